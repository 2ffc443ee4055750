# SPDX-License-Identifier: BSD-3-Clause
"""grouped_gemm, with weights of every kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from switchgear import autograd, ops, reference
from switchgear.arrays import accepts_arrays
from switchgear.autograd import apply, needs_autograd
from switchgear.backends import in_autocast
from switchgear.functional.arguments import as_dtype, dropout_seed, in_autocast_dtype
from switchgear.weights.offloaded import OffloadedWeight
from switchgear.weights.weight import AdaptedWeight, SelectedWeight, Weight, taken_by_grouped_gemm

AnyWeight = Tensor | Weight | AdaptedWeight | SelectedWeight | OffloadedWeight


@accepts_arrays
def grouped_gemm(
    x: Tensor,
    weight: AnyWeight | Sequence[Tensor],
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    token_indices: Tensor | None = None,
) -> Tensor:
    """Multiplies each expert's rows by its matrix: out[s] = x[r(s)] · weight[e(s)]ᵀ + bias[e(s)], [S,N].

    Args:
        x: [S,C] in slot order; or [T,C] with token_indices [S] (Plan.token_indices), and then r(s) = token_indices[s].
        weight: [E,N,C], or E matrices [N_e,C] of different heights. Either of the last two dimensions must be
            contiguous: pass transposed weights [E,C,N] as `weight.mT`, without a copy. (Matrices of a list whose
            strides differ are copied.) A Weight in another format, an AdaptedWeight or a SelectedWeight also works;
            panels are expanded for the call, because only `moe` can read them.
        expert_offsets: [E+1] int32 (Plan.expert_offsets).
        bias: [E,N], N being the largest N_e.

    Rows past expert_offsets[E], and columns past an expert's N_e, are zero. Float tensors must have the same dtype;
    torch.autocast casts them to its own. Differentiable in x, a plain weight, adapters and bias; an expert without rows
    gets zero gradients.
    """
    if isinstance(weight, AdaptedWeight):
        return _adapted_grouped_gemm(x, weight, expert_offsets, bias, token_indices)
    if isinstance(weight, Weight):
        return _stored_grouped_gemm(x, weight, expert_offsets, bias, token_indices)
    if isinstance(weight, SelectedWeight):
        return _selected_grouped_gemm(x, weight, expert_offsets, bias, token_indices)
    if isinstance(weight, OffloadedWeight):
        raise ValueError("weight: expected one in memory, got offloaded experts, which only moe loads")
    matrices = [weight] if isinstance(weight, Tensor) else list(weight)
    if not matrices:
        raise ValueError("weight: expected at least one matrix, got none")
    if in_autocast(x.device.type):
        x, bias, *matrices = in_autocast_dtype(x.device.type, x, bias, *matrices)
    if needs_autograd(x, bias, *matrices):
        out: Tensor = apply(autograd.GroupedGemm, x, bias, expert_offsets, token_indices, *matrices)
        return out
    return ops.grouped_gemm(x, matrices, (), bias, expert_offsets, token_indices, False, False)


def _stored_grouped_gemm(
    x: Tensor, weight: Weight, expert_offsets: Tensor, bias: Tensor | None, token_indices: Tensor | None
) -> Tensor:
    if in_autocast(x.device.type):
        x, bias = in_autocast_dtype(x.device.type, x, bias)
    wants_gradients = needs_autograd(x, bias)
    if weight.is_lossless:
        has_kernels = weight.data.is_cpu  # other devices warn about missing ones
        taken = weight.plain() if wants_gradients and has_kernels else taken_by_grouped_gemm(weight, x.dtype)
        if isinstance(taken, Tensor):
            return grouped_gemm(x, taken, expert_offsets, bias=bias, token_indices=token_indices)
    if bias is not None and not weight.is_lossless:
        bias = as_dtype("bias", bias, x.dtype)
    if wants_gradients:
        args = (x, bias, expert_offsets, token_indices, weight.form, *weight.tensors)
        out: Tensor = apply(autograd.StoredGroupedGemm, *args)
        return out
    return ops.grouped_gemm(x, weight.tensors, weight.form, bias, expert_offsets, token_indices, False, False)


def _selected_grouped_gemm(
    x: Tensor, selected: SelectedWeight, expert_offsets: Tensor, bias: Tensor | None, token_indices: Tensor | None
) -> Tensor:
    check_selected("weight", selected, "bias", bias)
    tensors = (x, selected.weight, bias, selected.trained, selected.trained_bias)
    if in_autocast(x.device.type):
        tensors = in_autocast_dtype(x.device.type, *tensors)
    x, weight, bias, trained, trained_bias = tensors
    if needs_autograd(x, trained, trained_bias):
        args = (x, weight, bias, expert_offsets, token_indices, selected.experts, trained, trained_bias)
        out: Tensor = apply(autograd.SelectedGroupedGemm, *args)
        return out
    return ops.grouped_gemm(x, [weight], (), bias, expert_offsets, token_indices, False, False)


def check_selected(name: str, selected: SelectedWeight, bias_name: str, bias: Tensor | None) -> None:
    """Checks what no kernel sees: the trained experts' shapes, and that the rest is frozen."""
    for frozen_name, frozen in ((name, selected.weight), (bias_name, bias)):
        if frozen is not None and frozen.requires_grad:
            raise ValueError(f"{frozen_name}: expected a frozen one, of which some experts are trained alone")
    count, (_, rows, columns) = selected.experts.shape[0], selected.weight.shape
    for trained, shape in ((selected.trained, (count, rows, columns)), (selected.trained_bias, (count, rows))):
        if trained is not None and trained.shape != shape:
            raise ValueError(f"{name}: expected trained experts of shape {list(shape)}, got {list(trained.shape)}")


def _adapted_grouped_gemm(
    x: Tensor,
    adapted: AdaptedWeight,
    expert_offsets: Tensor,
    bias: Tensor | None,
    token_indices: Tensor | None,
) -> Tensor:
    """The product with the weight, plus that with the adapter."""
    out = grouped_gemm(x, adapted.weight, expert_offsets, bias=bias, token_indices=token_indices)
    a, b, scales, *ranks = adapted.adapter(x.dtype)
    if in_autocast(x.device.type):
        x, a, b = in_autocast_dtype(x.device.type, x, a, b)
    if ranks:
        unused = torch.arange(a.shape[1], device=a.device) >= ranks[0][:, None]
        a, b = a.masked_fill(unused[:, :, None], 0), b.masked_fill(unused[:, None, :], 0)
    if adapted.dropout > 0:
        rows = x if token_indices is None else x[token_indices.clamp(min=0).long()]
        kept = reference.keeps(dropout_seed(x.device), 0, rows.shape[0], rows.shape[1], adapted.dropout)
        x, token_indices, scales = torch.where(kept, rows, 0), None, scales / (1 - adapted.dropout)
    low = grouped_gemm(x, a, expert_offsets, token_indices=token_indices)
    experts = torch.bucketize(torch.arange(len(low), device=x.device), expert_offsets[1:], right=True)
    scaled = low * scales[experts.clamp(max=len(scales) - 1), None]
    return out + grouped_gemm(scaled.to(low.dtype), b, expert_offsets)
