# SPDX-License-Identifier: BSD-3-Clause
"""Int8 and Int4: levels of 8 or 4 bits with scales, multiplied in integers; see reference/integers.py.

Activations are quantized to int8 at run time. Gradients reach x, topk_weights and biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from switchgear.reference import integers
from switchgear.reference.formats import BITS
from switchgear.weights.form import KeyedForm, on_huge_pages
from switchgear.weights.weight import Weight

_MOST_COLUMNS = 1 << 16  # of a weight in integers
_SUFFIXES = {"data": "_values", "scales": "_scales", "row_scales": "_row_scales", "zeros": "_zeros"}


class _GroupSize:
    @staticmethod
    def check(name: str, value: int, sizes: object) -> None:
        if value and (value < 16 or value & (value - 1) or value > _MOST_COLUMNS):
            wanted = f"0 (the whole row) or a power of two from 16 to {_MOST_COLUMNS}"
            raise ValueError(f"{name}: expected {wanted}, got {value}")


GroupSize = Annotated[int, _GroupSize]


@dataclass(frozen=True)
class _Integers(KeyedForm):
    """group_size: columns of a row that share a scale: a power of two, at least 16, or 0 for the whole row.
    symmetric: levels around zero. Otherwise each group also has a zero point: 8 bits, like the scale.
    """

    group_size: GroupSize = 0
    symmetric: bool = True

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(suffix for field, suffix in _SUFFIXES.items() if not (self.symmetric and field == "zeros"))

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        if weight.shape[2] > _MOST_COLUMNS:  # sums of more products do not fit int32
            return f"{name} has {weight.shape[2]} columns, and {self.name} takes at most {_MOST_COLUMNS}"
        bits = BITS[self.name]
        levels = integers.quantize(weight.detach(), bits, self.group_size, self.symmetric, name)
        stored = integers.to_blocks(levels, bits, parts)
        data, scales, row_scales, zeros = (None if tensor is None else on_huge_pages(tensor) for tensor in stored)
        assert data is not None
        _, rows, cols = weight.shape
        return Weight(
            self.name, data, rows, cols, weight.dtype, scales, row_scales, zeros,
            parts=parts, group_size=self.group_size,
        )  # fmt: skip

    def save(self, weight: Weight) -> dict[str, Tensor]:
        named = {suffix: getattr(weight, field) for field, suffix in _SUFFIXES.items()}
        return {suffix: tensor for suffix, tensor in named.items() if tensor is not None}

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        fields = {field: tensors.get(suffix) for field, suffix in _SUFFIXES.items()}
        moved = {field: None if t is None else on_huge_pages(t.to(now.device)) for field, t in fields.items()}
        return now.with_tensors(moved)


@dataclass(frozen=True)
class Int8(_Integers):
    """8 bits per weight, and one scale per row or per `group_size` columns of it."""

    name: ClassVar[str] = "int8"


@dataclass(frozen=True)
class Int4(_Integers):
    """4 bits per weight, and one scale per `group_size` columns of a row."""

    name: ClassVar[str] = "int4"
    group_size: GroupSize = 32
