# SPDX-License-Identifier: BSD-3-Clause
"""Converts numpy, cupy and jax arrays to tensors and results back, through DLPack: no gradients, and no copies
except of arrays with negative strides."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import is_tensor
from torch.utils.dlpack import from_dlpack

from switchgear.checks import explain_failure
from switchgear.ops import check_capsule

P = ParamSpec("P")
R = TypeVar("R")


def accepts_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function of tensors accept any arrays with `__dlpack__`. The first argument determines the library."""
    names = list(inspect.signature(function).parameters)
    first_name = names[0]

    def on_arrays(first: Any, *args: Any, **kwargs: Any) -> R:
        if not hasattr(first, "__dlpack__"):
            raise TypeError(
                f"{first_name}: expected a torch.Tensor or an array with __dlpack__, got {type(first).__name__}"
            )
        with torch.no_grad():
            given = [_imported(name, value) for name, value in zip(names, args, strict=False)]
            given += args[len(names) :]  # too many; Python raises for them
            named = {name: _imported(name, value) for name, value in kwargs.items()}
            library = _library(first_name, first)  # before anything is computed
            result = wrapper(*given, **named)
        converted: R = _map(lambda value: library.from_dlpack(value.detach()) if is_tensor(value) else value, result)
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
            explain_failure(function, args, kwargs)
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


def _imported(name: str, value: Any) -> Any:
    """The argument `name` with its arrays as tensors."""
    return _map(lambda item: to_torch(item, name), value)


class _Checked:
    """An array whose capsule is checked first, because torch aborts the process for some strides."""

    def __init__(self, array: Any, name: str) -> None:
        self.array, self.name = array, name

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.array.__dlpack__(**options)
        check_capsule(self.name, capsule)
        return capsule


def to_torch(value: Any, name: str = "array") -> Any:
    """The array as a tensor that shares its memory, or that of a copy if strides are negative; other values unchanged.

    Raises TypeError or ValueError, naming the argument, for an array that torch cannot represent.
    """
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__"):
        return value
    if hasattr(value, "mask"):  # numpy's masked arrays, which export what they mask
        raise TypeError(f"{name}: expected an array without a mask, got a {type(value).__name__}")
    if not hasattr(value, "__dlpack_device__"):  # jax's tracers
        raise TypeError(f"{name}: expected an array with values, got a {type(value).__name__}, as under jax.jit")
    try:
        try:
            return from_dlpack(_Checked(value, name))
        except BufferError:  # negative strides, or read-only memory, which older libraries do not export
            if not hasattr(value, "copy"):
                raise
            return from_dlpack(_Checked(value.copy(), name))
    except (BufferError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{name}: ")
        raise TypeError(f"{name}: expected an array that torch can represent, got: {reason}") from error


def _library(name: str, array: Any) -> Any:
    """The library of an array, which makes arrays of results. Raises TypeError if it has no from_dlpack."""
    if hasattr(array, "__array_namespace__"):
        library = array.__array_namespace__()
    else:
        library = importlib.import_module(type(array).__module__.partition(".")[0])
    if not hasattr(library, "from_dlpack"):
        raise TypeError(
            f"{name}: expected an array of a library with from_dlpack, got {type(array).__name__}; "
            "pass torch.from_dlpack(array)"
        )
    return library
