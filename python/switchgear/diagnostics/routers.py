# SPDX-License-Identifier: BSD-3-Clause
"""How decided and how stable a router is: margin, saturation (OLMoE, arXiv:2409.02060) and change between checkpoints.

LibMoE (arXiv:2411.00918) measures margin and change too; the definitions here are ours. Its margin is the largest
weight of a token minus the second one, its change the fraction of choices that differ, place by place.
"""

from __future__ import annotations

from torch import Tensor

from switchgear.diagnostics.locality import one_hot


def router_margin(router_logits: Tensor, top_k: int = 1) -> Tensor:
    """The probability of the last chosen expert minus that of the first one left out, [T] float64. Near 0, a small
    change of x changes the choice. top_k = 1 is the margin between the best two."""
    num_experts = router_logits.shape[-1]
    if not 1 <= top_k < num_experts:
        raise ValueError(f"top_k: expected 1 to {num_experts - 1}, got {top_k}")
    best = router_logits.double().softmax(-1).topk(top_k + 1, -1).values
    return best[..., top_k - 1] - best[..., top_k]


def router_saturation(topk_ids: Tensor, final_ids: Tensor, num_experts: int) -> float:
    """The fraction of the final checkpoint's choices that an earlier checkpoint makes too, for the same tokens: 1 if
    routing no longer changes (OLMoE). Choices [T,K], in any order within a token."""
    before, after = one_hot(topk_ids, num_experts), one_hot(final_ids, num_experts)
    if before.shape != after.shape:
        raise ValueError(f"final_ids: expected {topk_ids.shape[0]} tokens, got {final_ids.shape[0]}")
    return int((before & after).sum()) / max(int(after.sum()), 1)


def routing_change(topk_ids: Tensor, next_ids: Tensor, num_experts: int) -> float:
    """The fraction of tokens whose set of experts differs between two checkpoints or two runs; bit-equal replay
    has 0."""
    before, after = one_hot(topk_ids, num_experts), one_hot(next_ids, num_experts)
    if before.shape != after.shape:
        raise ValueError(f"next_ids: expected {topk_ids.shape[0]} tokens, got {next_ids.shape[0]}")
    return float((before != after).any(-1).double().mean()) if before.shape[0] else 0.0
