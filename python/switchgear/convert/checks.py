# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the options of conversions, before anything is made: recipes are files, so any value may come."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from switchgear.complaints import check_seed
from switchgear.reference import check_size


def check_moe(num_experts: int, top_k: int) -> None:
    check_size("num_experts", num_experts)
    check_size("top_k", top_k)
    if top_k > num_experts:
        raise ValueError(f"top_k: expected 1 to {num_experts} (num_experts), got {top_k}")


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_all_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError for NaN and infinities. A tensor on meta has none."""
    if not tensor.is_meta and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinities")


def check_random(seed: Any, **deviations: Any) -> None:
    """Checks a seed, and standard deviations by name."""
    check_seed(seed)
    for name, deviation in deviations.items():
        check_number(name, deviation)
        if deviation < 0:
            raise ValueError(f"{name}: expected a standard deviation of at least 0, got {deviation}")


def derive_seed(seed: int, index: int) -> int:
    """The seed of one of several layers: seed + index, which goes on at the lowest one after the largest."""
    return (int(seed) + index + 2**63) % 2**64 - 2**63


def as_finite_numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """A list or a tensor of finite numbers as floats; None passes."""
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected numbers, got {type(values).__name__}")
    found = [value.item() if hasattr(value, "item") else value for value in values]
    for value in found:
        check_number(name, value)
    return tuple(map(float, found))
