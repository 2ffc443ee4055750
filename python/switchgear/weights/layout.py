# SPDX-License-Identifier: BSD-3-Clause
"""Layout: how a module of experts holds its projections. Modules of other libraries are found by those who know
them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Layout(NamedTuple):
    """How a module of experts holds its projections."""

    names: tuple[str, str]  # of the parameters: the first projection, the second
    transposed: bool  # they are [E,in,out] instead of [E,out,in]
    split_gates: bool  # the first holds all gates, then all ups

    def parts(self, index: int) -> int:
        """Of the rows of a projection: gates and ups are stored apart."""
        return 2 if index == 0 and self.split_gates else 1


FINDERS: list[Callable[[nn.Module], Layout | None]] = []  # each knows a kind of module


def layout_of(module: nn.Module) -> Layout | None:
    """How a module holds projections that the fused kernel multiplies; None where it has none."""
    return next((layout for find in FINDERS if (layout := find(module)) is not None), None)
