# SPDX-License-Identifier: BSD-3-Clause
"""Compact: fewer bits per weight, without loss; see reference/compact.py.

bfloat16 takes 12 bits instead of 16, and float32 takes 28 instead of 32. A float32 projection takes 12 if all its
numbers are bfloat16 ones, as in a bfloat16 checkpoint loaded as float32. Text generation is bound by memory: few
tokens per expert take less time, by up to that ratio; many mostly take up to 17 % more. Results have the same bits.
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

WORTH = 0.95  # of the plain bytes; a weight that needs more is not stored as compact


def compacted(weight: Tensor) -> Weight:
    """Packs a weight [E,N,C], bfloat16 or float32, on the CPU, into the rows that reference/compact.py defines."""
    weight = weight.detach().contiguous()
    elements = rows_of.elements_of(weight)
    num_experts, rows, cols = weight.shape
    records = rows_of.records_bytes(cols, elements.dtype)
    header = rows_of.header_bytes(0)
    while True:  # runs twice if some row has more exceptions than the first header holds
        out = torch.empty(num_experts, rows, header + records, dtype=torch.uint8, device="cpu")
        advise_huge_pages(out)
        needed = rows_of.header_bytes(ops.pack_compact(elements, out, torch.get_num_threads()))
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
        if weight.dtype not in rows_of.RECORD_BYTES:
            return f"{name} is {weight.dtype}, not torch.bfloat16 or torch.float32"
        if weight.shape[-1] > rows_of.MAX_COLUMNS:
            return f"{name} has {weight.shape[-1]} columns, more than {rows_of.MAX_COLUMNS}"
        packed = compacted(weight)
        if (part := packed.nbytes / weight.nbytes) > WORTH:
            return f"{name} would still take {part:.0%} of its bytes"
        return packed

    def check_values(self, name: str, weight: Tensor, parts: int) -> None:
        if isinstance(reason := self.encode(name, weight, parts), str):
            raise ValueError(f"{name}: expected a weight that can be stored as {self}; {reason}")
