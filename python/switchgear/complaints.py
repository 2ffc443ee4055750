# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the types of arguments. `complain` finds the invalid argument after a call has failed, so valid calls cost
nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

EXTRAS = {  # what they bring, for hints
    "bench": {"rich", "matplotlib", "PIL"},
    "transformers": {"transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy"},
}
MOST_SECONDS = 1e9  # of a timeout


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for the message of another one."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _origin(error: BaseException) -> BaseException:
    """transformers imports its names late, and hides what failed behind errors of its own."""
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__
    return error


def is_installed(package: str) -> bool:
    """Whether a package is found, without importing it. Not if something else stands for it in sys.modules."""
    with suppress(ImportError, ValueError):  # of a finder that blocks it, and for a stub without __spec__
        return importlib.util.find_spec(package) is not None
    return False


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_package(error: BaseException) -> str | None:
    """The package that an import lacks; None if it failed for another reason."""
    error = _origin(error)
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return name.partition(".")[0] if name else None


def failed_import(error: ImportError, module: str = "") -> str:
    """Why `module` could not be imported, in words for a user: what to install, or what is damaged."""
    of, missing, reason = module.partition(".")[0], missing_package(error), _origin(error)
    if missing is None:
        if of == "switchgear":  # one of its modules: a package that it needs
            of = (getattr(reason, "name", None) or "").partition(".")[0]
        return f"{of} is installed but cannot be imported: {reason}" if of else str(reason)
    extra = next((extra for extra, packages in EXTRAS.items() if {missing, of} & packages), None)
    wanted = missing if extra is None else f"'switchgear[{extra}]'"
    return f"needs {missing} ({reason}); pip install {wanted}"


def complain(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises TypeError for an argument whose type differs from the declared one or a tensor that is not dense, and
    ValueError for integers beyond 64 bits and for tensors without dimensions or on different devices. Returns if all
    arguments are valid."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:  # too many or too few; Python has already raised for it
        return
    hints = typing.get_type_hints(function)
    first: tuple[str, Tensor] | None = None
    for argument, value in bound.arguments.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{argument}: expected an integer of 64 bits, got {value}")
        for name, tensor in _tensors(argument, value, hints[argument]):
            check_dense(name, tensor)
            if tensor.dim() == 0:
                raise ValueError(f"{name}: expected at least one dimension, got shape []")
            first = first or (name, tensor)
            if tensor.device != first[1].device:
                wanted = f"a tensor on {first[1].device} like {first[0]}"
                hint = ", without numbers: load them, or call switchgear.offload.offload" if tensor.is_meta else ""
                raise ValueError(f"{name}: expected {wanted}, got one on {tensor.device}{hint}")
        if first is not None and getattr(value, "is_lossless", False) and value.dtype is not first[1].dtype:
            raise TypeError(
                f"{argument}: expected {first[1].dtype} like {first[0]}, got weights stored as {value.format} in "
                f"{value.dtype}, which .to() does not convert: restore, convert and store them again"
            )


def integer(name: str, value: Any) -> int:
    """An integer of any type (numpy's too, and a tensor of one) as int. Raises TypeError for anything else."""
    if not isinstance(value, bool):
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name}: expected an integer, got {value!r}")


def at_least(least: int, name: str, value: Any) -> int:
    """`integer`, for a number of at least `least`. Raises ValueError for a lower one."""
    found = integer(name, value)
    if found < least:
        raise ValueError(f"{name}: expected at least {least}, got {found}")
    return found


def sizes(name: str, values: Any) -> tuple[int, ...]:
    """At least one integer, each of at least 1, as int. Raises TypeError or ValueError for anything else."""
    check_several(name, values, "integers")
    found = tuple(at_least(1, name, value) for value in values)
    if not found:
        raise ValueError(f"{name}: expected at least one integer, got none")
    return found


def check_seconds(name: str, value: Any) -> None:
    """Raises for anything but a number of seconds above 0, at most MOST_SECONDS: clocks of C++ would overflow."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number of seconds, got {value!r}")
    if not 0 < float(value) <= MOST_SECONDS:
        raise ValueError(f"{name}: expected more than 0 seconds and at most {MOST_SECONDS:g}, got {value}")


def as_device(name: str, value: Any) -> torch.device:
    """A device of torch. Raises ValueError for anything that names none."""
    with suppress(RuntimeError, TypeError):
        return torch.device(value)
    raise ValueError(f"{name}: expected a device, got {value!r}")


def check_tensor(name: str, tensor: Any) -> None:
    """Raises TypeError for anything but a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected Tensor, got {type(tensor).__name__}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError for sparse, nested and other tensors that are not strided memory."""
    if tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got {tensor.layout}")


def check_module(name: str, module: Any) -> None:
    """Raises TypeError for anything but a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected torch.nn.Module, got {type(module).__name__}")


def check_function(name: str, value: Any) -> None:
    """Raises TypeError for anything that cannot be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError for anything but an optimizer of torch, or an object with its methods."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("step", "zero_grad")):
        raise TypeError(f"optimizer: expected torch.optim.Optimizer, got {type(optimizer).__name__}")


def check_several(name: str, values: Any, what: str) -> None:
    """Raises TypeError for anything that does not have several of `what`: one text or a tensor [] has none, a data set
    of torch does, without __iter__."""
    is_iterable = isinstance(values, Iterable) or hasattr(values, "__getitem__")
    if not is_iterable or isinstance(values, (str, bytes)) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name}: expected a list of {what}, got {type(values).__name__}")


def check_switch(name: str, value: Any) -> None:
    """Raises TypeError for anything but a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected bool, got {type(value).__name__}")


def check_seed(seed: Any) -> None:
    """Raises TypeError for anything but an integer, and ValueError for one beyond 64 bits, which torch's generators do
    not take."""
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(f"seed: expected int, got {type(seed).__name__}")
    if not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raises TypeError for anything but a floating dtype. None passes."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}: expected a floating dtype, got {dtype!r}")


def list_of_names(name: str, names: str | Iterable[str]) -> list[str]:
    """One name or several, as a list. Raises TypeError for anything else."""
    if not isinstance(names, Iterable):
        raise TypeError(f"{name}: expected names, got {type(names).__name__}")
    found = [names] if isinstance(names, str) else list(names)
    for one in found:
        if not isinstance(one, str):
            raise TypeError(f"{name}: expected names, got {type(one).__name__} in a list")
    return found


def complain_about_rows(name: str, rows: Any, hidden_size: int, like: Tensor | None) -> None:
    """Raises for an input of a router that is no tensor [..., hidden_size] with the device and dtype of `like`, its
    weight, which may be float32 for rows of 16 bits. Returns if it is valid."""
    check_tensor(name, rows)
    check_dense(name, rows)
    if rows.dim() == 0 or rows.shape[-1] != hidden_size:
        raise ValueError(f"{name}: expected shape [..., H={hidden_size}], got {list(rows.shape)}")
    if not rows.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {rows.dtype}")
    if like is not None and rows.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} like the weights, got one on {rows.device}")
    keeps_float32 = like is not None and like.dtype is torch.float32 and rows.dtype.itemsize == 2
    if like is not None and rows.dtype is not like.dtype and not keeps_float32:
        raise TypeError(f"{name}: expected {like.dtype} like the weights, got {rows.dtype}")
    if torch.compiler.is_compiling() or not rows.is_cpu or type(rows) not in (Tensor, nn.Parameter):
        return  # the rest is about memory, which fake and functorch's tensors do not show
    if is_functorch_wrapped_tensor(rows):
        return
    if rows.numel() and rows.untyped_storage().data_ptr() == 0:
        raise ValueError(f"{name}: expected data, got a tensor whose storage was freed")
    if rows.data_ptr() % rows.element_size() != 0:
        raise ValueError(f"{name}: expected data aligned to its elements ({rows.dtype}), got {rows.data_ptr():#x}")


def _tensors(name: str, value: Any, hint: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an argument; raises unless the argument has the type of the hint."""
    if _is_named_tuple(hint) and isinstance(value, tuple) and len(value) == len(hint._fields):
        for field, item, item_hint in zip(hint._fields, value, typing.get_type_hints(hint).values(), strict=True):
            yield from _tensors(field, item, item_hint)
        return
    if not _matches(value, hint):
        raise TypeError(f"{name}: expected {_describe(hint)}, got {type(value).__name__}")
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "tensors"):  # a Weight
        yield from ((name, tensor) for tensor in value.tensors)
    elif hasattr(value, "adapter"):  # an AdaptedWeight, whose tensors the ops name
        yield from ((name, tensor) for tensor in (value.weight, *value[1:]) if isinstance(tensor, Tensor))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if isinstance(item, Tensor):  # an AdaptedWeight has numbers, too
                yield f"{name}[{index}]", item


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple)


def _matches(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Sequence:
        (item_hint,) = typing.get_args(hint)
        return isinstance(value, (list, tuple)) and all(_matches(item, item_hint) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    """The type as written in the signature."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_describe, typing.get_args(hint)))
    if typing.get_origin(hint) is Sequence:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else str(hint.__name__)
