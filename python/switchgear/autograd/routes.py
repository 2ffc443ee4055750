# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of gate, route and route_dynamic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from switchgear import ops
from switchgear.autograd.common import apply, needs_autograd, once
from switchgear.reference.checks import wide


class Gate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, float32: bool) -> Any:
        return ops.gate(x, weight, bias, float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, _ = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        args = (grad_logits, x, weight, ctx.needs_input_grad[:3], ctx.bias_dtype)
        if torch.compiler.is_compiling() or not needs_autograd(grad_logits, x, weight):
            return *_gate_grads(*args), None
        return *apply(GateGrads, *args), None


class GateGrads(torch.autograd.Function):
    """The backward pass of Gate, used if autograd records it (create_graph=True)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
        return _gate_grads(grad, x, weight, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, to_x: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None) -> Any:
        """The second derivative, in torch's products, so there are all further ones. to_x is the gradient of grad_x."""
        saved = ctx.saved_tensors
        grad, x, weight = saved if saved[0].dtype == saved[1].dtype == saved[2].dtype else map(wide, saved)
        of_grad = of_x = of_weight = None
        if to_x is not None:
            of_grad, of_weight = to_x.to(x.dtype) @ weight.mT, grad.mT @ to_x.to(x.dtype)
        if to_weight is not None:
            through_weight = x @ to_weight.to(x.dtype).mT
            of_grad = through_weight if of_grad is None else of_grad + through_weight
            of_x = grad @ to_weight.to(x.dtype)
        if to_bias is not None:
            rows = to_bias.to(x.dtype).expand_as(grad)
            of_grad = rows if of_grad is None else of_grad + rows
        results = (of_grad, of_x, of_weight)
        return *(None if r is None else r.to(s.dtype) for r, s in zip(results, saved, strict=True)), None, None


def _gate_grads(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    """grad_x = g·W, grad_weight = gᵀ·x and grad_bias = Σ g.

    grad_x sums over a few experts, so it is computed as a weight gradient, whose kernel is made for short sums: that of
    the expert that has the rows of gᵀ and W. grad_weight has few rows and long sums, as a product of few tokens. Both
    read gᵀ. Each element has one order of sums, so a row of grad_x does not depend on the others.
    """
    need_x, need_weight, need_bias = needs
    if grad.shape[0] == 0:
        grad_bias = grad.new_zeros(grad.shape[1], dtype=bias_dtype) if need_bias else None
        return x.new_zeros(x.shape) if need_x else None, torch.zeros_like(weight) if need_weight else None, grad_bias
    rows, matrix = x, weight
    if not grad.dtype == x.dtype == weight.dtype:  # the gradient of float32 logits keeps its precision
        grad, rows, matrix = wide(grad), wide(x), wide(weight)
    grad_x = grad_weight = grad_bias = None
    transposed = grad.mT.contiguous()
    one_expert = torch.arange(2, dtype=torch.int32, device=x.device) * grad.shape[1]
    if need_x:
        grad_x = ops.grouped_gemm_wgrad(transposed, matrix, one_expert, None, False)[0].to(x.dtype)
    if need_weight:
        rows = rows if 1 in rows.stride() else rows.contiguous()  # weights of a product need it
        columns = (rows.mT[None],)
        grad_weight = ops.grouped_gemm(transposed, columns, (), None, one_expert, None, False, True).to(weight.dtype)
    if need_bias:  # the weight gradient of a column of ones
        ones, offsets = grad.new_ones(grad.shape[0], 1), torch.arange(2, dtype=torch.int32, device=x.device) * len(grad)
        grad_bias = ops.grouped_gemm_wgrad(grad, ones, offsets, None, False)[0, :, 0].to(bias_dtype)
    return grad_x, grad_weight, grad_bias


class Route(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(router_logits: Tensor, selection_bias: Tensor | None, *options: Any) -> Any:
        return ops.route(router_logits, selection_bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        router_logits, _, _, ctx.score_function, ctx.normalize, ctx.scale, *_ = inputs
        topk_ids, _ = output
        ctx.mark_non_differentiable(topk_ids)
        ctx.save_for_backward(router_logits, topk_ids)

    @staticmethod
    def backward(ctx: Any, _: Any, grad_topk_weights: Tensor) -> Any:
        options = (ctx.score_function, ctx.normalize, ctx.scale)

        def grad(*tensors: Any) -> Any:
            return ops.route_backward(*tensors, *options)

        return once(grad, grad_topk_weights, *ctx.saved_tensors), *[None] * 8


class RouteDynamic(Route):
    @staticmethod
    def forward(router_logits: Tensor, selection_bias: Tensor | None, *options: Any) -> Any:
        return ops.route_dynamic(router_logits, selection_bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        router_logits, _, _, _, ctx.score_function, _, _, ctx.normalize, ctx.scale = inputs
        topk_ids, _ = output
        ctx.mark_non_differentiable(topk_ids)
        ctx.save_for_backward(router_logits, topk_ids)
