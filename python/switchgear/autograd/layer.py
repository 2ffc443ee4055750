# SPDX-License-Identifier: BSD-3-Clause
"""The derivative of moe: a whole layer in one op, for weights of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import ops
from switchgear.autograd.common import once
from switchgear.autograd.in_place import add_in_place
from switchgear.ops import GRADIENTS, Layer
from switchgear.weights.operand import TrainedExperts

_COUNT = len(GRADIENTS)


class Recipe(NamedTuple):
    """How the inputs of Moe make up a layer."""

    forms: tuple[tuple[int, ...], tuple[int, ...]]  # of both projections
    counts: tuple[int, ...]  # tensors of both projections and of both adapters without derivatives, and frozen ones
    options: tuple[Any, ...]
    dropout: Sequence[float]
    source: Any  # a Source of the experts, which backward needs again; None if they are in memory

    def layer_of(self, inputs: Sequence[Any]) -> tuple[Layer, Tensor | None]:
        """The layer, and the list of experts that train alone."""
        _, first, second, gate_up_bias, down_bias, topk_weights, *factors = inputs[:_COUNT]
        topk_ids, seed, experts, *rest = inputs[_COUNT:]
        groups, at = [], 0
        for count in self.counts:
            groups.append(rest[at : at + count])
            at += count
        more, down_more, scales, down_scales, frozen = groups
        if frozen:
            first, second, gate_up_bias, down_bias = frozen
        adapter = () if factors[0] is None else (*factors[:2], *scales)
        down_adapter = () if factors[2] is None else (*factors[2:], *down_scales)
        fields: tuple[Any, ...] = (
            (first, *more), self.forms[0], (second, *down_more), self.forms[1], gate_up_bias, down_bias,
            topk_ids, topk_weights, *self.options, adapter, down_adapter, seed, self.dropout,
        )  # fmt: skip
        return Layer(*fields), experts


def inputs_of(x: Tensor, layer: Layer, trained: Sequence[TrainedExperts | None], source: Any) -> tuple[Any, ...]:
    """The inputs of Moe: the tensors of which GRADIENTS are the gradients, a recipe, and the other tensors.

    trained: experts of both projections that train alone, or None. Their gradients replace those of the projections and
    biases, which are frozen. source: of experts that are in memory now.
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
    forms = tuple(layer.gate_up_form), tuple(layer.down_form)
    recipe = Recipe(forms, tuple([len(group) for group in groups]), tuple(layer.options), layer.dropout, source)
    others = [tensor for group in groups for tensor in group]
    return (*given, recipe, layer.topk_ids, layer.dropout_seed, experts, *others)


class Moe(torch.autograd.Function):
    """Inputs: inputs_of. Outputs: y, and h, which has no gradient.

    Stored projections are frozen. The gradient ignores the rounding of x and a for integer weights (straight-through
    estimator).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        layer, _ = inputs[_COUNT].layer_of((*inputs[:_COUNT], *inputs[_COUNT + 1 :]))
        return ops.layer_forward(inputs[0], layer, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, h = output
        ctx.recipe = inputs[_COUNT]
        ctx.set_materialize_grads(False)  # no zeros of the size of h
        ctx.mark_non_differentiable(h)
        # Experts that train alone are saved, too: an in-place change of them raises in backward.
        ctx.save_for_backward(h, *inputs[:_COUNT], *inputs[_COUNT + 1 :])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        recipe, needs = ctx.recipe, list(ctx.needs_input_grad[:_COUNT])
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them

        def compute(grad_y: Tensor, h: Tensor, *inputs: Any) -> Any:
            layer, experts = recipe.layer_of(inputs)

            def of_layer(*_: Any) -> Any:
                return ops.layer_backward(grad_y, inputs[0], h, layer, needs, experts)

            source = recipe.source
            found = of_layer() if source is None else source.run(inputs[0], layer.topk_ids, of_layer, together=True)
            # torch 2.8 compiles no generator here.
            return tuple([grad if need else None for grad, need in zip(found, needs, strict=True)])

        grads = add_in_place(recipe, needs, grad_y, *saved)
        if grads is None:
            grads = once(compute, grad_y, *saved)
        return *grads, *[None] * (len(ctx.needs_input_grad) - _COUNT)
