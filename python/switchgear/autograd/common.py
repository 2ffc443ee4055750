# SPDX-License-Identifier: BSD-3-Clause
"""What all of these functions share: whether one is needed, and gradients that can be taken once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be needed. requires_grad shows neither forward-mode tangents nor tensors beneath a
    torch.vmap. For these the bare op would silently return wrong derivatives."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


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
