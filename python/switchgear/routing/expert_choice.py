# SPDX-License-Identifier: BSD-3-Clause
"""Expert choice: each expert takes its best tokens, so that all have equally many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from switchgear import ops
from switchgear.checks import Count, Finite, NotNegativeOrInf, Positive, Range, Size, checked
from switchgear.functional import Routing, route
from switchgear.routing.context import NOTHING_KNOWN, Context, Scope, is_per_sequence, sequences
from switchgear.routing.ranking import choose, finite, scores_of, uniform


@checked
@dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes the tokens of its k largest scores, k = max(1, ⌊capacity_factor · T / E⌋) (arXiv:2202.09368).

    Args:
        capacity_factor: the average number of experts per token.
        tokens_per_expert: k itself, instead (pMoE, arXiv:2306.04073: image patches per expert).
        scope: "batch", or "sequence": only tokens of one sequence compete, and T is its length. Only then is a token
            independent of other sequences (arXiv:2410.22884 steals prompts otherwise).
        weights: "score", the softmax over the experts, or "softmax_over_tokens": over the logits of the tokens that an
            expert took; the expert then also chooses by logits (pMoE). "logit": the logits themselves, which may be
            negative (Mixture-of-Depths, arXiv:2404.02258).
        max_experts_per_token: a cap b. Scores are first replaced by the solution A of max ⟨S, A⟩ + λ·H(A) with
            Σ_t A = k, Σ_e A <= b, 0 <= A <= 1 (λ = cap_lambda; the paper has 0.001, and 100 rounds at most); choices
            that still exceed the cap are removed. Each sequence is solved by itself, until a round changes no token's
            log A by more than cap_tolerance, or for cap_iterations rounds: 2 to 20 are usual, 100 or more if the
            capacities of experts and tokens are equal. With cap_iterations = 0 there is only the cut: a token keeps its
            b best. Without a cap the largest number of experts of a token is read back from the device; a compiled or
            captured graph uses E instead.
        scale: multiplies the weights.
        ties: "index", to the lowest token, or "random".
        evaluation: whether a token is taken depends on later tokens, so a decoder cannot use expert choice. With
            evaluation = n each token gets its n best experts in evaluation, with the same weights; so not with
            "softmax_over_tokens", which depends on later tokens. None: as in training.
    """

    capacity_factor: Positive = 2.0
    tokens_per_expert: Size | None = None
    scope: Scope = "batch"
    weights: Literal["score", "softmax_over_tokens", "logit"] = "score"
    max_experts_per_token: Size | None = None
    scale: Finite = 1.0
    ties: Literal["index", "random"] = "index"
    evaluation: Size | None = None
    cap_lambda: Annotated[float, Range(2**-126, math.inf)] = 1e-3
    cap_iterations: Count = 100
    cap_tolerance: NotNegativeOrInf = 2**-6

    def __post_init__(self) -> None:
        if self.evaluation is not None and self.weights == "softmax_over_tokens":
            raise ValueError(f"evaluation: expected None with weights='softmax_over_tokens', got {self.evaluation}")

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        if self.evaluation is not None and not context.training:
            return self._of_each_token(router_logits, self.evaluation, bias)
        num_tokens, num_experts = router_logits.shape
        by_score = self.weights == "score"
        scores = scores_of(router_logits, "softmax") if by_score else finite(router_logits)
        values = scores.detach() if bias is None else scores.detach() + finite(bias)
        if num_tokens == 0:
            ids = router_logits.new_zeros(0, 1, dtype=torch.int32)
            return Routing(ids, scores[:, :1], router_logits, num_experts, scores if by_score else None)
        sequence, limits = self._limits(context, num_tokens, num_experts, router_logits.device)
        if self.max_experts_per_token is not None and self.cap_iterations:
            values = self._capped(values, sequence, limits, context)
        taken = self._best(values, sequence, limits, context)
        ids = taken if self.max_experts_per_token is None else self._cap(taken, values)
        if self.max_experts_per_token is None and not _must_not_read(ids):
            ids = ids[:, : max(int((ids >= 0).sum(1).max()), 1)].contiguous()
        if self.weights == "softmax_over_tokens":
            scores = _softmax_over_tokens(scores, taken, sequence, limits.shape[0])
        weights = scores.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, 0) * self.scale
        return Routing(ids, weights, router_logits, num_experts, scores if by_score else None)

    def _of_each_token(self, router_logits: Tensor, count: int, bias: Tensor | None) -> Routing:
        """Each token's `count` best experts, by what experts choose by, and weighted alike."""
        if self.weights == "score":
            return route(router_logits, count, scale=self.scale, selection_bias=bias)
        logits = finite(router_logits)
        ids = choose(logits if bias is None else logits + finite(bias), count)
        weights = logits.gather(1, ids.long()) * self.scale
        return Routing(ids, weights, router_logits, router_logits.shape[1])

    def _limits(
        self, context: Context, num_tokens: int, num_experts: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor]:
        """The sequence of each token [T] int32, None if all tokens compete, and k of each sequence [B] int32."""
        if not is_per_sequence(self.scope, context):
            sequence, sizes = None, torch.full((1,), num_tokens, dtype=torch.int64, device=device)
        else:
            sequence, count = sequences(context, num_tokens, device)
            sizes = torch.zeros(count, dtype=torch.int64, device=device)
            sizes = sizes.scatter_add(0, sequence, torch.ones_like(sequence))
            sequence = sequence.to(torch.int32)
        if self.tokens_per_expert is not None:
            wanted = torch.full_like(sizes, self.tokens_per_expert)
        else:
            wanted = (sizes.double() * self._per_token(num_experts)).floor().long().clamp(min=1)
        return sequence, wanted.minimum(sizes).to(torch.int32)

    def _per_token(self, num_experts: int) -> float:
        """capacity_factor / E, from above: 100 tokens times 0.29 are 29, not 28.999999999999996."""
        return self.capacity_factor / num_experts * (1 + 2**-48)

    def _best(self, values: Tensor, sequence: Tensor | None, limits: Tensor, context: Context) -> Tensor:
        if self.ties == "index":
            return ops.column_topk(values, sequence, limits)
        shuffled = uniform((values.shape[0],), context, values.device).argsort()
        ids = ops.column_topk(values[shuffled], None if sequence is None else sequence[shuffled], limits)
        return torch.empty_like(ids).index_copy(0, shuffled, ids)

    def _cap(self, ids: Tensor, values: Tensor) -> Tensor:
        """The max_experts_per_token best of each token's experts, in ascending order."""
        assert self.max_experts_per_token is not None
        worth = values.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, torch.finfo(values.dtype).min)
        best = choose(worth, min(self.max_experts_per_token, ids.shape[1]))
        return ids.gather(1, best.sort(1).values.long())

    def _capped(self, values: Tensor, sequence: Tensor | None, limits: Tensor, context: Context) -> Tensor:
        """The values [T,E] that experts choose by under a cap. Reads the longest length back if lengths differ."""
        assert self.max_experts_per_token is not None
        if sequence is None:
            longest = values.shape[0]
        elif context.sequence_ids is None:
            longest = values.shape[0] // limits.shape[0]
        else:
            longest = int(torch.bincount(sequence).max())
        largest = self.tokens_per_expert or max(math.floor(longest * self._per_token(values.shape[1])), 1)
        return ops.assign_capped(
            values, sequence, limits, self.max_experts_per_token, self.cap_lambda, self.cap_iterations,
            self.cap_tolerance, longest, min(largest, longest),
        )  # fmt: skip


def _must_not_read(tensor: Tensor) -> bool:
    """Whether a graph is compiled or captured; reading a value on the host would break it."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _softmax_over_tokens(logits: Tensor, ids: Tensor, sequence: Tensor | None, num_sequences: int) -> Tensor:
    """For each expert and sequence, softmax of logits [T,E] over the tokens it took (ids [T,K]); 0 for others."""
    taken = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    taken = taken.scatter(1, torch.where(ids < 0, logits.shape[1], ids).long(), True)[:, :-1]
    logits = logits.masked_fill(~taken, -math.inf)
    if sequence is None:
        return logits.softmax(0)
    index = sequence.long()[:, None].expand_as(logits)
    highest = logits.detach().new_full((num_sequences, logits.shape[1]), -math.inf)
    highest = highest.scatter_reduce(0, index, logits.detach(), "amax")
    powers = (logits - highest.gather(0, index)).masked_fill(~taken, -math.inf).exp()
    totals = torch.zeros_like(highest).scatter_add(0, index, powers)
    return powers / totals.gather(0, index)
