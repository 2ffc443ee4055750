# SPDX-License-Identifier: BSD-3-Clause
"""Products of rows and their experts' matrices in plain torch: grouped_gemm and its weight gradient. The
specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from switchgear.checks import checked
from switchgear.reference import formats, gguf
from switchgear.reference.checks import Experts, Floats, check, check_experts, wide
from switchgear.reference.stages import Offsets, Slots, check_offsets, rows_of, segments

__all__ = ["empty_weight", "grouped_gemm", "grouped_gemm_wgrad"]


def gemm(rows: Tensor, matrices: Tensor | Sequence[Tensor], bias: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """Multiplies each expert's rows by its transposed matrix, in the wide dtype. Other elements are zero."""
    out = rows.new_zeros(rows.shape[0], max(matrix.shape[0] for matrix in matrices))
    for expert, slots in segments(expert_offsets):
        width = matrices[expert].shape[0]
        out[slots, :width] = rows[slots] @ wide(matrices[expert]).mT
        if bias is not None:
            out[slots, :width] += wide(bias[expert, :width])
    return out


def wgrad_of(
    grad_rows: Tensor, rows: Tensor, expert_offsets: Tensor, grad_weight: Tensor, experts: Tensor | None = None
) -> Tensor:
    """Fills grad_weight with Σ_s grad_rows[s] ⊗ rows[s] of each expert, or of each of `experts`."""
    grad_weight.zero_()
    index_of = {e: i for i, e in enumerate(range(len(grad_weight)) if experts is None else experts.tolist())}
    for expert, slots in segments(expert_offsets):
        if expert in index_of:
            grad_weight[index_of[expert]] = grad_rows[slots].mT @ rows[slots]
    return grad_weight


def sum_rows(rows: Tensor, expert_offsets: Tensor, like: Tensor, experts: Tensor | None = None) -> Tensor:
    """The sum of each expert's rows, or of those of `experts`, as [E,N] or [n,N] in the dtype of `like`."""
    ones, count = rows.new_ones(rows.shape[0], 1), like.shape[0] if experts is None else experts.shape[0]
    return wgrad_of(rows, ones, expert_offsets, like.new_empty(count, *like.shape[1:], 1), experts).squeeze(-1)


@checked
def grouped_gemm(
    x: Annotated[Tensor, Floats("R", "C")],
    weight: Sequence[Tensor],
    form: Sequence[int],
    bias: Annotated[Tensor, Floats("E", "N")] | None,
    expert_offsets: Offsets,
    token_indices: Slots | None,
    transposed: bool = False,
    input_gradient: bool = False,
) -> Tensor:
    """out[s,n] = Σ_c x[r(s),c] · weight[e(s)][n,c] + bias[e(s),n], with r(s) = token_indices[s] if given, else s.

    x [R,C]; weight: a weight [E,N,C] in its `form` (formats.py), or E matrices [N_e,C]; bias [E,N]. out [S,N], N is the
    largest N_e. transposed: x · W instead of x · Wᵀ, [S,C] of x [R,N], for a stored weight decoded to the dtype of x,
    without bias. input_gradient: kernels use the summation order of moe_backward instead of moe_forward.
    """
    num_experts = expert_offsets.shape[0] - 1
    check_offsets(expert_offsets, len(x if token_indices is None else token_indices), token_indices, len(x))
    is_list = not form and not (len(weight) == 1 and weight[0].dim() == 3)
    if is_list:
        for matrix in weight:
            check("weight", matrix, (None, x.shape[1]), x.dtype)
        experts, height = len(weight), max((len(matrix) for matrix in weight), default=0)
    else:
        sizes = (None, None, None if transposed else x.shape[1])
        experts, height, _ = formats.check_weight("weight", weight, form, sizes, x.dtype)
    if experts != num_experts:
        raise ValueError(f"weight: expected {num_experts} experts, got {experts}")
    rows = rows_of(x, token_indices)
    if transposed:
        if is_list:
            raise ValueError("weight: expected one weight [E,N,C] to be transposed, got separate matrices")
        check("x", x, (None, height))
        if bias is not None:
            raise ValueError("bias: expected none for a transposed weight")
        return gemm(rows, formats.decode(weight, form, x.dtype).mT, None, expert_offsets).to(x.dtype)
    check("bias", bias, (experts, height), x.dtype)
    if is_list:
        return gemm(rows, list(weight), bias, expert_offsets).to(x.dtype)
    return multiply(rows, x.dtype, weight, form, bias, expert_offsets).to(x.dtype)


def multiply(
    rows: Tensor,
    dtype: torch.dtype,
    weight: Sequence[Tensor],
    form: Sequence[int],
    bias: Tensor | None,
    expert_offsets: Tensor,
) -> Tensor:
    """Multiplies rows [S,C] of activations of `dtype` by each expert's matrix and adds the bias: [S,N], wide dtype.

    Integer weights and GGUF's types are multiplied by activations rounded to int8. All other products are in the wide
    dtype: plain, panels and compact weights keep their bits, and minifloats and groups are decoded exactly.
    """
    format = formats.format_of(form)
    if format in formats.BITS:
        out = formats.multiply_integers(rows.to(dtype), weight, form, expert_offsets).to(rows.dtype)
        for expert, slots in segments(expert_offsets):
            if bias is not None:
                out[slots] += wide(bias[expert])
        return out
    if format in formats.GGUF:
        rows = gguf.round_rows(format, rows.to(dtype)).to(rows.dtype)
    matrices = formats.decode(weight, form, rows.dtype if format in formats.DECODED else dtype)
    return gemm(rows, matrices, bias, expert_offsets)


@checked
def grouped_gemm_wgrad(
    grad_out: Annotated[Tensor, Floats("S", "N")],
    x: Annotated[Tensor, Floats(None, "C")],
    expert_offsets: Offsets,
    token_indices: Slots | None,
    transposed: bool,
    experts: Experts | None = None,
) -> Tensor:
    """grad_weight[e][n,c] = Σ_{s of e} grad_out[s,n] · x[r(s),c] as [E,N,C], stored as [E,C,N] if transposed.

    experts: [n], ascending; grad_weight [n,N,C] then has their matrices only.
    """
    if token_indices is None and len(x) != len(grad_out):
        raise ValueError(f"x: expected shape [{len(grad_out)}, C], got {list(x.shape)}")
    check_offsets(expert_offsets, len(grad_out), token_indices, len(x))
    num_experts = expert_offsets.shape[0] - 1
    check_experts(experts, num_experts)
    count = num_experts if experts is None else experts.shape[0]
    grad_weight = empty_weight(x, count, grad_out.shape[1], x.shape[1], transposed)
    return wgrad_of(wide(grad_out), rows_of(x, token_indices), expert_offsets, grad_weight, experts)


def empty_weight(like: Tensor, num_experts: int, rows: int, columns: int, transposed: bool) -> Tensor:
    """[E,rows,columns], uninitialized; if `transposed`, a view of [E,columns,rows] memory."""
    if transposed:
        return like.new_empty(num_experts, columns, rows).mT
    return like.new_empty(num_experts, rows, columns)
