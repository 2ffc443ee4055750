# SPDX-License-Identifier: BSD-3-Clause
"""The control connections between all ranks of a group: TCP sockets, set up through a store of torch.distributed.

A rank listens only while the group connects, and only on the interface that the group uses: loopback if all ranks share
it. Each connection begins with a greeting, the sender's rank and the listener's secret. Only readers of the store know
the secret. Strangers can still open connections, so greetings are read side by side and each has a deadline: slow bytes
delay no rank.

Steps that may block run on a thread of their own, so that the caller can give up in time. A store of torch.distributed
may live in a process that is stopped, and gloo connects in one blocking call. Neither can be interrupted. A step that
was given up ends by itself, at the latest at the timeout of the store or of gloo, and what it made is discarded.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

# ---- Steps that may block --------------------------------------------------------------------------------------------


T = TypeVar("T")
_LONGEST_PAUSE = 0.05


class Background(Generic[T]):
    """Runs a function on a thread. Waitable; `result` holds what it returned once the wait is over."""

    result: T

    def __init__(self, function: Callable[[], T], discard: Callable[[T], None] | None = None) -> None:
        self._function, self._discard = function, discard
        self._error: BaseException | None = None
        self._given_up = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="switchgear-connect", daemon=True).start()

    def _run(self) -> None:
        try:
            result = self._function()
        except BaseException as error:
            self._error = error
        else:
            with self._lock:
                self.result = result
                if self._given_up and self._discard is not None:
                    self._discard(result)
        self._ended.set()

    def wait_for(self, seconds: float) -> bool:
        if not self._ended.wait(seconds):
            return False
        if self._error is not None:
            raise self._error
        return True

    def give_up(self) -> None:
        """What the function returns, now or later, is discarded."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
            if self._discard is not None and hasattr(self, "result"):
                self._discard(self.result)


def get(store: Any, key: str, is_over: Callable[[], bool]) -> str:
    """The value of a key. Asks again and again, since a client of a store that waits blocks all its other users.

    Raises:
        TimeoutError: is_over() became true before the key was set.
    """
    pause = 1e-3
    while not store.check([key]):
        if is_over():
            raise TimeoutError(f"{key} was not set")
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
    return bytes(store.get(key)).decode()


def share(store: Any, key: str, rank: int, size: int, value: str, is_over: Callable[[], bool]) -> list[str]:
    """The values of all ranks under a key. Raises TimeoutError as `get`."""
    store.set(f"{key}/{rank}", value)
    return [get(store, f"{key}/{peer}", is_over) for peer in range(size)]


def never() -> bool:
    return False


def own_client(store: Any) -> Any:
    """A client of the same store for one user that may block, or the store itself if it has none."""
    with contextlib.suppress(Exception):
        return store.clone()
    return store


# ---- Connections -----------------------------------------------------------------------------------------------------


_GREETING = struct.Struct("<q32s")  # rank and secret
_GREETING_SECONDS = 2.0
_MOST_STRANGERS = 128  # connections without a greeting; beyond these the oldest is closed


@dataclass
class Mesh:
    """The connections so far. `awaited` is the rank whose turn it is, for the error if nothing comes."""

    sockets: dict[int, socket.socket] = field(default_factory=dict)
    machines: list[str] = field(default_factory=list)
    boards: list[Any] = field(default_factory=list)
    awaited: int = 0

    def close(self) -> None:
        for connection in self.sockets.values():
            connection.close()
        self.sockets.clear()


def connect(mesh: Mesh, rank: int, size: int, store: Any, host: str | None, deadline: float, board: Any) -> Mesh:
    """Connects to all lower ranks and accepts all higher ones. board: told to all ranks.

    Raises:
        OSError: a rank, mesh.awaited, could not be reached; TimeoutError: it did not come.
        ValueError: host is not an address of this machine.
    """
    try:
        _connect(mesh, rank, size, store, host, deadline, board)
    except BaseException:
        mesh.close()
        raise
    return mesh


def _connect(mesh: Mesh, rank: int, size: int, store: Any, host: str | None, deadline: float, board: Any) -> None:
    here = {"machine": _identify("pid"), "network": _identify("net"), "board": board}
    store.set(f"machine/{rank}", json.dumps(here))
    there = [json.loads(_get(mesh, store, "machine", peer, deadline)) for peer in range(size)]
    mesh.machines, mesh.boards = [entry["machine"] for entry in there], [entry["board"] for entry in there]
    if size == 1:
        return
    alone = len({entry["network"] for entry in there}) == 1
    with _listen("127.0.0.1" if alone else host or own_address(), size) as server:
        address, port = server.getsockname()[:2]
        secret = secrets.token_hex(16)
        store.set(f"address/{rank}", json.dumps([address, port, secret]))
        for peer in range(rank):
            address, port, theirs = json.loads(_get(mesh, store, "address", peer, deadline))
            connection = socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic()))
            mesh.sockets[peer] = connection
            connection.sendall(_GREETING.pack(rank, theirs.encode()))
        accept(server, mesh, set(range(rank + 1, size)), secret, deadline)
    for connection in mesh.sockets.values():
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def accept(server: socket.socket, mesh: Mesh, wanted: set[int], secret: str, deadline: float) -> None:
    """Accepts connections into mesh.sockets until each wanted rank has greeted with the secret, once."""
    greetings: dict[socket.socket, tuple[bytes, float]] = {}  # what has arrived, and until when; the oldest first
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)

        def forget(connection: socket.socket) -> None:
            selector.unregister(connection)
            del greetings[connection]

        try:
            while missing := wanted - mesh.sockets.keys():
                mesh.awaited = min(missing)
                now = time.monotonic()
                if now > deadline:
                    raise TimeoutError(f"rank {mesh.awaited} did not connect")
                overdue = [connection for connection, (_, until) in greetings.items() if until < now]
                for connection in (*overdue, *list(greetings)[len(overdue) : len(greetings) - _MOST_STRANGERS]):
                    forget(connection)
                    connection.close()
                for key, _ in selector.select(min(0.1, deadline - now)):
                    if key.fileobj is server:
                        with contextlib.suppress(OSError):
                            connection, _ = server.accept()
                            connection.setblocking(False)
                            greetings[connection] = (b"", now + _GREETING_SECONDS)
                            selector.register(connection, selectors.EVENT_READ)
                        continue
                    connection = key.fileobj  # type: ignore[assignment]
                    text, until = greetings[connection]
                    part = _receive(connection, _GREETING.size - len(text))
                    greetings[connection] = (text + part, until)
                    if part and len(text + part) < _GREETING.size:
                        continue
                    forget(connection)
                    peer = _rank_of(text + part, secret)
                    if peer in wanted and peer not in mesh.sockets:
                        mesh.sockets[peer] = connection
                    else:
                        connection.close()  # not from a rank
        finally:
            for connection in greetings:
                connection.close()


def _receive(connection: socket.socket, count: int) -> bytes:
    with contextlib.suppress(OSError):
        return connection.recv(count)
    return b""


def _rank_of(greeting: bytes, secret: str) -> int:
    """-1 if the sender is no rank."""
    if len(greeting) < _GREETING.size:
        return -1
    rank, given = _GREETING.unpack(greeting)
    return int(rank) if hmac.compare_digest(given, secret.encode()) else -1


def _get(mesh: Mesh, store: Any, key: str, peer: int, deadline: float) -> str:
    mesh.awaited = peer
    return get(store, f"{key}/{peer}", lambda: time.monotonic() > deadline)


# ---- addresses -------------------------------------------------------------------------------------------------------


def _listen(address: str, backlog: int) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(where[0]).is_unspecified:
            raise OSError("it means all interfaces")
        return socket.create_server(where[:2], family=family, backlog=max(128, backlog))
    except OSError as error:
        raise ValueError(f"host: expected an address of this machine, got {address!r}: {error}") from error


def _identify(namespace: str) -> str:
    """Equal for processes of the same boot in the same namespace: "pid", they can share memory; "net", they can connect
    over loopback."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat(f'/proc/self/ns/{namespace}').st_ino}"
    except OSError:
        return socket.gethostname()


def own_address() -> str:
    """The address of this machine as others see it: on the route to MASTER_ADDR, or of the host name."""
    master = os.environ.get("MASTER_ADDR", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master or socket.gethostname(), 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()
