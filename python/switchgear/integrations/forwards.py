# SPDX-License-Identifier: BSD-3-Clause
"""Which forward of a module runs.

Swapped forwards read the parameters of submodules instead of calling them. That is correct only while calling the
submodule does nothing else: adapters wrap it, offloading replaces its forward, users hook it, at any time. So each call
of a swapped forward checks its submodules, and calls the model's own code if one must be called. A parametrisation is
no obstacle: reading the attribute computes it.

A hook of Hugging Face's accelerate replaces `forward` too, and calls what it found, which it keeps in `_old_forward`.
Such hooks come and go before and after ours. So ours is put where a hook calls it, and taken from where it is by then.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from switchgear.adapters.wrappers import is_wrapper, lend_factors
from switchgear.utils.modules import constant_when_compiled
from switchgear.weights.state import Borrowed, Factors


def runs_own_forward(module: nn.Module) -> bool:
    """Whether the module runs the forward of its class, itself or below a hook."""
    forward = vars(module).get(_get_attribute(module))
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replaces the forward of a module that runs its own, or one of ours. Returns an undo function, which leaves those
    of others."""
    before = vars(module).get(_get_attribute(module))
    setattr(module, _get_attribute(module), types.MethodType(forward, module))

    def is_ours(name: str) -> bool:
        return getattr(vars(module).get(name), "__func__", None) is forward  # a hook may have bound it again

    def undo() -> None:
        own = before if _is_swap(before) else None
        if is_ours("forward") and own is None:
            del module.forward
            return
        for name in ("forward", "_old_forward"):
            if is_ours(name):
                setattr(module, name, own or types.MethodType(type(module).forward, module))

    return undo


def get_forward(module: nn.Module) -> Any:
    """The function that a module which runs its own forward, or one of ours, runs, itself or below a hook."""
    return getattr(vars(module).get(_get_attribute(module)), "__func__", type(module).forward)


def is_swapped(module: nn.Module) -> bool:
    """Whether the module runs a forward of `undecorated.PATCHES` or of `linears`, itself or below a hook."""
    own = vars(module)
    return _is_swap(own.get("forward")) or _is_swap(own.get("_old_forward"))


def _is_swap(forward: object) -> bool:
    return hasattr(getattr(forward, "__func__", None), "switchgear_patch")


def _get_attribute(module: nn.Module) -> str:
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


# ---- submodules ------------------------------------------------------------------------------------------------------


class PartClass(NamedTuple):
    """The class of a submodule, by name: modules of transformers are not imported for it."""

    module: str
    name: str

    def matches(self, cls: type[nn.Module]) -> bool:
        """Whether `cls` is this class with its own forward, or a subclass with that, as parametrisations make."""
        if cls.__name__ == self.name and cls.__module__ == self.module:
            return _has_own_forward(cls)
        bases = [base for base in cls.__mro__ if base.__name__ == self.name and base.__module__ == self.module]
        return any(getattr(base, "forward", None) is cls.forward and _has_own_forward(base) for base in bases)


_own_forwards: dict[type, Any] = {}  # a library's class: its forward as last recognised


@constant_when_compiled
def _has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether the forward of a library's class is the one of its source, which decorators of the library may wrap."""
    forward: Any = cls.forward
    if _own_forwards.get(cls) is forward:
        return True
    names = getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)
    if names != (cls.__module__, f"{cls.__qualname__}.forward"):
        return False
    library = cls.__module__.partition(".")[0]
    wrapped = forward
    while wrapped is not None:  # functools.wraps copies both names, but not where a function is from
        if getattr(wrapped, "__globals__", {}).get("__name__", "").partition(".")[0] != library:
            return False
        wrapped = getattr(wrapped, "__wrapped__", None)
    _own_forwards[cls] = forward
    return True


LINEAR = PartClass("torch.nn.modules.linear", "Linear")


def name_model_class(folder: str, name: str) -> PartClass:
    """A class of a model of transformers."""
    return PartClass(f"transformers.models.{folder}.modeling_{folder}", name)


class Bypassed(Exception):
    """A submodule must be called; the message says which and why."""


def get_part(module: nn.Module, name: str, expected: PartClass) -> nn.Module:
    """The submodule `name`, whose parameters may be read. Raises Bypassed if it is of another class, or its call does
    more than the forward of the class."""
    part = module._modules[name]  # three times faster than the attribute; that pays for the checks
    assert part is not None
    if torch.compiler.is_compiling():
        _check(part, name, expected)
        return part
    # What _check finds nothing in, without its six calls: decoding asks a dozen parts of each layer, with code and data
    # that the weights have evicted from the caches.
    own, cls = part.__dict__, part.__class__
    if (
        _recognised.get(cls) == (expected, cls.forward)
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and ((forward := own.get("forward")) is None or _is_swap(forward))
    ):
        return part
    _check(part, name, expected)
    _recognised[cls] = expected, cls.forward
    return part


_recognised: dict[type[nn.Module], tuple[PartClass, Any]] = {}  # a part's class, and its forward when it matched


def _check(part: nn.Module, name: str, expected: PartClass) -> None:
    cls = type(part)
    if not expected.matches(cls):
        if (cls.__module__, cls.__name__) == expected:
            raise Bypassed(f"the forward of {expected.name} was replaced")
        raise Bypassed(f"{name} is a {cls.__module__.partition('.')[0]} {cls.__name__}, not a {expected.name}")
    check_call(part, name)


def check_call(part: nn.Module, name: str) -> None:
    """Raises Bypassed if a call of the part does more than the forward of its class."""
    if has_hooks(part):
        raise Bypassed(f"{name} has hooks")
    if (forward := part.__dict__.get("forward")) is not None and not _is_swap(forward):
        raise Bypassed(f"the forward of {name} was replaced")


def has_hooks(part: nn.Module) -> bool:
    if part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return True
    return bool(part._forward_hooks) and not all(map(_is_idle, part._forward_hooks.values()))


def _is_idle(hook: Any) -> bool:
    """Whether a hook is one by which transformers records outputs, and the call under way records others or none. Once
    a model has been asked for some, it keeps the hooks for all."""
    code = getattr(hook, "__code__", None)
    if code is None or code.co_name != "output_capturing_hook" or "_active_collector" not in hook.__globals__:
        return False
    recorded = hook.__globals__["_active_collector"].get()
    return recorded is None or hook.__closure__[code.co_freevars.index("key")].cell_contents not in recorded


def borrow(module: nn.Module, name: str, expected: PartClass) -> Borrowed:
    """The factors that PEFT's wrappers around the submodule `name` would apply now. Raises Bypassed as `get_part`."""
    part: Any = module._modules[name]
    borrowed: dict[str, Sequence[Factors]] = {}
    while is_wrapper(part):
        check_call(part, name)
        if (factors := lend_factors(part)) is None:
            raise Bypassed(f"{name} has adapters whose factors cannot be read")
        if factors:
            borrowed[part.parameter_name] = factors
        part = part.base_layer
    _check(part, name, expected)
    return borrowed


def unwrap_part(part: Any) -> Any:
    """The module in wrappers of PEFT, if there are any."""
    while is_wrapper(part):
        part = part.base_layer
    return part
