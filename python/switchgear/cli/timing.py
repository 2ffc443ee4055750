# SPDX-License-Identifier: BSD-3-Clause
"""Timing on a machine whose speed drifts: everyone takes turns, and medians are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

TURN_SECONDS = 0.02  # of timed calls in a turn
LONG_SECONDS = 0.2  # a call as long as this has nothing to warm up
FEWEST_TURNS, MOST_TURNS = 3, 50
FAR_MORE = 3


def interleave(calls: Mapping[str, Callable[[int], object]], budget: float) -> dict[str, list[float]]:
    """Seconds per call of each entry, taken in turns A B C A B C … for about `budget` seconds.

    There are at least FEWEST_TURNS, unless they would take far more than the budget.

    A turn is one call that is not timed (it brings back caches and wakes threads; long calls do without) and timed ones
    for TURN_SECONDS. Calls get a running number, by which they choose their inputs.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    numbers = dict.fromkeys(calls, 0)

    def timed(name: str) -> float:
        start = perf_counter()
        calls[name](numbers[name])
        numbers[name] += 1
        return perf_counter() - start

    def another(turns: int, elapsed: float) -> bool:
        if turns == 0:
            return True
        after = elapsed * (turns + 1) / turns
        return after < (FAR_MORE * max(budget, 1.0) if turns < FEWEST_TURNS else budget) and turns < MOST_TURNS

    start, turns = perf_counter(), 0
    while another(turns, perf_counter() - start):
        for name, taken in times.items():
            if not taken or taken[-1] < LONG_SECONDS:
                timed(name)
            spent = 0.0
            while spent < TURN_SECONDS:
                taken.append(timed(name))
                spent += taken[-1]
        turns += 1
    return times
