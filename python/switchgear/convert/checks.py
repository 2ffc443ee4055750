# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the options of conversions that annotations do not express, and seeds of layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from switchgear.checks import Finite, convert


def check_top_k(num_experts: int, top_k: int) -> None:
    if top_k > num_experts:
        raise ValueError(f"top_k: expected 1 to {num_experts} (num_experts), got {top_k}")


def check_all_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError for NaN and infinities. A tensor on meta has none."""
    if not tensor.is_meta and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinities")


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
    return tuple(float(convert(name, value, Finite)) for value in found)
