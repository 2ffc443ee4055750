# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of grouped_gemm, with plain, stored and partly trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from switchgear import ops, reference
from switchgear.autograd.common import is_transposed, once
from switchgear.reference import formats


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


def _grouped_gemm_grads(needs: Sequence[bool], grad_out: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias and each weight; None where `needs` is false."""
    x, _, expert_offsets, token_indices, *weight = saved
    need_x, need_bias, *need_weight = needs
    packed = weight[0].dim() == 3
    grad_x = grad_bias = None
    grad_weight: list[Tensor | None] = [None] * len(weight)
    if need_x:
        transposes = [_heighten(matrix, grad_out.shape[1]).mT for matrix in weight]
        grad_x = ops.grouped_gemm(grad_out, transposes, (), None, expert_offsets, None, False, True)
        grad_x = _sum_by_row(grad_x, x, token_indices)
    if need_bias:
        grad_bias = _sum_by_expert(grad_out, expert_offsets)
        for expert, matrix in enumerate(() if packed else weight):
            grad_bias[expert, matrix.shape[0] :] = 0  # columns past this expert's height
    if any(need_weight):
        grad = ops.grouped_gemm_wgrad(grad_out, x, expert_offsets, token_indices, is_transposed(weight[0]))
        grad_weight = [grad] if packed else [grad[e, : matrix.shape[0]] for e, matrix in enumerate(weight)]
    return grad_x, grad_bias, *grad_weight


class GroupedGemm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, expert_offsets: Tensor, token_indices: Tensor | None, *weight: Tensor
    ) -> Any:
        return ops.grouped_gemm(x, weight, (), bias, expert_offsets, token_indices, False, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, need_bias, _, _, *need_weight = ctx.needs_input_grad
        needs = (need_x, need_bias, *need_weight)
        grad_x, grad_bias, *grad_weight = once(partial(_grouped_gemm_grads, needs), grad_out, *ctx.saved_tensors)
        return grad_x, grad_bias, None, None, *grad_weight


class StoredGroupedGemm(torch.autograd.Function):
    """grouped_gemm with integer or minifloat weights. The gradient of x uses the decoded weight and ignores the
    rounding of x (straight-through estimator)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        expert_offsets: Tensor,
        token_indices: Tensor | None,
        form: tuple[int, ...],
        *weight: Tensor,
    ) -> Any:
        return ops.grouped_gemm(x, weight, form, bias, expert_offsets, token_indices, False, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, bias, expert_offsets, token_indices, ctx.form, *weight = inputs
        ctx.save_for_backward(x, bias, expert_offsets, token_indices, *weight)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, need_bias, *_ = ctx.needs_input_grad
        form = ctx.form

        def grads(grad_out: Tensor, x: Tensor, _: Any, *rest: Any) -> Any:
            expert_offsets, token_indices, *weight = rest
            grad_x = grad_bias = None
            if need_x:
                grad_x = _sum_by_row(_times(grad_out, weight, form, expert_offsets), x, token_indices)
            if need_bias:
                grad_bias = _sum_by_expert(grad_out, expert_offsets)
            return grad_x, grad_bias

        saved = ctx.saved_tensors
        return *once(grads, grad_out, *saved), *[None] * (len(saved) - 1)


def _times(rows: Tensor, weight: Sequence[Tensor], form: tuple[int, ...], expert_offsets: Tensor) -> Tensor:
    """Multiplies rows [S,N] by each expert's matrix of a stored or plain weight, [S,C]."""
    if formats.format_of(form) in (*formats.BITS, *formats.DECODED):
        return ops.grouped_gemm(rows, weight, form, None, expert_offsets, None, True, False)
    plain = formats.decode(weight, form, rows.dtype)
    return ops.grouped_gemm(rows, [plain.mT], (), None, expert_offsets, None, False, True)


class SelectedGroupedGemm(torch.autograd.Function):
    """grouped_gemm with a weight of which some experts are trained alone; see SelectedWeight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        expert_offsets: Tensor,
        token_indices: Tensor | None,
        experts: Tensor,
        trained: Tensor,
        trained_bias: Tensor | None,
    ) -> Any:
        return ops.grouped_gemm(x, [weight], (), bias, expert_offsets, token_indices, False, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)  # the trained tensors too: an in-place change of them raises in backward

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, *_, need_weight, need_bias = ctx.needs_input_grad

        def grads(grad_out: Tensor, x: Tensor, weight: Tensor, _: Any, *rest: Any) -> Any:
            expert_offsets, token_indices, experts, trained, _ = rest
            grad_x = grad_weight = grad_bias = None
            if need_x:
                grad_x = ops.grouped_gemm(grad_out, [weight.mT], (), None, expert_offsets, None, False, True)
                grad_x = _sum_by_row(grad_x, x, token_indices)
            if need_weight:
                layout = is_transposed(trained)
                grad_weight = ops.grouped_gemm_wgrad(grad_out, x, expert_offsets, token_indices, layout, experts)
            if need_bias:
                grad_bias = _sum_by_expert(grad_out, expert_offsets, experts)
            return grad_x, grad_weight, grad_bias

        grad_x, *of_trained = once(grads, grad_out, *ctx.saved_tensors)
        return grad_x, *[None] * 5, *of_trained
