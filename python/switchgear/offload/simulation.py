# SPDX-License-Identifier: BSD-3-Clause
"""The hits and misses of a cache of experts on a recorded run.

An expert's weights are one record, loaded when it is needed and absent. A step's experts of a layer run together:

- those that are resident are hits, whatever the order of the others;
- all of them stay until the layer has run, if the cache has so many slots;
- if it has fewer, they run in waves: first the resident ones, then the others through one slot more. Afterwards the
  cache keeps those that the policy would evict last.

Misses then depend on the policy alone, and Belady's are the fewest of any policy that loads on demand: a miss is saved
for each interval between two uses of an expert in which it stays, the experts that stay at a moment are bounded, and
dropping the interval that ends last keeps the most intervals.

Prefetch is simulated in time: one lane copies a record at a time, the other computes a layer at a time. A layer's
guesses are submitted when the layer before has routed. When it routes itself, those that turn out wrong and have not
begun are dropped, and experts that were not guessed are submitted, before the next layer's guesses. A record in flight
is not interrupted. Experts leave when their layer has run: memory holds what one layer needs and what is on its way for
the next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf
from operator import lt
from typing import Annotated, NamedTuple

from switchgear.checks import NotNegative, Positive, Range, Size, checked
from switchgear.offload.accesses import Accesses
from switchgear.offload.policies import POLICIES, Policy
from switchgear.offload.predictors import Expert
from switchgear.offload.residency import Residency

# ---- Hits and misses -------------------------------------------------------------------------------------------------


Bytes = Annotated[int, Range(1, inf)]
RecordBytes = Bytes | Sequence[Sequence[Bytes]]


@dataclass(frozen=True)
class LayerHits:
    """Uses of experts of one layer that a cache would have served (hits) and read (misses)."""

    name: str
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Of the uses of experts; 0 if there are none."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass(frozen=True)
class Simulation:
    """What a cache of `slots` experts does in a run.

    Attributes:
        policy: its name.
        shared: one cache for all layers, or one of slots / L for each.
        slots: of all layers.
        bytes: loaded: record_bytes for each miss; None without record_bytes.
        tokens_per_second: None without a bandwidth.
        layers: hits and misses of each.
    """

    policy: str
    shared: bool
    slots: int
    hits: int
    misses: int
    bytes: int | None
    tokens_per_second: float | None
    layers: tuple[LayerHits, ...]

    @property
    def hit_rate(self) -> float:
        """Of the uses of experts; 0 if there are none."""
        return self.hits / max(self.hits + self.misses, 1)


@checked
def simulate(
    accesses: Accesses,
    policy: Policy,
    *,
    slots: Size | None = None,
    bytes: int | None = None,
    shared: bool = False,
    record_bytes: RecordBytes | None = None,
    bandwidth: Positive | None = None,
    compute_seconds: NotNegative = 0.0,
) -> Simulation:
    """Replays a run through an empty cache.

    Args:
        slots: experts per layer that the cache holds; if shared, L times as many for all layers together.
        bytes: of the whole cache, instead of slots; record_bytes says what an expert takes.
        shared: one cache for all layers instead of one for each.
        record_bytes: of an expert, or of each expert of each layer, such as [r.sizes for r in store.layers.values()]. A
            slot has room for the largest one of its cache.
        bandwidth: bytes per second at which experts are loaded.
        compute_seconds: of a step whose experts are resident. Loads add to it: nothing overlaps.
    """
    if bandwidth is not None and record_bytes is None:
        raise ValueError("record_bytes: expected a number with a bandwidth, got None")
    sizes = None if record_bytes is None else _sizes(accesses, record_bytes)
    room = None if sizes is None else [max(own, default=0) for own in sizes]
    capacities = _capacities(len(accesses.layers), slots, bytes, shared, room)
    hits, misses, nbytes = _replay(accesses, policy, capacities, sizes)
    loaded = None if sizes is None else nbytes
    rate = None
    if bandwidth is not None and loaded is not None:
        seconds = loaded / bandwidth + compute_seconds * len(accesses.steps)
        rate = accesses.num_tokens / seconds if seconds else (inf if accesses.num_tokens else 0.0)
    layers = tuple(LayerHits(*layer) for layer in zip(accesses.layers, hits, misses, strict=True))
    return Simulation(policy.name, shared, sum(capacities), sum(hits), sum(misses), loaded, rate, layers)


def simulate_all(
    accesses: Accesses,
    policies: Sequence[Policy] = POLICIES,
    *,
    slots: int | None = None,
    bytes: int | None = None,
    shared: bool = False,
    record_bytes: RecordBytes | None = None,
    bandwidth: float | None = None,
    compute_seconds: float = 0.0,
) -> dict[str, Simulation]:
    """`simulate` for each policy, by its name. Add StaticFrequency.of(another run) to POLICIES to see a hot list."""
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise ValueError(f"policies: expected different names, got {', '.join(names)}")
    return {
        policy.name: simulate(
            accesses, policy, slots=slots, bytes=bytes, shared=shared, record_bytes=record_bytes, bandwidth=bandwidth,
            compute_seconds=compute_seconds,
        )
        for policy in policies
    }  # fmt: skip


def _sizes(accesses: Accesses, record_bytes: RecordBytes) -> Sequence[Sequence[int]]:
    if isinstance(record_bytes, int):
        return [[record_bytes] * count for count in accesses.num_experts]
    wanted, got = list(accesses.num_experts), list(map(len, record_bytes))
    if len(got) != len(wanted) or any(map(lt, got, wanted)):
        raise ValueError(f"record_bytes: expected {wanted} numbers by layer, got {got}")
    return record_bytes


def _capacities(
    num_layers: int, slots: int | None, size: int | None, shared: bool, room: Sequence[int] | None
) -> list[int]:
    """Slots of each cache: one for all layers, or one per layer. room: bytes of a slot of each layer."""
    if (slots is None) == (size is None):
        raise ValueError(f"slots: expected slots or bytes, got {'neither' if slots is None else 'both'}")
    if slots is not None:
        each = slots * num_layers if shared else slots
    else:
        assert size is not None
        if room is None:
            raise ValueError("record_bytes: expected a number with bytes, got None")
        least = max(room, default=1) if shared else sum(room)
        each = size // max(least, 1)
        if each < 1:
            raise ValueError(f"bytes: expected at least {least}, a slot for {'one' if shared else 'each'}, got {size}")
    return [each] * min(num_layers, 1) if shared else [each] * num_layers


def _replay(
    accesses: Accesses, policy: Policy, capacities: Sequence[int], sizes: Sequence[Sequence[int]] | None
) -> tuple[list[int], list[int], int]:
    """Hits and misses by layer, and bytes of all misses."""
    num_layers = len(accesses.layers)
    width = max(accesses.num_experts, default=0)
    caches = [Residency(policy, capacity, num_layers, width) for capacity in capacities]
    future = _next_uses(accesses) if policy.looks_ahead else None
    hits, misses = [0] * num_layers, [0] * num_layers
    moment = nbytes = 0
    for step in accesses.steps:
        for layer, experts in enumerate(step):
            following = None if future is None else future[moment]
            turn = caches[layer % len(caches)].run(layer, experts, moment, following)
            hits[layer] += len(turn.hits)
            misses[layer] += len(turn.misses)
            if sizes is not None:
                nbytes += sum(sizes[layer][key - layer * width] for key in turn.misses)
            moment += 1
    return hits, misses, nbytes


def _next_uses(accesses: Accesses) -> list[list[float]]:
    """By moment, for each of its experts: the moment of its next use, inf for none."""
    num_layers = len(accesses.layers)
    following: list[dict[int, float]] = [{} for _ in range(num_layers)]
    result: list[list[float]] = []
    moment = len(accesses.steps) * num_layers
    for step in reversed(accesses.steps):
        for layer in reversed(range(num_layers)):
            moment -= 1
            known = following[layer]
            result.append([known.get(expert, inf) for expert in step[layer]])
            known.update(dict.fromkeys(step[layer], float(moment)))
    result.reverse()
    return result


# ---- What prefetch hides ---------------------------------------------------------------------------------------------


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


@checked
def timeline(
    accesses: Accesses,
    guesses: Sequence[Sequence[Collection[int]]] | None = None,
    *,
    copy_seconds: NotNegative,
    compute_seconds: NotNegative,
) -> Timeline:
    """The two lanes for a run whose experts all come from outside, with memory for two layers.

    Args:
        guesses: `[S][L]` experts, the most likely first, that are guessed for a layer when the one before has routed.
            None: none, so that each layer waits for its own.
        copy_seconds: of a record.
        compute_seconds: of a layer.
    """
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
