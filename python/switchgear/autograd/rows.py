# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of permute, combine and glu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from switchgear import ops
from switchgear.autograd.common import once

# permute and combine are each the backward of the other. The gradient of the weights is the same inner product.


class Permute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
        return ops.permute(x, *plan, topk_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need_x, need_weights, *_ = ctx.needs_input_grad

        def grads(grad: Tensor, x: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
            grad_x = ops.combine(grad, *plan, topk_weights) if need_x else None
            return grad_x, ops.combine_weight_backward(x, grad, *plan) if need_weights else None

        return *once(grads, grad, *ctx.saved_tensors), None, None, None


class Combine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(permuted_y: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
        return ops.combine(permuted_y, *plan, topk_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need_y, need_weights, *_ = ctx.needs_input_grad

        def grads(grad: Tensor, permuted_y: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
            grad_y = ops.permute(grad, *plan, topk_weights) if need_y else None
            return grad_y, ops.combine_weight_backward(grad, permuted_y, *plan) if need_weights else None

        return *once(grads, grad, *ctx.saved_tensors), None, None, None


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
