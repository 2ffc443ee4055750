# SPDX-License-Identifier: BSD-3-Clause
"""Plain, Panels and Compact: the forms that keep every bit of a weight.

Plain: unchanged parameters in the memory order that is fastest for the CPU's kernels, on huge pages. A projection
[E,in,out], as in gpt-oss, keeps its shape and gets the strides of a contiguous [E,out,in] seen through `mT`. Parameters
keep identity, shape, values and `requires_grad`, so training, copies and checkpoints work as before. Two functions need
care with such strides. safetensors' `save_file` requires contiguous tensors, so `restore` first. torch's optimizers
with fused=True require state with the parameter's strides, so store before their first step.

Panels: the elements of a weight in the order in which the CPU's kernels read them; see reference/panels.py. One word of
an activation is multiplied by many weights, and weights are read as one stream. With 2 to 64 tokens per expert a layer
takes up to 20 % less time; with many the time is about equal; with one token it is up to 5 % longer. Results have the
same bits, and weights have the same size.

Compact: fewer bits per weight; see reference/compact.py. bfloat16 takes 12 bits instead of 16, and float32 takes 28
instead of 32. A float32 projection takes 12 if all its numbers are bfloat16 ones, as in a bfloat16 checkpoint loaded as
float32. Text generation is bound by memory: few tokens per expert take less time, by up to that ratio; many mostly take
up to 17 % more. Results have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from switchgear import ops
from switchgear.reference import compact, panels
from switchgear.weights.form import Form
from switchgear.weights.weight import PANEL_DTYPES, Weight, advise_huge_pages

WORTH = 0.95  # of the plain bytes; a weight that needs more is not stored as compact

# ---- plain -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain(Form):
    """Rows along the inner dimension, on huge pages."""

    name: ClassVar[str] = "plain"
    devices: ClassVar[tuple[str, ...] | None] = ("cpu",)

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        _, rows, cols = weight.shape
        return Weight("plain", weight.detach(), rows, cols, weight.dtype, is_exact=True)


# ---- panels ----------------------------------------------------------------------------------------------------------


def panel_layout(dtype: torch.dtype) -> panels.PanelLayout:
    """The panel layout of the ISA in use."""
    return panels.PanelLayout(*ops.panel_layout(PANEL_DTYPES[dtype]))


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
        if cols % panels.COLUMNS:
            return f"{name} has {cols} columns, no multiple of {panels.COLUMNS}"
        data = torch.empty(panels.shape_of(weight, layout), dtype=torch.uint8, device="cpu")
        advise_huge_pages(data)
        panels.pack(weight.detach(), layout, data)
        return Weight("panels", data, rows, cols, weight.dtype, is_exact=True)


# ---- compact ---------------------------------------------------------------------------------------------------------


def compacted(weight: Tensor) -> Weight:
    """Packs a weight [E,N,C], bfloat16 or float32, on the CPU, into the rows that reference/compact.py defines."""
    weight = weight.detach().contiguous()
    elements = compact.elements_of(weight)
    num_experts, rows, cols = weight.shape
    records = compact.records_bytes(cols, elements.dtype)
    header = compact.header_bytes(0)
    while True:  # runs twice if some row has more exceptions than the first header holds
        out = torch.empty(num_experts, rows, header + records, dtype=torch.uint8, device="cpu")
        advise_huge_pages(out)
        needed = compact.header_bytes(ops.pack_compact(elements, out, torch.get_num_threads()))
        if needed <= header:
            return Weight("compact", out, rows, cols, weight.dtype, elements=elements.dtype, is_exact=True)
        header = needed


@dataclass(frozen=True)
class Compact(Form):
    """Weights of bfloat16 or float32 that become at least 5 % smaller."""

    name: ClassVar[str] = "compact"
    devices: ClassVar[tuple[str, ...] | None] = ("cpu",)
    one_dtype: ClassVar[bool] = True

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        if weight.dtype not in compact.RECORD_BYTES:
            return f"{name} is {weight.dtype}, not torch.bfloat16 or torch.float32"
        if weight.shape[-1] > compact.MAX_COLUMNS:
            return f"{name} has {weight.shape[-1]} columns, more than {compact.MAX_COLUMNS}"
        packed = compacted(weight)
        if (part := packed.nbytes / weight.nbytes) > WORTH:
            return f"{name} would still take {part:.0%} of its bytes"
        return packed

    def check_values(self, name: str, weight: Tensor, parts: int) -> None:
        if isinstance(reason := self.encode(name, weight, parts), str):
            raise ValueError(f"{name}: expected a weight that can be stored as {self}; {reason}")
