# SPDX-License-Identifier: BSD-3-Clause
"""accumulate_into_grad: the kernel that computes the gradient of a weight adds it to `.grad`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from switchgear import ops


class _Switch(threading.local):
    is_on = False


_switch = _Switch()


@contextmanager
def accumulate_into_grad() -> Iterator[None]:
    """Inside, `backward()` lets kernels add the gradients of projections to `.grad`, where autograd would allocate a
    temporary as large as the weights and add that: for a second micro-batch, less memory and time.

        with switchgear.accumulate_into_grad():
            loss.backward()

    The sums have the bits of autograd's. It applies to backward passes that this thread starts, to plain projections on
    the CPU that are leaves passed to `moe` as they are, and if `.grad` of each that trains has its dtype and strides;
    autograd adds elsewhere, under torch.compile, for create_graph, in anomaly mode and for torch.autograd.grad.

    The caller promises what nothing can check:
    - no other thread runs a backward pass that reaches the same parameters meanwhile: torch adds beneath a lock that
      kernels do not take;
    - no hook on the accumulation itself (`register_prehook` of the parameter's AccumulateGrad) reads the gradient: it
      gets one without elements. Hooks after the accumulation, such as those of DistributedDataParallel, see the sum,
      and a parameter with a hook of its own (`register_hook`) is left to autograd.
    """
    before, _switch.is_on = _switch.is_on, True
    try:
        yield
    finally:
        _switch.is_on = before


def add_in_place(
    recipe: Any, needs: Sequence[bool], grad_y: Tensor, h: Tensor, *inputs: Any
) -> tuple[Tensor | None, ...] | None:
    """The gradients of a layer, of which those of the projections are added to `.grad`; None if autograd has to."""
    if torch.compiler.is_compiling() or not _switch.is_on:
        return None
    layer, experts = recipe.layer_of(inputs)
    weights = layer.gate_up_proj[0], layer.down_proj[0]
    is_plain = experts is None and not any(recipe.forms) and not any(recipe.counts) and recipe.source is None
    if not is_plain or layer.gate_up_adapter or layer.down_adapter:
        return None
    others = [tensor for tensor in (grad_y, h, *inputs) if tensor is not None]
    if (grads := _find_grads(weights, needs[1:3], others)) is None:
        return None
    x, *_ = inputs
    grad_x, _, _, *rest = ops.moe_backward_on_host(grads, grad_y, x, h, layer, needs)
    return grad_x, *(None if grad is None else _empty_gradient(grad) for grad in grads), *rest


def _find_grads(
    weights: Sequence[Tensor], needs: Sequence[bool], others: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None] | None:
    """The .grad of both weights, None for one that needs no gradient, if the kernel can add to all that are needed."""
    if torch.is_grad_enabled() or torch.is_anomaly_enabled() or not any(needs):
        return None
    for weight, need in zip(weights, needs, strict=True):
        if need and not _can_add(weight):
            return None
    if not ops.needs_no_dispatch(*others):
        return None
    first, second = (weight.grad if need else None for weight, need in zip(weights, needs, strict=True))
    if first is not None and second is not None and _overlap(first, second):  # as of one parameter for both
        return None
    read = {tensor.untyped_storage().data_ptr() for tensor in others}  # the weights, too
    if any(grad is not None and grad.untyped_storage().data_ptr() in read for grad in (first, second)):
        return None
    return first, second


def _can_add(weight: Tensor) -> bool:
    """Whether autograd would add a gradient of this weight to its .grad, and no hook sees the gradient before."""
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


def _empty_gradient(weight: Tensor) -> Tensor:
    """A gradient that adds nothing, and takes no time to add. Hooks after the accumulation run for it."""
    indices = weight.new_empty((1, 0), dtype=torch.int64)
    values = weight.new_empty((0, *weight.shape[1:]))
    return torch.sparse_coo_tensor(indices, values, weight.shape, is_coalesced=True, check_invariants=False)
