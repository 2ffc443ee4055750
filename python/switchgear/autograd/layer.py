# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of moe: a whole layer in one op."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import ops
from switchgear.autograd.common import once
from switchgear.weights.offloaded import Source

# A gradient that is there is added to in place, by the kernel that computes the new one: otherwise autograd would add a
# temporary of the size of the weight. What backward returns then is a gradient without elements, so that hooks of the
# accumulation, such as those of DistributedDataParallel, still run.


def _gradients_there(
    weights: Sequence[Tensor], needs: Sequence[bool], others: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None] | None:
    """The .grad of both weights, None for one that needs no gradient, if the kernel can add to all that are needed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_anomaly_enabled() or not any(needs):
        return None
    for weight, need in zip(weights, needs, strict=True):
        if need and not _can_add(weight):
            return None
    if not ops.needs_no_dispatch(*[tensor for tensor in (*others, *weights) if tensor is not None]):
        return None
    first, second = (weight.grad if need else None for weight, need in zip(weights, needs, strict=True))
    if first is not None and second is not None and _overlap(first, second):  # as of one parameter for both
        return None
    read = {tensor.untyped_storage().data_ptr() for tensor in others if tensor is not None}
    if any(grad is not None and grad.untyped_storage().data_ptr() in read for grad in (first, second)):
        return None
    return (first, second) if _is_alone() else None


def _can_add(weight: Tensor) -> bool:
    """Whether autograd would add a gradient of this weight to its .grad, and nothing sees the gradient before."""
    if not weight.requires_grad or not weight.is_leaf or weight._backward_hooks:  # frozen since forward
        return False
    grad = weight.grad
    if grad is None or type(grad) is not Tensor or grad.requires_grad or grad.is_neg() or grad.layout != weight.layout:
        return False
    if grad.dtype is not weight.dtype or grad.stride() != weight.stride() or not grad.is_cpu:
        return False
    if grad.stride(-1) != 1 and grad.stride(-2) != 1:
        return False
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # of torch.autograd.grad, which returns gradients and leaves .grad alone
        return False


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors share memory."""
    first, second = one.data_ptr(), other.data_ptr()
    return first < second + other.nbytes and second < first + one.nbytes


# Whose threads run no backward pass: those of DataLoader, notebooks, progress bars, loggers, and our own.
_WITHOUT_PASSES = (
    "IPython.",
    "ipykernel.",
    "multiprocessing.queues",
    "rich.",
    "switchgear.",
    "tensorboard.",
    "torch.utils.data.",
    "tqdm.",
    "wandb.",
)


def _is_alone() -> bool:
    """Whether no other Python thread may be in a backward pass. It would add to the same gradients beneath torch's lock
    of each, which cannot be taken from here."""
    return threading.active_count() == 1 or all(map(_runs_no_pass, threading.enumerate()))


def _runs_no_pass(thread: threading.Thread) -> bool:
    if thread is threading.current_thread() or type(thread).__module__.startswith(_WITHOUT_PASSES):
        return True
    target = getattr(thread, "_target", None)
    return (getattr(target, "__module__", None) or "").startswith(_WITHOUT_PASSES)


def _nothing_of(weight: Tensor) -> Tensor:
    """A gradient that adds nothing, and takes no time to add."""
    indices = weight.new_empty((1, 0), dtype=torch.int64)
    values = weight.new_empty((0, *weight.shape[1:]))
    return torch.sparse_coo_tensor(indices, values, weight.shape, is_coalesced=True, check_invariants=False)


def _needed(outputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The first outputs, None where not needed. torch 2.8 compiles neither a generator here nor strict=False."""
    return tuple([output if need else None for output, need in zip(outputs[: len(needs)], needs, strict=True)])


class Moe(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *others: Any) -> Any:
        return ops.moe_forward(x, [gate_up_proj], (), [down_proj], (), *others, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, activation, gated, interleaved, alpha, limit = inputs
        _, h = output
        ctx.options = (activation, gated, interleaved, alpha, limit)
        ctx.set_materialize_grads(False)  # no zeros of the size of h
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(*tensors, h)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * 12
        needs = [*ctx.needs_input_grad[:5], ctx.needs_input_grad[6]]  # not of topk_ids
        options = ctx.options
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them
        x, gate_up_proj, down_proj, *others, h = saved
        weights = gate_up_proj, down_proj
        if (there := _gradients_there(weights, needs[1:3], (x, h, grad_y, *others))) is not None:
            found = ops.moe_backward_on_host(there, grad_y, x, h, *weights, *others, *options, needs=needs)
            nothing = (None if grad is None else _nothing_of(grad) for grad in there)
            grad_x, *grad_biases, grad_weights = found
            return grad_x, *nothing, *grad_biases, None, grad_weights, *[None] * 5

        def grads(grad_y: Tensor, x: Tensor, *saved: Any) -> Any:
            gate_up_proj, down_proj, *others, h = saved
            layer = ([gate_up_proj], (), [down_proj], (), *others)
            outputs = ops.moe_backward(grad_y, x, h, *layer, *options, needs)
            return _needed(outputs, needs)

        *grad_inputs, grad_weights = once(grads, grad_y, *saved)
        return *grad_inputs, None, grad_weights, *[None] * 5


class SelectedMoe(torch.autograd.Function):
    """Moe with projections of which some experts are trained alone; see SelectedWeight.

    Inputs: those of Moe up to topk_weights; experts; the trained projections and biases; the options.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *others: Any) -> Any:
        return ops.moe_forward(x, [gate_up_proj], (), [down_proj], (), *others[:4], *others[9:], True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, h = output
        ctx.options = inputs[12:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(*inputs[:12], h)  # the trained tensors too: an in-place change of them raises in backward

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * 17
        need_x, *_, need_weights = ctx.needs_input_grad[:7]
        of_trained = ctx.needs_input_grad[8:12]
        options, needs = ctx.options, [need_x, *of_trained, need_weights]

        def grads(grad_y: Tensor, x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *saved: Any) -> Any:
            *others, experts, _, _, _, _, h = saved
            layer = ([gate_up_proj], (), [down_proj], (), *others)
            outputs = ops.moe_backward(grad_y, x, h, *layer, *options, needs, experts=experts)
            return _needed(outputs, needs)

        grad_x, *grad_trained, grad_weights = once(grads, grad_y, *ctx.saved_tensors)
        return grad_x, *[None] * 5, grad_weights, None, *grad_trained, *[None] * 5


class Parts(NamedTuple):
    """What the tensors of MoeOfParts are."""

    forms: tuple[tuple[int, ...], tuple[int, ...]]  # of both projections
    counts: tuple[int, ...]  # of tensors: of the projections, of their adapters, and of the seed of dropout
    options: tuple[Any, ...]
    dropout: tuple[float, ...]
    source: Source | None = None  # of offloaded experts, which backward needs again

    def split(self, tensors: Sequence[Any]) -> list[list[Any]]:
        """The tensors, group by group."""
        rest = iter(tensors)
        return [[next(rest) for _ in range(count)] for count in self.counts]


class MoeOfParts(torch.autograd.Function):
    """Moe with stored projections, which are frozen, and with adapters. The gradient ignores the rounding of x and a
    for integer weights (straight-through estimator).

    Inputs: x, the biases, topk_ids, topk_weights; parts; then the tensors that they describe.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        topk_ids: Tensor,
        topk_weights: Tensor,
        parts: Parts,
        *tensors: Tensor,
    ) -> Any:
        first, second, *adapters, seed = parts.split(tensors)
        layer = (first, parts.forms[0], second, parts.forms[1], gate_up_bias, down_bias, topk_ids, topk_weights)
        drops = (seed[0] if seed else None, parts.dropout)
        return ops.moe_forward(x, *layer, *parts.options, True, *adapters, *drops)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.parts = inputs[:6]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1], *inputs[6:])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        parts: Parts = ctx.parts
        need_x, need_gate_up_bias, need_down_bias, _, need_weights, _, *rest = ctx.needs_input_grad
        need_first, need_second, *need_adapters, _of_seed = parts.split(rest)
        needs = [need_x, need_first[0], need_second[0], need_gate_up_bias, need_down_bias, need_weights]
        for need in need_adapters:
            needs += need[:2] or (False, False)

        def grads(grad_y: Tensor, x: Tensor, *saved: Any) -> Any:
            gate_up_bias, down_bias, topk_ids, topk_weights, h, *tensors = saved
            first, second, *adapters, seed = parts.split(tensors)
            layer = (first, parts.forms[0], second, parts.forms[1], gate_up_bias, down_bias, topk_ids, topk_weights)
            drops = (seed[0] if seed else None, parts.dropout)

            def compute(*_: Any) -> Any:
                return ops.moe_backward(grad_y, x, h, *layer, *parts.options, needs, *adapters, *drops)

            outputs: Any = compute() if parts.source is None else parts.source.run(x, topk_ids, compute, together=True)
            return _needed(outputs, needs)

        grad_x, grad_first, grad_second, *grad_biases, grad_weights, first_a, first_b, second_a, second_b = once(
            grads, grad_y, *ctx.saved_tensors
        )
        of_groups: tuple[list[Any], ...] = (
            [grad_first],
            [grad_second],
            [first_a, first_b],
            [second_a, second_b],
            [None],
        )
        of_tensors = (
            (*grads_of, None, None, None, None)[:count]
            for grads_of, count in zip(of_groups, parts.counts, strict=True)
        )  # fmt: skip
        return grad_x, *grad_biases, None, grad_weights, None, *(grad for group in of_tensors for grad in group)
