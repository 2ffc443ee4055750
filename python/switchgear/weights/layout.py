# SPDX-License-Identifier: BSD-3-Clause
"""Layout: how a module of experts holds its projections."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from switchgear.weights.state import find


class Layout(NamedTuple):
    """How a module of experts holds its projections."""

    names: tuple[str, str]  # of the parameters: first and second projection
    transposed: bool  # parameters are [E,in,out] instead of [E,out,in]
    split_gates: bool  # the first projection holds all gates, then all ups

    def parts(self, index: int) -> int:
        """Parts of a projection's rows that are stored separately: 2 for gates and ups, else 1."""
        return 2 if index == 0 and self.split_gates else 1


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module's projections; None if it has none that the fused kernel supports."""
    layout: Layout | None = find("layout", module)
    return layout


def hint_for(model: nn.Module) -> str:
    """Why a model has no module with a layout, from the first module that an integration knows, or what to do."""
    hints = (f"{name}: {hint}" for name, m in model.named_modules() if (hint := find("hint", m)) is not None)
    return next(hints, "for a Hugging Face model, call switchgear.accelerate(model) first")
