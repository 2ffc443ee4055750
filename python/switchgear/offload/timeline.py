# SPDX-License-Identifier: BSD-3-Clause
"""When copies of experts and the layers' computation run, in simulated time: what prefetch hides.

One lane copies a record at a time, the other computes a layer at a time. A layer's guesses are submitted when the layer
before has routed. When it routes itself, those that turn out wrong and have not begun are dropped, and experts that
were not guessed are submitted, before the next layer's guesses. A record in flight is not interrupted. Experts leave
when their layer has run: memory holds what one layer needs and what is on its way for the next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from switchgear.offload.accesses import Accesses
from switchgear.offload.predictors import Expert


class Interval(NamedTuple):
    """A copy of an expert, or the computation of a layer, in seconds since the start."""

    moment: int  # step · L + layer
    expert: int | None  # copied; None: the layer computes
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated run.

    Attributes:
        seconds: of the whole run.
        waits: `[S][L]`: seconds that each layer waits for experts, the exposed part of the copies.
        copied, wasted: records copied, and of them not used.
        peak: the most records in memory at once, those in flight included.
        intervals: of both lanes, by their begin.
    """

    seconds: float
    waits: tuple[tuple[float, ...], ...]
    copied: int
    wasted: int
    peak: int
    intervals: tuple[Interval, ...]

    @property
    def exposed(self) -> float:
        """Seconds of waiting, all layers and steps."""
        return sum(map(sum, self.waits))


def pregated(accesses: Accesses) -> list[list[tuple[int, ...]]]:
    """The guesses of pre-gates: all that a layer needs, except in the first layer of a step, which has its own gate."""
    return [[() if layer == 0 else experts for layer, experts in enumerate(step)] for step in accesses.steps]


def timeline(
    accesses: Accesses,
    guesses: Sequence[Sequence[Collection[int]]] | None = None,
    *,
    copy_seconds: float,
    compute_seconds: float,
) -> Timeline:
    """The two lanes for a run whose experts all come from outside, with memory for two layers.

    Args:
        guesses: `[S][L]` experts, the most likely first, that are guessed for a layer when the one before has routed.
            None: none, so that each layer waits for its own.
        copy_seconds: of a record.
        compute_seconds: of a layer.
    """
    for name, value in (("copy_seconds", copy_seconds), ("compute_seconds", compute_seconds)):
        if not (value >= 0 and isfinite(value)):
            raise ValueError(f"{name}: expected at least 0, got {value}")
    needed = [experts for step in accesses.steps for experts in step]
    guessed = [()] * len(needed) if guesses is None else [tuple(g) for step in guesses for g in step]
    if len(guessed) != len(needed):
        raise ValueError(f"guesses: expected those of {len(needed)} layers, got {len(guessed)}")
    lane = _Lane(copy_seconds)
    waits: list[float] = []
    computing: list[Interval] = []
    routed = 0.0  # when the layer's gate is known: the layer before has run
    for moment, experts in enumerate(needed):
        lane.run_until(routed)
        lane.keep(moment, experts)
        lane.submit(moment, [e for e in experts if (moment, e) not in lane.known], routed)
        if moment + 1 < len(needed):
            following = list(dict.fromkeys(guessed[moment + 1]))
            lane.submit(moment + 1, following, routed)
        ready = lane.when({(moment, e) for e in experts}, routed)
        waits.append(ready - routed)
        end = ready + compute_seconds
        computing.append(Interval(moment, None, ready, end))
        lane.leave(moment, end)
        routed = end
    lane.waiting.clear()
    used = {(moment, e) for moment, experts in enumerate(needed) for e in experts}
    wasted = sum((c.moment, c.expert) not in used for c in lane.intervals)
    width = max(len(accesses.layers), 1)
    rows = tuple(tuple(waits[i : i + width]) for i in range(0, len(waits), width))
    intervals = tuple(sorted([*computing, *lane.intervals], key=lambda i: (i.begin, i.end)))
    return Timeline(routed, rows, len(lane.intervals), wasted, lane.peak(), intervals)


class _Lane:
    """Copies one record after the other."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.free = seconds, 0.0
        self.waiting: list[tuple[Expert, float]] = []  # (moment, expert), when submitted
        self.known: set[Expert] = set()  # submitted and not dropped
        self.intervals: list[Interval] = []
        self.done: dict[Expert, float] = {}
        self.changes: list[tuple[float, int]] = []  # of the records in memory

    def submit(self, moment: int, experts: Sequence[int], now: float) -> None:
        new = [((moment, expert), now) for expert in experts]
        self.known.update(key for key, _ in new)
        self.waiting += new

    def keep(self, moment: int, experts: Collection[int]) -> None:
        """Drops what waits for this moment and is not needed, as wrong guesses in memory are."""
        wrong = {key for key, _ in self.waiting if key[0] == moment and key[1] not in experts}
        self.waiting = [item for item in self.waiting if item[0] not in wrong]
        self.known -= wrong

    def run_until(self, now: float) -> None:
        """Begins what begins before `now`."""
        while self.waiting and max(self.free, self.waiting[0][1]) < now:
            self._copy()

    def when(self, needed: set[Expert], now: float) -> float:
        """When all of these have arrived."""
        while any(key in needed for key, _ in self.waiting):
            self._copy()
        return max([now, *(self.done[key] for key in needed)])

    def leave(self, moment: int, now: float) -> None:
        """The layer's records leave at its end, those that are wrong too."""
        self.changes += [(max(now, end), -1) for key, end in self.done.items() if key[0] == moment]
        self.done = {key: end for key, end in self.done.items() if key[0] != moment}

    def peak(self) -> int:
        most = number = 0
        for _, change in sorted(self.changes):  # at one moment, records leave before others come
            number += change
            most = max(most, number)
        return most

    def _copy(self) -> None:
        (moment, expert), submitted = self.waiting.pop(0)
        begin = max(self.free, submitted)
        self.free = begin + self.seconds
        self.intervals.append(Interval(moment, expert, begin, self.free))
        self.done[moment, expert] = self.free
        self.changes.append((begin, 1))
