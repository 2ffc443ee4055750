# SPDX-License-Identifier: BSD-3-Clause
"""Selections of single papers: by sign, without experts that add little, for uncertain tokens, of tokens that a block
processes at all, and with equally many tokens per expert."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from switchgear import ops
from switchgear.checks import Fraction, Number, PositiveOrInf, Range, Size, checked
from switchgear.functional import Routing, route
from switchgear.routing.context import NOTHING_KNOWN, Context, Scope, Select, is_per_sequence, sequences
from switchgear.routing.expert_choice import ExpertChoice
from switchgear.routing.ranking import (
    ScoreFunction,
    choose,
    finite,
    keep_choices,
    left_aligned,
    ranks,
    scores_of,
    total_weight,
    trim,
)
from switchgear.routing.selection import as_rows, take


@dataclass(frozen=True)
class Positive:
    """The experts with positive logits, in ascending order, weighted by them: a ReLU as the router (ReMoE,
    arXiv:2412.14711). A token may have none or all. The bias moves the choice only.

    An expert with a logit NaN is chosen, too, with weight 0: what is NaN in the token stays so in the result, where no
    expert would make it 0."""

    score_function: ClassVar[str] = "sigmoid"  # a score of each expert alone, for losses and capacities

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = as_rows(router_logits)
        logits = finite(router_logits)
        num_tokens, num_experts = logits.shape
        keep = ((logits if bias is None else logits + finite(bias)) > 0) | router_logits.isnan()
        ids = torch.arange(num_experts, dtype=torch.int32, device=logits.device).expand(num_tokens, -1)
        routing = Routing(ids, logits.relu(), router_logits, num_experts)
        return trim(left_aligned(keep_choices(routing, keep)))


@checked
@dataclass(frozen=True)
class SkipBelow:
    """Another selection without the experts that add little: those with a weight below `ratio` times the token's
    largest. The other weights are scaled up to the same sum (arXiv:2402.14800, with the median ratio of a layer, which
    `calibrate` measures). ratio = 0 skips nothing; ratio = 1 keeps only the best.

    protect: the fraction of tokens, by largest Context.importance, that skip nothing (arXiv:2410.06270: 0.02).
    """

    select: Select
    ratio: Fraction
    protect: Fraction = 0.0

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        routing = self.select(router_logits, context, bias)
        weights = routing.topk_weights
        keep = weights.detach() >= self.ratio * weights.detach().amax(-1, keepdim=True)
        if self.protect:
            importance = context.require("importance", "SkipBelow(protect=)").reshape(-1)
            keep = keep | within_fraction(importance, self.protect, context, context.isolated)[:, None]
        kept = keep_choices(routing, keep & (routing.topk_ids >= 0))
        missing = total_weight(routing) / (total_weight(kept) + 1e-20)
        return trim(left_aligned(kept._replace(topk_weights=kept.topk_weights * missing)))

    @staticmethod
    def calibrate(routing: Routing) -> float:
        """The median of second weight / first weight over tokens with a choice. Raises ValueError for fewer than two
        experts per token, and for no such token."""
        if routing.topk_weights.shape[1] < 2:
            raise ValueError(f"routing: expected at least 2 experts per token, got {routing.topk_weights.shape[1]}")
        best = routing.topk_weights.detach().sort(-1, descending=True).values
        share = float((best[:, 1] / best[:, 0]).nanmedian())  # 0 / 0 for tokens without a choice
        if math.isnan(share):
            raise ValueError("routing: expected at least 1 token with a choice, got 0")
        return share


def within_fraction(values: Tensor, fraction: float, context: Context, per_sequence: bool) -> Tensor:
    """Whether each token is among the round(fraction · n) largest values [T]; n counts the tokens of the batch or, if
    per_sequence, of its sequence."""
    if not per_sequence:
        everyone = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        return ranks(values, everyone, 1) < round(fraction * len(values))
    sequence, count = sequences(context, len(values), values.device)
    sizes = sequence.new_zeros(count).scatter_add(0, sequence, torch.ones_like(sequence))
    return ranks(values, sequence, count) < (sizes.double() * fraction).round().long()[sequence]


@checked
@dataclass(frozen=True)
class Broadcast:
    """In training, sends tokens with uncertain routing to all experts, weighted by their probabilities. The other
    tokens use another selection, as do all in evaluation (GW-MoE, arXiv:2406.12375).

    A token is uncertain if the entropy of its probabilities is at least entropy_above (in nats), a number or a
    RunningThreshold. At most max_fraction of the tokens of the batch or sequence (scope) are, those of the largest
    entropy: round(max_fraction · T), which is none of ten tokens with 0.05, so small batches need a RunningThreshold
    and max_fraction = 1. (The authors' Switch code
    multiplies the experts' input, the paper their output; this follows the paper. Balance losses count an uncertain
    token on every expert; that code counts its best expert alone.)
    """

    select: Select
    entropy_above: Number | Callable[..., Any]
    max_fraction: Fraction = 0.05
    scope: Scope = "batch"

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        routing = self.select(router_logits, context, bias)
        if not context.training:
            return routing
        probabilities = scores_of(routing.router_logits, "softmax")
        detached = probabilities.detach()
        entropy = torch.special.entr(detached).sum(-1)
        limit = self.entropy_above
        unsure = (limit(entropy) if callable(limit) else entropy >= limit) & within_fraction(
            entropy, self.max_fraction, context, is_per_sequence(self.scope, context)
        )
        num_experts = probabilities.shape[1]
        missing = num_experts - routing.topk_ids.shape[1]
        everyone = torch.arange(num_experts, dtype=torch.int32, device=probabilities.device)
        ids = F.pad(routing.topk_ids, (0, missing), value=-1)
        weights = F.pad(routing.topk_weights, (0, missing))
        return trim(
            routing._replace(
                topk_ids=torch.where(unsure[:, None], everyone, ids),
                topk_weights=torch.where(unsure[:, None], probabilities, weights),
                scores=probabilities,
            )
        )


@checked
@dataclass(frozen=True)
class DepthChoice:
    """Which tokens a block processes at all: in each sequence the `fraction` with the largest logits, weighted by their
    logits (Mixture-of-Depths, arXiv:2404.02258). With E experts each takes fraction / E of the tokens.

    causal: in evaluation, the tokens with a positive logit instead, which does not depend on later tokens; ChoiceLoss
    trains the logits for that.
    """

    fraction: Annotated[float, Range(0, 1, "low")] = 0.125
    causal: bool = True
    scope: Scope = "sequence"

    def __post_init__(self) -> None:
        self._largest  # noqa: B018  compiled calls only read it

    @cached_property
    def _largest(self) -> ExpertChoice:
        return ExpertChoice(self.fraction, scope=self.scope, weights="logit")

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        if self.causal and not context.training:
            return Positive()(router_logits, context, bias)
        return self._largest(router_logits, context, bias)


@checked
@dataclass(frozen=True)
class BalancedAssignment:
    """In training each expert gets exactly T/E tokens (the first T mod E experts one more), and the sum of the assigned
    logits is near its maximum. In evaluation each token gets its best expert (BASE Layers, arXiv:2103.16716).

    The maximum comes from an auction with equal capacities (Bertsekas & Castañon 1989). An unassigned token bids for
    the expert of highest value at the current prices and raises its price by the margin over the second best expert,
    plus eps. An expert keeps its best bids, and its price is the lowest of them. If the auction ends within
    max_iterations, the total is within T·eps of the maximum; otherwise the remaining tokens take the remaining places
    in order. (In the authors' code experts bid for tokens, with the same eps and at most 100 iterations, which are more
    work each: here the auction takes hundreds if the logits of some experts are larger throughout. The kernels stop as
    soon as it has ended; the reference does on the CPU alone, since elsewhere it would wait for the device.)

    Args:
        eps: "auto" is (max - min) / 50 of the logits, at least 1e-4, as in the paper.
        score_function: gives the weight; the paper uses a sigmoid. No gradient flows through the assignment.
        scope: "batch", or "sequence": a separate assignment for each sequence.
        balanced_in_evaluation: use the assignment in evaluation too.
    """

    eps: PositiveOrInf | str = "auto"
    max_iterations: Size = 1000
    score_function: ScoreFunction = "sigmoid"
    scope: Scope = "batch"
    balanced_in_evaluation: bool = False
    top_k: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if isinstance(self.eps, str) and self.eps != "auto":
            raise ValueError(f"eps: expected a positive number or 'auto', got {self.eps!r}")

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        num_tokens, num_experts = router_logits.shape
        scores = scores_of(router_logits, self.score_function)
        if context.training or self.balanced_in_evaluation:
            values = router_logits.detach().to(scores.dtype)
            values = values if bias is None else values + bias
            sequence, count = None, 1
            if is_per_sequence(self.scope, context):
                sequence, count = sequences(context, num_tokens, values.device)
                sequence, count = sequence.to(torch.int32), max(count, 1)  # zero tokens have zero sequences
            eps = -1.0 if isinstance(self.eps, str) else self.eps
            ids = ops.assign_balanced(values, sequence, count, eps, self.max_iterations)[:, None]
        else:
            ids = route(router_logits.detach(), 1, selection_bias=bias).topk_ids
        return Routing(ids, scores.gather(1, ids.long()), router_logits, num_experts, scores)


@checked
@dataclass(frozen=True)
class EqualTopK:
    """The top_k best experts, each with the weight `scale`, whatever its score, and the gradients of
    scale · softmax. FactorLLM (arXiv:2408.11855) has equal weights, too, but its code passes no
    gradient: its router learns from `prior_approximate` alone.

    A dense network split into E experts is their sum, so scale is E / K where only K of them run.
    """

    top_k: Size
    scale: float = 1.0
    score_function: ScoreFunction = "softmax"

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        scores = scores_of(router_logits, self.score_function)
        ids = choose(router_logits if bias is None else scores + bias, self.top_k)
        routing = take(router_logits, scores, ids)
        weights = routing.topk_weights
        return routing._replace(topk_weights=self.scale * (1 + (weights - weights.detach())))
