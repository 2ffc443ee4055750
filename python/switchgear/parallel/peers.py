# SPDX-License-Identifier: BSD-3-Clause
"""Peers: which ranks of the group are alive, how far each one is, and the one failure on which all agree.

Data channels fail badly: gloo aborts the process when sizes differ, delivers stale rows or waits for minutes, and
shared memory never notices a dead peer. So ranks also keep small control connections, a full mesh of TCP sockets that a
thread in each process watches. Every wait for data also checks them:

- A killed process closes its connections: the others know within a millisecond or two.
- A rank announces an error before it raises it. A rank that leaves sends a goodbye with its last finished exchange.
- A rank that waits longer than the timeout pings all ranks. A stopped process does not answer; if all do, the one that
  is furthest behind and not itself waiting has stalled.

A rank that detects a failure reports it to the coordinator, the lowest rank that answers. The coordinator broadcasts
its first verdict, so all raise the same error.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import selectors
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

from switchgear.parallel.errors import PHASES, ExpertParallelError, Failure

POLL_SECONDS = 0.02  # between checks of the control connections while waiting for data
PING_SECONDS = 0.15  # within which a process that is not stopped answers
COORDINATOR_SECONDS = 0.35  # within which a coordinator decides: a ping and some slack
BETWEEN = "between layers"
_ENTRY = struct.Struct("<qq")  # of the board: step and phase number


class Waitable(Protocol):
    def wait_for(self, seconds: float) -> bool:
        """Waits up to `seconds`; returns whether it is done. Raises the error if it failed."""
        ...


class Peers:
    """The control connections of one rank of a group."""

    def __init__(self, rank: int, size: int, store: Any, timeout: float, host: str | None = None) -> None:
        """store: a torch.distributed.Store of this group only, for the addresses; not used afterwards."""
        self.rank, self.size, self.timeout = rank, size, timeout
        self.step, self.done, self.phase, self.waiting = 0, 0, BETWEEN, False
        self.failure: Failure | None = None
        self.on_failure: list[Callable[[], None]] = []
        self._decided = threading.Event()
        self._lock = threading.Lock()
        self._deciding = False
        self._dead: set[int] = set()
        self._left: dict[int, int] = {}  # rank -> its last finished exchange
        self._pings: dict[int, float] = {}  # rank -> when it was pinged; removed by its answer
        self._states: dict[int, tuple[int, str, bool]] = {}  # the answers: step, phase, waiting
        self._sockets: dict[int, socket.socket] = {}
        self._send_locks = {peer: threading.Lock() for peer in range(size)}
        self._board = _Board(rank, size)
        self._closed = False
        self.hosts: list[str] = []
        self._connect(store, host)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(
            target=_watch,
            args=(weakref.ref(self), dict(self._sockets), self._woken),
            name="switchgear-peers",
            daemon=True,
        )
        self._thread.start()

    # ---- connecting --------------------------------------------------------------------------------------------------

    def _connect(self, store: Any, host: str | None) -> None:
        """Connects each rank to all lower ranks. Eager, so that a rank that never connects raises here, within the
        timeout."""
        deadline = time.monotonic() + self.timeout
        token = secrets.token_hex(16)
        with socket.create_server(("", 0), backlog=self.size) as server:
            address = {"host": host or _own_address(), "port": server.getsockname()[1], "token": token,
                       "machine": _machine(), "board": self._board.source}  # fmt: skip
            store.set(f"address/{self.rank}", json.dumps(address))
            addresses = [json.loads(_get(store, f"address/{peer}", peer, deadline)) for peer in range(self.size)]
            self.hosts = [entry["machine"] for entry in addresses]
            alone = len(set(self.hosts)) == 1
            for peer in range(self.rank):
                target = "127.0.0.1" if alone else addresses[peer]["host"]
                with _as_failure(peer):
                    connection = socket.create_connection(
                        (target, addresses[peer]["port"]), timeout=max(0.1, deadline - time.monotonic())
                    )
                    connection.sendall(f"{self.rank:8d}{addresses[peer]['token']}".encode())
                self._sockets[peer] = connection
            while len(self._sockets) < self.size - 1:
                missing = next(peer for peer in range(self.size) if peer not in self._sockets and peer != self.rank)
                with _as_failure(missing):
                    server.settimeout(max(0.1, deadline - time.monotonic()))
                    connection, _ = server.accept()
                    connection.settimeout(2.0)
                    greeting = _receive_exactly(connection, 40)
                if greeting is None or greeting[8:].decode(errors="replace") != token:
                    connection.close()  # from a stranger
                    continue
                self._sockets[int(greeting[:8])] = connection
        for connection in self._sockets.values():
            connection.setblocking(True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._board.join(addresses[0]["board"] if alone else None)
        # Wait until all have mapped rank 0's board; it exists only while some process maps it.
        store.set(f"ready/{self.rank}", "")
        for peer in range(self.size):
            _get(store, f"ready/{peer}", peer, deadline)

    # ---- called by the exchange --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Wraps one exchange. Reports whatever is raised inside to the others."""
        self.check()
        self.step += 1
        try:
            yield
        except ExpertParallelError:
            raise
        except BaseException as error:
            kind = "exited" if isinstance(error, SystemExit) else "raised"
            reason = "" if kind == "exited" else f"{type(error).__name__}: {error}"
            self.report(Failure(self.rank, kind, self.phase, self.step, reason))
            raise
        self.done = self.step
        self.enter(BETWEEN)

    def enter(self, phase: str) -> None:
        self.phase = phase
        self._board.write(self.step, phase)
        self.check()

    def check(self) -> None:
        if self.failure is not None:
            raise ExpertParallelError(self.failure)

    def wait(self, work: Waitable) -> None:
        """Waits for the work; raises ExpertParallelError as soon as a rank knows that it will never finish."""
        begin = time.monotonic()
        asked = False
        self.waiting = True
        try:
            while True:
                try:
                    done = work.wait_for(POLL_SECONDS)
                except Exception as error:  # from the transport: usually a lost peer, whose report follows at once
                    self._decided.wait(0.25)
                    if self.failure is None:
                        self.report(Failure(self.rank, "lost", self.phase, self.step, str(error).split("\n")[0]))
                    self.check()
                    raise
                self.check()
                if done:
                    return
                for peer, finished in list(self._left.items()):
                    if finished < self.step:
                        self.report(Failure(peer, "exited", self.phase, self.step))
                elapsed = time.monotonic() - begin
                if not asked and elapsed > self.timeout - 2 * PING_SECONDS:
                    asked = True
                    self._ping()
                if elapsed > self.timeout:
                    self._report_stall()
        finally:
            self.waiting = False

    def fail(self, failure: Failure) -> None:
        """Adopts and raises a failure that every rank detects by itself. Nothing is aborted, and this rank counts as
        done: the others may still be reading the data that shows it."""
        self.done = self.step
        with self._lock:
            if self.failure is None:
                self.failure = failure
        self._decided.set()
        self.check()

    def report(self, failure: Failure) -> None:
        """Reports to the coordinator and waits for its decision. Not on the watching thread."""
        silent = set(self._silent())
        while self.failure is None:
            gone = self._dead | set(self._left) | silent
            coordinator = min(peer for peer in range(self.size) if peer not in gone)
            if coordinator == self.rank:
                self._decide(failure)
                self._decided.wait()
            elif not self._send(coordinator, kind="report", failure=failure.to_dict()) or not self._decided.wait(
                COORDINATOR_SECONDS
            ):
                silent.add(coordinator)

    def close(self) -> None:
        """Sends a goodbye. Ranks that still need this one fail; the others continue."""
        if self._closed:
            return
        self._closed = True
        for peer in self._sockets:
            self._send(peer, kind="bye", done=self.done)
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join(2.0)
        for connection in (*self._sockets.values(), self._wake, self._woken):
            connection.close()
        self._board.close()

    # ---- verdicts ----------------------------------------------------------------------------------------------------

    def _decide(self, failure: Failure) -> None:
        """The coordinator's verdict; the first report wins."""
        with self._lock:
            if self._deciding or self.failure is not None:
                return
            self._deciding = True
        if failure.kind == "stalled" and failure.rank < 0:
            failure = self._find_stalled(failure)
        elif failure.kind == "died":
            failure = self._with_last_phase(failure)
        for peer in self._sockets:
            self._send(peer, kind="verdict", failure=failure.to_dict())
        self._adopt(failure)

    def _adopt(self, failure: Failure) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        for action in self.on_failure:
            with contextlib.suppress(Exception):
                action()
        self._decided.set()

    def _report_stall(self) -> None:
        silent = self._silent()
        if silent:
            self.report(self._with_last_phase(Failure(silent[0], "stalled", self.phase, self.step)))
        else:
            self.report(Failure(-1, "stalled", self.phase, self.step))

    def _find_stalled(self, failure: Failure) -> Failure:
        """Pings all ranks. Returns the lowest rank that does not answer, or else the one that is furthest behind."""
        self._ping()
        deadline = time.monotonic() + PING_SECONDS
        while self._pings and time.monotonic() < deadline:
            time.sleep(0.005)
        if self._pings:
            return self._with_last_phase(Failure(min(self._pings), "stalled", failure.phase, failure.step))
        states = dict(self._states)
        states[self.rank] = (self.step, self.phase, self.waiting)
        order = {phase: number for number, phase in enumerate((BETWEEN, *PHASES))}

        def behind(peer: int) -> tuple[int, int, bool, int]:
            step, phase, waiting = states[peer]
            # Between layers, `step` is finished: such a rank is ahead of one in step, behind one in step + 1.
            return (2 * step + (phase == BETWEEN), order.get(phase, 0), waiting, peer)

        rank = min(states, key=behind)
        step, phase, _ = states[rank]
        return Failure(rank, "stalled", phase, step)

    def _with_last_phase(self, failure: Failure) -> Failure:
        """Adds what the board recorded, if there is one: a lost rank cannot report its phase."""
        last = self._board.read(failure.rank)
        if last is None:
            return failure
        return Failure(failure.rank, failure.kind, last[1], last[0], failure.reason)

    def _silent(self) -> list[int]:
        """Ranks whose answer to a ping is overdue."""
        latest = time.monotonic() - PING_SECONDS
        return sorted(peer for peer, asked in list(self._pings.items()) if asked < latest and peer not in self._dead)

    def _ping(self) -> None:
        now = time.monotonic()
        for peer in self._sockets:
            if peer not in self._dead and peer not in self._left:
                self._pings.setdefault(peer, now)
                self._send(peer, kind="ping")

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _send(self, peer: int, **message: Any) -> bool:
        """False if it could not be sent. Messages are few and small, so a full buffer means a lost peer."""
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._send_locks[peer]:
                return self._sockets[peer].send(data, socket.MSG_DONTWAIT) == len(data)
        except OSError:
            return False

    def _received(self, peer: int, message: dict[str, Any]) -> None:
        """Runs on the watching thread: must not block."""
        kind = message["kind"]
        if kind == "ping":
            self._send(peer, kind="pong", step=self.step, phase=self.phase, waiting=self.waiting)
        elif kind == "pong":
            self._states[peer] = (message["step"], message["phase"], message["waiting"])
            self._pings.pop(peer, None)
        elif kind == "bye":
            self._left[peer] = message["done"]
        elif kind == "verdict":
            self._adopt(Failure(**message["failure"]))
        elif kind == "report":
            self._in_background(self._decide, Failure(**message["failure"]))

    def _hung_up(self, peer: int) -> None:
        if peer in self._left or self._closed:
            return
        self._dead.add(peer)
        self._pings.pop(peer, None)
        failure = Failure(peer, "died", self.phase, self.step)
        if self.failure is None:
            self._in_background(self.report, failure)

    def _in_background(self, function: Callable[[Failure], None], failure: Failure) -> None:
        threading.Thread(target=function, args=(failure,), name="switchgear-verdict", daemon=True).start()


def _watch(reference: weakref.ref[Peers], sockets: dict[int, socket.socket], woken: socket.socket) -> None:
    """The watching thread. It holds no reference to its Peers while it waits, so that they can be collected."""
    selector = selectors.DefaultSelector()
    selector.register(woken, selectors.EVENT_READ, None)
    pending: dict[int, bytes] = {}
    for peer, connection in sockets.items():
        selector.register(connection, selectors.EVENT_READ, peer)
        pending[peer] = b""
    while True:
        ready = [key for key, _ in selector.select()]
        peers = reference()
        if peers is None or any(key.data is None for key in ready):
            selector.close()
            return
        for key in ready:
            try:
                data = sockets[key.data].recv(65536)
            except OSError:
                data = b""
            *lines, pending[key.data] = (pending[key.data] + data).split(b"\n")
            for line in lines:
                peers._received(key.data, json.loads(line))
            if not data:
                selector.unregister(sockets[key.data])
                peers._hung_up(key.data)
        del peers


class _Board:
    """Step and phase of each rank of one machine, in shared memory: shows what a killed process did last.

    The memory has no name in any file system, so nothing is left behind.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._bytes = rank, size * _ENTRY.size
        self._map: mmap.mmap | None = None
        self._file = -1
        self.source = ""
        if rank == 0 and hasattr(os, "memfd_create"):
            self._file = os.memfd_create("switchgear-board")
            os.ftruncate(self._file, self._bytes)
            self.source = f"/proc/{os.getpid()}/fd/{self._file}"

    def join(self, source: str | None) -> None:
        if source:
            with contextlib.suppress(OSError):
                file = os.open(source, os.O_RDWR)
                self._map = mmap.mmap(file, self._bytes)
                os.close(file)
            self.write(0, BETWEEN)

    def write(self, step: int, phase: str) -> None:
        if self._map is not None:
            number = PHASES.index(phase) if phase in PHASES else -1
            _ENTRY.pack_into(self._map, self._rank * _ENTRY.size, step, number)

    def read(self, rank: int) -> tuple[int, str] | None:
        if self._map is None:
            return None
        step, number = _ENTRY.unpack_from(self._map, rank * _ENTRY.size)
        return step, PHASES[number] if number >= 0 else BETWEEN

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


# ---- addresses -------------------------------------------------------------------------------------------------------


def _get(store: Any, key: str, peer: int, deadline: float) -> str:
    with _as_failure(peer):
        store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        return bytes(store.get(key)).decode()


@contextlib.contextmanager
def _as_failure(peer: int) -> Iterator[None]:
    """Converts errors inside to a failure: this rank never connected."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # from sockets and stores
        reason = f"could not connect ({type(error).__name__})"
        raise ExpertParallelError(Failure(peer, "stalled", "connect", 0, reason)) from error


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        try:
            part = connection.recv(count - len(data))
        except OSError:
            return None
        if not part:
            return None
        data += part
    return data


def _machine() -> str:
    """Equal for processes that can share memory: same boot and same PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _own_address() -> str:
    """The address of this machine as others see it: on the route to MASTER_ADDR, or of the host name."""
    master = os.environ.get("MASTER_ADDR", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master or socket.gethostname(), 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()
