# SPDX-License-Identifier: BSD-3-Clause
"""Layout: how a module of experts holds its projections. Integrations register a finder for modules of other
libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Layout(NamedTuple):
    """How a module of experts holds its projections."""

    names: tuple[str, str]  # of the parameters: first and second projection
    transposed: bool  # parameters are [E,in,out] instead of [E,out,in]
    split_gates: bool  # the first projection holds all gates, then all ups

    def parts(self, index: int) -> int:
        """Parts of a projection's rows that are stored separately: 2 for gates and ups, else 1."""
        return 2 if index == 0 and self.split_gates else 1


HINTS: list[Callable[[nn.Module], str | None]] = []
"""Each says of modules of one kind why they have no layout now, or None for other modules."""
FINDERS: list[Callable[[nn.Module], Layout | None]] = []
"""Each recognizes one kind of module. Append one of your own to store experts of other modules."""


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module's projections; None if it has none that the fused kernel supports."""
    return next((layout for find in FINDERS if (layout := find(module)) is not None), None)


def hint_for(model: nn.Module) -> str:
    """Why a model has no module with a layout, from the first module that an integration knows, or what to do."""
    hints = (f"{name}: {hint}" for name, m in model.named_modules() for find in HINTS if (hint := find(m)) is not None)
    return next(hints, "for a Hugging Face model, call switchgear.accelerate(model) first")
