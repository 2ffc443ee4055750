# SPDX-License-Identifier: BSD-3-Clause
"""Operand: what a weight of any kind is for the ops. A kind of weight is a class with shape, dtype and `operand`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from switchgear.backends import cast_in_autocast


class TrainedExperts(NamedTuple):
    """Experts that are trained alone: copies of some rows of a frozen weight and of its bias."""

    weight: Tensor  # [n,N,C]
    bias: Tensor | None  # [n,N]
    experts: Tensor  # [n] int32, ascending


class Operand(NamedTuple):
    """A projection [E,N,C] as the ops take it."""

    tensors: Sequence[Tensor]  # of a stored weight, or one plain tensor, or matrices [N_e,C]
    form: tuple[int, ...] = ()  # empty: plain
    leaves: Sequence[Tensor | None] = ()  # those that may need a gradient
    adapter: tuple[Tensor, ...] = ()  # a, b, scales and possibly ranks; empty: none
    dropout: float = 0.0  # of the adapter
    trained: TrainedExperts | None = None
    source: Any = None  # a Source: the experts are not in memory, and there are no tensors
    needs_no_dispatch: bool = False  # the tensors are known to be plain ones in CPU memory


class AnyOperand(Protocol):
    """A weight that answers for itself."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def operand(self, dtype: torch.dtype, autocast: str | None) -> Operand: ...


def operand_of(weight: Tensor | AnyOperand, dtype: torch.dtype, autocast: str | None = None) -> Operand:
    """The operand for an x of `dtype`. autocast: the device type whose torch.autocast is on and gave x its dtype."""
    if isinstance(weight, Tensor):
        tensors = (weight,) if autocast is None else cast_in_autocast(autocast, weight)
        return Operand(tensors, (), tensors)
    return weight.operand(dtype, autocast)
