# SPDX-License-Identifier: BSD-3-Clause
"""What trains and selects in a dense network that was split: equal weights, and the prior of FactorLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear.complaints import check_tensor
from switchgear.functional import Routing
from switchgear.papers.parts.auxiliary import kl_divergence
from switchgear.reference import check_size
from switchgear.reference.checks import check
from switchgear.routing.context import NOTHING_KNOWN, Context
from switchgear.routing.ranking import choose, scores_of
from switchgear.routing.selection import take


@dataclass(frozen=True)
class EqualTopK:
    """The top_k best experts, each with the weight `scale`, whatever its score; gradients are those of
    scale · softmax, for the chosen experts. FactorLLM (arXiv:2408.11855) has equal weights, too, but its code passes no
    gradient: its router learns from `prior_approximate` alone.

    A dense network split into E experts is their sum, so scale is E / K where only K of them run.
    """

    top_k: int
    scale: float = 1.0
    score_function: str = "softmax"

    def __post_init__(self) -> None:
        check_size("top_k", self.top_k)

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        scores = scores_of(router_logits, self.score_function)
        ids = choose(router_logits if bias is None else scores + bias, self.top_k)
        routing = take(router_logits, scores, ids)
        weights = routing.topk_weights
        return routing._replace(topk_weights=self.scale * (1 + (weights - weights.detach())))


def prior_approximate(router_logits: Tensor, expert_outputs: Tensor, dense_output: Tensor, top_k: int) -> Tensor:
    """KL(softmax(router_logits) || softmax(target)), a float32 scalar averaged over tokens: teaches the router of a
    split network which experts come closest to it (FactorLLM's prior-approximate loss, arXiv:2408.11855, in the
    direction of its code).

    The target [T,E] is 1 for the top_k experts with the least mean squared error to dense_output · K / E, else 0, and
    has no gradient.

    Args:
        router_logits: [T,E].
        expert_outputs: [T,E,H], of every expert.
        dense_output: [T,H], of the network that was split.
    """
    for name, tensor in (
        ("router_logits", router_logits), ("expert_outputs", expert_outputs), ("dense_output", dense_output),
    ):  # fmt: skip
        check_tensor(name, tensor)
    check("router_logits", router_logits, (None, None))
    num_tokens, num_experts = router_logits.shape
    check_size("top_k", top_k)
    if top_k > num_experts:
        raise ValueError(f"top_k: expected 1 to {num_experts}, got {top_k}")
    check("dense_output", dense_output, (num_tokens, None))
    check("expert_outputs", expert_outputs, (num_tokens, num_experts, dense_output.shape[1]))
    with torch.no_grad():
        share = dense_output.float() * (top_k / num_experts)
        errors = (expert_outputs.float() - share[:, None]).square().mean(-1)
        target = torch.zeros_like(errors).scatter_(1, choose(-errors, top_k).long(), 1.0)
        log_target = target.log_softmax(-1)
    log_router = router_logits.float().log_softmax(-1)
    return kl_divergence(log_router, log_target).sum() / max(num_tokens, 1)
