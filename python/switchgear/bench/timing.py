# SPDX-License-Identifier: BSD-3-Clause
"""Timing on a shared machine whose speed drifts: competitors take turns, and medians are compared.

A turn starts once other processes are idle, or after a timeout. It counts only if they stayed idle throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter, sleep
from typing import NamedTuple

from ..common.machine import busy_seconds_elsewhere

TURN_SECONDS = 0.05  # of timed calls in a turn
LONG_SECONDS = 0.2  # a call as long as this needs no warm-up
FEWEST_TURNS, MOST_TURNS = 3, 30
FEWEST_QUIET = 2  # turns; with fewer, all count
FAR_MORE = 3
QUIET, STIRRED = 0.2, 0.1  # cores in use by others: a turn starts below the first and does not count above the second
TICK = 0.011  # seconds of error in the system's clock of busy cores
GLANCE = 0.05  # seconds over which the load of others is sampled


class Timed(NamedTuple):
    seconds: list[float]  # of each call that counts
    quiet_turns: int
    turns: int


def interleave(
    calls: Mapping[str, Callable[[int], object]], budget: float, *, leaves_memory: bool = False
) -> dict[str, Timed]:
    """Times of each entry, taken in turns A B C A B C … for about `budget` seconds.

    There are at least FEWEST_TURNS, unless they would far exceed the budget.

    A turn is one untimed call (it refills caches and wakes threads; long calls skip it) and then timed calls for
    TURN_SECONDS. Calls get a running number, which selects their inputs. With `leaves_memory`, each call frees the
    memory of the one before. The first call of a turn frees another entry's memory, so it is never timed.
    """
    turns: dict[str, list[tuple[list[float], bool]]] = {name: [] for name in calls}
    numbers = dict.fromkeys(calls, 0)

    def timed(name: str) -> float:
        start = perf_counter()
        calls[name](numbers[name])
        numbers[name] += 1
        return perf_counter() - start

    def another(rounds: int, elapsed: float) -> bool:
        if rounds == 0:
            return True
        after = elapsed * (rounds + 1) / rounds
        return after < (FAR_MORE * max(budget, 1.0) if rounds < FEWEST_TURNS else budget) and rounds < MOST_TURNS

    start, rounds = perf_counter(), 0
    while another(rounds, perf_counter() - start):
        for name, taken in turns.items():
            wait_for_quiet(budget / 10 / len(calls))
            if leaves_memory or not taken or taken[-1][0][-1] < LONG_SECONDS:
                timed(name)
            times: list[float] = []
            before, began, spent = busy_seconds_elsewhere(), perf_counter(), 0.0
            while spent < TURN_SECONDS:
                times.append(timed(name))
                spent += times[-1]
            stirred = busy_seconds_elsewhere() - before > STIRRED * (perf_counter() - began) + TICK
            taken.append((times, not stirred))
        rounds += 1
    return {name: _counted(taken) for name, taken in turns.items()}


def wait_for_quiet(longest: float) -> None:
    """Returns once other processes use few of the cores, or after `longest` seconds."""
    end = perf_counter() + longest
    while perf_counter() < end:
        before = busy_seconds_elsewhere()
        sleep(GLANCE)
        if busy_seconds_elsewhere() - before <= QUIET * GLANCE + TICK:
            return


def _counted(taken: list[tuple[list[float], bool]]) -> Timed:
    quiet = [times for times, is_quiet in taken if is_quiet]
    counted = quiet if len(quiet) >= FEWEST_QUIET else [times for times, _ in taken]
    return Timed([seconds for times in counted for seconds in times], len(quiet), len(taken))
