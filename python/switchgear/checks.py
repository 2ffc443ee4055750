# SPDX-License-Identifier: BSD-3-Clause
"""Checks of arguments by their annotations, once, where a public call comes in.

    @checked
    def calibrate(model: nn.Module, tokens: Size = 512, seed: Seed = 0, method: Literal["rtn", "gptq"] = "rtn") -> …

`checked` binds the arguments, converts numbers of other libraries (numpy's integers) and raises before the function
runs: TypeError for a wrong type, ValueError for a wrong value. Every message is "argument: expected …, got …".
Hot functions are not wrapped: `explain_failure` reads the same annotations after a call has failed.

    int, float, bool, str, Tensor, any class        isinstance; integers of any library become int, bool is no number
    Literal["a", "b"], Annotated[str, OneOf(TABLE)] one of these
    Size, Count, Seed, Share, Positive, …           numbers in a range, defined below
    Annotated[Tensor, Shape("T", "H")]              sizes; a name is one size in the whole call, None any
    X | None, Sequence[X], Iterable[X], Callable    as they say; items of lists and tuples are checked, too,
    Mapping[K, X]                                   and values of mappings
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Annotated, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

P = ParamSpec("P")
R = TypeVar("R")
MOST_SECONDS = 1e9  # Clocks of C++ overflow beyond.


# ---- constraints -----------------------------------------------------------------------------------------------------


class Range(typing.NamedTuple):
    """Numbers from `low` to `high`; `open` lists the ends that are excluded: "low", "high", "low high"."""

    low: float
    high: float
    open: str = ""

    def check(self, name: str, value: Any, sizes: dict[str, int]) -> None:
        above = value > self.low if "low" in self.open else value >= self.low
        below = value < self.high if "high" in self.open else value <= self.high
        if not (above and below):  # NaN is neither
            raise ValueError(f"{name}: expected {self}, got {value}")

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number" if self.open else "a number"
        if self.low == -(2**63):
            return "an integer of 64 bits"
        if self.high == math.inf or self.high == 2**31 - 1:
            return f"more than {self.low:g}" if "low" in self.open else f"at least {self.low:g}"
        left, right = "(" if "low" in self.open else "[", ")" if "high" in self.open else "]"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"


class Shape:
    """Sizes of a tensor: a number, a name for the same size in all arguments of a call, or None for any size."""

    def __init__(self, *sizes: int | str | None) -> None:
        self.sizes = sizes

    def check(self, name: str, value: Tensor, sizes: dict[str, int]) -> None:
        if value.dim() == len(self.sizes):
            pairs = list(zip(self.sizes, value.shape, strict=True))
            wanted = [sizes.setdefault(size, got) if isinstance(size, str) else size for size, got in pairs]
            if all(size is None or size == got for size, got in zip(wanted, value.shape, strict=True)):
                return
        shown = [f"{size}={sizes[size]}" if isinstance(size, str) and size in sizes else size for size in self.sizes]
        expected = ", ".join("any" if size is None else str(size) for size in shown)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(value.shape)}")


class Divides:
    """A divisor of an earlier argument, if that is an integer."""

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def check(self, name: str, value: int, sizes: dict[str, int]) -> None:
        if (total := sizes.get(self.argument)) is not None and total % value:
            raise ValueError(f"{name}: expected a divisor of {total} ({self.argument}), got {value}")


class FloatingPoint:
    """A tensor or a dtype of floating-point numbers."""

    @staticmethod
    def check(name: str, value: Any, sizes: dict[str, int]) -> None:
        dtype = value.dtype if isinstance(value, Tensor) else value
        if not dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, got {dtype}")


class AllFinite:
    """A tensor without NaN and infinities. One on meta has none."""

    @staticmethod
    def check(name: str, value: Tensor, sizes: dict[str, int]) -> None:
        if not value.is_meta and not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinities")


class NotEmpty:
    """At least one item."""

    @staticmethod
    def check(name: str, value: Any, sizes: dict[str, int]) -> None:
        if len(value) == 0:
            raise ValueError(f"{name}: expected at least one, got none")


class Steps:
    """An optimizer of torch, or an object with its methods."""

    @staticmethod
    def check(name: str, value: Any, sizes: dict[str, int]) -> None:
        if not all(callable(getattr(value, method, None)) for method in ("step", "zero_grad")):
            raise TypeError(f"{name}: expected torch.optim.Optimizer, got {type(value).__name__}")


class OneOf:
    """One of the names of a table."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def check(self, name: str, value: str, sizes: dict[str, int]) -> None:
        if value not in self.names:
            raise ValueError(f"{name}: expected one of {', '.join(self.names)}, got {value!r}")


Size = Annotated[int, Range(1, 2**31 - 1)]
Count = Annotated[int, Range(0, 2**31 - 1)]
Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]
Number = Annotated[float, Range(-math.inf, math.inf)]  # Not NaN.
Finite = Annotated[float, Range(-math.inf, math.inf, "low high")]
Positive = Annotated[float, Range(0, math.inf, "low high")]
PositiveOrInf = Annotated[float, Range(0, math.inf, "low")]
NotNegative = Annotated[float, Range(0, math.inf, "high")]
NotNegativeOrInf = Annotated[float, Range(0, math.inf)]
Share = Annotated[float, Range(0, 1, "high")]  # A share or probability that 1 would make meaningless.
Fraction = Annotated[float, Range(0, 1)]
Seconds = Annotated[float, Range(0, MOST_SECONDS, "low")]
FloatTensor = Annotated[Tensor, FloatingPoint]
FiniteTensor = Annotated[Tensor, AllFinite]
FloatDtype = Annotated[torch.dtype, FloatingPoint]
Sizes = Annotated[Sequence[Size], NotEmpty]
Optimizer = Annotated[Any, Steps]


# ---- arguments of a call ---------------------------------------------------------------------------------------------


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Checks and converts the arguments of each call by the annotations of the function or method; those of a class by
    its __init__, which may be that of a dataclass."""
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own error for too many or too few
        convert_arguments(function, signature, bound.arguments)
        return function(*bound.args, **bound.kwargs)

    return wrapper


def convert_arguments(function: Callable[..., Any], signature: inspect.Signature, arguments: dict[str, Any]) -> None:
    """Checks `arguments`, and converts those of other libraries in place."""
    hints = _read_hints(function)
    sizes: dict[str, int] = {}
    for name, value in arguments.items():
        if name not in hints:
            continue
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments[name] = tuple(convert(name, item, hints[name], sizes) for item in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments[name] = {key: convert(key, item, hints[name], sizes) for key, item in value.items()}
        else:
            arguments[name] = converted = convert(name, value, hints[name], sizes)
            if isinstance(converted, int):
                sizes[name] = converted


@functools.cache
def _read_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations by name. Those that only exist for type checkers are left out."""
    function = inspect.unwrap(function)
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        return dict(_evaluate_one_by_one(function))


def _evaluate_one_by_one(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    for name, hint in function.__annotations__.items():
        single = types.SimpleNamespace(__annotations__={name: hint})
        with suppress(NameError):
            yield name, typing.get_type_hints(single, function.__globals__, include_extras=True)[name]


def convert(name: str, value: Any, hint: Any, sizes: dict[str, int] | None = None) -> Any:
    """`value` as the annotation `hint` has it. Raises TypeError or ValueError naming the argument."""
    sizes = {} if sizes is None else sizes
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = convert(name, value, options[0], sizes)
        for constraint in options[1:]:
            constraint.check(name, value, sizes)
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(name, value, options, hint, sizes)
    if origin is typing.Literal:
        if not any(value is option or (type(value) is type(option) and value == option) for option in options):
            raise ValueError(f"{name}: expected one of {', '.join(map(str, options))}, got {value!r}")
        return value
    if hint is None or hint is type(None):
        if value is not None:
            raise TypeError(f"{name}: expected None, got {type(value).__name__}")
        return value
    if hint is int:
        return integer(name, value)
    if hint is float:
        return _number(name, value)
    if hint is Tensor:
        return _convert_tensor(name, value)
    if hint is torch.device:
        as_device(name, value)
        return value
    if origin in _SERIES:
        return _convert_series(name, value, origin, options, sizes)
    kind = origin or hint
    is_class = isinstance(value, type) and getattr(kind, "_is_protocol", False)  # has the methods, and cannot run them
    if _is_testable(kind) and (is_class or not _is_instance(value, kind)):
        raise TypeError(f"{name}: expected {describe(hint)}, got {type(value).__name__}")
    if origin is collections.abc.Mapping:
        for key, item in value.items():
            convert(f"{name}[{key!r}]", item, options[1], sizes)
    return value


_SERIES = (collections.abc.Sequence, collections.abc.Iterable, list, tuple)


def _convert_union(name: str, value: Any, options: Sequence[Any], hint: Any, sizes: dict[str, int]) -> Any:
    if value is None and type(None) in options:
        return value
    errors: list[TypeError | ValueError] = []
    for option in options:
        if option is not type(None):
            try:
                return convert(name, value, option, sizes)
            except (TypeError, ValueError) as error:
                errors.append(error)
    errors.sort(key=lambda error: isinstance(error, TypeError))  # the right type with a wrong value says most
    if len(errors) == 1 or isinstance(errors[0], ValueError):
        raise errors[0]
    raise TypeError(f"{name}: expected {describe(hint)}, got {type(value).__name__}")


def _convert_series(name: str, value: Any, origin: Any, options: Sequence[Any], sizes: dict[str, int]) -> Any:
    """A Sequence may be anything with items but a mapping; what is no list becomes one. An Iterable stays as it is."""
    is_other = isinstance(value, Mapping) if origin is collections.abc.Sequence else not isinstance(value, origin)
    if origin is not collections.abc.Iterable and is_other:
        raise TypeError(f"{name}: expected {describe(origin[tuple(options)])}, got {type(value).__name__}")
    # One text or a tensor [] has no items; a data set of torch does, without __iter__.
    is_iterable = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    if not is_iterable or isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) == 0:
        wanted = describe(options[0]) if options else "items"
        raise TypeError(f"{name}: expected a list of {wanted}, got {type(value).__name__}")
    is_plain = isinstance(value, (list, tuple))
    if not options or (origin is collections.abc.Iterable and not is_plain):
        return value
    given = value if is_plain else list(value)
    if origin is tuple and options[-1] is not Ellipsis:
        if len(given) != len(options):
            raise ValueError(f"{name}: expected {len(options)} items, got {len(given)}")
        pairs = enumerate(zip(given, options, strict=True))
        items = [convert(f"{name}[{index}]", item, option, sizes) for index, (item, option) in pairs]
    else:
        items = [convert(f"{name}[{index}]", item, options[0], sizes) for index, item in enumerate(given)]
    if is_plain and all(item is before for item, before in zip(items, given, strict=True)):
        return value
    if not is_plain:
        return items
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _convert_tensor(name: str, value: Any) -> Tensor:
    """A tensor of strided memory; sparse, nested and other ones are refused."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got {value.layout}")
    return value


def _is_instance(value: Any, kind: type) -> bool:
    """isinstance; what torch.compile makes of a module counts as the module."""
    inside = value._modules.get("_orig_mod") if isinstance(value, nn.Module) else None
    return isinstance(value, kind) or isinstance(inside, kind)


def _is_testable(kind: Any) -> bool:
    """Whether isinstance works with it: Any, type variables and most protocols are for type checkers alone."""
    if kind is Any or not isinstance(kind, type):
        return False
    return not getattr(kind, "_is_protocol", False) or getattr(kind, "_is_runtime_protocol", False)


def describe(hint: Any) -> str:
    """The annotation in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return describe(options[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(describe, options))
    if origin in _SERIES:
        return f"a list of {describe(options[0])}" if options else "a list"
    if origin is typing.Literal:
        return " or ".join(map(str, options))
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        return "a function"
    if hint is nn.Module:
        return "torch.nn.Module"
    return "None" if hint is type(None) else str(getattr(origin or hint, "__name__", hint))


def explain_failure(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises for the invalid argument of a call that has failed, so that valid calls cost nothing: for a type that
    differs from the annotation, for integers beyond 64 bits, and for tensors that are not dense, have no dimension or
    are on different devices. Returns if all arguments are valid."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return  # Python has raised for it
    hints = _read_hints(function)
    first: tuple[str, Tensor] | None = None
    for argument, value in bound.arguments.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{argument}: expected an integer of 64 bits, got {value}")
        for name, tensor in _find_tensors(argument, value, hints.get(argument, Any)):
            convert(name, tensor, Tensor)
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


def _find_tensors(name: str, value: Any, hint: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an argument. Raises unless the argument has the type of the hint."""
    fields = getattr(hint, "_fields", None)  # of a NamedTuple
    if fields is not None and isinstance(value, tuple) and len(value) == len(fields):
        for field, item, item_hint in zip(fields, value, typing.get_type_hints(hint).values(), strict=True):
            yield from _find_tensors(field, item, item_hint)
        return
    convert(name, value, hint)
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "tensors"):  # a Weight
        yield from ((name, tensor) for tensor in value.tensors)
    elif hasattr(value, "adapter"):  # an AdaptedWeight, whose tensors the ops name
        yield from ((name, tensor) for tensor in (value.weight, *value[1:]) if isinstance(tensor, Tensor))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if isinstance(item, Tensor):
                yield f"{name}[{index}]", item


# ---- single values ---------------------------------------------------------------------------------------------------


def integer(name: str, value: Any) -> int:
    """An integer of any library as int; a symbolic one stays. Raises TypeError for bool, tensors and anything else."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, Tensor)):  # reading a tensor waits for its device
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name}: expected int, got {type(value).__name__}")


def _number(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected float, got {type(value).__name__}")
    return value if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else float(value)


def as_device(name: str, value: Any) -> torch.device:
    """A device of torch. Raises ValueError for anything that names none."""
    with suppress(RuntimeError, TypeError):
        return torch.device(value)
    raise ValueError(f"{name}: expected a device, got {value!r}")


def list_of_names(name: str, names: str | Iterable[str]) -> list[str]:
    """One name or several, as a list. Raises TypeError for anything else."""
    if not isinstance(names, Iterable):
        raise TypeError(f"{name}: expected names, got {type(names).__name__}")
    found = [names] if isinstance(names, str) else list(names)
    for one in found:
        if not isinstance(one, str):
            raise TypeError(f"{name}: expected names, got {type(one).__name__} in a list")
    return found


def explain_rows(name: str, rows: Any, hidden_size: int, like: Tensor | None) -> None:
    """Raises for an input of a router that is no tensor [..., hidden_size] with the device and dtype of `like`, its
    weight, which may be float32 for rows of 16 bits. Returns if it is valid."""
    convert(name, rows, FloatTensor)
    if rows.dim() == 0 or rows.shape[-1] != hidden_size:
        raise ValueError(f"{name}: expected shape [..., H={hidden_size}], got {list(rows.shape)}")
    if like is not None and rows.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} like the weights, got one on {rows.device}")
    keeps_float32 = like is not None and like.dtype is torch.float32 and rows.dtype.itemsize == 2
    if like is not None and rows.dtype is not like.dtype and not keeps_float32:
        raise TypeError(f"{name}: expected {like.dtype} like the weights, got {rows.dtype}")
    if torch.compiler.is_compiling() or not rows.is_cpu or type(rows) not in (Tensor, nn.Parameter):
        return  # Fake and functorch's tensors do not show their memory.
    if is_functorch_wrapped_tensor(rows):
        return
    if rows.numel() and rows.untyped_storage().data_ptr() == 0:
        raise ValueError(f"{name}: expected data, got a tensor whose storage was freed")
    if rows.data_ptr() % rows.element_size() != 0:
        raise ValueError(f"{name}: expected data aligned to its elements ({rows.dtype}), got {rows.data_ptr():#x}")
