# SPDX-License-Identifier: BSD-3-Clause
"""The stages of a layer, each an op: plan, permute, combine, grouped_gemm, glu, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from switchgear import reference
from switchgear.ops.native import host
from switchgear.ops.registration import alike, dense, matrix, register, rows

__all__ = [
    "combine", "combine_weight_backward", "glu", "glu_backward", "grouped_gemm", "grouped_gemm_on_host",
    "grouped_gemm_wgrad", "linear_on_host", "permute", "plan",
]  # fmt: skip

# ---- plan ------------------------------------------------------------------------------------------------------------


def _allocate_plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = matrix("topk_ids", topk_ids).shape
    reference.check_num_experts(num_experts)
    reference.check_slots("topk_ids", num_tokens, top_k)
    return (
        topk_ids.new_empty(num_experts + 1),
        topk_ids.new_empty(num_tokens * top_k),
        topk_ids.new_empty(num_tokens, top_k),
    )


plan: Callable[..., tuple[Tensor, Tensor, Tensor]] = register(
    "plan(Tensor topk_ids, int num_experts) -> (Tensor expert_offsets, Tensor token_indices, Tensor slot_indices)",
    _allocate_plan,
    lambda topk_ids, _: ((dense(topk_ids),), ()),
)


# ---- permute, combine ------------------------------------------------------------------------------------------------


permute: Callable[..., Tensor] = register(
    "permute(Tensor x, Tensor expert_offsets, Tensor token_indices, Tensor slot_indices, Tensor? topk_weights) "
    "-> Tensor",
    lambda x, _, token_indices, *__: x.new_empty(token_indices.shape[0], matrix("x", x).shape[1]),
    lambda x, *others: ((rows(x), *map(dense, others)), ()),
)


combine: Callable[..., Tensor] = register(
    "combine(Tensor permuted_y, Tensor expert_offsets, Tensor token_indices, Tensor slot_indices, "
    "Tensor? topk_weights) -> Tensor",
    lambda y, _, __, slot_indices, *___: y.new_empty(slot_indices.shape[0], matrix("permuted_y", y).shape[1]),
    lambda permuted_y, *others: ((rows(permuted_y), *map(dense, others)), ()),
)


combine_weight_backward: Callable[..., Tensor] = register(
    "combine_weight_backward(Tensor grad_y, Tensor permuted_y, Tensor expert_offsets, Tensor token_indices, "
    "Tensor slot_indices) -> Tensor",
    lambda grad_y, *others: grad_y.new_empty(others[-1].shape, dtype=reference.weight_dtype(grad_y.dtype)),
    lambda grad_y, permuted_y, *plan: ((rows(grad_y), rows(permuted_y), *map(dense, plan)), ()),
)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def _width(weight: Sequence[Tensor], form: Sequence[int], transposed: bool) -> int:
    """Columns of the product."""
    if form:
        return form[2] if transposed else form[1]
    if not (len(weight) == 1 and weight[0].dim() == 3):
        for separate in weight:
            matrix("weight", separate)
    return max(part.shape[-1 if transposed else -2] for part in weight)


def _allocate_grouped_gemm(
    x: Tensor,
    weight: Sequence[Tensor],
    form: Sequence[int],
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    transposed: bool,
    input_gradient: bool,
) -> Tensor:
    num_rows = matrix("x", x).shape[0] if token_indices is None else token_indices.shape[0]
    return x.new_empty(num_rows, _width(weight, form, transposed))


def _gemm_flops(x: Sequence[int], *others: Any, out_shape: Sequence[int], **_: Any) -> int:
    """Either x [·,C] -> [S,N], or the gradient of x: [·,N] -> [S,C]."""
    return 2 * prod(out_shape) * x[1]


grouped_gemm: Callable[..., Tensor] = register(
    "grouped_gemm(Tensor x, Tensor[] weight, int[] form, Tensor? bias, Tensor expert_offsets, Tensor? token_indices, "
    "bool transposed=False, bool input_gradient=False) -> Tensor",
    _allocate_grouped_gemm,
    lambda x, weight, form, bias, expert_offsets, token_indices, *options: (
        (rows(x), alike(weight), form or (), rows(bias), dense(expert_offsets), dense(token_indices)),
        options,
    ),
    flops=_gemm_flops,
)


def grouped_gemm_on_host(
    x: Tensor, weight: Sequence[Tensor], form: tuple[int, ...], bias: Tensor | None, expert_offsets: Tensor
) -> Tensor:
    """grouped_gemm of a stored weight, for tensors that need no dispatch."""
    out = x.new_empty((x.shape[0], form[1]))
    inputs = rows(x), weight, form, rows(bias), expert_offsets, None
    host.module.grouped_gemm(inputs, (False, False), (out,), host.execution())
    return out


def linear_on_host(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T,C] · weightᵀ [N,C] + bias [N], of one dtype, for tensors that need no dispatch: grouped_gemm of one expert,
    whose sums `gate` has."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    host.module.gate((rows(x), rows(weight), bias), (), (out,), host.execution())
    return out


def _allocate_grouped_gemm_wgrad(
    grad_out: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    transposed: bool,
    experts: Tensor | None,
) -> Tensor:
    width, columns = matrix("grad_out", grad_out).shape[1], matrix("x", x).shape[1]
    count = expert_offsets.shape[0] - 1 if experts is None else matrix("experts", experts, 1).shape[0]
    return reference.empty_weight(grad_out, count, width, columns, transposed)


def _wgrad_flops(
    grad_out: Sequence[int], x: Sequence[int], expert_offsets: Sequence[int], *others: Any, **_: Any
) -> int:
    experts, flops = others[2] if len(others) > 2 else None, 2 * prod(grad_out) * x[1]
    return flops if experts is None else flops * experts[0] // (expert_offsets[0] - 1)  # as if all had as many rows


grouped_gemm_wgrad: Callable[..., Tensor] = register(
    "grouped_gemm_wgrad(Tensor grad_out, Tensor x, Tensor expert_offsets, Tensor? token_indices, bool transposed, "
    "Tensor? experts=None) -> Tensor",
    _allocate_grouped_gemm_wgrad,
    lambda grad_out, x, expert_offsets, token_indices, _, experts: (
        (rows(grad_out), rows(x), dense(expert_offsets), dense(token_indices), dense(experts)),
        (),
    ),
    flops=_wgrad_flops,
)


# ---- glu -------------------------------------------------------------------------------------------------------------


def _allocate_glu(h: Tensor, activation: str, gated: bool, *_: Any) -> Tensor:
    num_rows, width = matrix("h", h).shape
    return h.new_empty(num_rows, width // 2 if gated else width)


glu: Callable[..., Tensor] = register(
    "glu(Tensor h, str activation, bool gated, bool interleaved, float alpha, float limit) -> Tensor",
    _allocate_glu,
    lambda h, *options: ((rows(h),), options),
)


glu_backward: Callable[..., Tensor] = register(
    "glu_backward(Tensor grad_a, Tensor h, str activation, bool gated, bool interleaved, float alpha, float limit) "
    "-> Tensor",
    lambda grad_a, h, *_: torch.empty_like(h, memory_format=torch.contiguous_format),
    lambda grad_a, h, *options: ((rows(grad_a), rows(h)), options),
)
