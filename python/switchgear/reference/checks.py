# SPDX-License-Identifier: BSD-3-Clause
"""Constraints of arguments, for annotations of functions that are `checked`; checks of contents; the dtype of sums; and
a rounded division.

Errors are ValueError, or TypeError for a dtype, with the argument, what was expected and what was passed.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from switchgear.checks import OneOf, Range, Shape, convert

__all__ = [
    "check_choice", "check_finite", "check_fraction", "check_num_experts", "check_range", "check_size", "check_slots",
    "weight_dtype", "wide",
]  # fmt: skip

MAX_EXPERTS = 1 << 24  # of a plan, whose memory grows with them; far more than the millions of any model
NumExperts = Annotated[int, Range(1, MAX_EXPERTS)]


# ---- constraints -----------------------------------------------------------------------------------------------------


class Numbers:
    """A tensor's dtype and sizes. dtype: one of torch's; "any float", of at least 16 bits; "float", the same in all
    arguments; or "sum", that of sums of these. Sizes: as of Shape; only the first may be 0."""

    def __init__(self, dtype: torch.dtype | str, *sizes: int | str | None) -> None:
        self.dtype, self.sizes = dtype, sizes

    def check(self, name: str, value: Tensor, sizes: dict[str, Any]) -> None:
        dtype: Any = self.dtype
        if isinstance(dtype, str):
            dtype = {"any float": None, "float": (one := sizes.get("dtype")), "sum": one and weight_dtype(one)}[dtype]
        is_right = value.dtype == dtype if dtype is not None else value.is_floating_point() and value.itemsize > 1
        if not is_right:
            raise TypeError(f"{name}: expected {dtype or 'a floating dtype'}, got {value.dtype}")
        Shape(*self.sizes).check(name, value, sizes)
        if 0 in value.shape[1:]:
            raise ValueError(f"{name}: expected sizes of at least 1, got {list(value.shape)}")
        if self.dtype == "float":
            sizes["dtype"] = value.dtype


class Fields:
    """A NamedTuple whose fields are as its annotations say."""

    @staticmethod
    def check(name: str, value: Any, sizes: dict[str, Any]) -> None:
        hints = typing.get_type_hints(type(value), include_extras=True)
        for field, item in zip(value._fields, value, strict=True):
            convert(field, item, hints[field], sizes)


AnyFloats, Floats = partial(Numbers, "any float"), partial(Numbers, "float")
Sums, Indices = partial(Numbers, "sum"), partial(Numbers, torch.int32)

Rows = Annotated[Tensor, Floats("T", "H")]
Experts = Annotated[Tensor, Indices("n")]  # a list of them
TopkIds = Annotated[Tensor, Indices("T", "K")]
TopkWeights = Annotated[Tensor, Sums("T", "K")]


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    OneOf(choices).check(name, value, {})


def check(name: str, tensor: Tensor | None, shape: Sequence[int | None], dtype: torch.dtype | None = None) -> None:
    """Checks that `tensor` has `shape` (None: any size) and `dtype` (None: any floating dtype). Only its first size may
    be 0. None passes."""
    if tensor is not None:
        Numbers(dtype or "any float", *shape).check(name, tensor, {})


def check_range(name: str, indices: Tensor, low: int, high: int) -> None:
    """Checks that every index is in [low, high)."""
    if indices.numel() and bool(((indices < low) | (indices > high - 1)).any()):  # 2^31 is no int32
        smallest, largest = indices.aminmax()
        raise ValueError(f"{name}: expected {low} to {high - 1}, got {int(smallest)} to {int(largest)}")


def check_slots(name: str, num_tokens: int, top_k: int) -> None:
    """Raises ValueError if int32 does not number the slots, before memory for them is allocated."""
    if num_tokens * top_k >= 2**31:
        raise ValueError(f"{name}: expected less than 2^31 slots, got {num_tokens} tokens with {top_k} choices each")


def check_experts(experts: Tensor | None, num_experts: int) -> None:
    """Checks that a list of experts [n] is ascending. None passes."""
    if experts is None:
        return
    check_range("experts", experts, 0, num_experts)
    if bool((experts[1:] <= experts[:-1]).any()):
        raise ValueError(f"experts: expected ascending values, got {experts.tolist()}")


def check_size(name: str, value: int, least: int = 1) -> int:
    """A size of at least `least`, of any type of integers (numpy's too), as int. Raises TypeError or ValueError for
    anything else."""
    size: int = convert(name, value, Annotated[int, Range(least, 2**31 - 1)])
    return size


def check_num_experts(num_experts: int) -> None:
    convert("num_experts", num_experts, NumExperts)


def check_finite(name: str, value: float) -> None:
    Range(-math.inf, math.inf, "low high").check(name, value, {})


def check_fraction(name: str, value: float) -> None:
    """Checks a probability or a share that 1 would make meaningless."""
    Range(0, 1, "high").check(name, value, {})


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of topk_weights, and of every sum, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """Converts to float32; float64 stays."""
    return tensor.to(weight_dtype(tensor.dtype))


def divide_up(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)
