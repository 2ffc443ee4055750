# SPDX-License-Identifier: BSD-3-Clause
"""Experts whose weights lie in panels, in the order in which the CPU's kernels read them: see reference_panels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops, reference_panels
from switchgear.pages import advise_huge_pages
from switchgear.reference_panels import COLUMNS, PanelLayout
from switchgear.stored import Form, restore, store

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class PanelMatrix(NamedTuple):
    """A weight [E,N,C] and what its bytes do not show."""

    data: Tensor  # [E,N/R,V,B] uint8
    rows: int  # N
    columns: int  # C
    dtype: torch.dtype  # of the weight
    isa: str  # whose kernels read them

    def weight(self) -> Tensor:
        """The weight itself."""
        weight = torch.empty(self.data.shape[0], self.rows, self.columns, dtype=self.dtype, device=self.data.device)
        if weight.is_cpu and not torch.compiler.is_compiling():
            advise_huge_pages(weight)
        return reference_panels.expand(self.data, weight)

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the kernels read these panels for an x of `dtype`: those of another ISA do not."""
        # A graph cannot ask for the ISA; the op that it calls looks at the shape.
        return dtype is self.dtype and (torch.compiler.is_compiling() or ops.cpu_isa() == self.isa)

    def with_data(self, data: Tensor) -> PanelMatrix:
        """The same of other panels."""
        return self._replace(data=data)


def panel_layout(dtype: torch.dtype) -> PanelLayout:
    """What the ISA in use reads."""
    return PanelLayout(*ops.host.module.panel_layout(DTYPES[dtype]))


def pack_panels(model: nn.Module) -> int:
    """Lays the experts' projections in the order in which the CPU's kernels read them, for inference.

    One word of an activation then serves many weights, and weights are one stream of memory. With 2 to 64 tokens per
    expert a layer takes up to a fifth less time, with many about as long, with a single one up to 5 % longer. Results
    have the same bits, and weights the same number of bytes.

    The parameters of the projections go; in their place are buffers `<name>_panels`. State dicts hold, and take, the
    plain weights under their own names, so checkpoints know nothing of it. Where gradients are asked for, or on another
    device, a call restores the weights for its duration; so does one on another ISA than that of the panels.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).

    Returns the number of experts modules whose weights are in panels now.

    Raises:
        ValueError: the model has no such experts with parameters of float32, bfloat16 or float16 whose hidden and
            intermediate size are multiples of 64 (32 without AVX-512); the message says why those there are stay.
    """
    return store(model, PANELS)


def unpack_panels(model: nn.Module) -> int:
    """Takes `pack_panels` back: the parameters are there again, bit for bit. Returns how many modules it changed."""
    return restore(model, PANELS)


def in_panels(weight: Tensor) -> PanelMatrix:
    """A weight [E,N,C] in panels of the ISA in use; N and C are multiples as PanelLayout says."""
    layout = panel_layout(weight.dtype)
    _, rows, columns = weight.shape
    panels = torch.empty(reference_panels.shape_of(weight, layout), dtype=torch.uint8, device="cpu")
    advise_huge_pages(panels)
    return PanelMatrix(
        reference_panels.pack(weight.detach(), layout, panels), rows, columns, weight.dtype, ops.cpu_isa()
    )


def _store(name: str, weight: Tensor, has_halves: bool) -> PanelMatrix | str:
    if weight.dtype not in DTYPES:
        return f"{name} is {weight.dtype}, not torch.float32, torch.bfloat16 or torch.float16"
    layout = panel_layout(weight.dtype)
    unit = layout.rows * (2 if has_halves else 1)
    if weight.shape[1] % unit:
        return f"{name} has {weight.shape[1]} rows, no multiple of {unit}"
    if weight.shape[2] % COLUMNS:
        return f"{name} has {weight.shape[2]} columns, no multiple of {COLUMNS}"
    return in_panels(weight)


PANELS = Form("panels", "weights in panels", _store)
