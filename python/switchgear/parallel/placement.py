# SPDX-License-Identifier: BSD-3-Clause
"""Which rank holds which experts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from switchgear.checks import checked


@dataclass(frozen=True)
class Placement:
    """experts_of_rank[r]: the experts of rank r, in ascending order. A rank may have none; an expert may be on several.

    Raises:
        ValueError: an expert without a rank, twice on one rank, or out of order.
    """

    num_experts: int
    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for rank, experts in enumerate(self.experts_of_rank):
            if list(experts) != sorted(set(experts)):
                raise ValueError(f"experts_of_rank: expected ascending ids on rank {rank}, got {list(experts)}")
        placed = {expert for experts in self.experts_of_rank for expert in experts}
        if placed != set(range(self.num_experts)):
            wrong = sorted(placed ^ set(range(self.num_experts)))
            raise ValueError(f"experts_of_rank: expected each of {self.num_experts} experts, wrong are {wrong[:8]}")

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Consecutive experts; the first num_experts % num_ranks ranks have one more than the others."""
        share, more = divmod(num_experts, num_ranks)
        starts = [rank * share + min(rank, more) for rank in range(num_ranks + 1)]
        ranks = (tuple(range(starts[rank], starts[rank + 1])) for rank in range(num_ranks))
        return cls(num_experts, tuple(ranks))

    @property
    def num_ranks(self) -> int:
        """Ranks that hold experts."""
        return len(self.experts_of_rank)

    @cached_property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each expert, in ascending order."""
        owners: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.experts_of_rank):
            for expert in experts:
                owners[expert].append(rank)
        return tuple(map(tuple, owners))

    @cached_property
    def replicated(self) -> tuple[int, ...]:
        """The experts with more than one rank."""
        return tuple(expert for expert, ranks in enumerate(self.owners) if len(ranks) > 1)

    def routes(self, source: int, near: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """For tokens of rank `source`: the rank [E] where each expert is used, and its local number there [E].

        For a replicated expert this is the own copy, or else one of a rank in `near` (those of the node), if any, that
        depends only on `source`. So sources spread over the copies, and a token's route does not depend on its batch.
        """
        chosen = []
        for ranks in self.owners:
            close = [rank for rank in ranks if rank in near] or ranks
            chosen.append(source if source in ranks else close[source % len(close)])
        local = [self.experts_of_rank[rank].index(expert) for expert, rank in enumerate(chosen)]
        return torch.tensor(chosen), torch.tensor(local)

    def repeat(self, counts: Sequence[int]) -> Placement:
        """The placement with counts[e] consecutive experts in place of each expert e, all on the ranks of e."""
        starts = [0, *accumulate(counts)]
        ranks = (tuple(i for e in experts for i in range(starts[e], starts[e + 1])) for experts in self.experts_of_rank)
        return Placement(starts[-1], tuple(ranks))

    def digest(self) -> int:
        """A number that differs between placements."""
        return zlib.crc32(repr((self.num_experts, self.experts_of_rank)).encode())

    def load_of_rank(self, load: Sequence[float] | Tensor) -> list[float]:
        """The load of each rank if an expert's load is spread evenly over its copies."""
        values = [float(value) for value in load]
        return [sum(values[e] / len(self.owners[e]) for e in experts) for experts in self.experts_of_rank]


@checked
def place_experts(
    load: Tensor | Sequence[float],
    num_ranks: int,
    *,
    num_replicas: int = 0,
    correlation: Tensor | None = None,
    method: Literal["greedy", "anticorrelation"] = "greedy",
) -> Placement:
    """A placement that balances the load, with at most ⌈(E + num_replicas) / num_ranks⌉ experts on a rank.

    Greedy: experts, by descending load, go to the rank with the least load that has space (arXiv:2303.06182).
    Deterministic; ties go to the lowest number. Replicas are ours: num_replicas times, the expert with the largest load
    per copy gets another copy, and copies are placed like experts.

    "anticorrelation" keeps experts apart that are busy at the same time, so that ranks are even in each batch and not
    only on average: when expert a seeks its rank, an expert m there counts A_m + correlation[a,m] / 2, where A_m is its
    share of the total load (the same paper).

    Args:
        load: [E] tokens of each expert, or a trace of topk_ids [T,K] to count them from (then ids range from 0 to the
            largest one seen).
        num_replicas: copies beyond one per expert.
        correlation: [E,E] from -1 to 1, such as torch.corrcoef of the loads [E, batches]; for "anticorrelation".
        method: "greedy" or "anticorrelation".

    Raises:
        ValueError: more copies than distinct ranks can hold, or a negative load; a method without what it needs.
    """
    if (correlation is None) == (method == "anticorrelation"):
        wanted = "[E,E] for anticorrelation" if correlation is None else "None for greedy"
        raise ValueError(f"correlation: expected {wanted}, got {'None' if correlation is None else 'a tensor'}")
    counts = load if isinstance(load, Tensor) else torch.tensor(list(load), dtype=torch.float64)
    if counts.dim() == 2:
        counts = torch.bincount(counts[counts >= 0].flatten().long())
    loads = [float(value) for value in counts]
    num_experts = len(loads)
    together = _correlations(correlation, num_experts)
    if min(loads, default=0.0) < 0:
        raise ValueError(f"load: expected numbers of tokens, got {min(loads)}")
    if not 0 <= num_replicas <= num_experts * (num_ranks - 1):
        most = num_experts * (num_ranks - 1)
        raise ValueError(f"num_replicas: expected 0 to {most} (one copy of an expert a rank), got {num_replicas}")
    copies = [1] * num_experts
    for _ in range(num_replicas):
        candidates = [e for e in range(num_experts) if copies[e] < num_ranks]
        copies[max(candidates, key=lambda e: (loads[e] / copies[e], -e))] += 1
    room = -(-(num_experts + num_replicas) // num_ranks)
    ranks: list[set[int]] = [set() for _ in range(num_ranks)]
    totals, whole = [0.0] * num_ranks, sum(loads)
    # Among equal loads, experts with the most copies go first: distinct ranks are hardest to find for them.
    for expert in sorted(range(num_experts), key=lambda e: (-loads[e] / copies[e], -copies[e], e)):
        for _ in range(copies[expert]):
            free = [r for r in range(num_ranks) if len(ranks[r]) < room and expert not in ranks[r]]
            if not free:  # all ranks with space have it: another rank moves an expert away
                free = [_make_room(ranks, totals, loads, copies, expert, room)]
            beside = [whole / 2 * sum(together[expert][e] for e in held) for held in ranks] if together else []
            best = min(free, key=lambda r: (totals[r] + (beside[r] if beside else 0.0), r))
            ranks[best].add(expert)
            totals[best] += loads[expert] / copies[expert]
    return Placement(num_experts, tuple(tuple(sorted(experts)) for experts in ranks))


def keep_experts(holders: Sequence[Sequence[int]], num_experts: int, num_replicas: int = 0) -> Placement:
    """A placement that moves few experts: holders[r] are those that rank r has today. At most
    ⌈(E + num_replicas) / ranks⌉ are on a rank. Copies that exist stay as far as num_replicas allows, and further ones
    go to the experts with the fewest. An expert that no rank has is placed too. Deterministic."""
    num_ranks = len(holders)
    held = [[rank for rank in range(num_ranks) if expert in holders[rank]] for expert in range(num_experts)]
    num_copies = min(num_experts + num_replicas, num_experts * num_ranks)
    copies = [1] * num_experts
    for _ in range(num_copies - num_experts):
        candidates = [e for e in range(num_experts) if copies[e] < num_ranks]
        copies[min(candidates, key=lambda e: (copies[e], copies[e] >= len(held[e]), e))] += 1
    room = -(-num_copies // num_ranks)
    ranks: list[set[int]] = [set() for _ in range(num_ranks)]
    for expert in sorted(range(num_experts), key=lambda e: (len(held[e]) - copies[e], e)):
        stay = sorted((len(ranks[r]), r) for r in held[expert] if len(ranks[r]) < room)
        for _, rank in stay[: copies[expert]]:
            ranks[rank].add(expert)
    ones = [1.0] * num_experts
    for expert in sorted(range(num_experts), key=lambda e: (-copies[e], e)):
        while sum(expert in kept for kept in ranks) < copies[expert]:
            free = [r for r in range(num_ranks) if len(ranks[r]) < room and expert not in ranks[r]]
            if not free:
                free = [_make_room(ranks, [0.0] * num_ranks, ones, [1] * num_experts, expert, room)]
            ranks[min(free, key=lambda r: (len(ranks[r]), r))].add(expert)
    return Placement(num_experts, tuple(tuple(sorted(experts)) for experts in ranks))


def _correlations(correlation: Tensor | None, num_experts: int) -> list[list[float]]:
    """Rows by expert; NaN, that of an expert whose load is constant, is none."""
    if correlation is None:
        return []
    if tuple(correlation.shape) != (num_experts, num_experts):
        raise ValueError(f"correlation: expected [{num_experts},{num_experts}], got {list(correlation.shape)}")
    values = correlation.double().nan_to_num(0.0)
    if bool((values.abs() > 1 + 1e-6).any()):  # corrcoef rounds
        raise ValueError(f"correlation: expected numbers from -1 to 1, got {float(values.abs().max())}")
    rows: list[list[float]] = values.tolist()
    return rows


def _make_room(
    ranks: list[set[int]], totals: list[float], loads: list[float], copies: list[int], expert: int, room: int
) -> int:
    """Moves the lightest possible expert from a full rank without `expert` to one with space; returns the rank."""
    moves = [
        (loads[other] / copies[other], other, giver, taker)
        for giver, held in enumerate(ranks) if expert not in held
        for taker, taken in enumerate(ranks) if len(taken) < room
        for other in held - taken
    ]  # fmt: skip
    share, other, giver, taker = min(moves)
    ranks[giver].remove(other)
    ranks[taker].add(other)
    totals[giver] -= share
    totals[taker] += share
    return giver
