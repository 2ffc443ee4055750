# SPDX-License-Identifier: BSD-3-Clause
"""Policies of a cache of experts: which one makes room for another.

A policy has two pure functions. `touch` says where an expert stands from a use until its next one: a group, and a value
in it. `score` compares groups at the moment of an eviction. The victim is the expert with the lowest score, of equals
the least recently used; in a group, the one with the lowest value, of equals the least recently used, so that an
eviction looks at one expert per group. Most policies have one group. Of the experts of a layer and step,
those that were resident are used first, then those that were loaded, each in the order of their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from switchgear.offload.accesses import Accesses


class Use(NamedTuple):
    """A use of an expert. Moments count the layers that ran: L per step."""

    layer: int
    expert: int
    uses: int  # from the start on, this one included, those before an eviction too
    loaded: int  # moment of the load that brought it
    moment: int
    next_use: float  # moment, inf for none; known to policies that look ahead


class Now(NamedTuple):
    """The moment of an eviction."""

    layer: int  # that runs
    num_layers: int
    moment: int

    def distance(self, layer: int) -> int:
        """Layers from the running one to the next run of `layer`: 1 for the next layer, L for the running one."""
        return (layer - self.layer - 1) % self.num_layers + 1

    def in_this_pass(self, moment: int) -> bool:
        """Whether a moment is in the current pass through the layers."""
        return moment >= self.moment - self.layer


@runtime_checkable
class Policy(Protocol):
    """Which expert of a full cache makes room. `touch` gives an expert a group and a value after each use. On eviction
    the expert with the lowest `score` leaves, and of equals the least recently used."""

    @property
    def name(self) -> str:
        """For tables."""

    @property
    def looks_ahead(self) -> bool:
        """Whether it needs the future, which a running model does not know."""

    def touch(self, use: Use) -> tuple[int, float]:
        """Group and value of an expert after a use."""

    def score(self, group: int, value: float, last: int, now: Now) -> float:
        """Of an expert that was used last at moment `last`; must grow with (value, last) in a group."""


@dataclass(frozen=True)
class _OneGroup:
    """The value is the score."""

    @property
    def looks_ahead(self) -> bool:
        return False

    def score(self, group: int, value: float, last: int, now: Now) -> float:
        return value


@dataclass(frozen=True)
class LRU(_OneGroup):
    """Evicts the least recently used expert (per layer: arXiv:2312.17238)."""

    name: str = "lru"

    def touch(self, use: Use) -> tuple[int, float]:
        return 0, 0.0


@dataclass(frozen=True)
class LFU(_OneGroup):
    """Evicts the least frequently used expert. Counts outlive an eviction."""

    name: str = "lfu"

    def touch(self, use: Use) -> tuple[int, float]:
        return 0, use.uses


@dataclass(frozen=True)
class LIFO(_OneGroup):
    """Evicts the expert that was loaded last (arXiv:2303.06182): layers run in order, so that it is needed last.

    Experts that a layer loads in one step count as loaded at once, and of those the lowest numbers leave first. The
    paper loads them one by one: if a layer needs 1, 2 and 3 in two slots, its cache keeps 1 and 3, this one 2 and 3.
    """

    name: str = "lifo"

    def touch(self, use: Use) -> tuple[int, float]:
        return 0, -use.loaded


@dataclass(frozen=True)
class StaticFrequency(_OneGroup):
    """Evicts the expert that a calibration used least: a list of hot experts that does not change. One slot stays for
    the experts that are not on it.

    counts: uses by (layer, expert); 0 for others.
    """

    counts: Mapping[tuple[int, int], int]
    name: str = "static frequency"

    @classmethod
    def of(cls, calibration: Accesses) -> StaticFrequency:
        """From another run than the one to be replayed."""
        return cls(calibration.counts())

    def touch(self, use: Use) -> tuple[int, float]:
        return 0, self.counts.get((use.layer, use.expert), 0)


@dataclass(frozen=True)
class Belady(_OneGroup):
    """Evicts the expert whose next use is furthest (arXiv:2410.19123): no policy that loads on demand misses less. A
    bound, since it looks ahead."""

    name: str = "belady"

    @property
    def looks_ahead(self) -> bool:
        return True

    def touch(self, use: Use) -> tuple[int, float]:
        return 0, -use.next_use


@dataclass(frozen=True)
class LFRU:
    """Evicts the lowest frequency × recency: uses / (layers run since the last use + 1). The formula is ours, for what
    caches of experts call LFRU. Groups are experts of equal counts."""

    name: str = "lfru"
    looks_ahead: bool = False

    def touch(self, use: Use) -> tuple[int, float]:
        return use.uses, 0.0

    def score(self, group: int, value: float, last: int, now: Now) -> float:
        return group / (now.moment - last + 1)


@dataclass(frozen=True)
class LeastStale:
    """Evicts experts that were used in an earlier pass and not yet in this one, before those that were used in this one
    (SpecMD, arXiv:2602.03921). Ours: among them the one whose layer runs last, then the least recently used. In a cache
    of one layer it is LRU. Groups are layers."""

    name: str = "least stale"
    looks_ahead: bool = False

    def touch(self, use: Use) -> tuple[int, float]:
        return use.layer, 0.0

    def score(self, group: int, value: float, last: int, now: Now) -> float:
        fresh = now.in_this_pass(last) * (now.num_layers + 1)  # above all stale ones: distances are 1 to L
        return fresh - now.distance(group)


@dataclass(frozen=True)
class FrequencyDistance:
    """Evicts the lowest uses / distance, the layers until the expert's own runs again: experts that are rare, or far
    from the running layer (EdgeMoE, arXiv:2308.14352, names both; the quotient is ours). In a cache of one layer it is
    LFU. Groups are layers."""

    name: str = "frequency/distance"
    looks_ahead: bool = False

    def touch(self, use: Use) -> tuple[int, float]:
        return use.layer, use.uses

    def score(self, group: int, value: float, last: int, now: Now) -> float:
        return value / now.distance(group)


POLICIES: tuple[Policy, ...] = (LRU(), LFU(), LFRU(), LIFO(), LeastStale(), FrequencyDistance(), Belady())
"""All that need no calibration."""
