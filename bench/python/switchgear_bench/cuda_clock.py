# SPDX-License-Identifier: BSD-3-Clause
"""Timing on a GPU: by events, in turns, each call after a read that exceeds the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, TypeVar

import torch

T = TypeVar("T")
FLUSHED_BYTES = 256 << 20  # more than the L2 of any GPU
WARM_CALLS = 3  # before a capture: kernels are loaded at their first use, libraries choose theirs
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
CASE_SECONDS = 4.0


def timer() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def in_turns(calls: Mapping[str, Callable[[], object]], seconds: float = CASE_SECONDS) -> dict[str, list[float]]:
    """Milliseconds of each call, by turns."""
    # Read, not written: up to 50 MB of written lines would be copied to memory during the timed call.
    flushed = torch.zeros(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = perf_counter(), 0
    while calls and (rounds <= FEWEST_ROUNDS or (rounds <= MOST_ROUNDS and perf_counter() - start < seconds)):
        events = {}
        for name, call in calls.items():
            flushed.sum()
            begin, finish = timer(), timer()
            begin.record()
            call()
            finish.record()
            events[name] = (begin, finish)
        torch.cuda.synchronize()
        if rounds > 0:  # the first round warms up
            for name, (begin, finish) in events.items():
                times[name].append(begin.elapsed_time(finish))
        rounds += 1
    return times


def captured(call: Callable[[], T]) -> Callable[[], T] | None:
    """A function that replays a CUDA graph of the call, so that the time is not that of launches from Python, and
    returns its output; None for a call that cannot be captured, for example since it waits for the device."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_CALLS):
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            output = call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()  # raises if the device itself has failed
        return None

    def replay() -> T:
        graph.replay()
        return output

    return replay


def best_seconds(call: Callable[[], object]) -> float:
    """The fastest call within half a second: a ceiling is not a median."""
    return min(in_turns({"": call}, 0.5)[""]) / 1e3


def peak_memory(call: Callable[[], object]) -> int:
    """Peak bytes that a call allocates, beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
