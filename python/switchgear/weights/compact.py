# SPDX-License-Identifier: BSD-3-Clause
"""Compact: fewer bits a weight, without loss; see reference/compact.py.

bfloat16 takes 12 bits instead of 16; float32 28 instead of 32, or 12 where all of a projection are bfloat16 numbers, as
in a bfloat16 checkpoint that was loaded as float32. Generating text waits for weights from memory: with few tokens per
expert a layer takes up to that much less time, with many mostly up to 17 % more. Results have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from switchgear import ops
from switchgear.reference import compact as rows_of
from switchgear.weights.form import Form
from switchgear.weights.pages import advise_huge_pages
from switchgear.weights.weight import Weight

WORTH = 0.95  # of the plain bytes: above that compact weights are not worth their name


def compacted(weight: Tensor) -> Weight:
    """A weight [E,N,C], bfloat16 or float32, on the CPU, with rows as reference/compact.py makes them."""
    weight = weight.detach().contiguous()
    elements = rows_of.elements_of(weight)
    num_experts, rows, cols = weight.shape
    records = rows_of.records_bytes(cols, elements.dtype)
    header = rows_of.header_bytes(0)
    while True:  # twice where the first headers have no room for the exceptions of some row
        out = torch.empty(num_experts, rows, header + records, dtype=torch.uint8, device="cpu")
        advise_huge_pages(out)
        needed = rows_of.header_bytes(ops.pack_compact(elements, out, torch.get_num_threads()))
        if needed <= header:
            return Weight("compact", out, rows, cols, weight.dtype, elements=elements.dtype, is_exact=True)
        header = needed


@dataclass(frozen=True)
class Compact(Form):
    """Weights of bfloat16 or float32 of which this saves at least a twentieth."""

    name: ClassVar[str] = "compact"
    devices: ClassVar[tuple[str, ...] | None] = ("cpu",)
    one_dtype: ClassVar[bool] = True

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        if weight.dtype not in rows_of.RECORD_BYTES:
            return f"{name} is {weight.dtype}, not torch.bfloat16 or torch.float32"
        if weight.shape[-1] > rows_of.MAX_COLUMNS:
            return f"{name} has {weight.shape[-1]} columns, more than {rows_of.MAX_COLUMNS}"
        packed = compacted(weight)
        if (part := packed.nbytes / weight.nbytes) > WORTH:
            return f"{name} would still take {part:.0%} of its bytes"
        return packed
