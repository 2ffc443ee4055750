# SPDX-License-Identifier: BSD-3-Clause
"""Expert choice: each expert takes its best tokens, so that all have equally many."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear.functional import Routing, route
from switchgear.reference import check_choice
from switchgear.routing.context import NOTHING_KNOWN, Context, check_scope, is_per_sequence, sequences
from switchgear.routing.pairs import from_pairs
from switchgear.routing.ranking import choose, finite, positions, scores_of, uniform


def token_rows(context: Context, num_tokens: int, per_sequence: bool, device: torch.device) -> Tensor:
    """The tokens that compete with each other, [B,L] int64: a row per sequence, or a single one. -1 past the last token
    of a shorter sequence. (Only for sequences of unequal lengths is L read back.)"""
    tokens = torch.arange(num_tokens, device=device)
    if not per_sequence:
        return tokens[None]
    sequence, count = sequences(context, num_tokens, device)
    if context.sequence_ids is None:
        return tokens.view(count, -1)
    column, sizes = positions(sequence, count)
    length = int(sizes.max()) if num_tokens else 0
    rows = torch.full((count * length,), -1, dtype=torch.int64, device=device)
    return rows.scatter(0, sequence * length + column, tokens).view(count, length)


@dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes the tokens of its k largest scores, k = max(1, ⌊capacity_factor · T / E⌋) (arXiv:2202.09368).

    Args:
        capacity_factor: the average number of experts of a token.
        tokens_per_expert: k itself, instead (pMoE, arXiv:2306.04073: the patches that an expert takes of an image).
        scope: "batch", or "sequence": the tokens of a sequence compete among themselves, T being its length. Only then
            is a token independent of other sequences (arXiv:2410.22884 steals prompts where it is not).
        weights: "score", the softmax over the experts, or "softmax_over_tokens": over the logits of the tokens that an
            expert took, by which it then also chooses (pMoE).
        max_experts_per_token: a cap b. Scores are first replaced by the solution A of max ⟨S, A⟩ + λ·H(A) with
            Σ_t A = k, Σ_e A <= b, 0 <= A <= 1, by cap_iterations rounds (λ = cap_lambda = 0.001 is unverified), and
            what then still exceeds the cap goes to no one. With cap_iterations = 0 it is but a cut: a token keeps its b
            best. Without a cap the largest number of experts of a token is read back (see from_pairs).
        scale: multiplies the weights.
        ties: "index", to the lowest token, or "random".
        evaluation: which token is taken depends on later ones, so that a decoder cannot do this; with evaluation = n
            the router takes the n best experts of each token in evaluation. None: as in training.
    """

    capacity_factor: float = 2.0
    tokens_per_expert: int | None = None
    scope: str = "batch"
    weights: str = "score"
    max_experts_per_token: int | None = None
    scale: float = 1.0
    ties: str = "index"
    evaluation: int | None = None
    cap_lambda: float = 1e-3
    cap_iterations: int = 30

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_choice("weights", self.weights, ("score", "softmax_over_tokens"))
        check_choice("ties", self.ties, ("index", "random"))
        if not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor: expected a positive number, got {self.capacity_factor}")
        if not self.cap_lambda > 0:
            raise ValueError(f"cap_lambda: expected a positive number, got {self.cap_lambda}")
        for name in ("tokens_per_expert", "max_experts_per_token", "evaluation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        if self.evaluation is not None and not context.training:
            return route(router_logits, self.evaluation, selection_bias=bias)
        num_tokens, num_experts = router_logits.shape
        by_score = self.weights == "score"
        scores = scores_of(router_logits, "softmax") if by_score else finite(router_logits)
        values = scores.detach() if bias is None else scores.detach() + finite(bias)
        if num_tokens == 0:
            return Routing(
                router_logits.new_zeros(0, 1, dtype=torch.int32), scores[:, :1], router_logits, num_experts, scores
            )
        rows = token_rows(context, num_tokens, is_per_sequence(self.scope, context), router_logits.device)
        num_rows, length = rows.shape
        padded = context.sequence_ids is not None and num_rows * length != num_tokens
        sizes = (rows >= 0).sum(1) if padded else None
        by_expert = self._by_expert(values, rows, sizes)
        count = self._count(length, num_experts)
        column = self._best(by_expert, count, context).view(num_rows, num_experts, count)
        token = rows[:, None, :].expand(-1, num_experts, -1).gather(2, column.long())
        if sizes is not None:
            limits = self._counts(sizes, num_experts)
            token = token.masked_fill(torch.arange(count, device=token.device) >= limits[:, None, None], -1)
        expert = torch.arange(num_experts, device=token.device)[:, None].expand(num_rows, -1, count)
        taken = token >= 0
        weight = scores.flatten()[(token.clamp(min=0) * num_experts + expert).flatten()].view(token.shape)
        if not by_score:
            weight = weight.masked_fill(~taken, -math.inf).softmax(-1)
        token, expert, weight = token.flatten(), expert.flatten(), weight.flatten()
        if self.max_experts_per_token is not None:
            chosen = by_expert.view(num_rows, num_experts, length).gather(2, column.long()).flatten()
            token = self._cap(token, chosen, num_tokens)
        ids, weights = from_pairs(token, expert, weight, num_tokens, num_experts, self.max_experts_per_token)
        return Routing(ids, weights * self.scale, router_logits, num_experts, scores if by_score else None)

    def _count(self, length: int, num_experts: int) -> int:
        wanted = self.tokens_per_expert or max(1, math.floor(length * self.capacity_factor / num_experts))
        return min(wanted, length)

    def _counts(self, sizes: Tensor, num_experts: int) -> Tensor:
        """_count of each of the sequences."""
        if self.tokens_per_expert is not None:
            return sizes.clamp(max=self.tokens_per_expert)
        wanted = (sizes.double() * self.capacity_factor / num_experts).floor().long()
        return wanted.clamp(min=1).minimum(sizes)

    def _by_expert(self, values: Tensor, rows: Tensor, sizes: Tensor | None) -> Tensor:
        """values [T,E] -> [B·E,L], what each expert chooses by; the lowest number where there is no token."""
        lowest = torch.finfo(values.dtype).min
        if sizes is None:
            table = values.view(*rows.shape, -1).mT
        else:
            table = values[rows.clamp(min=0)].masked_fill((rows < 0)[:, :, None], lowest).mT
        cap = self.max_experts_per_token
        if cap is not None and self.cap_iterations:
            each = self._counts((rows >= 0).sum(1), table.shape[1]).to(table.dtype)
            table = _capped_plan(table, rows >= 0, each, cap, self.cap_lambda, self.cap_iterations)
            table = table.masked_fill((rows < 0)[:, None, :], lowest)
        return table.reshape(-1, rows.shape[1]).contiguous()

    def _best(self, by_expert: Tensor, count: int, context: Context) -> Tensor:
        if self.ties == "index":
            return choose(by_expert, count)
        shuffled = uniform((by_expert.shape[1],), context, by_expert.device).argsort()
        return shuffled[choose(by_expert[:, shuffled], count).long()]

    def _cap(self, token: Tensor, chosen: Tensor, num_tokens: int) -> Tensor:
        """-1 for the pairs that are not among the max_experts_per_token best of their token."""
        assert self.max_experts_per_token is not None
        order = chosen.sort(descending=True, stable=True).indices
        place, _ = positions(token[order], num_tokens)
        keep = torch.empty_like(place).scatter(0, order, place) < self.max_experts_per_token
        return token.masked_fill(~keep, -1)


def _capped_plan(
    scores: Tensor, real: Tensor, tokens_per_expert: Tensor, cap: int, entropy: float, iterations: int
) -> Tensor:
    """log A [B,E,L], up to values above 0 for 1, of the entropy-regularised assignment of scores [B,E,L] (real [B,L]:
    which tokens there are) to experts that take tokens_per_expert [B] and tokens that take at most `cap`.

    A = min(1, exp(S/λ + price_e - price_t)); each round makes the sums of the experts exact and then those of the
    tokens, which is coordinate ascent on the dual problem.
    """
    worth = (scores / entropy).masked_fill(~real[:, None, :], -math.inf)
    of_expert, of_token = torch.zeros_like(worth[:, :, :1]), torch.zeros_like(worth[:, :1])
    if cap >= scores.shape[1]:  # no token can have more
        return worth
    each, most = tokens_per_expert[:, None, None], torch.full_like(worth[:1, :1, :1], cap)
    for _ in range(iterations):
        of_expert = _price(worth - of_token, each)
        of_token = (-_price((worth + of_expert).mT, most)).clamp(min=0).mT
    of_expert = _price(worth - of_token, each)
    return worth + of_expert - of_token


def _price(values: Tensor, total: Tensor) -> Tensor:
    """p [...,1] such that Σ min(1, exp(values + p)) over the last dimension is `total`, at most its size.

    If the j largest become 1, the others have to sum to total - j; the first j for which none of them exceeds 1 is the
    solution. Rows of -inf give inf.
    """
    descending = values.sort(-1, descending=True).values
    rest = descending.flip(-1).logcumsumexp(-1).flip(-1)  # of the elements from j on
    left = total - torch.arange(values.shape[-1], dtype=values.dtype, device=values.device)
    price = left.clamp(min=torch.finfo(values.dtype).tiny).log() - rest
    first = ((descending + price <= 0) & (left > 0)).to(torch.int8).argmax(-1, keepdim=True)
    return price.gather(-1, first)
