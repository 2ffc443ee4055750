# SPDX-License-Identifier: BSD-3-Clause
"""The derivative of grouped_gemm, with plain, stored and partly trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from switchgear import ops, reference
from switchgear.autograd.common import is_transposed, once
from switchgear.reference import formats
from switchgear.weights.operand import Operand


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
