# SPDX-License-Identifier: BSD-3-Clause
"""The floating-point operations of ops that multiply matrices, for torch.utils.flop_counter.FlopCounterMode.

A formula gets the shapes of an op's tensors, so it counts each of T·K choices, empty ones too. A multiply-add is two
operations. The first projection takes 2·T·K·N·H, the second 2·T·K·H·I; an adapter of rank r adds 2·T·K·r to each of its
matrices' columns and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

Shape = Sequence[int]
Shapes = Sequence[Shape]


def _rows_of(weight: Shapes, form: Sequence[int]) -> int:
    """N of a weight [E,N,C]: stored bytes do not show it, their form does."""
    return form[1] if form else weight[0][1]


def _products(x: Shape, topk_ids: Shape, width: int, gated: bool) -> tuple[int, int]:
    """Of the first and of the second projection."""
    per_column = 2 * prod(topk_ids) * x[1]
    return per_column * width, per_column * (width // 2 if gated else width)


def _adapters(topk_ids: Shape, *adapters: Shapes | None) -> int:
    """Of a [E,r,C] and b [E,N,r]."""
    return sum(2 * prod(topk_ids) * prod(shape[1:]) for adapter in adapters if adapter for shape in adapter[:2])


def _share(flops: int, experts: Shape | None, num_experts: int) -> int:
    """Of the listed experts, as if all had as many rows."""
    return flops if experts is None else flops * experts[0] // num_experts


def moe_forward(
    x: Shape, gate_up_proj: Shapes, gate_up_form: Sequence[int], down_proj: Shapes, down_form: Sequence[int],
    gate_up_bias: Shape | None, down_bias: Shape | None, topk_ids: Shape, topk_weights: Shape,
    activation: str, gated: bool, interleaved: bool, alpha: float, limit: float, save_h_or_sums: Any,
    gate_up_adapter: Shapes | None = None, down_adapter: Shapes | None = None, *others: Any, **_: Any,
) -> int:  # fmt: skip
    products = _products(x, topk_ids, _rows_of(gate_up_proj, gate_up_form), gated)
    return sum(products) + _adapters(topk_ids, gate_up_adapter, down_adapter)


def moe_backward(
    grad_y: Shape, x: Shape, h: Shape,
    gate_up_proj: Shapes, gate_up_form: Sequence[int], down_proj: Shapes, down_form: Sequence[int],
    gate_up_bias: Shape | None, down_bias: Shape | None, topk_ids: Shape, topk_weights: Shape,
    activation: str, gated: bool, interleaved: bool, alpha: float, limit: float, needs: Sequence[bool],
    gate_up_adapter: Shapes | None = None, down_adapter: Shapes | None = None, dropout_seed: Any = None,
    dropout: Sequence[float] = (), experts: Shape | None = None, **_: Any,
) -> int:  # fmt: skip
    """A product's gradients are a product each: of its input, and of its weight if it trains."""
    first, second = _products(x, topk_ids, _rows_of(gate_up_proj, gate_up_form), gated)
    of_inputs = second + (first if needs[0] else 0)
    of_weights = (first if needs[1] else 0) + (second if needs[2] else 0)
    of_weights = _share(of_weights, experts, gate_up_proj[0][0])
    return of_inputs + of_weights + 2 * _adapters(topk_ids, gate_up_adapter, down_adapter)


def gate(x: Shape, weight: Shape, *others: Any, **_: Any) -> int:
    return 2 * x[0] * prod(weight)


def grouped_gemm(x: Shape, weight: Shapes, form: Sequence[int], *others: Any, out_shape: Shape, **_: Any) -> int:
    """Either x [·,C] -> [S,N], or the gradient of x: [·,N] -> [S,C]."""
    return 2 * prod(out_shape) * x[1]


def grouped_gemm_wgrad(
    grad_out: Shape, x: Shape, expert_offsets: Shape, token_indices: Shape | None, transposed: bool,
    experts: Shape | None = None, **_: Any,
) -> int:  # fmt: skip
    return _share(2 * prod(grad_out) * x[1], experts, expert_offsets[0] - 1)
