# SPDX-License-Identifier: BSD-3-Clause
"""What all derivatives share: whether one is needed, gradients that can be taken once, and accumulate_into_grad.

Ops have no autograd formula: the functions beside wrap them in an autograd.Function if a gradient or a forward-mode
tangent is needed. Gradients can be taken once, those of gate any number of times; forward mode raises. A stored Weight
has no gradient: gradients reach activations, biases and topk_weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from switchgear import ops


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be needed."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return is_transformed()


def is_transformed() -> bool:
    """Whether forward mode or torch.func is active. requires_grad shows neither tangents nor tensors beneath a
    torch.vmap, for which the bare op would silently return wrong derivatives."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def needs_no_dispatch_in_backward(grad: Tensor, *others: Tensor | None) -> bool:
    """ops.needs_no_dispatch of a backward pass, where batched gradients and zeros without memory look like plain
    tensors."""
    return (
        ops.needs_no_dispatch(grad, *others)
        and not is_transformed()
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
        and not grad._is_zerotensor()
    )


class _Once(torch.autograd.Function):
    """Runs `function` on tensors. Differentiating its result raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("switchgear: gradients can be taken once; there is no second derivative of its functions")


def once(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Runs a backward pass, `function` of tensors, inside _Once if autograd records it (create_graph=True)."""
    if torch.compiler.is_compiling() or not needs_autograd(*tensors):
        return function(*tensors)
    return apply(_Once, function, *tensors)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


def is_transposed(weight: Tensor) -> bool:
    """Whether the memory of weight [..., N, C] is that of [..., C, N]."""
    return weight.stride(-2) == 1 and weight.stride(-1) != 1


# ---- gradients that kernels add to .grad -----------------------------------------------------------------------------


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


def accumulates_into_grad() -> bool:
    return _switch.is_on


def find_grads_to_add_to(
    weights: Sequence[Tensor], needs: Sequence[bool], others: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None] | None:
    """The .grad of both weights, None for one that needs no gradient, if a kernel that reads `others`, the weights
    included, may add to all that are needed; else None."""
    if torch.is_grad_enabled() or torch.is_anomaly_enabled() or not any(needs):
        return None
    for weight, need in zip(weights, needs, strict=True):
        if need and not _can_add(weight):
            return None
    first, second = (weight.grad if need else None for weight, need in zip(weights, needs, strict=True))
    if first is not None and second is not None and _overlap(first, second):  # as of one parameter for both
        return None
    read = {tensor.untyped_storage().data_ptr() for tensor in others}
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


def empty_gradient(weight: Tensor) -> Tensor:
    """A gradient that adds nothing, and takes no time to add. Hooks after the accumulation run for it."""
    indices = weight.new_empty((1, 0), dtype=torch.int64)
    values = weight.new_empty((0, *weight.shape[1:]))
    return torch.sparse_coo_tensor(indices, values, weight.shape, is_coalesced=True, check_invariants=False)
