# SPDX-License-Identifier: BSD-3-Clause
"""grouped_gemm, with weights of every kind, its gradients, and linear."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from switchgear import ops, reference
from switchgear.arrays import accepts_arrays
from switchgear.backends import cast_in_autocast, in_autocast
from switchgear.functional.arguments import as_dtype, dropout_seed, flat
from switchgear.functional.gradients import apply, is_transposed, needs_autograd, once
from switchgear.reference import formats
from switchgear.weights.weight import AdaptedWeight, OffloadedWeight, Operand, SelectedWeight, Weight, operand_of

AnyWeight = Tensor | Weight | AdaptedWeight | SelectedWeight | OffloadedWeight
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


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
            strides differ are copied.) A Weight in another format, an AdaptedWeight or a SelectedWeight also works.
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
        x, bias = cast_in_autocast(kind, x, bias)
    if isinstance(weight, Tensor) or hasattr(weight, "operand"):
        operand = _operand_of(weight, x, bias, autocast)
    else:
        matrices = list(weight) if autocast is None else cast_in_autocast(autocast, *weight)
        operand = Operand(matrices, leaves=matrices)
        if not matrices:
            raise ValueError("weight: expected at least one matrix, got none")
    if operand.trained is not None:
        check_trained("weight", operand, "bias", bias)
    if operand.form and not getattr(weight, "is_lossless", False):
        bias = as_dtype("bias", bias, x.dtype)
    if needs_autograd(x, bias, *operand.leaves):
        inputs = gemm_inputs_of(x, bias, expert_offsets, token_indices, operand)
        out: Tensor = apply(GroupedGemm, *inputs)
        return out
    return ops.grouped_gemm(x, operand.tensors, operand.form, bias, expert_offsets, token_indices, False, False)


@accepts_arrays
def linear(x: Tensor, weight: AnyWeight, bias: Tensor | None = None) -> Tensor:
    """Multiplies rows by one matrix, as torch.nn.functional.linear: x · weightᵀ + bias, [...,N].

    It is `grouped_gemm` with one expert: a row has the same bits in any batch, and the weight may be stored. (The
    reference backend, which is torch, promises no bits.)

    Args:
        x: [...,C].
        weight: [N,C]; or of one expert, [1,N,C], in any form that `grouped_gemm` takes.
        bias: [N].
    """
    if isinstance(weight, Tensor) and weight.dim() == 2:
        if is_direct(x, weight, bias):
            return linear_on_host(x, weight, bias)
        return _plain_linear(x, weight, bias)
    if weight.shape[0] != 1:
        raise ValueError(f"weight: expected [N,C], or one expert, got shape {list(weight.shape)}")
    rows = flat("x", x)
    bias = None if bias is None else bias[None]
    if type(weight) is Weight and is_direct(x, None, bias) and (operand := weight.direct_operand(x.dtype)) is not None:
        out = ops.grouped_gemm_on_host(rows, operand.tensors, operand.form, bias, _kept_offsets(len(rows)))
    else:
        out = grouped_gemm(rows, weight, _offsets(len(rows), x.device), bias=bias)
    return out.view(*x.shape[:-1], out.shape[1])


def is_direct(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether linear_on_host takes a product: one dtype, no gradient, no autocast, and nothing to dispatch to."""
    dtype = x.dtype
    for other in (weight, bias):
        if other is not None and other.dtype is not dtype:
            return False
    return not in_autocast("cpu") and ops.needs_no_dispatch(x, weight, bias) and not needs_autograd(x, weight, bias)


def linear_on_host(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """ops.linear_on_host of x [...,C]."""
    if x.dim() == 2:
        return ops.linear_on_host(x, weight, bias)
    out = ops.linear_on_host(flat("x", x), weight, bias)
    return out.view(*x.shape[:-1], out.shape[1])


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if in_autocast(x.device.type):
        x, weight, bias = cast_in_autocast(x.device.type, x, weight, bias)
    rows = flat("x", x)
    out: Tensor = (
        apply(Linear, rows, weight, bias) if needs_autograd(x, weight, bias) else _multiply(rows, weight, bias)
    )
    return out.view(*x.shape[:-1], out.shape[1])


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T,C] · weightᵀ [N,C] + bias [N]: grouped_gemm of one expert."""
    bias = None if bias is None else bias[None]
    return ops.grouped_gemm(x, [weight[None]], (), bias, _offsets(len(x), x.device), None, False, False)


def _offsets(num_rows: int, device: torch.device) -> Tensor:
    """expert_offsets of one expert."""
    if device.type == "cpu" and not torch.compiler.is_compiling() and not _dispatch_modes():
        return _kept_offsets(num_rows)
    return torch.tensor([0, num_rows], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _kept_offsets(num_rows: int) -> Tensor:
    with torch.inference_mode(False):  # autograd saves it
        return torch.tensor([0, num_rows], dtype=torch.int32, device="cpu")


def _operand_of(weight: Any, x: Tensor, bias: Tensor | None, autocast: str | None) -> Operand:
    """What the product reads: of lossless forms plain weights if it is differentiated."""
    is_exact = isinstance(weight, Weight) and weight.is_lossless and weight.form
    if is_exact and weight.data.is_cpu and needs_autograd(x, bias):
        return operand_of(weight.plain(), x.dtype, autocast)
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
        x, a, b = cast_in_autocast(x.device.type, x, a, b)
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


# ---- gradients -------------------------------------------------------------------------------------------------------


def _heighten(matrix: Tensor, height: int) -> Tensor:
    """Pads the matrix with rows of zeros to `height`."""
    missing = height - matrix.shape[-2]
    return pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _sum_by_row(grad_slots: Tensor, x: Tensor, token_indices: Tensor | None) -> Tensor:
    """The gradient of x: sums those of each row's slots. Unassigned slots add their zeros to row 0."""
    if token_indices is None:
        return grad_slots
    total = torch.zeros(x.shape, dtype=reference.weight_dtype(x.dtype), device=x.device)
    if x.shape[0]:
        total = total.index_add(0, token_indices.clamp(min=0), grad_slots.to(total.dtype))
    return total.to(x.dtype)


def _sum_by_expert(grad_out: Tensor, expert_offsets: Tensor, experts: Tensor | None = None) -> Tensor:
    """The gradient of a bias [E,N]: the sum of each expert's rows, as the weight gradient of a column of ones. With
    `experts` [n], those of these experts [n,N]."""
    ones = grad_out.new_ones(grad_out.shape[0], 1)
    return ops.grouped_gemm_wgrad(grad_out, ones, expert_offsets, None, False, experts).squeeze(-1)


def _times(rows: Tensor, weight: Sequence[Tensor], form: tuple[int, ...], expert_offsets: Tensor) -> Tensor:
    """Multiplies rows [S,N] by each expert's matrix of a stored or plain weight, [S,C]."""
    if form and formats.format_of(form) in (*formats.BITS, *formats.DECODED):
        return ops.grouped_gemm(rows, weight, form, None, expert_offsets, None, True, False)
    plain = [formats.decode(weight, form, rows.dtype)] if form else weight
    transposes = [_heighten(matrix, rows.shape[1]).mT for matrix in plain]
    return ops.grouped_gemm(rows, transposes, (), None, expert_offsets, None, False, True)


def gemm_inputs_of(
    x: Tensor, bias: Tensor | None, expert_offsets: Tensor, token_indices: Tensor | None, operand: Operand
) -> tuple[Any, ...]:
    """The inputs of GroupedGemm: x, bias, what has no gradient, and the tensors of the weight. For experts that train
    alone, bias and weight are theirs, after the list of them and what the product reads."""
    others = operand.form, expert_offsets, token_indices
    if operand.trained is None:
        return (x, bias, *others, None, None, None, *operand.tensors)
    trained, trained_bias, experts = operand.trained
    return (x, trained_bias, *others, experts, operand.tensors[0], bias, trained)


class GroupedGemm(torch.autograd.Function):
    """Inputs: gemm_inputs_of. The gradient of x uses the decoded weight and ignores the rounding of x (straight-through
    estimator)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        form: tuple[int, ...],
        expert_offsets: Tensor,
        token_indices: Tensor | None,
        experts: Tensor | None,
        frozen: Tensor | None,
        frozen_bias: Tensor | None,
        *weight: Tensor,
    ) -> Any:
        if frozen is not None:
            weight, bias = (frozen,), frozen_bias
        return ops.grouped_gemm(x, weight, form, bias, expert_offsets, token_indices, False, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, bias, ctx.form, *others = inputs
        # Experts that train alone are saved, too: an in-place change of them raises in backward.
        ctx.save_for_backward(x, bias, *others)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, need_bias, _, _, _, _, _, _, *need_weight = ctx.needs_input_grad
        form = ctx.form

        def grads(grad_out: Tensor, x: Tensor, _: Any, *saved: Any) -> Any:
            expert_offsets, token_indices, experts, frozen, _, *weight = saved
            packed = weight[0].dim() == 3
            grad_x = grad_bias = None
            grad_weight: list[Tensor | None] = [None] * len(weight)
            if need_x:
                read = weight if frozen is None else [frozen]
                grad_x = _sum_by_row(_times(grad_out, read, form, expert_offsets), x, token_indices)
            if need_bias:
                grad_bias = _sum_by_expert(grad_out, expert_offsets, experts)
                for expert, matrix in enumerate(() if packed or form else weight):
                    grad_bias[expert, matrix.shape[0] :] = 0  # columns past this expert's height
            if any(need_weight):
                layout = is_transposed(weight[0])
                grad = ops.grouped_gemm_wgrad(grad_out, x, expert_offsets, token_indices, layout, experts)
                grad_weight = [grad] if packed else [grad[e, : matrix.shape[0]] for e, matrix in enumerate(weight)]
            return grad_x, grad_bias, *grad_weight

        grad_x, grad_bias, *grad_weight = once(grads, grad_out, *ctx.saved_tensors)
        return grad_x, grad_bias, *[None] * 6, *grad_weight


class Linear(torch.autograd.Function):
    """Inputs: x [T,C], weight [N,C], bias [N] or None. If autograd records the backward pass (create_graph=True), it is
    in torch's products, which have all further derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if not torch.compiler.is_compiling() and needs_autograd(grad_out, x, weight):
            grad_x = grad_out @ weight if need_x else None
            grad_weight = grad_out.mT @ x if need_weight else None
            return grad_x, grad_weight, grad_out.sum(0) if need_bias else None
        offsets = _offsets(len(x), x.device)
        if need_x:
            grad_x = ops.grouped_gemm(grad_out, [weight.mT[None]], (), None, offsets, None, False, True)
        if need_weight:
            grad_weight = ops.grouped_gemm_wgrad(grad_out, x, offsets, None, is_transposed(weight))[0]
        if need_bias:
            grad_bias = _sum_by_expert(grad_out, offsets)[0]
        return grad_x, grad_weight, grad_bias
