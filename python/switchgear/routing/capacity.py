# SPDX-License-Identifier: BSD-3-Clause
"""How many tokens an expert takes: all (the default), or a multiple of the average, and what happens to the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear.functional import Routing
from switchgear.reference import check_choice
from switchgear.routing.context import Context, check_scope, is_per_sequence, sequences
from switchgear.routing.ranking import choose, finite, positions, scores_of, uniform

DROPS = ("order", "choice", "score", "reverse", "random")
OVERFLOWS = ("drop", "reroute")


def min_capacity(delta: float, hidden_size: int, num_experts: int) -> float:
    """1 / (E · erfc(√(H·δ² / (2 - δ²)))), the lower bound that LocMoE puts on the capacity of an expert
    (arXiv:2401.13920).

    delta: the paper's δ, a threshold of the similarity of tokens and experts, about 0.03 as measured there. The units
    of the bound are unverified. ValueError unless 0 < δ < √2.
    """
    if not 0 < delta < math.sqrt(2):
        raise ValueError(f"delta: expected a number between 0 and √2, got {delta}")
    tail = math.erfc(math.sqrt(hidden_size * delta**2 / (2 - delta**2)))
    return 1 / (num_experts * tail) if tail else math.inf


@dataclass(frozen=True)
class Dropless:
    """Experts take every token that chose them (arXiv:2303.06182, dynamic gating). No token depends on another one."""

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return routing


@dataclass(frozen=True)
class Capacity:
    """An expert takes at most C = ⌈factor · K · T / E⌉ tokens (arXiv:2101.03961; arXiv:2503.05066 for inference).

    Args:
        factor: in training, and in evaluation unless evaluation_factor is given. Infinite: no limit.
        drop: which choices an expert with too many keeps. "order": the first tokens, of one token the best choice; with
            it a stranger's tokens earlier in the batch push out others (arXiv:2402.05526). "choice": first choices
            before second ones, then by order (GShard, arXiv:2006.16668). "reverse": the last ones. "score": those of
            the largest weight. "random".
        overflow: "drop", and the token gets nothing for this choice; or "reroute" to the token's next best experts that
            have room, in the same order of precedence. The new weight is the old one times the ratio of the scores.
        expand: a token has ⌈K · expand⌉ candidates in all, all experts if None. A choice is dropped only if every
            candidate is full or has the token already.
        scope: "batch", or "sequence": T is its length and its tokens compete among themselves, so that no other
            sequence matters.

    Empty choices take no place and are not counted as dropped.
    """

    factor: float = 1.25
    drop: str = "order"
    overflow: str = "drop"
    scope: str = "batch"
    expand: float | None = None
    evaluation_factor: float | None = None

    needs_scores = property(lambda self: self.overflow == "reroute")

    def __post_init__(self) -> None:
        check_choice("drop", self.drop, DROPS)
        check_choice("overflow", self.overflow, OVERFLOWS)
        check_scope(self.scope)
        for name in ("factor", "evaluation_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.expand is not None and not self.expand >= 1:
            raise ValueError(f"expand: expected a number of at least 1, got {self.expand}")

    def __call__(self, routing: Routing, context: Context) -> Routing:
        ids = routing.topk_ids
        num_tokens, top_k = ids.shape
        factor = self.factor
        if not context.training and self.evaluation_factor is not None:
            factor = self.evaluation_factor
        before = routing.num_dropped
        dropped = torch.zeros((), dtype=torch.int64, device=ids.device) if before is None else before
        if math.isinf(factor) or num_tokens == 0:
            return routing._replace(num_dropped=dropped)
        limits, sequence, count = self._limits(factor, ids, routing.num_experts, context)
        groups = ids.long() if sequence is None else sequence[:, None] * routing.num_experts + ids
        groups = groups.masked_fill(ids < 0, -1)
        order = self._order(routing, context)
        keep, taken = _first(groups.flatten(), order, limits, count * routing.num_experts)
        keep = keep.view(num_tokens, top_k)
        kept_ids = ids.masked_fill(~keep, -1)
        weights = routing.topk_weights.masked_fill(~keep, 0)
        lost = (ids >= 0) & ~keep
        if self.overflow == "reroute":
            kept_ids, weights, lost = self._reroute(routing, context, kept_ids, weights, lost, limits, taken, sequence)
        return routing._replace(topk_ids=kept_ids, topk_weights=weights, num_dropped=dropped + lost.sum())

    def _limits(
        self, factor: float, ids: Tensor, num_experts: int, context: Context
    ) -> tuple[Tensor | int, Tensor | None, int]:
        """C, or C of each (sequence, expert); the sequence of each token, or None; the number of sequences."""
        num_tokens, top_k = ids.shape
        if not is_per_sequence(self.scope, context):
            return math.ceil(factor * top_k * num_tokens / num_experts), None, 1
        sequence, count = sequences(context, num_tokens, ids.device)
        sizes = torch.zeros(count, dtype=torch.int64, device=ids.device)
        sizes = sizes.scatter_add(0, sequence, torch.ones_like(sequence))
        limits = (sizes.double() * (factor * top_k) / num_experts).ceil().long()
        return limits.repeat_interleave(num_experts), sequence, count

    def _order(self, routing: Routing, context: Context) -> Tensor | None:
        """The choices t·K + k in order of precedence; None for ascending."""
        num_tokens, top_k = routing.topk_ids.shape
        device = routing.topk_ids.device
        if self.drop == "order":
            return None
        everything = torch.arange(num_tokens * top_k, device=device)
        if self.drop == "choice":
            return everything.view(num_tokens, top_k).T.flatten()
        if self.drop == "reverse":
            return everything.flip(0)
        if self.drop == "random":
            return uniform((num_tokens * top_k,), context, device).argsort()
        return finite(routing.topk_weights.detach()).flatten().sort(descending=True, stable=True).indices

    def _reroute(
        self,
        routing: Routing,
        context: Context,
        ids: Tensor,
        weights: Tensor,
        lost: Tensor,
        limits: Tensor | int,
        taken: Tensor,
        sequence: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each round a token offers its next candidate one of its lost choices, the best one first."""
        num_tokens, top_k = ids.shape
        num_experts = routing.num_experts
        scores = routing.scores if routing.scores is not None else scores_of(routing.router_logits, "softmax")
        candidates = num_experts if self.expand is None else min(math.ceil(top_k * self.expand), num_experts)
        if candidates <= top_k:
            return ids, weights, lost
        original = routing.topk_ids.clamp(min=0).long()
        # what a token chose, and lost or not, is no candidate: such an expert is full or has it
        had = torch.zeros(num_tokens, num_experts, dtype=torch.int8, device=ids.device)
        had = had.scatter_add(1, original, (routing.topk_ids >= 0).to(torch.int8)) > 0
        ranking = choose(scores.detach().masked_fill(had, -math.inf), candidates - top_k).long()
        old_score = scores.gather(1, original)
        tiny = torch.finfo(scores.dtype).tiny
        for place in range(candidates - top_k):
            expert = ranking[:, place]
            offered = lost.any(1) & ~had.gather(1, expert[:, None])[:, 0]
            slot = lost.to(torch.int8).argmax(1, keepdim=True)  # the first of the lost ones
            group = expert if sequence is None else sequence * num_experts + expert
            group = group.masked_fill(~offered, -1)
            order = self._token_order(routing, context, slot)
            accepted, taken = _first(group, order, limits, taken.shape[0], taken)
            accepted = accepted & offered
            ratio = scores.gather(1, expert[:, None]) / old_score.gather(1, slot).clamp(min=tiny)
            weight = routing.topk_weights.gather(1, slot) * ratio
            here = torch.zeros_like(lost).scatter(1, slot, accepted[:, None])
            ids = torch.where(here, expert[:, None].to(ids.dtype), ids)
            weights = torch.where(here, weight, weights)
            lost = lost & ~here
        return ids, weights, lost

    def _token_order(self, routing: Routing, context: Context, slot: Tensor) -> Tensor | None:
        """The tokens in order of precedence when each of them offers the choice `slot` [T,1]."""
        num_tokens = slot.shape[0]
        if self.drop == "order":
            return None
        if self.drop == "choice":
            return slot[:, 0].argsort(stable=True)
        if self.drop == "reverse":
            return torch.arange(num_tokens - 1, -1, -1, device=slot.device)
        if self.drop == "random":
            return uniform((num_tokens,), context, slot.device).argsort()
        weight = finite(routing.topk_weights.detach()).gather(1, slot)[:, 0]
        return weight.sort(descending=True, stable=True).indices


def _first(
    groups: Tensor, order: Tensor | None, limits: Tensor | int, num_groups: int, taken: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which of groups [P] (-1 for none) are among the first limits[group] - taken[group] of their group, in `order`;
    and how many places of each group are taken then."""
    if order is None:
        place, demand = positions(groups, num_groups)
    else:
        in_order, demand = positions(groups[order], num_groups)
        place = torch.empty_like(in_order).scatter(0, order, in_order)
    at = groups.clamp(min=0)
    if taken is not None:
        place = place + taken[at]
        demand = demand + taken
    keep = (groups >= 0) & (place < (limits if isinstance(limits, int) else limits[at]))
    return keep, demand.clamp(max=limits) if isinstance(limits, int) else demand.minimum(limits)
