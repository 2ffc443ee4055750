# SPDX-License-Identifier: BSD-3-Clause
"""Balanced assignment: one expert per token, equally many tokens per expert, maximal total affinity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from switchgear import ops
from switchgear.complaints import at_least
from switchgear.functional import Routing, as_number, route
from switchgear.reference import check_choice
from switchgear.routing.context import NOTHING_KNOWN, Context, check_scope, is_per_sequence, sequences
from switchgear.routing.ranking import SCORE_FUNCTIONS, scores_of


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

    eps: float | str = "auto"
    max_iterations: int = 1000
    score_function: str = "sigmoid"
    scope: str = "batch"
    balanced_in_evaluation: bool = False
    top_k: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_choice("score_function", self.score_function, SCORE_FUNCTIONS)
        at_least(1, "max_iterations", self.max_iterations)
        if self.eps != "auto" and (isinstance(self.eps, str) or not as_number("eps", self.eps) > 0):
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
