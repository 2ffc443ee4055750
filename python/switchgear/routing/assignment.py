# SPDX-License-Identifier: BSD-3-Clause
"""Balanced assignment: one expert for each token, equally many tokens for each expert, the largest total affinity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear import ops
from switchgear.functional import Routing, route
from switchgear.reference import check_choice
from switchgear.routing.context import NOTHING_KNOWN, Context, check_at_least, check_scope, is_per_sequence, sequences
from switchgear.routing.ranking import SCORE_FUNCTIONS, scores_of


@dataclass(frozen=True)
class BalancedAssignment:
    """In training each expert gets exactly T/E tokens (of T, the first T mod E experts one more) and the total of the
    logits is near its maximum; in evaluation each token gets its best expert (BASE Layers, arXiv:2103.16716).

    The maximum comes from an auction with equal places (Bertsekas & Castañon 1989): a token without a place bids for
    the expert that is worth most to it at the present prices, by as much as the next best expert is worth less, plus
    eps; an expert keeps its best bids, and its price is the lowest of these. If the auction ends within max_iterations,
    the total is within T·eps of the maximum; if it does not, the tokens that are left get the places that are left, in
    order. (The authors' code lets experts bid for tokens, with the same eps, and waits for the device in each
    iteration; here a device other than the CPU always runs max_iterations and is never waited for.)

    Args:
        eps: "auto" is (max - min) / 50 of the logits, at least 1e-4, as in the paper.
        score_function: of the weight, a sigmoid in the paper. No gradient flows through the assignment.
        scope: "batch", or "sequence": one assignment for each sequence.
        balanced_in_evaluation: assign in evaluation too.
    """

    eps: float | str = "auto"
    max_iterations: int = 100
    score_function: str = "sigmoid"
    scope: str = "batch"
    balanced_in_evaluation: bool = False

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_choice("score_function", self.score_function, SCORE_FUNCTIONS)
        check_at_least("max_iterations", self.max_iterations, 1)
        if self.eps != "auto" and (isinstance(self.eps, str) or not self.eps > 0):
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
                sequence, count = sequence.to(torch.int32), max(count, 1)  # no tokens have no sequences
            eps = -1.0 if isinstance(self.eps, str) else self.eps
            ids = ops.assign_balanced(values, sequence, count, eps, self.max_iterations)[:, None]
        else:
            ids = route(router_logits.detach(), 1, selection_bias=bias).topk_ids
        return Routing(ids, scores.gather(1, ids.long()), router_logits, num_experts, scores)
