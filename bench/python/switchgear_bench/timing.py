# SPDX-License-Identifier: BSD-3-Clause
"""Timing on a shared machine whose speed drifts: competitors take turns, and medians are compared.

A turn starts once other processes are idle, or after a timeout. It counts only if they stayed idle throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter, sleep
from typing import NamedTuple, TypeVar

from .machine import busy_seconds_elsewhere

T = TypeVar("T")
TURN_SECONDS = 0.05  # of timed calls in a turn
LONG_SECONDS = 0.2  # a call as long as this needs no warm-up
FEWEST_TURNS, MOST_TURNS = 3, 30
FEWEST_QUIET = 2  # turns; with fewer, all count
FAR_MORE = 3
QUIET, STIRRED = 0.2, 0.1  # cores in use by others: a turn starts below the first and does not count above the second
TICK = 0.011  # seconds of error in the system's clock of busy cores
GLANCE = 0.05  # seconds over which the load of others is sampled


class Call(NamedTuple):
    number: int
    seconds: float


class Timed(NamedTuple):
    seconds: list[float]  # of each call that counts
    quiet_turns: int
    turns: int
    numbers: list[int]  # of these calls


def interleave(
    calls: Mapping[str, Callable[[int], object]], budget: float, *, leaves_memory: bool = False
) -> dict[str, Timed]:
    """Times of each entry, taken in turns A B C A B C … for about `budget` seconds.

    There are at least FEWEST_TURNS, unless they would far exceed the budget.

    A turn is one untimed call (it refills caches and wakes threads; long calls skip it) and then timed calls for
    TURN_SECONDS. Calls get a running number, which selects their inputs. With `leaves_memory`, each call frees the
    memory of the one before. The first call of a turn frees another entry's memory, so it is never timed.
    """
    turns: dict[str, list[tuple[list[Call], bool]]] = {name: [] for name in calls}
    numbers = dict.fromkeys(calls, 0)

    def timed(name: str) -> Call:
        start, number = perf_counter(), numbers[name]
        calls[name](number)
        numbers[name] += 1
        return Call(number, perf_counter() - start)

    def another(rounds: int, elapsed: float) -> bool:
        if rounds == 0:
            return True
        after = elapsed * (rounds + 1) / rounds
        return after < (FAR_MORE * max(budget, 1.0) if rounds < FEWEST_TURNS else budget) and rounds < MOST_TURNS

    start, rounds = perf_counter(), 0
    while another(rounds, perf_counter() - start):
        for name, taken in turns.items():
            wait_for_quiet(budget / 10 / len(calls))
            if leaves_memory or not taken or taken[-1][0][-1].seconds < LONG_SECONDS:
                timed(name)
            made: list[Call] = []
            before, began, spent = busy_seconds_elsewhere(), perf_counter(), 0.0
            while spent < TURN_SECONDS:
                made.append(timed(name))
                spent += made[-1].seconds
            stirred = busy_seconds_elsewhere() - before > STIRRED * (perf_counter() - began) + TICK
            taken.append((made, not stirred))
        rounds += 1
    return {name: _timed(taken) for name, taken in turns.items()}


def wait_for_quiet(longest: float) -> None:
    """Returns once other processes use few of the cores, or after `longest` seconds."""
    end = perf_counter() + longest
    while perf_counter() < end:
        before = busy_seconds_elsewhere()
        sleep(GLANCE)
        if busy_seconds_elsewhere() - before <= QUIET * GLANCE + TICK:
            return


def counted(turns: Sequence[tuple[Sequence[T], bool]]) -> list[T]:
    """What was measured in the quiet turns, or in all if too few are quiet. Each has its measurements, and is quiet or
    not."""
    quiet = [made for made, is_quiet in turns if is_quiet]
    return [each for made in (quiet if len(quiet) >= FEWEST_QUIET else [made for made, _ in turns]) for each in made]


def _timed(turns: list[tuple[list[Call], bool]]) -> Timed:
    calls = counted(turns)
    quiet_turns = sum(is_quiet for _, is_quiet in turns)
    return Timed([call.seconds for call in calls], quiet_turns, len(turns), [call.number for call in calls])
