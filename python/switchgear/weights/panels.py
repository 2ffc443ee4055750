# SPDX-License-Identifier: BSD-3-Clause
"""Panels: the elements of a weight in the order in which the CPU's kernels read them; see reference/panels.py.

One word of an activation is multiplied by many weights, and weights are read as one stream. With 2 to 64 tokens per
expert a layer takes up to 20 % less time; with many the time is about equal; with one token it is up to 5 % longer.
Results have the same bits, and weights have the same size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from switchgear import ops
from switchgear.reference import panels as layouts
from switchgear.reference.panels import COLUMNS, PanelLayout
from switchgear.weights.form import Form
from switchgear.weights.pages import advise_huge_pages
from switchgear.weights.weight import PANEL_DTYPES, Weight


def panel_layout(dtype: torch.dtype) -> PanelLayout:
    """The panel layout of the ISA in use."""
    return PanelLayout(*ops.panel_layout(PANEL_DTYPES[dtype]))


@dataclass(frozen=True)
class Panels(Form):
    """The order of the ISA in use. With another ISA, or if gradients are needed, each call expands the weights to plain
    ones.

    N must be a multiple of 64 (32 without AVX-512), as must I if gates precede ups; C must be a multiple of 32.
    """

    name: ClassVar[str] = "panels"
    devices: ClassVar[tuple[str, ...] | None] = ("cpu",)
    one_dtype: ClassVar[bool] = True

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        if weight.dtype not in PANEL_DTYPES:
            return f"{name} is {weight.dtype}, not torch.float32, torch.bfloat16 or torch.float16"
        layout = panel_layout(weight.dtype)
        unit, (_, rows, cols) = layout.rows * parts, weight.shape
        if rows % unit:
            return f"{name} has {rows} rows, no multiple of {unit}"
        if cols % COLUMNS:
            return f"{name} has {cols} columns, no multiple of {COLUMNS}"
        data = torch.empty(layouts.shape_of(weight, layout), dtype=torch.uint8, device="cpu")
        advise_huge_pages(data)
        layouts.pack(weight.detach(), layout, data)
        return Weight("panels", data, rows, cols, weight.dtype, is_exact=True)
