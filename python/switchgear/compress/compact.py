# SPDX-License-Identifier: BSD-3-Clause
"""Experts whose weights take fewer bits each, without loss: see reference_compact for the format."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops, reference_compact
from switchgear.pages import advise_huge_pages
from switchgear.stored import Form, restore, store

WORTH = 0.95  # of the plain bytes: above that compact weights are not worth their name


class CompactMatrix(NamedTuple):
    """A weight [E,N,C] and what its bytes do not show."""

    data: Tensor  # rows [E,N,B] uint8
    columns: int  # C
    dtype: torch.dtype  # of the weight
    stored: torch.dtype  # of the elements in the rows: bfloat16, too, for float32 whose lower halves are zero

    @property
    def rows(self) -> int:
        """N."""
        return self.data.shape[1]

    def weight(self) -> Tensor:
        """The weight itself."""
        if not self.data.is_cpu or torch.compiler.is_compiling():
            return reference_compact.expand(self.data, self.columns, self.stored).to(self.dtype)
        weight = torch.empty(*self.data.shape[:-1], self.columns, dtype=self.stored)
        advise_huge_pages(weight)
        ops.host.module.expand_compact(self.data.contiguous(), weight, torch.get_num_threads())
        return weight.to(self.dtype)

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the kernels read these rows for an x of `dtype`."""
        return dtype is self.dtype or dtype is self.stored

    def with_data(self, data: Tensor) -> CompactMatrix:
        """The same of other rows."""
        return self._replace(data=data)


def compact(model: nn.Module) -> int:
    """Stores the experts' projections in fewer bits a weight, without loss, for decoding on a CPU.

    bfloat16 takes 12 bits instead of 16; float32 28 instead of 32, or 12 where all of a projection are bfloat16
    numbers, as in a bfloat16 checkpoint that was loaded as float32. Generating text waits for weights from memory: with
    few tokens per expert a layer takes up to that much less time, with many it takes longer, mostly by 0 to 17 %.
    Results have the same bits.

    The parameters of the projections go; in their place are buffers `<name>_compact`. State dicts hold, and take, the
    plain weights under their own names, so checkpoints know nothing of it. Where gradients are asked for, or on another
    device, a call expands the weights for its duration.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).

    Returns the number of experts modules whose weights are compact now.

    Raises:
        ValueError: the model has no such experts with bfloat16 or float32 parameters of which this saves a twentieth;
            the message says why those there are stay as they are.
    """
    return store(model, COMPACT)


def expand(model: nn.Module) -> int:
    """Takes `compact` back: the parameters are there again, bit for bit. Returns the number of modules it changed."""
    return restore(model, COMPACT)


def compacted(weight: Tensor) -> CompactMatrix:
    """A weight [E,N,C], bfloat16 or float32, on the CPU, with rows as reference_compact.compact makes them."""
    weight = weight.detach().contiguous()
    elements = reference_compact.elements_of(weight)
    num_experts, rows, columns = weight.shape
    records = reference_compact.records_bytes(columns, elements.dtype)
    header = reference_compact.header_bytes(0)
    while True:  # twice where the first headers have no room for the exceptions of some row
        out = torch.empty(num_experts, rows, header + records, dtype=torch.uint8, device="cpu")
        advise_huge_pages(out)
        needed = reference_compact.header_bytes(ops.host.module.pack_compact(elements, out, torch.get_num_threads()))
        if needed <= header:
            return CompactMatrix(out, columns, weight.dtype, elements.dtype)
        header = needed


def _compact(name: str, weight: Tensor, _: bool) -> CompactMatrix | str:
    if weight.dtype not in reference_compact.RECORD_BYTES:
        return f"{name} is {weight.dtype}, not torch.bfloat16 or torch.float32"
    if weight.shape[-1] > reference_compact.MAX_COLUMNS:
        return f"{name} has {weight.shape[-1]} columns, more than {reference_compact.MAX_COLUMNS}"
    matrix = compacted(weight)
    if (part := matrix.data.nbytes / weight.nbytes) > WORTH:
        return f"{name} would still take {part:.0%} of its bytes"
    return matrix


COMPACT = Form("compact", "compact weights", _compact)
