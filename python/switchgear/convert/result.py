# SPDX-License-Identifier: BSD-3-Clause
"""What a conversion of a model did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Converted:
    """One layer: its name, what it was, and its experts afterwards."""

    name: str
    was: str
    num_experts: int
    how: str


@dataclass(frozen=True)
class Conversion:
    """A converted model, and what was done to each of its layers."""

    model: nn.Module
    layers: tuple[Converted, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [f"{layer.name}: {layer.was} -> {layer.num_experts} experts ({layer.how})" for layer in self.layers]
        return "\n".join([*rows, *self.notes])

    def summary(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {"layers": [vars(layer) for layer in self.layers], "notes": list(self.notes)}
