# SPDX-License-Identifier: BSD-3-Clause
"""Conversion of (token, expert, weight) pairs, from policies with any number of experts per token, to a Routing."""

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
    """topk_ids [T,K'] int32 and topk_weights [T,K'] of P pairs: each token's experts in ascending order, then holes.

    Args:
        token, expert: [P] integers below num_tokens and num_experts; a pair with token -1 is ignored. Pairs are
            distinct.
        weight: [P] float32; the result is differentiable in it.
        max_experts_per_token: K'. If None it is the largest number of experts of a token (at least 1), read back from
            the device; in a compiled graph, or for meta tensors, it is E. A token with more experts keeps the lowest
            ones.
    """
    _, order, _ = ops.plan(expert.to(torch.int32).masked_fill(token < 0, -1).view(-1, 1), num_experts)
    order = order.long()  # pairs sorted by expert, -1 past the last one
    in_order = order.clamp(min=0)
    token = token[in_order].masked_fill(order < 0, -1)
    column, per_token = positions(token, num_tokens)  # the index of a pair within its token, in order of experts
    width = max_experts_per_token
    if width is None and (torch.compiler.is_compiling() or token.is_meta):
        width = num_experts
    elif width is None:
        width = max(int(per_token.max()), 1) if num_tokens else 1
    target = token * width + column
    target = torch.where((token >= 0) & (column < width), target, num_tokens * width)
    size = num_tokens * width + 1  # dropped pairs go to the last element
    ids = torch.full((size,), -1, dtype=torch.int32, device=token.device)
    ids = ids.scatter(0, target, expert[in_order].to(torch.int32))[:-1]
    weights = weight.new_zeros(size).scatter(0, target, weight[in_order])[:-1]
    return ids.view(num_tokens, width), weights.view(num_tokens, width)
