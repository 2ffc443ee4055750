# SPDX-License-Identifier: BSD-3-Clause
"""The stages around the products in plain torch: plan, permute, combine; and rows gathered. The specification."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from switchgear.checks import checked
from switchgear.reference.checks import (
    Floats,
    Indices,
    NumExperts,
    Rows,
    TopkIds,
    TopkWeights,
    check,
    check_range,
    check_slots,
    wide,
)

__all__ = ["combine", "combine_weight_backward", "gather_rows", "permute", "plan", "segments", "to_slots"]

Offsets = Annotated[Tensor, Indices(None)]
Slots = Annotated[Tensor, Indices("S")]  # one for each slot


def check_offsets(expert_offsets: Tensor, num_slots: int, token_indices: Tensor | None, num_tokens: int) -> None:
    """Checks the contents of a plan."""
    offsets = expert_offsets.tolist()
    if len(offsets) < 2 or offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > num_slots:
        raise ValueError(f"expert_offsets: expected 0, then ascending numbers up to {num_slots}, got {offsets}")
    if token_indices is not None:
        check_range("token_indices", token_indices[: offsets[-1]], 0, num_tokens)


def gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices], with zeros for any index out of range: -1, and what is past the last slot in use. `indices` may
    have any shape."""
    if rows.shape[0] == 0:
        return rows.new_zeros((*indices.shape, *rows.shape[1:]))
    gathered = rows[indices.clamp(0, len(rows) - 1).long()]
    is_outside = (indices < 0) | (indices >= len(rows))
    return gathered.masked_fill(is_outside.view(*indices.shape, *[1] * (rows.dim() - 1)), 0)


def to_slots(values: Tensor, slot_indices: Tensor) -> Tensor:
    """[T,K] -> [S]: the value of each slot, 0 past the last one in use."""
    num_slots = slot_indices.numel()
    target = torch.where(slot_indices < 0, num_slots, slot_indices).flatten().long()
    return values.new_zeros(num_slots + 1).scatter(0, target, values.flatten())[:num_slots]


def segments(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its slots) for every expert that has slots."""
    offsets = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        if begin < end:
            yield expert, slice(begin, end)


def rows_of(x: Tensor, token_indices: Tensor | None) -> Tensor:
    return wide(x if token_indices is None else gather_rows(x, token_indices))


# ---- stages ----------------------------------------------------------------------------------------------------------


@checked
def plan(topk_ids: TopkIds, num_experts: NumExperts) -> tuple[Tensor, Tensor, Tensor]:
    """expert_offsets [E+1], token_indices [S] and slot_indices [T,K] of topk_ids [T,K].

    Slots are in the order (expert, token, choice).
    """
    num_tokens, top_k = topk_ids.shape
    check_slots("topk_ids", num_tokens, top_k)
    check_range("topk_ids", topk_ids, -1, num_experts)
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


def _check_plan(expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor) -> None:
    num_slots = slot_indices.numel()
    if len(token_indices) != num_slots:
        raise ValueError(f"token_indices: expected shape [{num_slots}], got {list(token_indices.shape)}")
    check_offsets(expert_offsets, num_slots, token_indices, slot_indices.shape[0])
    check_range("slot_indices", slot_indices, -1, num_slots)


@checked
def permute(
    x: Annotated[Tensor, Floats(None, "H")],
    expert_offsets: Offsets,
    token_indices: Slots,
    slot_indices: TopkIds,
    topk_weights: TopkWeights | None,
) -> Tensor:
    """permuted_x[s] = x[token_indices[s]], times the slot's weight if given. x [T,H] -> [S,H]."""
    check("x", x, (len(slot_indices), None))
    _check_plan(expert_offsets, token_indices, slot_indices)
    permuted_x = gather_rows(x, token_indices)
    if topk_weights is None:
        return permuted_x
    return (wide(permuted_x) * to_slots(topk_weights, slot_indices)[:, None]).to(x.dtype)


@checked
def combine(
    permuted_y: Annotated[Tensor, Floats(None, "H")],
    expert_offsets: Offsets,
    token_indices: Slots,
    slot_indices: TopkIds,
    topk_weights: TopkWeights | None,
) -> Tensor:
    """y[t] = Σ_k topk_weights[t,k] · permuted_y[slot_indices[t,k]]; absent weights are 1. [S,H] -> [T,H]."""
    _check_plan(expert_offsets, token_indices, slot_indices)
    check("permuted_y", permuted_y, (slot_indices.numel(), None))
    rows = wide(gather_rows(permuted_y, slot_indices))
    if topk_weights is not None:
        rows = rows * topk_weights.masked_fill(slot_indices < 0, 0)[:, :, None]
    return rows.sum(1).to(permuted_y.dtype)


@checked
def combine_weight_backward(
    grad_y: Rows,
    permuted_y: Annotated[Tensor, Floats(None, "H")],
    expert_offsets: Offsets,
    token_indices: Slots,
    slot_indices: TopkIds,
) -> Tensor:
    """grad_topk_weights[t,k] = <grad_y[t], permuted_y[slot_indices[t,k]]>, 0 for empty slots."""
    _check_plan(expert_offsets, token_indices, slot_indices)
    check("permuted_y", permuted_y, (slot_indices.numel(), None))
    products = wide(gather_rows(permuted_y, slot_indices)) * wide(grad_y)[:, None]
    return products.sum(-1).masked_fill(slot_indices < 0, 0)
