# SPDX-License-Identifier: BSD-3-Clause
"""Partitions of the neurons of a dense feed-forward network into experts. Neuron n is row n of gate and up and column n
of down; the network is the sum of its neurons, so any partition is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from switchgear import ops
from switchgear.checks import Finite, Seed, Shape, Size, checked
from switchgear.integrations.blocks import FeedForward

Method = Literal["random", "contiguous", "interleave", "cluster", "gradient", "domain_masks"]
LLOYD_STEPS = 20


@dataclass(frozen=True)
class Partition:
    """The neurons of each expert and of the shared expert, as ascending int64 indices.

    is_split: each neuron is in exactly one of them, so that all of them together are the dense network. Otherwise
    neurons are in several experts, or in none (interleave with shared ones, domain masks).
    """

    experts: tuple[Tensor, ...]
    shared: Tensor
    is_split: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each expert."""
        return tuple(len(index) for index in self.experts)

    @property
    def num_experts(self) -> int:
        """E, without the shared expert."""
        return len(self.experts)


@checked
def partition(
    weights: FeedForward,
    num_experts: Size,
    method: Method = "random",
    *,
    shared: int | float = 0,
    importance: Tensor | None = None,
    keep: Finite = 0.5,
    seed: Seed = 0,
) -> Partition:
    """Divides the neurons of a network; see split_dense for the methods.

    Raises:
        ValueError: an unknown method, a width that does not divide, or importance missing or of another shape.
    """
    width = weights.intermediate_size
    if method == "domain_masks":
        return _split_by_masks(_read_importance(importance, width, method), num_experts, keep, shared)
    in_each = method == "interleave" and isinstance(shared, float)  # a fraction of each expert, not of the network
    num_shared = 0 if in_each else _count_shared(shared, num_experts, width)
    rest = width - num_shared
    if rest % num_experts or rest < num_experts:
        raise ValueError(
            f"num_experts: expected a divisor of the {rest} neurons that are not shared ({width} in all), "
            f"got {num_experts}"
        )
    if method == "gradient":
        return _split_by_gradient(_read_importance(importance, width, method), num_experts, num_shared)
    ranked = torch.arange(width)
    if importance is not None:  # the most important neurons are shared
        ranked = _read_importance(importance, width, method).mean(0).argsort(descending=True, stable=True)
    if method == "interleave":
        size = rest // num_experts
        if in_each:
            return _interleave(ranked, num_experts, _count_shared(shared, 1, size), size)
        return _interleave(ranked, num_experts, num_shared, num_shared + size)
    first, order = ranked[:num_shared].sort().values, ranked[num_shared:].sort().values
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        order = order[torch.randperm(rest, generator=generator)]
    elif method == "cluster":
        rows = weights.up if weights.gate is None else weights.gate
        directions = F.normalize(rows[order.to(rows.device)].detach().float().cpu(), dim=1)
        ids = balanced_kmeans(directions, num_experts, seed)
        order = order[ids.argsort(stable=True)]
    return Partition(tuple(part.sort().values for part in order.chunk(num_experts)), first)


@checked
def balanced_kmeans(rows: Annotated[Tensor, Shape("N", "D")], num_clusters: Size, seed: Seed = 0) -> Tensor:
    """[N] int64: a cluster for each of rows [N,D] float32, all of N / C rows, by Lloyd's steps with the balanced
    assignment of the native op. The result with the least squared distance is returned."""
    if rows.dtype is not torch.float32:
        raise TypeError(f"rows: expected torch.float32, got {rows.dtype}")
    if num_clusters > len(rows):
        raise ValueError(f"num_clusters: expected 1 to {len(rows)}, got {num_clusters}")
    generator = torch.Generator().manual_seed(seed)
    centers = rows[torch.randperm(len(rows), generator=generator)[:num_clusters]]
    best, best_ids = math.inf, torch.zeros(len(rows), dtype=torch.int64)
    ids: Tensor | None = None
    for _ in range(LLOYD_STEPS):
        distances = torch.cdist(rows, centers).square()
        new = ops.assign_balanced(-distances, None, 1, -1.0, 200).long()
        total = float(distances.gather(1, new[:, None]).sum())
        if total < best:
            best, best_ids = total, new
        if ids is not None and torch.equal(new, ids):
            break
        ids = new
        sums = torch.zeros_like(centers).index_add_(0, ids, rows)
        centers = sums / torch.bincount(ids, minlength=num_clusters)[:, None]
    return best_ids


def _count_shared(shared: int | float, num_experts: int, width: int) -> int:
    """A whole number counts shared experts as wide as the others; a fraction is one of the neurons."""
    if not shared:
        return 0
    if isinstance(shared, int):
        if shared < 0 or width % (num_experts + shared):
            raise ValueError(
                f"shared: expected a number such that {num_experts} + shared divides {width}, got {shared}"
            )
        return width // (num_experts + shared) * shared
    if not 0 <= shared < 1:
        raise ValueError(f"shared: expected a fraction in [0, 1) or a whole number, got {shared}")
    return width - (width - round(shared * width)) // num_experts * num_experts  # the rest divides


def _interleave(ranked: Tensor, num_experts: int, num_shared: int, size: int) -> Partition:
    """Each expert has the first neurons and every E-th of the others, cut to its size: the last ones may be in none."""
    shared, others = ranked[:num_shared], ranked[num_shared:]
    experts = tuple(torch.cat((shared, others[e::num_experts]))[:size].sort().values for e in range(num_experts))
    return Partition(experts, ranked[:0], not num_shared or num_experts == 1)


def _read_importance(importance: Tensor | None, width: int, method: str) -> Tensor:
    """[G,I] float32 on the CPU."""
    if importance is None:
        raise ValueError(f"importance: expected a tensor [I] or [G,I] for method={method!r}, got None")
    rows = importance.detach().float().cpu()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[1] != width:
        raise ValueError(f"importance: expected shape [{width}] or [G, {width}], got {list(importance.shape)}")
    if not rows.isfinite().all():
        raise ValueError("importance: expected finite numbers, got NaN or infinities")
    return rows


def _split_by_gradient(importance: Tensor, num_experts: int, num_shared: int) -> Partition:
    """The most important neurons are shared. The others: with a row of importance per expert, such that the sum of the
    importance of each expert's neurons to it is near its maximum; with one row, dealt out in order of importance."""
    groups = len(importance)
    if groups not in (1, num_experts):
        raise ValueError(f"importance: expected 1 or {num_experts} rows, one per expert, got {groups}")
    if groups == 1:
        ranked = importance[0].argsort(descending=True, stable=True)
        turns = ranked[num_shared:].view(-1, num_experts)
        turns = torch.where((torch.arange(len(turns)) % 2 == 1)[:, None], turns.flip(1), turns)  # boustrophedon
        return Partition(
            tuple(turns[:, e].sort().values for e in range(num_experts)), ranked[:num_shared].sort().values
        )
    is_shared = _vote(importance, num_shared)
    rest = (~is_shared).nonzero().flatten()
    values = importance[:, rest].T.contiguous()
    ids = ops.assign_balanced(values / values.abs().max().clamp(min=1e-30), None, 1, -1.0, 1000).long()
    return Partition(tuple(rest[ids == e] for e in range(num_experts)), is_shared.nonzero().flatten())


def _vote(importance: Tensor, count: int) -> Tensor:
    """[I] bool: the `count` neurons that most experts have among the best of their row, as many as they get; after each
    round of votes the best are chosen among the others (LLaMA-MoE v2)."""
    num_experts, width = importance.shape
    size = (width - count) // num_experts
    ranked = importance.argsort(dim=1, descending=True, stable=True)
    taken = torch.zeros(width, dtype=torch.bool)
    while missing := count - int(taken.sum()):
        votes = torch.bincount(ranked[:, :size].flatten(), minlength=width)
        taken[(votes == votes.max()).nonzero().flatten()[:missing]] = True
        ranked = ranked[~taken[ranked]].view(num_experts, -1)
    return taken


def _split_by_masks(importance: Tensor, num_experts: int, keep: float, shared: int | float) -> Partition:
    """Read-ME: each domain keeps its top share of neurons; the intersection of all is shared, the rest of a mask is
    the domain's expert."""
    if importance.shape[0] != num_experts:
        raise ValueError(f"importance: expected {num_experts} rows, one per domain, got {importance.shape[0]}")
    if shared:
        raise ValueError(f"shared: expected 0 for domain masks, whose intersection is shared; got {shared}")
    width = importance.shape[1]
    count = round(keep * width)
    if not 0 < keep <= 1 or not count:
        raise ValueError(f"keep: expected a fraction in (0, 1] that keeps a neuron, got {keep}")
    best = importance.argsort(dim=1, descending=True, stable=True)[:, :count]
    masks = torch.zeros(importance.shape, dtype=torch.bool).scatter_(1, best, True)
    residual = masks.all(0)
    if torch.equal(masks.any(0), residual):
        raise ValueError(f"importance: expected domains that keep different neurons, got the same {count} for all")
    experts = tuple((mask & ~residual).nonzero().flatten() for mask in masks)
    return Partition(experts, residual.nonzero().flatten(), False)
