# SPDX-License-Identifier: BSD-3-Clause
"""Your own routing policy and your own activation between the kernels, differentiable end to end.

Everything downstream of routing takes topk_ids [T,K] (-1: no expert) and topk_weights [T,K], from any source. Here each
expert keeps at most `capacity` tokens, those with the highest weights, and the activation is x · tanh(x).

    python examples/custom_pieces.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import switchgear


def drop_over_capacity(routing: switchgear.Routing, capacity: int) -> Tensor:
    """topk_ids with -1 where the expert already has `capacity` tokens of higher weight."""
    best_first = routing.topk_weights.flatten().argsort(descending=True, stable=True)
    ids = routing.topk_ids.flatten()[best_first].long()
    place = one_hot(ids, routing.num_experts).cumsum(0).gather(1, ids[:, None]).squeeze(1)  # 1: an expert's best token
    kept = torch.empty_like(routing.topk_ids.flatten())
    kept[best_first] = ids.masked_fill(place > capacity, -1).to(kept.dtype)
    return kept.view_as(routing.topk_ids)


def experts(x: Tensor, up_proj: Tensor, down_proj: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """The stages of switchgear.moe, around an activation that it does not have. x [T,H] -> [T,H]."""
    plan = switchgear.plan(topk_ids, num_experts=up_proj.shape[0])
    h = switchgear.grouped_gemm(x, up_proj, plan.expert_offsets, token_indices=plan.token_indices)
    a = h * h.tanh()
    permuted_y = switchgear.grouped_gemm(a, down_proj, plan.expert_offsets)
    return switchgear.combine(permuted_y, plan, topk_weights)


def main() -> Tensor:
    """The number of tokens of each expert after dropping."""
    torch.manual_seed(0)
    num_tokens, hidden_size, intermediate_size, num_experts, top_k, capacity = 64, 32, 48, 8, 2, 16
    x = torch.randn(num_tokens, hidden_size)
    router = switchgear.Router(hidden_size, num_experts, top_k)
    up_proj = torch.randn(num_experts, intermediate_size, hidden_size, requires_grad=True)
    down_proj = torch.randn(num_experts, hidden_size, intermediate_size, requires_grad=True)

    routing = router(x)
    topk_ids = drop_over_capacity(routing, capacity)
    y = experts(x, up_proj, down_proj, topk_ids, routing.topk_weights)
    y.square().mean().backward()

    tokens_per_expert = torch.bincount(topk_ids[topk_ids >= 0], minlength=num_experts)
    print(f"before {torch.bincount(routing.topk_ids.flatten(), minlength=num_experts).tolist()}")
    print(f"after  {tokens_per_expert.tolist()}, dropped {int((topk_ids < 0).sum())} of {topk_ids.numel()} choices")
    print(f"gradient norms: router {router.weight.grad.norm():.3f}, up_proj {up_proj.grad.norm():.3f}")
    return tokens_per_expert


if __name__ == "__main__":
    main()
