# SPDX-License-Identifier: BSD-3-Clause
"""The stages around the products in plain torch: plan, permute, combine. The specification."""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear.reference.checks import check, check_num_experts, check_range, weight_dtype, wide
from switchgear.reference.rows import check_plan, gather_rows, to_slots


def plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """expert_offsets [E+1], token_indices [S] and slot_indices [T,K] of topk_ids [T,K].

    Slots are in the order (expert, token, choice).
    """
    check("topk_ids", topk_ids, (None, None), torch.int32)
    check_num_experts(num_experts)
    check_range("topk_ids", topk_ids, -1, num_experts)
    num_tokens, top_k = topk_ids.shape
    num_slots = num_tokens * top_k
    empty = topk_ids < 0
    expert = torch.where(empty, num_experts, topk_ids).flatten().long()  # empty slots sort last
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    ends = counts[:num_experts].cumsum(0)
    pairs = expert.argsort(stable=True)  # slot -> t·K + k
    slots = torch.arange(num_slots, device=topk_ids.device)
    token_indices = torch.where(slots < ends[-1], pairs // max(top_k, 1), -1)
    slot_indices = torch.empty_like(slots).scatter(0, pairs, slots).view(num_tokens, top_k).masked_fill(empty, -1)
    expert_offsets = torch.nn.functional.pad(ends, (1, 0))
    return expert_offsets.to(torch.int32), token_indices.to(torch.int32), slot_indices.to(torch.int32)


def permute(
    x: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor, topk_weights: Tensor | None
) -> Tensor:
    """permuted_x[s] = x[token_indices[s]], times the slot's weight if given. x [T,H] -> [S,H]."""
    check("x", x, (slot_indices.shape[0], None))
    check_plan(expert_offsets, token_indices, slot_indices, x.shape[0])
    check("topk_weights", topk_weights, slot_indices.shape, weight_dtype(x.dtype))
    permuted_x = gather_rows(x, token_indices)
    if topk_weights is None:
        return permuted_x
    return (wide(permuted_x) * to_slots(topk_weights, slot_indices)[:, None]).to(x.dtype)


def combine(
    permuted_y: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor, topk_weights: Tensor | None
) -> Tensor:
    """y[t] = Σ_k topk_weights[t,k] · permuted_y[slot_indices[t,k]]; absent weights are 1. [S,H] -> [T,H]."""
    check_plan(expert_offsets, token_indices, slot_indices, None)
    check("permuted_y", permuted_y, (slot_indices.numel(), None))
    check("topk_weights", topk_weights, slot_indices.shape, weight_dtype(permuted_y.dtype))
    rows = wide(gather_rows(permuted_y, slot_indices))
    if topk_weights is not None:
        rows = rows * topk_weights.masked_fill(slot_indices < 0, 0)[:, :, None]
    return rows.sum(1).to(permuted_y.dtype)


def combine_weight_backward(
    grad_y: Tensor, permuted_y: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor
) -> Tensor:
    """grad_topk_weights[t,k] = <grad_y[t], permuted_y[slot_indices[t,k]]>, 0 for empty slots."""
    check("grad_y", grad_y, (slot_indices.shape[0], None))
    check_plan(expert_offsets, token_indices, slot_indices, grad_y.shape[0])
    check("permuted_y", permuted_y, (slot_indices.numel(), grad_y.shape[1]), grad_y.dtype)
    products = wide(gather_rows(permuted_y, slot_indices)) * wide(grad_y)[:, None]
    return products.sum(-1).masked_fill(slot_indices < 0, 0)
