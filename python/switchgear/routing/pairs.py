# SPDX-License-Identifier: BSD-3-Clause
"""Policies under which a token has any number of experts make pairs (token, expert, weight); a Routing has rows."""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear import ops
from switchgear.routing.ranking import positions


def from_pairs(
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    num_tokens: int,
    num_experts: int,
    max_experts_per_token: int | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_ids [T,K'] int32 and topk_weights [T,K'] of P pairs: a token's experts in ascending order, then holes.

    Args:
        token, expert: [P] integers below num_tokens and num_experts; a pair with token -1 is none. No pair occurs
            twice.
        weight: [P] float32; the result is differentiable in it.
        max_experts_per_token: K'. If absent it is the largest number of experts of a token (at least 1), which is read
            back from the device; in a compiled graph, or of tensors without values, it is E. Of a token with more
            experts, the lowest ones stay.
    """
    _, order, _ = ops.plan(expert.to(torch.int32).masked_fill(token < 0, -1).view(-1, 1), num_experts)
    order = order.long()  # pairs in the order of experts, -1 past the last one
    in_order = order.clamp(min=0)
    token = token[in_order].masked_fill(order < 0, -1)
    column, per_token = positions(token, num_tokens)  # each token's pairs, still in the order of experts
    width = max_experts_per_token
    if width is None and (torch.compiler.is_compiling() or token.is_meta):
        width = num_experts
    elif width is None:
        width = max(int(per_token.max()), 1) if num_tokens else 1
    target = token * width + column
    target = torch.where((token >= 0) & (column < width), target, num_tokens * width)
    size = num_tokens * width + 1  # the last place takes what is left out
    ids = torch.full((size,), -1, dtype=torch.int32, device=token.device)
    ids = ids.scatter(0, target, expert[in_order].to(torch.int32))[:-1]
    weights = weight.new_zeros(size).scatter(0, target, weight[in_order])[:-1]
    return ids.view(num_tokens, width), weights.view(num_tokens, width)
