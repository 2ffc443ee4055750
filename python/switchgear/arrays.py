# SPDX-License-Identifier: BSD-3-Clause
"""Converts numpy, cupy and jax arrays to tensors and results back, through DLPack: no copies, no gradients."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils.dlpack import from_dlpack

from switchgear.complaints import complain

P = ParamSpec("P")
R = TypeVar("R")


def accepts_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function of tensors accept any arrays with `__dlpack__`. The first argument determines the library."""
    first_name = next(iter(inspect.signature(function).parameters))

    def on_arrays(first: Any, *args: Any, **kwargs: Any) -> R:
        if not hasattr(first, "__dlpack__"):
            raise TypeError(
                f"{first_name}: expected a torch.Tensor or an array with __dlpack__, got {type(first).__name__}"
            )
        with torch.no_grad():
            result = wrapper(*_map(to_torch, args), **_map(to_torch, kwargs))
        converted: R = _map(lambda value: from_torch(value, like=first), result)
        return converted

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else kwargs.get(first_name)
        if not isinstance(first, torch.Tensor):
            return on_arrays(first, *args, **kwargs)
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Exception:
            complain(function, args, kwargs)
            raise

    return wrapper


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Applies `change` to the leaves of nested tuples, lists and dicts."""
    if isinstance(value, dict):
        return {name: _map(change, item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        items: Iterable[Any] = (_map(change, item) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value)


def to_torch(value: Any) -> Any:
    """The array as a tensor that shares its memory; other values unchanged."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__"):
        return value
    try:
        return from_dlpack(value)
    except BufferError:  # read-only memory, which older libraries do not export
        return from_dlpack(value.copy())


def from_torch(value: Any, like: Any) -> Any:
    """The tensor as an array of the library of `like`; other values unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    if hasattr(like, "__array_namespace__"):
        namespace = like.__array_namespace__()
    else:
        namespace = importlib.import_module(type(like).__module__.partition(".")[0])
    return namespace.from_dlpack(value.detach())
