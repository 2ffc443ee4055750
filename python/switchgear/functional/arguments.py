# SPDX-License-Identifier: BSD-3-Clause
"""Conversions of arguments that the functions share."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from switchgear import reference
from switchgear.checks import Range, convert

T = TypeVar("T", Tensor, Tensor | None)
_INT32 = torch.iinfo(torch.int32)
# Smaller numbers are 0 in float32, which means no limit.
Limit = Annotated[float, Range(2.0**-150, torch.finfo(torch.float32).max, "low")]


def as_ids(name: str, ids: Tensor) -> Tensor:
    if ids.dtype is torch.int32:
        return ids
    if ids.dtype is not torch.int64:
        raise TypeError(f"{name}: expected int32 or int64, got {ids.dtype}")
    return ids.clamp(_INT32.min, _INT32.max).int()  # saturates: an invalid id must not wrap around to a valid one


def as_weights(name: str, weights: T, dtype: torch.dtype) -> T:
    """Converts token weights to float32 (float64 if `dtype` is float64), differentiably."""
    return as_dtype(name, weights, reference.weight_dtype(dtype))


def as_dtype(name: str, tensor: T, dtype: torch.dtype) -> T:
    """Converts a floating tensor, differentiably."""
    if tensor is None or tensor.dtype is dtype:
        return tensor
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    return tensor.to(dtype)


def flat(name: str, tensor: Tensor) -> Tensor:
    """[..., N] -> [T,N]"""
    if tensor.dim() > 0 and tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected a last dimension of at least 1, got shape {list(tensor.shape)}")
    return tensor.reshape(-1, tensor.shape[-1])


def as_number(name: str, value: Any) -> float:
    if isinstance(value, float):
        return value
    try:
        if not isinstance(value, (str, bytes)):  # float() would parse these
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        pass
    raise TypeError(f"{name}: expected float, got {type(value).__name__}")


def as_limit(limit: float | None) -> float:
    if limit is None:
        return 0.0
    checked: float = convert("limit", as_number("limit", limit), Limit)
    return checked


def dropout_seed(device: torch.device) -> Tensor:
    """A new seed for the masks of dropout, from torch's generator."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
