# SPDX-License-Identifier: BSD-3-Clause
"""Runs a model's linears on switchgear's products: each nn.Linear, and routers that call F.linear themselves.

A forward of ours on the instance multiplies where the call is the plain product of one matrix on the CPU. In all other
cases it calls the forward of the class: under torch.compile, torch.jit.trace, autocast and torch.func, in forward mode,
for other devices, dtypes and kinds of tensors, and for arguments that torch refuses.

No shape of the input makes a difference, so a row has the same bits in any batch.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.backends import in_autocast, runs_natively
from switchgear.functional import linear
from switchgear.functional.gradients import is_transformed
from switchgear.functional.products import is_direct, linear_on_host
from switchgear.integrations.forwards import LINEAR, replace_forward, runs_own_forward

_KINDS = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[[], None]]]:
    """Replaces the forward of each linear, one after the other: yields (name, module, undo)."""
    for name, module in model.named_modules():
        if not runs_own_forward(module):
            continue
        if LINEAR.matches(type(module)):
            yield name, module, replace_forward(module, _build_linear(type(module).forward))
        elif (own := _find_router_forward(module)) is not None:
            yield name, module, replace_forward(module, own)


def _build_linear(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward of modules of a class whose own forward is `own`."""

    def forward(self: Any, input: Tensor) -> Tensor:  # torch's name of the argument
        if type(self).forward is own:
            try:  # faster than the attributes
                weight, bias = self._parameters["weight"], self._parameters["bias"]
            except KeyError:  # a parametrisation computes them, or other code has put them elsewhere
                weight, bias = self.weight, self.bias
            if (out := multiply(input, weight, bias)) is not None:
                return out
        return type(self).forward(self, input)  # type: ignore[no-any-return]

    forward.switchgear_patch = "linear"  # type: ignore[attr-defined]
    return forward


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """F.linear(x, weight, bias) by our kernels; None if torch has to compute it."""
    if is_direct(x, weight, bias):
        try:
            return linear_on_host(x, weight, bias)
        except (RuntimeError, TypeError, ValueError):  # torch computes it, or explains what is wrong
            return None
    return linear(x, weight, bias) if _is_plain_product(x, weight, bias) else None


def _is_plain_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` takes a product that needs a gradient, or whose op is dispatched to a profiler or a mode."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or in_autocast("cpu") or is_transformed():
        return False
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if type(tensor) not in _KINDS or not tensor.is_cpu or tensor.layout is not torch.strided:
            return False
        if tensor.dtype is not x.dtype:
            return False
    if x.dtype not in _DTYPES or not runs_natively(x.dtype) or 0 in weight.shape:
        return False
    return x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])


# ---- routers ---------------------------------------------------------------------------------------------------------


class _Functions:
    """torch.nn.functional with our linear."""

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = multiply(input, weight, bias)
        return F.linear(input, weight, bias) if out is None else out

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


_functions = _Functions()


def _find_router_forward(module: nn.Module) -> Callable[..., Any] | None:
    """A forward for a router of transformers that multiplies by its own parameter: that of its class, with our linear.
    None for other modules."""
    own: Any = type(module).forward
    weight, code = module._parameters.get("weight"), getattr(own, "__code__", None)
    if weight is None or weight.dim() != 2 or code is None or own.__closure__ or list(module.children()):
        return None
    names, names_of_module = code.co_names, own.__globals__
    is_library = (
        type(module).__module__.startswith("transformers.models.") and own.__module__ == type(module).__module__
    )
    if not is_library or "linear" not in names or names_of_module.get("F") is not F:
        return None
    ours = types.FunctionType(code, names_of_module | {"F": _functions}, "forward", own.__defaults__)
    ours.__kwdefaults__ = own.__kwdefaults__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_ours = type(self).forward is own and not torch.compiler.is_compiling()
        return (ours if is_ours else type(self).forward)(self, *args, **kwargs)

    forward.switchgear_patch = "linear"  # type: ignore[attr-defined]
    return forward
