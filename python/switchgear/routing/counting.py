# SPDX-License-Identifier: BSD-3-Clause
"""What routers, losses, controllers and selections count in training, call by call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.utils._python_dispatch import _disable_current_modes

from switchgear.utils.modules import has_proxies


def unseen(*like: Any) -> AbstractContextManager[Any]:
    """Hides the ops inside, on tensors such as those in `like`, from dispatch modes: for what is not done again where
    checkpointing repeats a forward. Selective checkpointing numbers the ops of both runs."""
    if torch.compiler.is_compiling() or has_proxies() or not torch._C._len_torch_dispatch_stack():
        return nullcontext()
    if any(isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter) for value in like):
        return nullcontext()  # fake tensors and the like, which live in a mode
    return _disable_current_modes()


def aside(count: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """count(*tensors), unseen by dispatch modes and the transforms of torch.func. Under vmap the tensors have the rows
    of all calls, in dimensions of their own at the front."""
    if torch.compiler.is_compiling() or has_proxies():
        return count(*tensors)
    plain = [None if tensor is None else _unwrapped(tensor) for tensor in tensors]
    with ExitStack() as stack:
        if _functorch.maybe_current_level() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # has loaded already

            stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(unseen(*plain))
        return count(*plain)


def _unwrapped(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        dim = _functorch.maybe_get_bdim(tensor)  # -1 if not of vmap
        tensor = _functorch.get_unwrapped(tensor)
        tensor = tensor.movedim(dim, 0) if dim > 0 else tensor
    return tensor


def kept_counts(module: nn.Module) -> Callable[[], None]:
    """A function that puts back what parts of a router or a model, itself among them, have counted by now: what they
    name in `counted`."""
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "counted")]
    before = [(part, name, _copied(getattr(part, name))) for part in parts for name in part.counted]

    def restore() -> None:
        for part, name, value in before:
            if name in part._buffers:
                getattr(part, name).copy_(value)
            else:
                setattr(part, name, value)

    return restore


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)
