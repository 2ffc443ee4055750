# SPDX-License-Identifier: BSD-3-Clause
"""The whole layer of experts in plain torch: moe_forward and moe_backward. The specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from switchgear.reference.activations import check_options, glu_backward_of, glu_of, intermediate_size_of
from switchgear.reference.checks import check, check_experts, weight_dtype, wide
from switchgear.reference.formats import check_weight, format_of
from switchgear.reference.products import gemm, multiply, sum_rows, wgrad_of
from switchgear.reference.rows import gather_rows, rows_of, segments, to_slots
from switchgear.reference.stages import combine, plan


def check_layer(
    x: Tensor,
    sizes: tuple[int, int, int],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
) -> None:
    """Checks the arguments other than weights. sizes: E, N, and H of the projections."""
    num_experts, width, hidden_size = sizes
    check("x", x, (None, hidden_size))
    check("gate_up_bias", gate_up_bias, (num_experts, width), x.dtype)
    check("down_bias", down_bias, (num_experts, hidden_size), x.dtype)
    check("topk_ids", topk_ids, (x.shape[0], None), torch.int32)
    check("topk_weights", topk_weights, topk_ids.shape, weight_dtype(x.dtype))


def _plain(name: str, tensors: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    if form:
        raise ValueError(f"{name}: expected plain weights for gradients, got {format_of(form)}")
    return tensors[0]


def empty_gradient(weight: Tensor, experts: Tensor | None) -> Tensor:
    """The gradient of a weight [E,…], or of its `experts`, uninitialised, in the memory order of the weight."""
    return torch.empty_like(weight if experts is None else weight[: experts.shape[0]])


def moe_forward(
    x: Tensor,
    gate_up_proj: Sequence[Tensor],
    gate_up_form: Sequence[int],
    down_proj: Sequence[Tensor],
    down_form: Sequence[int],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    """y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu) · W_dᵀ + b_d), and h [S,N] = x·W_guᵀ + b_gu in slot order.

    h is [0,N] unless save_h. Each projection has a form (formats.py). Integer weights are multiplied by activations
    rounded to int8: x, and a = glu(h) after rounding to the dtype of x.
    """
    check_options(activation, gated, alpha, limit)
    check("x", x, (None, None))
    sizes = check_weight("gate_up_proj", gate_up_proj, gate_up_form, (None, None, x.shape[1]), x.dtype)
    num_experts, width, hidden_size = sizes
    intermediate_size = intermediate_size_of("gate_up_proj", width, gated)
    check_weight("down_proj", down_proj, down_form, (num_experts, hidden_size, intermediate_size), x.dtype)
    check_layer(x, sizes, gate_up_bias, down_bias, topk_ids, topk_weights)
    expert_offsets, token_indices, slot_indices = plan(topk_ids, num_experts)
    h = multiply(rows_of(x, token_indices), x.dtype, gate_up_proj, gate_up_form, gate_up_bias, expert_offsets)
    a = glu_of(h, activation, gated, interleaved, alpha, limit)
    permuted_y = multiply(a, x.dtype, down_proj, down_form, down_bias, expert_offsets)
    y = combine(permuted_y, expert_offsets, token_indices, slot_indices, topk_weights)
    return y.to(x.dtype), h.to(x.dtype) if save_h else x.new_empty(0, width)


def moe_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    gate_up_proj: Sequence[Tensor],
    gate_up_form: Sequence[int],
    down_proj: Sequence[Tensor],
    down_form: Sequence[int],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: Sequence[bool],
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of moe_forward from x and h; `a` is recomputed. Projections are plain. Outputs that `needs` does not
    request are empty. With dy the rows of grad_y in slot order and w their weights:

        da' = dy · W_d                    dh = glu'(h, w · da')
        x             Σ_k dh · W_gu       gate_up_proj  dhᵀ · x          gate_up_bias  Σ dh
        topk_weights  <da', a> + <dy,b_d> down_proj     (w · dy)ᵀ · a    down_bias     Σ w · dy

    experts: [n], ascending; the gradients of projections and biases are then those of these experts, [n,…].
    """
    check_options(activation, gated, alpha, limit)
    sizes = check_weight("gate_up_proj", gate_up_proj, gate_up_form, (None, None, None), x.dtype)
    num_experts, width, hidden_size = sizes
    down_sizes = (num_experts, hidden_size, intermediate_size_of("gate_up_proj", width, gated))
    check_weight("down_proj", down_proj, down_form, down_sizes, x.dtype)
    gate_up, down = _plain("gate_up_proj", gate_up_proj, gate_up_form), _plain("down_proj", down_proj, down_form)
    check_layer(x, sizes, gate_up_bias, down_bias, topk_ids, topk_weights)
    check("grad_y", grad_y, x.shape, x.dtype)
    check("h", h, (topk_ids.numel(), width), x.dtype)
    check_experts(experts, num_experts)
    need_x, need_gate_up, need_down, need_gate_up_bias, need_down_bias, need_weights = needs
    options = (activation, gated, interleaved, alpha, limit)
    expert_offsets, token_indices, slot_indices = plan(topk_ids, num_experts)
    absent = x.new_empty(0)
    grad_x = grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = absent
    grad_weights = topk_weights.new_empty(0)

    rows_h = wide(h)
    grad_rows = rows_of(grad_y, token_indices)  # dy
    weighted = grad_rows * to_slots(topk_weights, slot_indices)[:, None]  # w · dy
    a = glu_of(rows_h, *options)
    if need_down:
        grad_down = wgrad_of(weighted, a, expert_offsets, empty_gradient(down, experts), experts)
    if need_down_bias and down_bias is not None:
        grad_down_bias = sum_rows(weighted, expert_offsets, down_bias, experts)
    if need_weights:
        grad_a = gemm(grad_rows, down.mT, None, expert_offsets)  # da'
        grad_slot = (grad_a * a).sum(-1)
        if down_bias is not None:
            for expert, slots in segments(expert_offsets):
                grad_slot[slots] += grad_rows[slots] @ wide(down_bias[expert])
        grad_weights = gather_rows(grad_slot, slot_indices)
    if need_x or need_gate_up or need_gate_up_bias:
        grad_h = glu_backward_of(gemm(weighted, down.mT, None, expert_offsets), rows_h, *options)
        if need_x:
            grad_slots = gemm(grad_h, gate_up.mT, None, expert_offsets)
            grad_x = combine(grad_slots, expert_offsets, token_indices, slot_indices, None).to(x.dtype)
        if need_gate_up:
            rows_x, empty = rows_of(x, token_indices), empty_gradient(gate_up, experts)
            grad_gate_up = wgrad_of(grad_h, rows_x, expert_offsets, empty, experts)
        if need_gate_up_bias and gate_up_bias is not None:
            grad_gate_up_bias = sum_rows(grad_h, expert_offsets, gate_up_bias, experts)
    return grad_x, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias, grad_weights
