# SPDX-License-Identifier: BSD-3-Clause
"""Peers: which ranks of the group are alive, how far each one is, and the one failure on which all agree.

Data channels fail badly: gloo aborts the process when sizes differ, delivers stale rows or waits for minutes, and
shared memory never notices a dead peer. So ranks also keep small control connections (connect.py), which a thread in
each process watches. Every wait for data, and for the other ranks during construction, also checks them:

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
import logging
import mmap
import os
import selectors
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from switchgear.parallel import shared_memory
from switchgear.parallel.connect import Background, Mesh, connect, share
from switchgear.parallel.errors import (
    MORE_PHASES,
    PHASES,
    SETTLE_SECONDS,
    ExpertParallelError,
    Failure,
    explain_uncaught,
)
from switchgear.parallel.transport import Work

POLL_SECONDS = 0.02  # between checks of the control connections while waiting for data
PING_SECONDS = 0.15  # within which a process that is not stopped answers
COORDINATOR_SECONDS = 0.35  # within which a coordinator decides: a ping and some slack
CONNECT, BETWEEN = "connect", "between layers"
_PHASES = (CONNECT, BETWEEN, *PHASES, *MORE_PHASES)
_ENTRY = struct.Struct("<qq")  # of the board: step and phase number
_LONGEST_REASON = 1000  # characters; a message must fit into the buffer of a socket
_LONGEST_MESSAGE = 1 << 16
T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Peers:
    """The control connections of one rank of a group."""

    def __init__(
        self, rank: int, size: int, store: Any, timeout: float, host: str | None = None,
        lost: Callable[[], int] = lambda: -1,
    ) -> None:  # fmt: skip
        """store: a torch.distributed.Store of this group only, for the addresses; not used afterwards. lost: a rank
        that is known to be gone while the group connects; -1 for none.

        The group is then connected, but under construction until `constructed`: whatever is left to set up goes through
        `run`, which fails at the timeout that began here.
        """
        self.rank, self.size, self.timeout = rank, size, timeout
        self.step, self.done, self.phase, self.waiting = 0, -1, CONNECT, False
        self.failure: Failure | None = None
        self.has_decided = self.has_raised = False
        self.on_failure: list[Callable[[], None]] = []
        self._deadline: float | None = time.monotonic() + timeout
        self._decided = threading.Event()
        self._lock = threading.Lock()
        self._deciding = False
        self._dead: set[int] = set()
        self._ended: set[int] = set()  # dead ones whose connections were closed, on either side
        self._has_ended = False  # some connection on this side
        self._left: dict[int, int] = {}  # rank -> its last finished exchange
        self._pings: dict[int, float] = {}  # rank -> when it was pinged; removed by its answer
        self._states: dict[int, tuple[int, str, bool]] = {}  # the answers: step, phase, waiting
        self._sockets: dict[int, socket.socket] = {}
        self._send_locks = {peer: threading.Lock() for peer in range(size)}
        self._board = _Board(rank, size)
        self._closed = False
        try:
            mesh = self._connect(store, host, lost)
        except BaseException:
            self._board.close()
            raise
        self.hosts, self._sockets = mesh.machines, mesh.sockets
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(
            target=_watch,
            args=(weakref.ref(self), dict(self._sockets), self._woken),
            name="switchgear-peers",
            daemon=True,
        )
        self._thread.start()
        try:
            self._board.join(mesh.boards[0] if len(set(self.hosts)) == 1 else None)
            is_over = self.is_over()
            # Until all have mapped rank 0's board; it exists only while some process maps it.
            self.run(lambda: share(store, "ready", rank, size, "", is_over))
        except BaseException:
            self.close()
            raise

    # ---- construction ------------------------------------------------------------------------------------------------

    def _connect(self, store: Any, host: str | None, lost: Callable[[], int]) -> Mesh:
        """Connects to all ranks. Eager, so that a rank that never connects raises here, within the timeout."""
        mesh = Mesh()
        deadline = time.monotonic() + self._remaining()
        work = Background(
            lambda: connect(mesh, self.rank, self.size, store, host, deadline, self._board.address), Mesh.close
        )
        cause: Exception | None = None
        late = time.monotonic() + self._remaining() + PING_SECONDS  # longer than each step in it
        try:
            while time.monotonic() < late:
                if work.wait_for(POLL_SECONDS):
                    return work.result
                if (rank := lost()) >= 0:
                    work.give_up()
                    raise ExpertParallelError(Failure(rank, "died", CONNECT, 0))
        except ExpertParallelError:
            raise
        except (OSError, RuntimeError) as error:  # from sockets and stores
            cause = error
        except BaseException:
            work.give_up()
            raise
        work.give_up()
        reason = f"could not connect ({type(cause).__name__ if cause else 'the store does not answer'})"
        raise ExpertParallelError(Failure(mesh.awaited, "stalled", CONNECT, 0, reason)) from cause

    def is_over(self) -> Callable[[], bool]:
        """For a function of `run`: whether its result is no longer needed."""
        late = time.monotonic() + self._remaining() + 2.0
        return lambda: self._closed or self.failure is not None or time.monotonic() > late

    def _remaining(self) -> float:
        """Seconds until a rank that others wait for has stalled."""
        if self._deadline is None:
            return self.timeout
        # Enough for pings, so that the error names the right rank.
        return max(self._deadline - time.monotonic(), 4 * PING_SECONDS)

    def run(self, function: Callable[[], T], discard: Callable[[T], None] | None = None) -> T:
        """Runs a step that needs the other ranks and may block. If one of them fails meanwhile, or does not take part,
        raises ExpertParallelError and discards what the function returns later."""
        work = Background(function, discard)
        try:
            self.wait(work)
        except BaseException:
            work.give_up()
            raise
        return work.result

    def constructed(self) -> None:
        """From now on, the timeout counts for each wait."""
        explain_uncaught(self)
        self._deadline, self.done = None, 0
        self.enter(BETWEEN)

    # ---- called by the exchange --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Wraps one exchange. Reports whatever is raised inside to the others."""
        self.check()
        if self._closed:
            raise RuntimeError("ExpertParallel: it is closed")
        self.step += 1
        try:
            yield
        except ExpertParallelError:
            raise
        except BaseException as error:
            kind = "exited" if isinstance(error, SystemExit) else "raised"
            reason = "" if kind == "exited" else f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
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
            self.has_raised = True
            raise ExpertParallelError(self.failure)

    def settle(self) -> None:
        """After an error of another channel: until the ranks have agreed on the failure that it shows, if any."""
        self._decided.wait(SETTLE_SECONDS)

    def wait(self, work: Work) -> None:
        """Waits for the work; raises ExpertParallelError as soon as a rank knows that it will never finish."""
        begin, timeout = time.monotonic(), self._remaining()
        asked = False
        self.waiting = True
        try:
            while True:
                done = False
                try:
                    done = work.wait_for(POLL_SECONDS)
                except (OSError, RuntimeError) as error:  # from the transport or the store: usually a lost peer
                    self._report_lost(str(error).split("\n")[0][:_LONGEST_REASON])
                    if self.failure is None:
                        raise
                self.check()  # outside of the handler, whose error would be printed first
                if done:
                    return
                for peer, finished in list(self._left.items()):
                    if finished < self.step:
                        self.report(Failure(peer, "exited", self.phase, self.step))
                if self._is_cut_off():
                    self.report(Failure(self.rank, "lost", self.phase, self.step))
                elapsed = time.monotonic() - begin
                if not asked and elapsed > timeout - 2 * PING_SECONDS:
                    asked = True
                    self._ping()
                if elapsed > timeout:
                    self._report_stall()
        finally:
            self.waiting = False

    def finish(self) -> None:
        """Before an error that every rank finds by itself: this rank counts as done, not as lost, since the others may
        still be reading the data that shows the error."""
        self.done = self.step

    def fail(self, failure: Failure) -> None:
        """Adopts and raises a failure that every rank detects by itself. Nothing is aborted."""
        self.finish()
        with self._lock:
            if self.failure is None:
                self.failure = failure
        self.has_decided = self.rank == 0
        self._decided.set()
        self.check()

    def report(self, failure: Failure) -> None:
        """Reports to the coordinator and waits for its decision. Not on the watching thread."""
        if self._is_cut_off():  # whatever it has seen of others is wrong
            failure = Failure(self.rank, "lost", self.phase, self.step, "this process has closed its own connections")
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

    def gone(self, with_left: bool = True) -> set[int]:
        """Ranks that are known to be lost, or to have left."""
        failed = set() if self.failure is None else {self.failure.rank}
        return (self._dead | failed | (set(self._left) if with_left else set())) - {self.rank}

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
            try:
                connection.getsockname()
                connection.close()
            except OSError:  # somebody has closed its number, which another file may have by now
                connection.detach()
        self._board.close()

    # ---- verdicts ----------------------------------------------------------------------------------------------------

    def _decide(self, failure: Failure) -> None:
        """The coordinator's verdict; the first report wins."""
        with self._lock:
            if self._deciding or self.failure is not None:
                return
            self._deciding = self.has_decided = True
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
        _logger.error("%s", failure)
        for action in self.on_failure:
            with contextlib.suppress(Exception):
                action()
        self._decided.set()

    def _report_lost(self, reason: str) -> None:
        """After an error of the transport. A dead peer's report follows at once; a stopped one does not answer."""
        if self._decided.wait(0.25):
            return
        self._ping()
        if self._decided.wait(2 * PING_SECONDS):
            return
        silent = self._silent()
        failure = Failure(silent[0] if silent else self.rank, "stalled" if silent else "lost", self.phase, self.step,
                          "" if silent else reason)  # fmt: skip
        self.report(self._with_last_phase(failure) if silent else failure)

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
        order = {phase: number for number, phase in enumerate(_PHASES)}

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

    def _is_cut_off(self) -> bool:
        """Whether this process has closed connections that the other ranks hold open, as a daemon closes all files.
        Remembered, since a connection that both sides have closed does not tell which was first."""
        if not self._closed:
            self._has_ended = self._has_ended or any(map(_is_closed_here, self._sockets.values()))
        return self._has_ended

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _send(self, peer: int, **message: Any) -> bool:
        """False if it could not be sent. Messages are few and small, so a full buffer means a lost peer. To one that
        has ended its connection nothing is sent: the kernel's answer would hide from it that it was the first."""
        if peer in self._ended:
            return False
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

    def _hung_up(self, peer: int, has_ended: bool) -> None:
        """has_ended: the connection, not only what is understood of it."""
        if peer in self._left or self._closed:
            return
        self._dead.add(peer)
        if has_ended:
            self._ended.add(peer)
        self._is_cut_off()  # while the connection tells
        self._pings.pop(peer, None)
        failure = Failure(peer, "died", self.phase, self.step)
        if self.failure is None:
            self._in_background(self.report, failure)

    def _in_background(self, function: Callable[[Failure], None], failure: Failure) -> None:
        threading.Thread(target=function, args=(failure,), name="switchgear-verdict", daemon=True).start()


# TCP's states (tcp_states.h) of a connection that this side has ended: FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSING.
_ENDED_HERE = (4, 5, 6, 11)


def _is_closed_here(connection: socket.socket) -> bool:
    try:
        if not hasattr(socket, "TCP_INFO"):
            connection.getsockname()
            return False
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _ENDED_HERE
    except OSError:  # its number belongs to nothing, or to another file
        return True


class Outside:
    """Stands for the Peers of a process that is in no group."""

    def check(self, *_: object) -> None:
        raise ValueError("parallel: expected a process that has joined (switchgear.parallel.join), got one outside")

    exchange = enter = run = check

    def settle(self) -> None:
        pass

    def gone(self, with_left: bool = True) -> set[int]:
        return set()

    def close(self) -> None:
        pass


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
            try:
                for line in lines:
                    peers._received(key.data, json.loads(line))
                understood = len(pending[key.data]) <= _LONGEST_MESSAGE
            except (ValueError, KeyError, TypeError):
                understood = False
            if not data or not understood:
                selector.unregister(sockets[key.data])
                peers._hung_up(key.data, not data)
        del peers


class _Board:
    """Step and phase of each rank of one machine, in shared memory: shows what a killed process did last."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._bytes = rank, size * _ENTRY.size
        self._map: mmap.mmap | None = None
        self._file = -1
        self.address: shared_memory.Address | None = None
        if rank == 0 and hasattr(os, "memfd_create"):
            name = shared_memory.random_name("board")
            with contextlib.suppress(OSError):
                self._file, self._map = shared_memory.create(name, self._bytes)
                self.address = shared_memory.Address(os.getpid(), self._file, name)

    def join(self, address: list[Any] | None) -> None:
        """Maps rank 0's board, if there is one; without it, failures lack the phase."""
        if address is None:
            self._unmap()
        elif self._map is None:
            with contextlib.suppress(OSError, ValueError, TypeError):
                self._map = shared_memory.attach(shared_memory.Address(*address), self._bytes)
        self.write(0, CONNECT)

    def write(self, step: int, phase: str) -> None:
        if self._map is not None:
            number = _PHASES.index(phase) if phase in _PHASES else _PHASES.index(BETWEEN)
            _ENTRY.pack_into(self._map, self._rank * _ENTRY.size, step, number)

    def read(self, rank: int) -> tuple[int, str] | None:
        if self._map is None:
            return None
        step, number = _ENTRY.unpack_from(self._map, rank * _ENTRY.size)
        return step, _PHASES[number] if 0 <= number < len(_PHASES) else BETWEEN

    def _unmap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def close(self) -> None:
        self._unmap()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
