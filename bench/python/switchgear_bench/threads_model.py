# SPDX-License-Identifier: BSD-3-Clause
"""How a layer scales, on paper: its recorded tasks, scheduled for more threads and memory nodes in simulated time.

A call is recorded on one core with its work cut for P threads: each task of each parallel loop, with its seconds and
the bytes of weights that it reads or writes. csrc/cpu/simulation.cpp then schedules the tasks by the rules of
csrc/cpu/threads.h. The rest of a call is serial.

Assumed, not measured: the memory of a socket and the links between sockets (Machine), and what a loop costs to start
and join beyond two threads (FORK_PER_THREAD). Cores are those of this machine (Cores): caches, clock and the rate at
which one core reads. Not modelled: the clock at many busy cores, L3 that cores share, and contention for the counters
of a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from switchgear import _C
from switchgear.ops.native import host

FORK_PER_THREAD = 0.1e-6  # seconds that each thread beyond the second adds to the start and the end of a loop
SOCKET_BANDWIDTH = 380e9  # bytes/s: twelve channels of DDR5-4800 have 461, of which plain reads get some 82 %
LINK_BANDWIDTH = 150e9  # bytes/s from one socket to another, in one direction
PLACEMENTS = ("first node", "interleaved", "local")


class Machine(NamedTuple):
    """A machine to simulate. Nodes of a socket share its memory channels equally."""

    threads: int
    nodes: int = 1
    sockets: int = 1
    placement: str = "interleaved"
    node_bandwidth: float = SOCKET_BANDWIDTH
    link_bandwidth: float = LINK_BANDWIDTH

    @property
    def bandwidth(self) -> float:
        return self.nodes * self.node_bandwidth

    @property
    def name(self) -> str:
        if self.nodes == 1:
            return f"{self.threads} threads, 1 node"
        where = f"{self.nodes} nodes in {self.sockets} socket{'s' * (self.sockets > 1)}"
        return f"{self.threads} threads, {where}, {self.placement}"


def machine(threads: int, nodes: int = 1, sockets: int = 1, placement: str = "interleaved") -> Machine:
    return Machine(threads, nodes, sockets, placement, SOCKET_BANDWIDTH * sockets / nodes)


MACHINES = (
    *(machine(threads) for threads in (2, 8, 16, 32, 64)),
    *(machine(64, 4, 1, placement) for placement in PLACEMENTS),
    *(machine(64, 2, 2, placement) for placement in PLACEMENTS),
    *(machine(128, 2, 2, placement) for placement in PLACEMENTS),
    *(machine(128, 8, 2, placement) for placement in PLACEMENTS),
)


class Work(NamedTuple):
    """A recorded task."""

    seconds: float
    expert: int  # -1: several, or none
    rows: int
    bytes: int


@dataclass(frozen=True)
class Loop:
    name: str
    in_shares: bool
    threads: int
    tasks: tuple[Work, ...]

    @property
    def seconds(self) -> float:
        return sum(task.seconds for task in self.tasks)

    @property
    def bytes(self) -> int:
        return sum(task.bytes for task in self.tasks)


@dataclass(frozen=True)
class Recording:
    """A call on one core, cut for `threads`."""

    threads: int
    loops: tuple[Loop, ...]
    serial: float  # seconds outside the loops

    @property
    def seconds(self) -> float:
        return self.serial + sum(loop.seconds for loop in self.loops)

    @property
    def bytes(self) -> int:
        return sum(loop.bytes for loop in self.loops)


@contextmanager
def cut_for(threads: int) -> Iterator[None]:
    """Calls within are cut for `threads`, which only a recording runs on one."""
    before = host.execution
    host.execution = lambda: threads
    try:
        yield
    finally:
        host.execution = before


def record(call: Callable[[int], object], threads: int, repeats: int, routings: int = 1) -> Recording:
    """The medians of some recordings of call 0. Calls 1 to routings - 1 before each evict its weights. One round before
    all warms up, if there are several."""
    with cut_for(threads):
        rounds = [[_C.record_loops(partial(call, number)) for number in reversed(range(routings))]
                  for _ in range(repeats + (repeats > 1))]  # fmt: skip
    runs = [calls[-1] for calls in rounds[-repeats:]]
    serial = median(total - sum(end - begin for *_, begin, end, _ in loops) for loops, total in runs)
    loops = []
    for same in zip(*(loops for loops, _ in runs), strict=True):
        name, in_shares, count, *_ = same[0]
        tasks = zip(*(loop[-1] for loop in same), strict=True)
        loops.append(Loop(name, in_shares, count, tuple(_typical(task) for task in tasks)))
    return Recording(threads, tuple(loops), serial)


def _typical(runs: Sequence[tuple[float, int, int, int]]) -> Work:
    return Work(median(seconds for seconds, *_ in runs), *runs[0][1:])


class Prediction(NamedTuple):
    """A call on a machine. What it lost are parts of threads x seconds."""

    machine: Machine
    seconds: float
    bandwidth: float  # bytes/s of all its loops, over the seconds of the call
    remote: float  # part of the bytes that come from another node
    serial: float  # only one thread works
    fork: float  # loops start and end
    idle: float  # a thread has no task left, or never had one
    waiting: float  # for memory, longer than a task on one core waits

    def efficiency(self, one_core: float) -> float:
        return one_core / (self.machine.threads * self.seconds)


class Cores(NamedTuple):
    """Measured on this machine."""

    fork: float  # seconds to start and join a loop on two threads
    read: float  # bytes/s that one core reads alone


def predict(recording: Recording, on: Machine, cores: Cores) -> Prediction:
    threads = recording.threads
    each = cores.fork + FORK_PER_THREAD * (threads - 2)
    forks = each * sum(loop.threads > 1 for loop in recording.loops)
    in_loops = busy = remote = moved = 0.0
    for loop in recording.loops:
        tasks = [(task.seconds, task.bytes) for task in loop.tasks]
        where = (threads, on.nodes, on.sockets, cores.read, on.node_bandwidth, on.link_bandwidth, on.placement)
        seconds, spent, by_node, elsewhere, _ = _C.simulate_loop(tasks, loop.in_shares, where)
        in_loops, busy, remote, moved = in_loops + seconds, busy + spent, remote + elsewhere, moved + sum(by_node)
    seconds = recording.serial + forks + in_loops
    whole = threads * seconds
    alone = sum(loop.seconds for loop in recording.loops)
    return Prediction(
        on, seconds, moved / seconds, remote / max(moved, 1.0), (threads - 1) * recording.serial / whole,
        threads * forks / whole, (threads * in_loops - busy) / whole, (busy - alone) / whole,
    )  # fmt: skip


class Measured(NamedTuple):
    """Medians on this machine."""

    seconds: float  # of a call on all threads
    read: float  # bytes/s of plain reading on all threads
    core_read: float  # and on one


def measured(call: Callable[[int], object], read: Callable[[int, int], int], threads: int, repeats: int) -> Measured:
    """Real calls and reads in turns, since the speed of a shared memory drifts. read(number, threads) returns the bytes
    that it read."""
    seconds = []
    rates: dict[int, list[float]] = {threads: [], 1: []}
    with cut_for(threads):
        for number in range(repeats + 1):
            start = perf_counter()
            call(number)
            seconds.append(perf_counter() - start)
            for index, of in enumerate(rates.items()):
                start = perf_counter()
                count = read(2 * number + index, of[0])
                of[1].append(count / (perf_counter() - start))
    return Measured(median(seconds[1:]), median(rates[threads][1:]), median(rates[1][1:]))


def fork_seconds(repeats: int = 300) -> float:
    """What a loop costs to start and join on two threads of this machine: a read of nothing, with two and with one."""
    nothing = [torch.zeros(1)]

    def typical(threads: int) -> float:
        times = []
        for _ in range(repeats):
            start = perf_counter()
            _C.read(nothing, threads)
            times.append(perf_counter() - start)
        return median(times)

    return max(typical(2) - typical(1), 0.0)


LOSSES = ("serial", "fork", "idle", "waiting")


def as_row(prediction: Prediction, one_core: float) -> dict[str, Any]:
    on = prediction.machine
    return {
        "threads": on.threads, "nodes": on.nodes, "sockets": on.sockets, "placement": on.placement,
        "ms": 1e3 * prediction.seconds, "efficiency": prediction.efficiency(one_core),
        "of_bandwidth": prediction.bandwidth / on.bandwidth, "remote": prediction.remote,
        **{name: getattr(prediction, name) for name in LOSSES},
    }  # fmt: skip
