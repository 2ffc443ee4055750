# SPDX-License-Identifier: BSD-3-Clause
"""How many experts a cache holds, which, and what it did: hits, misses, bytes, waits and prefetch, by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple

from switchgear.offload.policies import Now, Policy, Use

# ---- How many --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Layers whose records have one size, and so one arena.

    layers: their indices. num_experts: of each.
    """

    record_bytes: int
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]


@dataclass(frozen=True)
class CachePlan:
    """Of a group. capacities: slots of each layer, or one number for all of them.

    rows: of the arena: the slots, those that the experts of a step pass through if they are more than the slots, and
    guess_rows, which predictions may fill.
    """

    group: Group
    capacities: tuple[int, ...]
    rows: int
    guess_rows: int

    @property
    def fits(self) -> bool:
        """Whether all experts do."""
        if len(self.capacities) == len(self.group.layers):
            return all(c >= e for c, e in zip(self.capacities, self.group.num_experts, strict=True))
        return self.capacities[0] >= sum(self.group.num_experts)

    @property
    def nbytes(self) -> int:
        return self.rows * self.group.record_bytes


def group_layers(record_bytes: Sequence[int], num_experts: Sequence[int]) -> list[Group]:
    sizes = sorted(set(record_bytes))
    result = []
    for size in sizes:
        layers = tuple(layer for layer, own in enumerate(record_bytes) if own == size)
        result.append(Group(size, layers, tuple(num_experts[layer] for layer in layers)))
    return result


def plan_caches(
    groups: Sequence[Group], slots: int | None, size: int | None, shared: bool, guess_rows: int
) -> list[CachePlan]:
    """For `slots` per layer, or as many as fit in `size` bytes."""
    if (slots is None) == (size is None):
        raise ValueError(f"slots: expected slots or bytes, got {'neither' if slots is None else 'both'}")
    if slots is not None:
        return [_plan(group, [slots] * len(group.layers), shared, guess_rows) for group in groups]
    assert size is not None
    # The most slots that fit: of a layer, or shared ones, of which a layer's are as many as there are layers.
    most = max(count for group in groups for count in group.num_experts)
    steps = max(len(group.layers) for group in groups) if shared else 1

    def plans(count: int) -> list[CachePlan]:
        found = []
        for group in groups:
            each = [count * len(group.layers) // steps] if shared else [count] * len(group.layers)
            found.append(_plan(group, each, shared, guess_rows))
        return found

    if _nbytes(whole := plans(most * steps)) <= size:  # no other rows: fewer slots may take more memory
        return whole
    low, high = 0, most * steps  # plans(low) fits
    while low < high:
        middle = (low + high + 1) // 2
        made = plans(middle)
        is_within = _nbytes(made) <= size and all(min(plan.capacities) > 0 for plan in made)
        low, high = (middle, high) if is_within else (low, middle - 1)
    if low == 0:
        least = min(_nbytes(plans(steps)), _nbytes(whole))
        raise ValueError(f"bytes: expected at least {least} for one slot in each layer, got {size}")
    return plans(low)


def _nbytes(plans: Sequence[CachePlan]) -> int:
    return sum(plan.nbytes for plan in plans)


def _plan(group: Group, each: Sequence[int], shared: bool, guess_rows: int) -> CachePlan:
    total, most = sum(group.num_experts), max(group.num_experts)
    if shared:
        capacity = min(sum(each), total)
        # Experts that are resident and leave can have higher numbers than those that take their slots. Then both are
        # in memory, at most half of a layer's; and one more passes through.
        extra = 0 if capacity >= most else min(capacity, most // 2) + 1
        capacities: tuple[int, ...] = (capacity,)
    else:
        pairs = [(min(own, experts), experts) for own, experts in zip(each, group.num_experts, strict=True)]
        extra = max((min(own, experts - own) + 1 for own, experts in pairs if own < experts), default=0)
        capacities = tuple(own for own, _ in pairs)
    plan = CachePlan(group, capacities, sum(capacities) + extra + guess_rows, guess_rows)
    return replace(plan, rows=total, guess_rows=0) if plan.fits else plan


# ---- Which -----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What the experts of a layer and step did to the cache. Experts are keys."""

    hits: list[int]  # resident before, ascending
    misses: list[int]  # absent before, ascending
    evicted: list[int]  # not resident afterwards. If there are fewer slots than experts: some of hits and misses, too


class Residency:
    """A cache of `capacity` experts, of one layer or of several. An expert's key is layer · width + expert.

    `last` has the experts that may be evicted; each has an entry in the heap of its group. An entry is outdated once
    its expert was used again or evicted; it is dropped when it comes up.
    """

    def __init__(self, policy: Policy, capacity: int, num_layers: int, width: int) -> None:
        self.policy, self.capacity, self.num_layers, self.width = policy, capacity, num_layers, width
        self.last: dict[int, int] = {}  # number of the last use
        self._heaps: dict[int, list[tuple[float, int, int, int]]] = {}  # (value, number of the use, moment, key)
        self._counts: dict[int, int] = {}
        self._loaded: dict[int, int] = {}
        self._num_uses = self._entries = 0

    def __len__(self) -> int:
        return len(self.last)

    def __contains__(self, key: int) -> bool:
        return key in self.last

    def run(self, layer: int, experts: Sequence[int], moment: int, following: Sequence[float] | None = None) -> Turn:
        """The experts (ascending) of a layer run together. following: moments of their next uses, if they are known."""
        last, counts, loaded, touch = self.last, self._counts, self._loaded, self.policy.touch
        first = layer * self.width
        hits: list[int] = []
        misses: list[int] = []
        for expert in experts:
            key = first + expert
            (hits if key in last else misses).append(key)
        for key in misses:
            loaded[key] = moment
        keys = hits + misses
        upcoming = (
            {} if following is None else {first + e: next_use for e, next_use in zip(experts, following, strict=True)}
        )
        now = Now(layer, self.num_layers, moment)
        together = len(keys) <= self.capacity
        evicted: list[int] = []
        if together:  # nothing may evict them: they take their slots first
            for key in hits:
                del last[key]
            evicted = [self._evict(now) for _ in range(len(last) + len(keys) - self.capacity)]
        for key in keys:
            count = counts[key] = counts.get(key, 0) + 1
            group, value = touch(Use(layer, key - first, count, loaded[key], moment, upcoming.get(key, inf)))
            number = self._num_uses
            self._num_uses = number + 1
            heap = self._heaps.get(group)
            if heap is None:
                heap = self._heaps[group] = []
            heappush(heap, (value, number, moment, key))
            last[key] = number  # after the entry: an interrupt must not leave an expert that cannot be evicted
        self._entries += len(keys)
        if not together:
            evicted = [self._evict(now) for _ in range(len(last) - self.capacity)]
        if self._entries > 4 * len(last) + 64:
            self._compact()
        return Turn(hits, misses, evicted)

    def forget(self, key: int) -> None:
        """Empties its slot: the load failed."""
        self.last.pop(key, None)

    def _evict(self, now: Now) -> int:
        best = None
        for group in list(self._heaps):
            heap = self._heaps[group]
            while heap and self.last.get(heap[0][3]) != heap[0][1]:
                heappop(heap)
                self._entries -= 1
            if not heap:
                del self._heaps[group]
                continue
            value, number, moment, key = heap[0]
            rank = (self.policy.score(group, value, moment, now), number, key)
            best = rank if best is None or rank < best else best
        assert best is not None
        del self.last[best[2]]
        return best[2]

    def _compact(self) -> None:
        for group, heap in list(self._heaps.items()):
            kept = [entry for entry in heap if self.last.get(entry[3]) == entry[1]]
            heapify(kept)
            if kept:
                self._heaps[group] = kept
            else:
                del self._heaps[group]
        self._entries = sum(map(len, self._heaps.values()))


# ---- What it did -----------------------------------------------------------------------------------------------------


@dataclass
class LayerStatistics:
    """Counts of one layer since the start.

    Attributes:
        hits: uses of experts that were resident when their layer started. Prefetch makes no hits.
        misses: the other uses.
        bytes: read for misses: misses × record.
        wait_seconds: in which the layer waited for reads.
        predicted, used: of the experts that ran with prefetch, those that were predicted, and all.
        prefetched: misses whose reads a prediction had begun.
        wasted_bytes: read for predictions that were wrong.
    """

    name: str
    hits: int = 0
    misses: int = 0
    bytes: int = 0
    wait_seconds: float = 0.0
    predicted: int = 0
    used: int = 0
    prefetched: int = 0
    wasted_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Of the uses of experts; 0 if there are none."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def recall(self) -> float | None:
        """Of the experts that were used, the share that was predicted; None without predictions."""
        return self.predicted / self.used if self.used else None


@dataclass(frozen=True)
class Statistics:
    """Counts of a cache; its str is a table."""

    layers: tuple[LayerStatistics, ...]

    @property
    def hits(self) -> int:
        """Uses of experts that were in memory."""
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        """Uses of experts that had to be read."""
        return sum(layer.misses for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """Of the uses of experts; 0 if there are none."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def bytes(self) -> int:
        """Bytes read, those of prefetches included."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def wait_seconds(self) -> float:
        """Seconds that layers waited for experts."""
        return sum(layer.wait_seconds for layer in self.layers)

    @property
    def recall(self) -> float | None:
        """Of the experts that were used, the share that was predicted; None without predictions."""
        used = sum(layer.used for layer in self.layers)
        return sum(layer.predicted for layer in self.layers) / used if used else None

    @property
    def wasted_bytes(self) -> int:
        """Bytes read for predictions that were wrong."""
        return sum(layer.wasted_bytes for layer in self.layers)

    def __str__(self) -> str:
        names = [each.name for each in fields(LayerStatistics) if each.name != "name"]
        total = LayerStatistics("all", **{name: sum(getattr(layer, name) for layer in self.layers) for name in names})
        lines = [[column for column, _ in _COLUMNS]]
        lines += [[show(layer) for _, show in _COLUMNS] for layer in (*self.layers, total)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


_COLUMNS: tuple[tuple[str, Callable[[LayerStatistics], str]], ...] = (
    ("layer", lambda layer: layer.name),
    ("hits", lambda layer: str(layer.hits)),
    ("misses", lambda layer: str(layer.misses)),
    ("hit rate", lambda layer: f"{layer.hit_rate:.1%}"),
    ("MB read", lambda layer: f"{layer.bytes / 1e6:.1f}"),
    ("s waited", lambda layer: f"{layer.wait_seconds:.3f}"),
    ("recall", lambda layer: "-" if layer.recall is None else f"{layer.recall:.1%}"),
    ("MB wasted", lambda layer: f"{layer.wasted_bytes / 1e6:.1f}"),
)
