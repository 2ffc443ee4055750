# SPDX-License-Identifier: BSD-3-Clause
"""Floating-point operations of a call, counted by torch's counter: torch's ops by its own formulas, switchgear's by the
actual (token, expert) pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def _of_pairs(topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> int:
    """A multiply and an add per weight of each pair's expert."""
    return 2 * int((topk_ids >= 0).sum()) * (gate_up_proj[0].numel() + down_proj[0].numel())


def _moe_forward(*args: Any, **_: Any) -> int:
    _, (gate_up_proj,), _, (down_proj,), _, _, _, topk_ids, *_ = args
    return _of_pairs(topk_ids, gate_up_proj, down_proj)


def _moe_backward(*args: Any, **named: Any) -> int:
    """Each product has two gradients: of its input and, if needed, of its weight (of the listed experts)."""
    _, _, _, (gate_up_proj,), _, (down_proj,), _, _, _, topk_ids, *_ = args
    needs, experts = args[16], args[21] if len(args) > 21 else named.get("experts")
    trained = topk_ids if experts is None else torch.where(torch.isin(topk_ids, experts), topk_ids, -1)
    weights = [weight for weight, need in zip((gate_up_proj, down_proj), needs[1:3], strict=True) if need]
    of_weights = 2 * int((trained >= 0).sum()) * sum(weight[0].numel() for weight in weights)
    return _of_pairs(topk_ids, gate_up_proj, down_proj) + of_weights


def _gate(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """A multiply and an add per weight and token."""
    return 2 * x.shape[0] * weight.numel()


def _grouped_gemm(*args: Any, **_: Any) -> int:
    _, (weight, *_), _, _, expert_offsets, *_ = args
    return 2 * int(expert_offsets[-1]) * weight[0].numel()


def _grouped_gemm_wgrad(grad_out: Tensor, x: Tensor, expert_offsets: Tensor, *rest: Any, **__: Any) -> int:
    rows = expert_offsets.diff()
    if len(rest) > 2 and rest[2] is not None:
        rows = rows[rest[2].long()]
    return 2 * int(rows.sum()) * grad_out.shape[1] * x.shape[1]


def _embedding_bag(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> int:
    """A weighted sum of rows."""
    return 2 * indices.numel() * weight.shape[1]


_FORMULAS = {
    torch.ops.switchgear.gate: _gate,
    torch.ops.switchgear.gate_route: _gate,
    torch.ops.switchgear.grouped_gemm: _grouped_gemm,
    torch.ops.switchgear.grouped_gemm_wgrad: _grouped_gemm_wgrad,
    torch.ops.switchgear.moe_forward: _moe_forward,
    torch.ops.switchgear.moe_backward: _moe_backward,
    torch.ops.aten._embedding_bag: _embedding_bag,
    torch.ops.aten._embedding_bag_forward_only: _embedding_bag,
}
for formula in _FORMULAS.values():
    formula._get_raw = True  # type: ignore[attr-defined]  # of the tensors, not of their shapes


def count_flops(call: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter:
        call()
    return int(counter.get_total_flops())
