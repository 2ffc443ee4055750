# SPDX-License-Identifier: BSD-3-Clause
"""The derivative of moe: a whole layer in one op, for weights of every kind."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import ops
from switchgear.functional.gradients import (
    accumulates_into_grad,
    empty_gradient,
    find_grads_to_add_to,
    needs_no_dispatch_in_backward,
    once,
)
from switchgear.ops import GRADIENTS, Layer
from switchgear.weights.weight import TrainedExperts

_COUNT = len(GRADIENTS)


class Recipe(NamedTuple):
    """How the inputs of Moe make up a layer."""

    forms: tuple[tuple[int, ...], tuple[int, ...]]  # of both projections
    counts: tuple[int, ...]  # tensors of both projections and of both adapters without derivatives, and frozen ones
    options: tuple[Any, ...]
    dropout: Sequence[float]
    source: Any  # an offload.waves.LayerInWaves, which runs the layer; None if its experts are in memory
    needs_no_dispatch: bool  # in forward

    def layer_of(self, inputs: Sequence[Any]) -> tuple[Layer, Tensor | None]:
        """The layer, and the list of experts that train alone."""
        _, first, second, gate_up_bias, down_bias, topk_weights, a, b, down_a, down_b, topk_ids, seed, experts = inputs[
            : _COUNT + 3
        ]
        more: Sequence[Any] = ()
        down_more = scales = down_scales = more
        if any(self.counts):
            groups, at = [], _COUNT + 3
            for count in self.counts:
                groups.append(inputs[at : at + count])
                at += count
            more, down_more, scales, down_scales, frozen = groups
            if frozen:
                first, second, gate_up_bias, down_bias = frozen
        fields: tuple[Any, ...] = (
            (first, *more), self.forms[0], (second, *down_more), self.forms[1], gate_up_bias, down_bias,
            topk_ids, topk_weights, *self.options,
            () if a is None else (a, b, *scales), () if down_a is None else (down_a, down_b, *down_scales),
            seed, self.dropout,
        )  # fmt: skip
        return Layer(*fields), experts


def inputs_of(
    x: Tensor,
    layer: Layer,
    trained: Sequence[TrainedExperts | None] = (None, None),
    source: Any = None,
    needs_no_dispatch: bool = False,
) -> tuple[Any, ...]:
    """The inputs of Moe: a recipe, the tensors of which GRADIENTS are the gradients, and the other tensors.

    trained: experts of both projections that train alone, or None. Their gradients replace those of the projections and
    biases, which are frozen. source: runs the layer, if its experts are offloaded.
    """
    frozen: tuple[Tensor | None, ...] = ()
    given, experts = ops.differentiable(x, layer), None
    first, second = trained
    if first is not None and second is not None:
        frozen, experts = given[1:5], first.experts
        given = (x, first.weight, second.weight, first.bias, second.bias, *given[5:])
    groups = (
        layer.gate_up_proj[1:],
        layer.down_proj[1:],
        (layer.gate_up_adapter or ())[2:],
        (layer.down_adapter or ())[2:],
        frozen,
    )
    forms, counts = (tuple(layer.gate_up_form), tuple(layer.down_form)), tuple(map(len, groups))
    recipe = Recipe(forms, counts, tuple(layer[8:13]), layer.dropout, source, needs_no_dispatch)
    others = [tensor for group in groups for tensor in group]
    return (recipe, *given, layer.topk_ids, layer.dropout_seed, experts, *others)


class Moe(torch.autograd.Function):
    """Inputs: inputs_of. Outputs: y, and h, which has no gradient.

    Stored projections are frozen. The gradient ignores the rounding of x and a for integer weights (straight-through
    estimator).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: Recipe, *inputs: Any) -> Any:
        layer, _ = recipe.layer_of(inputs)
        run = ops.layer_forward if recipe.source is None else recipe.source.forward
        return run(inputs[0], layer, True, recipe.needs_no_dispatch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.recipe, *tensors = inputs
        _, h = output
        ctx.set_materialize_grads(False)  # no zeros of the size of h
        ctx.mark_non_differentiable(h)
        # Experts that train alone are saved, too: an in-place change of them raises in backward.
        ctx.save_for_backward(h, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        recipe, needs = ctx.recipe, list(ctx.needs_input_grad[1 : _COUNT + 1])
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them
        is_direct = recipe.needs_no_dispatch and needs_no_dispatch_in_backward(grad_y, *saved)

        def compute(grad_y: Tensor, h: Tensor, *inputs: Any) -> Any:
            layer, experts = recipe.layer_of(inputs)
            run = ops.layer_backward if recipe.source is None else recipe.source.backward
            found = run(grad_y, inputs[0], h, layer, needs, experts, is_direct)
            # torch 2.8 compiles no generator here.
            return tuple([grad if need else None for grad, need in zip(found, needs, strict=True)])

        grads = _add_in_place(recipe, needs, grad_y, *saved) if is_direct and accumulates_into_grad() else None
        if grads is None:
            grads = once(compute, grad_y, *saved)
        return None, *grads, *[None] * (len(ctx.needs_input_grad) - _COUNT - 1)


# torch binds the arguments of each call, and would derive the signature anew.
Moe.forward.__signature__ = inspect.signature(Moe.forward)  # type: ignore[attr-defined]


def _add_in_place(
    recipe: Recipe, needs: Sequence[bool], grad_y: Tensor, h: Tensor, *inputs: Any
) -> tuple[Tensor | None, ...] | None:
    """The gradients of a layer, of which those of the projections are added to `.grad`; None if autograd has to."""
    layer, experts = recipe.layer_of(inputs)
    is_plain = experts is None and not any(recipe.forms) and not any(recipe.counts) and recipe.source is None
    if not is_plain or layer.gate_up_adapter or layer.down_adapter:
        return None
    others = [tensor for tensor in (grad_y, h, *inputs) if tensor is not None]
    grads = find_grads_to_add_to((layer.gate_up_proj[0], layer.down_proj[0]), needs[1:3], others)
    if grads is None:
        return None
    grad_x, _, _, *rest = ops.moe_backward_on_host(grads, grad_y, inputs[0], h, layer, needs)
    return grad_x, *(None if grad is None else empty_gradient(grad) for grad in grads), *rest
