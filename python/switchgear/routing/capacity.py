# SPDX-License-Identifier: BSD-3-Clause
"""How many tokens an expert accepts: all (the default) or a multiple of the average; and what happens to the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from switchgear import ops, reference
from switchgear.functional import Routing
from switchgear.reference import check_choice
from switchgear.routing.context import Context, check_scope, is_per_sequence, sequences
from switchgear.routing.ranking import choose, scores_of, uniform

DROPS = ("order", "choice", "score", "reverse", "random")
OVERFLOWS = ("drop", "reroute", "overselect")


def min_capacity(delta: float, hidden_size: int, num_experts: int) -> float:
    """1 / (E · erfc(√(H·δ² / (2 - δ²)))): LocMoE's lower bound on the capacity of an expert (arXiv:2401.13920).

    delta: the paper's δ, a threshold on the similarity of tokens and experts, measured there as about 0.03. The unit
    of the bound is unverified. ValueError unless 0 < δ < √2.
    """
    if not 0 < delta < math.sqrt(2):
        raise ValueError(f"delta: expected a number between 0 and √2, got {delta}")
    tail = math.erfc(math.sqrt(hidden_size * delta**2 / (2 - delta**2)))
    return 1 / (num_experts * tail) if tail else math.inf


@dataclass(frozen=True)
class Dropless:
    """Experts accept every token that chose them (dynamic gating, arXiv:2303.06182). Tokens are independent."""

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return routing


@dataclass(frozen=True)
class Capacity:
    """An expert accepts at most C = max(minimum, ⌈factor · K · T / E⌉) tokens (arXiv:2101.03961; arXiv:2503.05066 for
    inference).

    Args:
        factor: in training, and in evaluation unless evaluation_factor is given. Infinity: no limit.
        drop: which choices an overfull expert keeps. "order": the first tokens, and each token's best choice first;
            other users' tokens earlier in the batch can then displace others (arXiv:2402.05526). "choice": first
            choices before second ones, then by order (GShard, arXiv:2006.16668). "reverse": the last ones. "score":
            those of the largest weight. "random".
        overflow: "drop": the token gets nothing for this choice; or "reroute": the choice goes to the token's next best
            expert with free capacity, in the same order of precedence. Its weight is scaled by the ratio of the scores.
            "overselect": each token first chooses all of its candidates, and then the others are dropped; so a token
            may have more than K experts (that all survivors stay is a choice of ours).
        expand: number of candidates per token, ⌈K · expand⌉; all experts if None. With "reroute" a choice is dropped
            only if each candidate is full or already has the token.
        scope: "batch", or "sequence": T is the length of a sequence and only its own tokens compete, so other sequences
            have no effect.
        minimum: the smallest capacity.
        renormalize: scale the weights that a token keeps to the sum that they had before, for routers that normalise
            the weights of their choices (norm_topk_prob; arXiv:2503.05066). A token without experts stays without.
        prefill_only: in evaluation, no limit for sequences of one token, a decoding step (arXiv:2503.05066). Known from
            x [B,1,H] or Context.sequence_length.

    Empty choices use no capacity and do not count as dropped.
    """

    factor: float = 1.25
    drop: str = "order"
    overflow: str = "drop"
    scope: str = "batch"
    expand: float | None = None
    evaluation_factor: float | None = None
    minimum: int = 0
    renormalize: bool = False
    prefill_only: bool = False

    @property
    def needs_scores(self) -> bool:
        """Whether full experts send tokens on to others, which takes the scores of all experts."""
        return self.overflow != "drop"

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
        if self.minimum < 0:
            raise ValueError(f"minimum: expected at least 0, got {self.minimum}")

    def __call__(self, routing: Routing, context: Context) -> Routing:
        ids = routing.topk_ids
        num_tokens, top_k = ids.shape
        factor = self.factor
        if not context.training and self.evaluation_factor is not None:
            factor = self.evaluation_factor
        before = routing.num_dropped
        dropped = torch.zeros((), dtype=torch.int64, device=ids.device) if before is None else before
        decodes = self.prefill_only and not context.training and 1 in (num_tokens, context.sequence_length)
        if math.isinf(factor) or num_tokens == 0 or decodes:
            return routing._replace(num_dropped=dropped)
        limits, sequence = self._limits(factor, ids, routing.num_experts, context)
        scores, candidates = None, 0
        wanted = routing
        if self.overflow != "drop":
            scores = routing.scores if routing.scores is not None else scores_of(routing.router_logits, "softmax")
            candidates = routing.num_experts
            if self.expand is not None:
                candidates = min(math.ceil(top_k * self.expand), candidates)
            if self.overflow == "overselect":
                routing = _overselected(routing, scores, candidates)
                ids, scores, candidates = routing.topk_ids, None, 0
        kept_ids = ops.fit_capacity(
            ids, self._priorities(routing, context), None if scores is None else scores.detach().float(), sequence,
            limits, routing.num_experts, self.drop if self.drop in reference.DROPS else "priority", candidates,
        )  # fmt: skip
        weights = routing.topk_weights.masked_fill(kept_ids < 0, 0)
        if scores is not None:
            moved = (kept_ids != ids) & (kept_ids >= 0)
            weights = torch.where(moved, weights * _ratio(scores, kept_ids, ids), weights)
        if self.renormalize:
            total = weights.sum(1, keepdim=True)
            whole = wanted.topk_weights.sum(1, keepdim=True)
            weights = weights * (whole / torch.where(total == 0, torch.ones_like(total), total))
        lost = (wanted.topk_ids >= 0).sum(1) - (kept_ids >= 0).sum(1)
        return routing._replace(topk_ids=kept_ids, topk_weights=weights, num_dropped=dropped + lost.clamp(min=0).sum())

    def _limits(self, factor: float, ids: Tensor, num_experts: int, context: Context) -> tuple[Tensor, Tensor | None]:
        """C of each sequence [B] int32, and the sequence of each token [T] int32, None if all tokens compete."""
        num_tokens, top_k = ids.shape
        if not is_per_sequence(self.scope, context):
            limit = max(math.ceil(factor * top_k * num_tokens / num_experts), self.minimum)
            limit = min(limit, num_tokens * top_k)
            return torch.full((1,), limit, dtype=torch.int32, device=ids.device), None
        sequence, count = sequences(context, num_tokens, ids.device)
        sizes = torch.zeros(count, dtype=torch.int64, device=ids.device)
        sizes = sizes.scatter_add(0, sequence, torch.ones_like(sequence))
        limits = (sizes.double() * (factor * top_k) / num_experts).ceil()
        limits = limits.clamp(min=self.minimum).clamp(max=num_tokens * top_k)
        return limits.to(torch.int32), sequence.to(torch.int32)

    def _priorities(self, routing: Routing, context: Context) -> Tensor | None:
        if self.drop == "score":
            return routing.topk_weights.detach().float()
        if self.drop == "random":
            return uniform(tuple(routing.topk_ids.shape), context, routing.topk_ids.device)
        return None


@dataclass(frozen=True)
class CapacityByKind:
    """Two capacities: ⌈factor · τ·K·T / (τ·N + F)⌉ tokens for each of N real experts, ⌈factor · K·T / (τ·N + F)⌉ for
    each of the F = free_experts last ones, which cost nothing (MoE++, arXiv:2410.07348; constants unverified).

    limit: a Capacity that drops, whose factor is the formula's; evaluation_factor alike.
    """

    free_experts: int
    tau: float = 0.75
    limit: Capacity = field(default_factory=partial(Capacity, 1.1))

    def __post_init__(self) -> None:
        check_choice("limit.overflow", self.limit.overflow, ("drop",))
        if self.free_experts < 0:
            raise ValueError(f"free_experts: expected at least 0, got {self.free_experts}")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau: expected a positive number, got {self.tau}")

    def __call__(self, routing: Routing, context: Context) -> Routing:
        num_experts = routing.num_experts
        if self.free_experts > num_experts:
            raise ValueError(f"free_experts: expected at most {num_experts} (num_experts), got {self.free_experts}")
        real = num_experts - self.free_experts
        unit = num_experts / (self.tau * real + self.free_experts)  # factor 1 of a Capacity is K·T / num_experts
        is_free = routing.topk_ids >= real
        limited = self._limited(routing, ~is_free, self.tau * unit, context)
        others = self._limited(routing, is_free, unit, context)
        topk_ids = torch.where(is_free, others.topk_ids, limited.topk_ids)
        topk_weights = torch.where(is_free, others.topk_weights, limited.topk_weights)
        assert limited.num_dropped is not None
        assert others.num_dropped is not None
        before = 0 if routing.num_dropped is None else routing.num_dropped
        num_dropped = limited.num_dropped + others.num_dropped - before
        return routing._replace(topk_ids=topk_ids, topk_weights=topk_weights, num_dropped=num_dropped)

    def _limited(self, routing: Routing, kind: Tensor, scale: float, context: Context) -> Routing:
        """The choices of one kind, which only displace each other, within `scale` times the limit."""
        evaluation = self.limit.evaluation_factor
        limit = replace(
            self.limit,
            factor=self.limit.factor * scale,
            evaluation_factor=None if evaluation is None else evaluation * scale,
        )
        return limit(routing._replace(topk_ids=routing.topk_ids.masked_fill(~kind, -1)), context)


def _ratio(scores: Tensor, new_ids: Tensor, old_ids: Tensor) -> Tensor:
    """scores[t, new] / scores[t, old], [T,K]; scores [T,E]."""
    new, old = (scores.gather(1, ids.clamp(min=0).long()) for ids in (new_ids, old_ids))
    return new / old.clamp(min=torch.finfo(scores.dtype).tiny)


def _overselected(routing: Routing, scores: Tensor, candidates: int) -> Routing:
    """The routing with each token's next best experts behind its choices, up to `candidates` in all. Their weights are
    the token's first one, scaled by the ratio of the scores."""
    ids, weights = routing.topk_ids, routing.topk_weights
    more = candidates - ids.shape[1]
    if more <= 0:
        return routing
    had = (
        torch.zeros_like(scores[:, :1])
        .expand_as(scores)
        .scatter_add(1, ids.clamp(min=0).long(), (ids >= 0).to(scores.dtype))
    )
    others = choose(scores.detach().masked_fill(had > 0, -math.inf), more)
    has_any = ids[:, :1] >= 0
    extra = weights[:, :1] * _ratio(scores, others, ids[:, :1])
    return routing._replace(
        topk_ids=torch.cat((ids, others.masked_fill(~has_any, -1)), 1),
        topk_weights=torch.cat((weights, extra.masked_fill(~has_any, 0)), 1),
    )
