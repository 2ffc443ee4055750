# SPDX-License-Identifier: BSD-3-Clause
"""Stages that change rows without multiplying by a matrix: permute, glu, combine."""

from __future__ import annotations

from torch import Tensor

from switchgear import autograd, ops
from switchgear.arrays import accepts_arrays
from switchgear.autograd import apply, needs_autograd
from switchgear.functional.arguments import as_limit, as_number, as_weights, flat
from switchgear.functional.routes import Plan


@accepts_arrays
def permute(x: Tensor, plan: Plan, topk_weights: Tensor | None = None) -> Tensor:
    """The rows of x [T,H] in slot order, [S,H]: permuted_x[s] = x[token_indices[s]], times the slot's weight if given.

    topk_weights [T,K] may have any floating dtype. Rows past expert_offsets[E] are zero. Differentiable in both.
    """
    topk_weights = as_weights("topk_weights", topk_weights, x.dtype)
    if needs_autograd(x, topk_weights):
        permuted_x: Tensor = apply(autograd.Permute, x, topk_weights, *plan)
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
        y: Tensor = apply(autograd.Combine, permuted_y, topk_weights, *plan)
        return y
    return ops.combine(permuted_y, *plan, topk_weights)


@accepts_arrays
def glu(
    h: Tensor,
    activation: str = "silu",
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
            gate · sigmoid(alpha · gate) ⊙ (up + 1).
        interleaved: gate = h[..., 0::2] and up = h[..., 1::2]; otherwise the first and the second half.
        limit: gate = min(gate, limit) and up = clamp(up, -limit, limit) first; gradients pass within it, ends included.

    Returns [..., I]. Source of gated units: arXiv:2002.05202.
    """
    rows = h if h.dim() == 2 else flat("h", h)
    options = (activation, gated, interleaved, as_number("alpha", alpha), as_limit(limit))
    a: Tensor = apply(autograd.Glu, rows, *options) if needs_autograd(rows) else ops.glu(rows, *options)
    return a if h.dim() == 2 else a.reshape(*h.shape[:-1], a.shape[-1])
