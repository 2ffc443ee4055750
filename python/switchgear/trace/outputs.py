# SPDX-License-Identifier: BSD-3-Clause
"""What experts return for each token, before it is weighted and summed: those chosen, or all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from switchgear.integrations.experts import is_of
from switchgear.integrations.moe_blocks import MoeBlock

_ROWS = 8192  # of experts' outputs at a time
# Their experts take other arguments than (x, ids, weights).
_OTHERS = ("JetMoeMoE", "Llama4TextMoe", "NllbMoeSparseMLP", "SwitchTransformersSparseMLP")


def check_outputs(block: MoeBlock) -> None:
    """Raises ValueError for a block whose experts' outputs cannot be had one by one."""
    if is_of(block.block, *_OTHERS):
        raise ValueError(
            f"{block.name}: expected experts called with ids and weights, got {type(block.block).__name__}"
        )


@torch.no_grad()
def chosen_norms(block: MoeBlock, x: Tensor, topk_ids: Tensor) -> Tensor:
    """[T,K] float32: norms of the outputs of expert topk_ids[t,k] for x[t], with weight 1; 0 for empty choices (-1).

    The experts run a second time for it, as modules (hooks aside), with some thousand rows at a time. x [T,H] as in an
    Observation.
    """
    check_outputs(block)
    num_tokens, top_k = topk_ids.shape
    at_once = max(1, _ROWS // max(top_k, 1))
    distributed = any(getattr(module, "parallel", None) is not None for module in block.experts.modules())
    if distributed:  # all ranks call their experts once, with tokens or without
        return _norms(block, x, topk_ids)
    parts = [_norms(block, x[i : i + at_once], topk_ids[i : i + at_once]) for i in range(0, num_tokens, at_once)]
    return torch.cat(parts) if parts else x.new_zeros(0, top_k, dtype=torch.float32)


def _norms(block: MoeBlock, x: Tensor, topk_ids: Tensor) -> Tensor:
    empty = topk_ids < 0
    rows = x.detach().repeat_interleave(topk_ids.shape[1], 0)
    ids = topk_ids.clamp(min=0).reshape(-1, 1)
    ones = torch.ones_like(ids, dtype=torch.float32 if block.is_ours else x.dtype)
    forward: Any = block.experts.forward  # not the module's call: hooks belong to the model's own calls
    y: Tensor = forward(rows, *_one_choice(block.experts, ids if block.is_ours else ids.long(), ones))
    norms: Tensor = torch.linalg.vector_norm(y.float(), dim=-1)
    return norms.reshape(topk_ids.shape).masked_fill(empty, 0)


@torch.no_grad()
def expert_outputs(experts: nn.Module, x: Tensor, num_experts: int | None = None) -> Tensor:
    """The output of every expert for every token of x [T,H], [E,T,H]. For a small batch: it runs all experts.

    experts: called as (x, topk_ids, topk_weights), as switchgear's Experts and Hugging Face's are.
    """
    count: Any = getattr(experts, "num_experts", None) if num_experts is None else num_experts
    if not isinstance(count, int):
        raise ValueError("num_experts: expected a number, as the module has none, got None")
    ids = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    ones = torch.ones(x.shape[0], 1, device=x.device, dtype=x.dtype)
    return torch.stack([experts(x, *_one_choice(experts, ids + expert, ones)) for expert in range(count)])


def _one_choice(experts: nn.Module, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """One choice per token, ids and weights [T,1], as the experts take it: LongCat's own loop takes two or more."""
    if not is_of(experts, "LongcatFlashExperts"):
        return ids, weights
    return ids.expand(-1, 2), torch.cat((weights, torch.zeros_like(weights)), 1)
