# SPDX-License-Identifier: BSD-3-Clause
"""Which experts a cache holds, without their weights: the simulator and the cache of a running model share it."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple

from switchgear.offload.policies import Now, Policy, Use


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
