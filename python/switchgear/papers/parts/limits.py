# SPDX-License-Identifier: BSD-3-Clause
"""Limits of single papers: capacities by kind of expert, and a lower bound on a capacity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from switchgear.checks import Count, Positive, checked
from switchgear.functional import Routing
from switchgear.routing.capacity import Capacity, count_choices, renormalize_weights
from switchgear.routing.context import Context


def min_capacity(delta: float, hidden_size: int, num_experts: int) -> float:
    """1 / (E · erfc(√(H·δ² / (2 - δ²)))): LocMoE's lower bound on the capacity of an expert (arXiv:2401.13920).

    delta: the paper's δ, a threshold on the similarity of tokens and experts, measured there as about 0.03. The unit
    of the bound is unverified. ValueError unless 0 < δ < √2.
    """
    if not 0 < delta < math.sqrt(2):
        raise ValueError(f"delta: expected a number between 0 and √2, got {delta}")
    tail = math.erfc(math.sqrt(hidden_size * delta**2 / (2 - delta**2)))
    return 1 / (num_experts * tail) if tail else math.inf


@checked
@dataclass(frozen=True)
class CapacityByKind:
    """Two capacities: ⌈factor · τ·K·T / (τ·N + F)⌉ tokens for each of N real experts, ⌈factor · K·T / (τ·N + F)⌉ for
    each of the F = free_experts last ones, which cost nothing (MoE++, arXiv:2410.07348; constants unverified). K·T is
    the number of choices, without empty ones.

    limit: a Capacity that drops, whose factor is the formula's; evaluation_factor alike.
    """

    free_experts: Count
    tau: Positive = 0.75
    limit: Capacity = field(default_factory=partial(Capacity, 1.1))

    def __post_init__(self) -> None:
        if self.limit.overflow != "drop":
            raise ValueError(f"limit.overflow: expected drop, got {self.limit.overflow!r}")

    @property
    def needs_scores(self) -> bool:
        """Whether its limit does."""
        return self.limit.needs_scores

    def __call__(self, routing: Routing, context: Context) -> Routing:
        num_experts = routing.num_experts
        if self.free_experts > num_experts:
            raise ValueError(f"free_experts: expected at most {num_experts} (num_experts), got {self.free_experts}")
        real = num_experts - self.free_experts
        unit = num_experts / (self.tau * real + self.free_experts)  # factor 1 of a Capacity is choices / num_experts
        is_free = routing.topk_ids >= real
        limited = self._limited(routing, ~is_free, self.tau * unit, context)
        others = self._limited(routing, is_free, unit, context)
        topk_ids = torch.where(is_free, others.topk_ids, limited.topk_ids)
        topk_weights = torch.where(is_free, others.topk_weights, limited.topk_weights)
        assert limited.num_dropped is not None
        assert others.num_dropped is not None
        before = 0 if routing.num_dropped is None else routing.num_dropped
        num_dropped = limited.num_dropped + others.num_dropped - before
        kept = routing._replace(topk_ids=topk_ids, topk_weights=topk_weights, num_dropped=num_dropped)
        return kept._replace(topk_weights=renormalize_weights(kept, routing)) if self.limit.renormalize else kept

    def _limited(self, routing: Routing, kind: Tensor, scale: float, context: Context) -> Routing:
        """The choices of one kind, which only displace each other, within `scale` times the limit."""
        evaluation = self.limit.evaluation_factor
        limit = replace(
            self.limit,
            factor=self.limit.factor * scale,
            evaluation_factor=None if evaluation is None else evaluation * scale,
            renormalize=False,  # a token's weights of both kinds have one sum
        )
        part = routing._replace(topk_ids=routing.topk_ids.masked_fill(~kind, -1))
        return limit.limited(part, context, count_choices(routing))
