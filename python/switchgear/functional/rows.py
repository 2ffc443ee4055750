# SPDX-License-Identifier: BSD-3-Clause
"""Stages that change rows without multiplying by a matrix: permute, glu, combine; and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchgear import ops
from switchgear.arrays import accepts_arrays
from switchgear.checks import convert
from switchgear.functional.arguments import as_dtype, as_limit, as_number, as_weights, flat
from switchgear.functional.gradients import apply, needs_autograd, once
from switchgear.functional.routes import Plan
from switchgear.reference import activations


@accepts_arrays
def permute(x: Tensor, plan: Plan, topk_weights: Tensor | None = None) -> Tensor:
    """The rows of x [T,H] in slot order, [S,H]: permuted_x[s] = x[token_indices[s]], times the slot's weight if given.

    topk_weights [T,K] may have any floating dtype. Rows past expert_offsets[E] are zero. Differentiable in both.
    """
    topk_weights = as_weights("topk_weights", topk_weights, x.dtype)
    if needs_autograd(x, topk_weights):
        permuted_x: Tensor = apply(Permutation, True, x, topk_weights, *plan)
        return permuted_x
    return ops.permute(x, *plan, topk_weights)


@accepts_arrays
def combine(permuted_y: Tensor, plan: Plan, topk_weights: Tensor | None = None) -> Tensor:
    """Sums each token's slots, [T,H]: y[t] = Σ_k topk_weights[t,k] · permuted_y[slot_indices[t,k]].

    permuted_y [S,H]; topk_weights [T,K] of any floating dtype, 1 if absent. The sum is in float32, in order of k.
    Differentiable in both.
    """
    topk_weights = as_weights("topk_weights", topk_weights, permuted_y.dtype)
    if needs_autograd(permuted_y, topk_weights):
        y: Tensor = apply(Permutation, False, permuted_y, topk_weights, *plan)
        return y
    return ops.combine(permuted_y, *plan, topk_weights)


@accepts_arrays
def glu(
    h: Tensor,
    activation: str | Callable[..., Tensor] = "silu",
    *,
    gated: bool = True,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """The activation between the two projections: act(gate) ⊙ up for gated experts, else act(h).

    Args:
        h: [..., N], N = 2I for gated experts, else I.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "swiglu_oai" (gpt-oss, gated only):
            gate · sigmoid(alpha · gate) ⊙ (up + 1). Or a function of the rows gate [S,I] and up [S,I], or of h [S,I] if
            not gated, in their dtype, that returns [S,I]; torch differentiates it.
        interleaved: gate = h[..., 0::2] and up = h[..., 1::2]; otherwise the first and the second half.
        limit: gate = min(gate, limit) and up = clamp(up, -limit, limit) first; gradients pass within it, ends included.

    Returns [..., I]. Source of gated units: arXiv:2002.05202.
    """
    rows = h if h.dim() == 2 else flat("h", h)
    if callable(activation):
        own = _apply_function(activation, activations.split(rows, gated, interleaved, as_limit(limit)))
        return own if h.dim() == 2 else own.reshape(*h.shape[:-1], own.shape[-1])
    options = (activation, gated, interleaved, as_number("alpha", alpha), as_limit(limit))
    a: Tensor = apply(Glu, rows, *options) if needs_autograd(rows) else ops.glu(rows, *options)
    return a if h.dim() == 2 else a.reshape(*h.shape[:-1], a.shape[-1])


def _apply_function(activation: Callable[..., Tensor], parts: tuple[Tensor, ...]) -> Tensor:
    """activation(*parts), in the dtype of h even if it computes in a wider one."""
    a: Tensor = convert("activation's result", activation(*parts), Tensor)
    if a.shape != parts[0].shape:
        raise ValueError(f"activation: expected a result of shape {list(parts[0].shape)}, got {list(a.shape)}")
    return as_dtype("activation's result", a, parts[0].dtype)


# ---- gradients -------------------------------------------------------------------------------------------------------


class Permutation(torch.autograd.Function):
    """permute, or combine: each is the backward of the other. The gradient of the weights is one inner product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(is_permute: bool, rows: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
        return (ops.permute if is_permute else ops.combine)(rows, *plan, topk_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_permute, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        is_permute, (_, need_rows, need_weights, *_) = ctx.is_permute, ctx.needs_input_grad

        def grads(grad: Tensor, rows: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
            move = ops.combine if is_permute else ops.permute
            of_tokens, of_slots = (rows, grad) if is_permute else (grad, rows)
            grad_rows = move(grad, *plan, topk_weights) if need_rows else None
            return grad_rows, ops.combine_weight_backward(of_tokens, of_slots, *plan) if need_weights else None

        return None, *once(grads, grad, *ctx.saved_tensors), None, None, None


class Glu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, *options: Any) -> Any:
        return ops.glu(h, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        h, *ctx.options = inputs
        ctx.save_for_backward(h)

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor) -> Any:
        options = ctx.options

        def grad(grad_a: Tensor, h: Tensor) -> Any:
            return ops.glu_backward(grad_a, h, *options)

        return once(grad, grad_a, *ctx.saved_tensors), *[None] * 5
