# SPDX-License-Identifier: BSD-3-Clause
"""Gathers rows of tokens and slots for the specifications in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from switchgear.reference.checks import check, check_range, wide


def check_offsets(expert_offsets: Tensor, num_slots: int, token_indices: Tensor | None, num_tokens: int) -> None:
    check("token_indices", token_indices, (num_slots,), torch.int32)
    check("expert_offsets", expert_offsets, (None,), torch.int32)
    offsets = expert_offsets.tolist()
    if len(offsets) < 2 or offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > num_slots:
        raise ValueError(f"expert_offsets: expected 0, then ascending numbers up to {num_slots}, got {offsets}")
    if token_indices is not None:
        check_range("token_indices", token_indices[: offsets[-1]], 0, num_tokens)


def check_plan(expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor, num_tokens: int | None) -> None:
    check("slot_indices", slot_indices, (num_tokens, None), torch.int32)
    check_offsets(expert_offsets, slot_indices.numel(), token_indices, slot_indices.shape[0])
    check_range("slot_indices", slot_indices, -1, slot_indices.numel())


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
