# SPDX-License-Identifier: BSD-3-Clause
"""How many tokens an expert accepts: all (the default) or a multiple of the average; and what happens to the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from switchgear import ops, reference
from switchgear.checks import PositiveOrInf, Range, checked
from switchgear.functional import Routing
from switchgear.routing.context import Context, Scope, is_per_sequence, sequences
from switchgear.routing.ranking import choose, is_open, keep_choices, left_aligned, scores_of, total_weight, uniform

Drop = Literal["order", "choice", "score", "reverse", "random"]
Overflow = Literal["drop", "reroute", "overselect"]


@dataclass(frozen=True)
class Dropless:
    """Experts accept every token that chose them (dynamic gating, arXiv:2303.06182). Tokens are independent."""

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return routing


@checked
@dataclass(frozen=True)
class Capacity:
    """An expert accepts at most C = max(minimum, ⌈factor · N / E⌉) tokens, where N is the number of choices that the
    tokens made: K·T if each of T tokens chose K experts (arXiv:2101.03961; arXiv:2503.05066 for inference). Rounding up
    is that of the second paper; the code of Switch Transformer and of OpenMoE truncates.

    Empty choices, as of masked experts, are not in N, use no capacity and do not count as dropped. So neither the other
    tokens' numbers of choices nor padding behind them changes what happens to a sequence.

    Args:
        factor: in training, and in evaluation unless evaluation_factor is given. Infinity: no limit.
        drop: which choices an overfull expert keeps. "order": the first tokens, and each token's best choice first;
            other users' tokens earlier in the batch can then displace others (arXiv:2402.05526). "choice": first
            choices before second ones, then by order (GShard, arXiv:2006.16668). "reverse": the last ones. "score":
            those of the largest score (Routing.scores, else the softmax of the logits), which no normalisation of a
            token's weights changes. "random".
        overflow: "drop": the token gets nothing for this choice; or "reroute": the choice goes to the token's next best
            expert with free capacity, in the same order of precedence. Its weight is scaled by the ratio of the scores.
            "overselect": each token first chooses all of its candidates, and then each expert drops those beyond its
            capacity. With `expand` a token then keeps its k best of them, without it all: it may have more than K.
        expand: number of candidates of a token with k choices, ⌈k · expand⌉; all experts if None, but never those of
            score 0, as masked ones. With "reroute" a choice is dropped only if each candidate is full or already has
            the token.
        scope: "batch", or "sequence": N is that of a sequence and only its own tokens compete, so other sequences have
            no effect.
        minimum: the smallest capacity.
        renormalize: scale the weights that a token keeps to the sum that they had before, for routers that normalise
            the weights of their choices (norm_topk_prob; arXiv:2503.05066). A token without experts stays without.
        prefill_only: in evaluation, no limit for sequences of one token, a decoding step (arXiv:2503.05066). Known from
            x [B,1,H] or Context.sequence_length.
    """

    factor: PositiveOrInf = 1.25
    drop: Drop = "order"
    overflow: Overflow = "drop"
    scope: Scope = "batch"
    expand: Annotated[float, Range(1, math.inf, "high")] | None = None
    evaluation_factor: PositiveOrInf | None = None
    minimum: Annotated[int, Range(0, math.inf)] = 0
    renormalize: bool = False
    prefill_only: bool = False

    @property
    def needs_scores(self) -> bool:
        """Whether full experts rank tokens by their scores, or send them on to others, which takes those of all."""
        return self.drop == "score" or self.overflow != "drop"

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return self.limited(routing, context, count_choices(routing))

    def limited(self, routing: Routing, context: Context, choices: Tensor, scale: float = 1.0) -> Routing:
        """The routing within `scale` times the limits that follow from choices [T] int64, the number of choices of each
        token."""
        ids, num_experts = routing.topk_ids, routing.num_experts
        num_tokens, top_k = ids.shape
        factor = self.factor
        if not context.training and self.evaluation_factor is not None:
            factor = self.evaluation_factor
        factor *= scale
        before = routing.num_dropped
        dropped = torch.zeros((), dtype=torch.int64, device=ids.device) if before is None else before
        decodes = self.prefill_only and not context.training and 1 in (num_tokens, context.sequence_length)
        if factor == math.inf or num_tokens == 0 or decodes:
            return routing._replace(num_dropped=dropped)
        limits, sequence = self._limits(factor, choices, num_experts, context)
        wanted, ranking, candidates = routing, None, top_k
        scores = routing.scores
        if scores is None and self.needs_scores:
            scores = scores_of(routing.router_logits, "softmax")
        if self.overflow != "drop":
            assert scores is not None
            others, most = _open(routing, scores.detach()), num_experts - 1
            if self.overflow == "overselect" or self.expand is not None:
                others, most = _others(routing, others, self.expand)
            if self.overflow == "overselect":
                routing = _overselected(routing, scores, others, most)
            else:
                ranking, candidates = others.float(), top_k + most
        kept_ids = ops.fit_capacity(
            routing.topk_ids, self._priorities(routing, scores, context), ranking, sequence, limits, num_experts,
            self.drop if self.drop in reference.DROPS else "priority", candidates,
        )  # fmt: skip
        weights = routing.topk_weights.masked_fill(kept_ids < 0, 0)
        if ranking is not None:
            assert scores is not None
            moved = (kept_ids != ids) & (kept_ids >= 0)
            weights = torch.where(moved, weights * _ratio(scores, kept_ids, ids), weights)
        routing = routing._replace(topk_ids=kept_ids, topk_weights=weights)
        if self.overflow == "overselect" and self.expand is not None:
            routing = _cut_back(routing, wanted)
        if self.renormalize:
            routing = routing._replace(topk_weights=renormalize_weights(routing, wanted))
        lost = count_choices(wanted) - count_choices(routing)
        return _narrowed(routing._replace(num_dropped=dropped + lost.clamp(min=0).sum()))

    def _limits(
        self, factor: float, choices: Tensor, num_experts: int, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """C of each sequence [B] int32, and the sequence of each token [T] int32, None if all tokens compete."""
        if not is_per_sequence(self.scope, context):
            sequence, total = None, choices.sum().view(1)
        else:
            index, count = sequences(context, len(choices), choices.device)
            total = torch.zeros(count, dtype=torch.int64, device=choices.device).scatter_add(0, index, choices)
            sequence = index.to(torch.int32)
        limits = _rounded_up(total.double() * factor / num_experts)
        return limits.clamp(min=min(self.minimum, _MOST)).to(torch.int32), sequence

    def _priorities(self, routing: Routing, scores: Tensor | None, context: Context) -> Tensor | None:
        if self.drop == "score":
            assert scores is not None
            return scores.detach().gather(1, routing.topk_ids.clamp(min=0).long()).float()
        if self.drop == "random":
            return uniform(tuple(routing.topk_ids.shape), context, routing.topk_ids.device)
        return None


_MOST = 2**31 - 1  # of a limit, an int32


def count_choices(routing: Routing) -> Tensor:
    """The number of choices of each token, [T] int64."""
    return (routing.topk_ids >= 0).sum(1)


def renormalize_weights(routing: Routing, wanted: Routing) -> Tensor:
    """The weights [T,K] of routing, scaled to the sums of each token's in wanted."""
    total, whole = total_weight(routing), total_weight(wanted)
    return routing.topk_weights * (whole / torch.where(total == 0, torch.ones_like(total), total))


def _rounded_up(values: Tensor) -> Tensor:
    """⌈values⌉ int64, at most _MOST, of float64 products of a number as it is written: 1.1 · 100 / 10 is 11, not 12."""
    return (values * (1 - 2**-48)).ceil().clamp(max=_MOST).long()


def _ratio(scores: Tensor, new_ids: Tensor, old_ids: Tensor) -> Tensor:
    """scores[t, new] / scores[t, old], [T,K]; scores [T,E]."""
    new, old = (scores.gather(1, ids.clamp(min=0).long()) for ids in (new_ids, old_ids))
    return new / old.clamp(min=torch.finfo(scores.dtype).tiny)


def _open(routing: Routing, scores: Tensor) -> Tensor:
    """scores [T,E] with 0 for experts that Masked closes."""
    return scores.masked_fill(~is_open(routing.router_logits), 0)


def _others(routing: Routing, scores: Tensor, expand: float | None) -> tuple[Tensor, int]:
    """scores [T,E] with 0 for all but a token's candidates beyond its choices, and the most that a token can have."""
    ids = routing.topk_ids
    top_k, num_experts = ids.shape[1], routing.num_experts
    had = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.bool, device=ids.device)
    had = had.scatter(1, ids.long() + 1, True)[:, 1:]  # holes are noted in the first column
    scores = scores.masked_fill(had, 0)
    if expand is None:
        return scores, num_experts - 1
    most = min(math.ceil(top_k * expand) - top_k, num_experts - 1)
    best = choose(scores, max(most, 1))
    count = count_choices(routing)[:, None]
    within = torch.arange(best.shape[1], device=ids.device) < _rounded_up(count.double() * expand) - count
    return scores.masked_fill(~torch.zeros_like(had).scatter(1, best.long(), within), 0), most


def _overselected(routing: Routing, scores: Tensor, others: Tensor, most: int) -> Routing:
    """The routing with each token's others behind its choices, the best first. Their weights are the token's first one,
    scaled by the ratio of the scores."""
    ids, weights = routing.topk_ids, routing.topk_weights
    if most == 0:
        return routing
    best = choose(others, most)
    is_other = (others.gather(1, best.long()) > 0) & (ids[:, :1] >= 0)
    extra = weights[:, :1] * _ratio(scores, best, ids[:, :1])
    return routing._replace(
        topk_ids=torch.cat((ids, best.masked_fill(~is_other, -1)), 1),
        topk_weights=torch.cat((weights, extra.masked_fill(~is_other, 0)), 1),
    )


def _cut_back(routing: Routing, wanted: Routing) -> Routing:
    """The routing with no more choices of a token than in wanted: its first ones, which are its best."""
    full, top_k = left_aligned(routing), wanted.topk_ids.shape[1]
    full = full._replace(topk_ids=full.topk_ids[:, :top_k], topk_weights=full.topk_weights[:, :top_k])
    within = torch.arange(top_k, device=full.topk_ids.device) < count_choices(wanted)[:, None]
    return keep_choices(full, within)


def _narrowed(routing: Routing) -> Routing:
    """The routing without columns beyond E, which no token can fill."""
    num_experts = routing.num_experts
    if routing.topk_ids.shape[1] <= num_experts:
        return routing
    full = left_aligned(routing)
    return full._replace(topk_ids=full.topk_ids[:, :num_experts], topk_weights=full.topk_weights[:, :num_experts])
