# SPDX-License-Identifier: BSD-3-Clause
"""The stages of a layer, each an op: plan, permute, combine, grouped_gemm, glu, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from switchgear import reference
from switchgear.ops.native import Kernels
from switchgear.ops.registration import _dense, _matrix, _register, _rows

# ---- plan ------------------------------------------------------------------------------------------------------------


def _allocate_plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = _matrix("topk_ids", topk_ids).shape
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    return (
        topk_ids.new_empty(num_experts + 1),
        topk_ids.new_empty(num_tokens * top_k),
        topk_ids.new_empty(num_tokens, top_k),
    )


def _plan(kernels: Kernels, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_plan(topk_ids, num_experts)
    kernels.module.plan(topk_ids.contiguous(), *outputs, kernels.execution())
    return outputs


plan: Callable[..., tuple[Tensor, Tensor, Tensor]] = _register(
    "plan(Tensor topk_ids, int num_experts) -> (Tensor expert_offsets, Tensor token_indices, Tensor slot_indices)",
    _plan,
    _allocate_plan,
)


# ---- permute, combine ------------------------------------------------------------------------------------------------


def _allocate_permute(x: Tensor, expert_offsets: Tensor, token_indices: Tensor, *_: Any) -> Tensor:
    return x.new_empty(token_indices.shape[0], _matrix("x", x).shape[1])


def _permute(
    kernels: Kernels,
    x: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor,
    slot_indices: Tensor,
    topk_weights: Tensor | None,
) -> Tensor:
    permuted_x = _allocate_permute(x, expert_offsets, token_indices)
    kernels.module.permute(
        _rows(x), expert_offsets.contiguous(), token_indices.contiguous(), slot_indices.contiguous(),
        _dense(topk_weights), permuted_x, kernels.execution(),
    )  # fmt: skip
    return permuted_x


permute: Callable[..., Tensor] = _register(
    "permute(Tensor x, Tensor expert_offsets, Tensor token_indices, Tensor slot_indices, Tensor? topk_weights) "
    "-> Tensor",
    _permute,
    _allocate_permute,
)


def _allocate_combine(
    permuted_y: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor, *_: Any
) -> Tensor:
    return permuted_y.new_empty(slot_indices.shape[0], _matrix("permuted_y", permuted_y).shape[1])


def _combine(
    kernels: Kernels,
    permuted_y: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor,
    slot_indices: Tensor,
    topk_weights: Tensor | None,
) -> Tensor:
    y = _allocate_combine(permuted_y, expert_offsets, token_indices, slot_indices)
    kernels.module.combine(
        _rows(permuted_y), expert_offsets.contiguous(), token_indices.contiguous(), slot_indices.contiguous(),
        _dense(topk_weights), y, kernels.execution(),
    )  # fmt: skip
    return y


combine: Callable[..., Tensor] = _register(
    "combine(Tensor permuted_y, Tensor expert_offsets, Tensor token_indices, Tensor slot_indices, "
    "Tensor? topk_weights) -> Tensor",
    _combine,
    _allocate_combine,
)


def _allocate_combine_weight_backward(
    grad_y: Tensor, permuted_y: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor
) -> Tensor:
    return grad_y.new_empty(slot_indices.shape, dtype=reference.weight_dtype(grad_y.dtype))


def _combine_weight_backward(
    kernels: Kernels,
    grad_y: Tensor,
    permuted_y: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor,
    slot_indices: Tensor,
) -> Tensor:
    grad_topk_weights = _allocate_combine_weight_backward(
        grad_y, permuted_y, expert_offsets, token_indices, slot_indices
    )
    kernels.module.combine_weight_backward(
        _rows(grad_y), _rows(permuted_y), expert_offsets.contiguous(), token_indices.contiguous(),
        slot_indices.contiguous(), grad_topk_weights, kernels.execution(),
    )  # fmt: skip
    return grad_topk_weights


combine_weight_backward: Callable[..., Tensor] = _register(
    "combine_weight_backward(Tensor grad_y, Tensor permuted_y, Tensor expert_offsets, Tensor token_indices, "
    "Tensor slot_indices) -> Tensor",
    _combine_weight_backward,
    _allocate_combine_weight_backward,
)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def _is_packed(weight: Sequence[Tensor]) -> bool:
    return len(weight) == 1 and weight[0].dim() == 3


def _alike(weight: Sequence[Tensor]) -> list[Tensor]:
    """The kernels take one pair of strides for all matrices; where they differ, as contiguous copies."""
    if all(matrix.stride() == weight[0].stride() for matrix in weight):
        return list(weight)
    return [matrix.clone(memory_format=torch.contiguous_format) for matrix in weight]


def _allocate_grouped_gemm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    input_gradient: bool = False,
) -> Tensor:
    if not _is_packed(weight):
        for matrix in weight:
            _matrix("weight", matrix)
    rows = x.shape[0] if token_indices is None else token_indices.shape[0]
    return x.new_empty(rows, max(matrix.shape[-2] for matrix in weight))


def _grouped_gemm(
    kernels: Kernels,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    input_gradient: bool = False,
) -> Tensor:
    out = _allocate_grouped_gemm(x, weight, bias, expert_offsets, token_indices)
    kernels.module.grouped_gemm(
        _rows(x), weight[0] if _is_packed(weight) else _alike(weight), _rows(bias), expert_offsets.contiguous(),
        _dense(token_indices), out, kernels.execution(), input_gradient,
    )  # fmt: skip
    return out


grouped_gemm: Callable[..., Tensor] = _register(
    "grouped_gemm(Tensor x, Tensor[] weight, Tensor? bias, Tensor expert_offsets, Tensor? token_indices, "
    "bool input_gradient=False) -> Tensor",
    _grouped_gemm,
    _allocate_grouped_gemm,
)


def _allocate_grouped_gemm_wgrad(
    grad_out: Tensor, x: Tensor, expert_offsets: Tensor, token_indices: Tensor | None, transposed: bool
) -> Tensor:
    rows, columns = _matrix("grad_out", grad_out).shape[1], _matrix("x", x).shape[1]
    return reference.empty_weight(grad_out, expert_offsets.shape[0] - 1, rows, columns, transposed)


def _grouped_gemm_wgrad(
    kernels: Kernels,
    grad_out: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    transposed: bool,
) -> Tensor:
    grad_weight = _allocate_grouped_gemm_wgrad(grad_out, x, expert_offsets, token_indices, transposed)
    kernels.module.grouped_gemm_wgrad(
        _rows(grad_out), _rows(x), expert_offsets.contiguous(), _dense(token_indices), grad_weight,
        kernels.execution(),
    )  # fmt: skip
    return grad_weight


grouped_gemm_wgrad: Callable[..., Tensor] = _register(
    "grouped_gemm_wgrad(Tensor grad_out, Tensor x, Tensor expert_offsets, Tensor? token_indices, bool transposed) "
    "-> Tensor",
    _grouped_gemm_wgrad,
    _allocate_grouped_gemm_wgrad,
)


# ---- glu -------------------------------------------------------------------------------------------------------------


def _allocate_glu(h: Tensor, activation: str, gated: bool, *_: Any) -> Tensor:
    rows, width = _matrix("h", h).shape
    return h.new_empty(rows, width // 2 if gated else width)


def _glu(
    kernels: Kernels, h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float
) -> Tensor:
    a = _allocate_glu(h, activation, gated)
    kernels.module.glu(_rows(h), a, activation, gated, interleaved, alpha, limit, kernels.execution())
    return a


glu: Callable[..., Tensor] = _register(
    "glu(Tensor h, str activation, bool gated, bool interleaved, float alpha, float limit) -> Tensor",
    _glu,
    _allocate_glu,
)


def _allocate_glu_backward(grad_a: Tensor, h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _glu_backward(
    kernels: Kernels,
    grad_a: Tensor,
    h: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    grad_h = _allocate_glu_backward(grad_a, h)
    kernels.module.glu_backward(
        _rows(grad_a), _rows(h), grad_h, activation, gated, interleaved, alpha, limit,
        kernels.execution(),
    )  # fmt: skip
    return grad_h


glu_backward: Callable[..., Tensor] = _register(
    "glu_backward(Tensor grad_a, Tensor h, str activation, bool gated, bool interleaved, float alpha, float limit) "
    "-> Tensor",
    _glu_backward,
    _allocate_glu_backward,
)
