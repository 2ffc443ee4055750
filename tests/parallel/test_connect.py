# SPDX-License-Identifier: BSD-3-Clause
"""Construction of an ExpertParallel: each step fails in time with the one error, whatever others do."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from parallel_pool import Pool
from torch.distributed import HashStore

import switchgear
from errors import raises
from switchgear.parallel import ExpertParallel, ExpertParallelError, connect, group, shared_memory
from switchgear.parallel.errors import Failure
from switchgear.parallel.peers import Peers

LONG = 60.0  # a timeout that no test waits for


def files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# ---- a rank is lost while the others construct -----------------------------------------------------------------------


def misbehave(fault: str) -> None:
    if fault == "raise":
        raise ArithmeticError("planted")
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def construct(rank: int, culprit: int, fault: str, step: str, transport: str) -> Any:
    before = files()
    if rank == culprit:
        if step == "tokens":
            ExpertParallel._find_twins = lambda *_: misbehave(fault)  # type: ignore[assignment, method-assign]
        else:
            group.open_on_host = lambda *_: misbehave(fault)  # type: ignore[assignment, return-value]
    timeout = 2.0 if fault == "stop" else LONG
    try:
        ExpertParallel(timeout=timeout, transport=transport)
    except ExpertParallelError as error:
        failure = error.failure
    except ArithmeticError:
        return "own"
    if transport == "gloo" and step == "transport" and timeout == LONG:
        return failure, 0  # gloo cannot be interrupted, and connects until its timeout
    # The group is unusable, and has closed all its files. A step that was given up may need a moment to end.
    end = time.monotonic() + 20
    while files() > before and time.monotonic() < end:
        time.sleep(0.05)
    return failure, files() - before


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
@pytest.mark.parametrize(
    ("culprit", "fault", "step"),
    [(0, "stop", "tokens"), (1, "stop", "transport"), (1, "kill", "tokens"), (0, "kill", "transport"),
     (0, "raise", "tokens"), (1, "raise", "transport")],
)  # fmt: skip
@pytest.mark.some(4)
def test_a_rank_is_lost(culprit: int, fault: str, step: str, transport: str) -> None:
    pool = Pool(2)
    try:
        pool.start(construct, culprit, fault, step, transport)
        ((failure, grown),) = pool.results([1 - culprit], timeout=50)
    finally:
        pool.close()
    kind = {"kill": "died", "stop": "stalled", "raise": "exited"}[fault]
    assert (failure.rank, failure.kind, failure.phase, failure.step) == (culprit, kind, "connect", 0)
    assert grown <= 0


class SilentStore:
    """A store whose process is stopped: requests get no answer."""

    def __init__(self) -> None:
        self._never = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: (self._never.wait(LONG), None)[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": float("inf")}, ValueError, "timeout"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"timeout": "x"}, TypeError, "timeout"),
        ({"timeout": True}, TypeError, "timeout"),
        ({"placement": 5}, TypeError, "placement"),
        ({"link": 5}, TypeError, "link"),
        ({"store": 5}, TypeError, "store"),
        ({"invariant": "no"}, TypeError, "invariant"),
        ({"average_gradients": 1}, TypeError, "average_gradients"),
        ({"num_chunks": True}, TypeError, "num_chunks"),
        ({"capacity": True}, TypeError, "capacity"),
        ({"capacity": 2.0}, TypeError, "capacity"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        ExpertParallel(**options)


@pytest.mark.parametrize("capacity", [None, np.int64(4)])
def test_a_closed_group_computes_no_more(capacity: Any) -> None:
    with ExpertParallel(capacity=capacity) as parallel:
        layer = switchgear.MoE(8, 4, num_experts=2, top_k=1, parallel=parallel)
        y = layer(torch.randn(3, 8))
    with raises(RuntimeError, "ExpertParallel"):
        layer(torch.randn(3, 8))
    with raises(RuntimeError, "ExpertParallel"):
        y.sum().backward()


def test_a_store_that_does_not_answer() -> None:
    before = files()
    with raises(ExpertParallelError):
        Peers(0, 2, SilentStore(), timeout=0.2)
    assert files() == before


def test_a_store_that_fails() -> None:
    class Failing:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("connection reset")

    before = files()
    with raises(ExpertParallelError):
        Peers(0, 2, Failing(), timeout=0.2)
    assert files() == before


# ---- strangers -------------------------------------------------------------------------------------------------------


@contextmanager
def listening(wanted: set[int], secret: str, deadline: float = LONG) -> Iterator[tuple[Any, connect.Mesh, Any]]:
    """A rank that accepts connections, as (address, its mesh, wait for it to end)."""
    mesh = connect.Mesh()
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        address = server.getsockname()
        end = time.monotonic() + deadline
        thread = threading.Thread(target=connect.accept, args=(server, mesh, wanted, secret, end), daemon=True)
        thread.start()

        def ends() -> bool:
            thread.join(30)
            return not thread.is_alive()

        yield address, mesh, ends
        mesh.close()


def greet(address: Any, rank: int, secret: str) -> socket.socket:
    connection = socket.create_connection(address, timeout=20)
    connection.sendall(connect._GREETING.pack(rank, secret.encode()))
    return connection


def test_slow_strangers_delay_no_rank() -> None:
    secret = "s" * 32
    with listening({1}, secret) as (address, mesh, ends):
        strangers = [socket.create_connection(address) for _ in range(40)]
        for stranger in strangers:
            stranger.send(b"\x01")  # and nothing more, without closing
        with greet(address, 1, secret):
            assert ends()
            assert set(mesh.sockets) == {1}
        assert all(stranger.recv(1) == b"" for stranger in strangers)


def test_a_greeting_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_GREETING_SECONDS", 0.1)
    with listening({1}, "s" * 32) as (address, _, ends), socket.create_connection(address, timeout=20) as stranger:
        stranger.send(b"\x01")
        assert stranger.recv(1) == b""
        with greet(address, 1, "s" * 32):
            assert ends()


def test_a_flood_of_strangers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are closed, without waiting for their deadline. A rank that greets still gets in."""
    monkeypatch.setattr(connect, "_GREETING_SECONDS", LONG)
    before = files()
    with listening({1}, "s" * 32) as (address, _, ends):
        strangers = [socket.create_connection(address, timeout=20) for _ in range(300)]
        assert all(stranger.recv(1) == b"" for stranger in strangers[: 300 - connect._MOST_STRANGERS])
        with greet(address, 1, "s" * 32):
            assert ends()
        for stranger in strangers:
            stranger.close()
    assert files() <= before


@pytest.mark.parametrize(
    ("rank", "secret"),
    [(1, "t" * 32), (0, "s" * 32), (3, "s" * 32), (-1, "s" * 32), (2**62, "s" * 32), (1, "\0" * 32)],
)
def test_strangers_are_refused(rank: int, secret: str) -> None:
    """A wrong secret, or a rank that is not expected."""
    with listening({1, 2}, "s" * 32) as (address, mesh, ends):
        with greet(address, rank, secret) as stranger:
            assert stranger.recv(1) == b""
        assert not mesh.sockets
        with greet(address, 1, "s" * 32) as first:
            while 1 not in mesh.sockets:
                time.sleep(0.001)
            with greet(address, 1, "s" * 32) as second:  # once only
                assert second.recv(1) == b""
            assert mesh.sockets[1].getpeername() == first.getsockname()
            with greet(address, 2, "s" * 32):
                assert ends()
        assert set(mesh.sockets) == {1, 2}


def make_peers(size: int, **options: Any) -> list[Any]:
    """Peers in threads of this process, or the errors that they raised."""
    store, made = HashStore(), [None] * size

    def make(rank: int) -> None:
        try:
            made[rank] = Peers(rank, size, store, 10.0, **options)  # type: ignore[call-overload]
        except Exception as error:
            made[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_it_listens_on_one_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback if all ranks share it, else the address of this machine. Never all interfaces."""
    addresses: list[str] = []
    create = socket.create_server

    def recorded(address: Any, **options: Any) -> socket.socket:
        addresses.append(address[0])
        return create(address, **options)

    monkeypatch.setattr(socket, "create_server", recorded)
    for peers in make_peers(2):
        peers.close()
    assert set(addresses) == {"127.0.0.1"}
    addresses.clear()
    networks = iter("ab")
    monkeypatch.setattr(connect, "_identify", lambda namespace: next(networks) if namespace == "net" else "here")
    for peers in make_peers(2, host="127.0.0.2"):
        peers.close()
    assert set(addresses) == {"127.0.0.2"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", ""])
def test_a_host_that_is_not_an_address_of_this_machine(host: str) -> None:
    with raises(ValueError, "host"):
        connect._listen(host, 1)


@pytest.mark.parametrize(
    "data", [b"{}\n", b"[1]\n", b"\xff\n", b'{"kind": "verdict", "failure": {}}\n', b"x" * 100_000]
)
def test_a_peer_that_sends_nonsense_is_gone(data: bytes) -> None:
    first, second = make_peers(2)
    second._sockets[0].sendall(data)
    assert first._decided.wait(20)
    assert (first.failure.rank, first.failure.kind) == (1, "died")
    first.close()
    second.close()


class Endless:
    def wait_for(self, seconds: float) -> bool:
        time.sleep(seconds)
        return False


End = Callable[[socket.socket], object]
ENDS: list[End] = [
    socket.socket.close, lambda s: os.close(s.fileno()), lambda s: s.shutdown(socket.SHUT_RDWR)
]  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_closes_its_own_connections_is_to_blame(
    culprit: int, end: Callable[[socket.socket], object]
) -> None:
    """For itself, too, and as soon as it waits for others."""
    peers = make_peers(2)
    end(peers[culprit]._sockets[1 - culprit])
    for each in peers:
        with pytest.raises(ExpertParallelError) as error:
            each.wait(Endless())
        assert error.value.rank == culprit
    assert [each._is_cut_off() for each in peers] == [rank == culprit for rank in range(2)]  # it is remembered
    for each in peers:
        each.close()


class Broken:
    def wait_for(self, seconds: float) -> bool:
        raise RuntimeError("timed out")


@pytest.mark.parametrize(("answers", "kind"), [(False, "stalled"), (True, "lost")])
def test_a_transport_that_fails_beside_a_silent_rank(answers: bool, kind: str) -> None:
    """The rank that does not answer is to blame, else the one whose transport failed."""
    first, second = make_peers(2)
    if not answers:
        second._received = lambda *_: None
    with pytest.raises(ExpertParallelError) as error:
        first.wait(Broken())
    assert (error.value.rank, error.value.kind) == (0 if answers else 1, kind)
    second._received = Peers._received.__get__(second)
    first.close()
    second.close()


def wordy(rank: int) -> Failure:
    def waits(parallel: ExpertParallel) -> None:
        with parallel.peers.exchange():
            if rank == 1:
                raise ArithmeticError("x" * 10**7)  # more than fits into the buffer of a connection
            parallel.peers.wait(_Never())

    with ExpertParallel(timeout=20) as parallel, pytest.raises((ExpertParallelError, ArithmeticError)):
        waits(parallel)
    assert parallel.peers.failure is not None
    return parallel.peers.failure


class _Never:
    def wait_for(self, seconds: float) -> bool:
        time.sleep(seconds)
        return False


def test_a_long_reason_is_cut(pool: Pool) -> None:
    failures = set(pool.run(wordy))
    assert len(failures) == 1
    failure = failures.pop()
    assert (failure.rank, failure.kind) == (1, "raised")
    assert failure.reason.startswith("ArithmeticError: xxx")
    assert len(failure.reason) <= 1000


# ---- shared memory ---------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not shared_memory.available(), reason="needs Linux on x86-64")


@linux
def test_a_segment_of_another_name_or_kind_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process number that was given to another process, whose file has the same number; and worse."""
    name = shared_memory.random_name("test")
    file, memory = shared_memory.create(name, 4096)
    there = shared_memory.Address(os.getpid(), file, name)
    mapped = shared_memory.attach(there, 4096)
    mapped[0] = 7
    assert memory[0] == 7
    with raises(ValueError, "segment"):
        shared_memory.attach(there, 8192)
    with raises(ValueError, "segment"):
        shared_memory.attach(there._replace(name=shared_memory.random_name("test")), 4096)
    with raises(OSError):
        os.ftruncate(file, 100)
    plain = tmp_path / f"memfd:{name} (deleted)"
    plain.write_bytes(bytes(4096))
    with open(plain, "r+b") as opened, raises(ValueError, "segment"):
        shared_memory.attach(there._replace(file=opened.fileno()), 4096)
    unsealed = os.memfd_create(name)
    os.ftruncate(unsealed, 4096)
    with raises(ValueError):
        shared_memory.attach(there._replace(file=unsealed), 4096)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with raises(ValueError):
        shared_memory.attach(there, 4096)
    with raises(ValueError):
        shared_memory.attach(shared_memory.Address("../../etc/passwd", 0, name), 4096)  # type: ignore[arg-type]
    for descriptor in (file, unsealed):
        os.close(descriptor)


def no_segments(rank: int, culprit: int, transport: str) -> Any:
    """One rank cannot open the segments of another."""
    attach, before = shared_memory.attach, files()

    def refuse(address: shared_memory.Address, size: int) -> Any:
        if size > 4096 and rank == culprit:  # not the board of Peers
            raise PermissionError("planted")
        return attach(address, size)

    shared_memory.attach = refuse
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with ExpertParallel(timeout=30, transport=transport) as parallel:
                moe = switchgear.MoE(16, 8, 8, 2, parallel=parallel)
                moe(torch.randn(5, 16)).sum().backward()
                used = type(parallel._transports["cpu"]).__name__
        return used, [str(entry.message) for entry in caught if "shared memory" in str(entry.message)], None
    except ValueError as error:
        return None, str(error), files() - before
    finally:
        shared_memory.attach = attach


@linux
def test_without_shared_memory_auto_means_gloo(pool: Pool) -> None:
    message = "rows are sent by gloo, since shared memory cannot be opened: rank 2: PermissionError: planted"
    assert pool.run(no_segments, 2, "auto") == 4 * [("GlooTransport", [message], None)]


@linux
def test_without_shared_memory_it_cannot_be_requested(pool: Pool) -> None:
    message = "transport: expected 'gloo' or 'auto', shared memory cannot be opened: rank 0: PermissionError: planted"
    assert pool.run(no_segments, 0, "shared_memory") == 4 * [(None, message, 0)]


def tight(rank: int) -> float:
    """The user's own store keeps its timeout."""
    store = torch.distributed.distributed_c10d._get_default_store()
    before = store.timeout
    ExpertParallel(timeout=10, transport="gloo").close()
    return float((store.timeout - before).total_seconds())


def test_the_timeout_of_the_store_is_not_changed(pool: Pool) -> None:
    assert pool.run(tight) == [0.0] * 4
