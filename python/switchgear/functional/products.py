# SPDX-License-Identifier: BSD-3-Clause
"""grouped_gemm, with weights of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from switchgear import autograd, ops, reference
from switchgear.arrays import accepts_arrays
from switchgear.autograd import apply, needs_autograd
from switchgear.backends import in_autocast
from switchgear.functional.arguments import as_dtype, dropout_seed, in_autocast_dtype
from switchgear.weights.offloaded import OffloadedWeight
from switchgear.weights.operand import Operand, operand_of
from switchgear.weights.weight import AdaptedWeight, SelectedWeight, Weight

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
    autocast = kind if in_autocast(kind := x.device.type) else None
    if isinstance(weight, AdaptedWeight):
        return _adapted_grouped_gemm(x, weight, expert_offsets, bias, token_indices)
    if autocast is not None:
        x, bias = in_autocast_dtype(kind, x, bias)
    if isinstance(weight, Tensor) or hasattr(weight, "operand"):
        operand = _operand_of(weight, x, bias, autocast)
    else:
        matrices = list(weight) if autocast is None else in_autocast_dtype(autocast, *weight)
        operand = Operand(matrices, leaves=matrices)
        if not matrices:
            raise ValueError("weight: expected at least one matrix, got none")
    if operand.trained is not None:
        check_trained("weight", operand, "bias", bias)
    if operand.form and not getattr(weight, "is_lossless", False):
        bias = as_dtype("bias", bias, x.dtype)
    if needs_autograd(x, bias, *operand.leaves):
        inputs = autograd.gemm_inputs_of(x, bias, expert_offsets, token_indices, operand)
        out: Tensor = apply(autograd.GroupedGemm, *inputs)
        return out
    return ops.grouped_gemm(x, operand.tensors, operand.form, bias, expert_offsets, token_indices, False, False)


def _operand_of(weight: Any, x: Tensor, bias: Tensor | None, autocast: str | None) -> Operand:
    """What the product reads: plain weights instead of panels, and of other lossless forms if it is differentiated."""
    if isinstance(weight, Weight) and weight.is_lossless and weight.form:
        if weight.data.is_cpu and needs_autograd(x, bias):
            return operand_of(weight.plain(), x.dtype, autocast)
        if weight.format == "panels":
            return weight.expanded(x.dtype, autocast, "weights in panels, in grouped_gemm")
    operand = operand_of(weight, x.dtype, autocast)
    if operand.source is not None:
        raise ValueError("weight: expected one in memory, got offloaded experts, which only moe loads")
    return operand


def check_trained(name: str, operand: Operand, bias_name: str, bias: Tensor | None) -> None:
    """Checks what no kernel sees: the trained experts' shapes, and that the rest is frozen."""
    weight, trained = operand.tensors[0], operand.trained
    assert trained is not None
    for frozen_name, frozen in ((name, weight), (bias_name, bias)):
        if frozen is not None and frozen.requires_grad:
            raise ValueError(f"{frozen_name}: expected a frozen one, of which some experts are trained alone")
    count, (_, rows, columns) = trained.experts.shape[0], weight.shape
    for tensor, shape in ((trained.weight, (count, rows, columns)), (trained.bias, (count, rows))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected trained experts of shape {list(shape)}, got {list(tensor.shape)}")


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
