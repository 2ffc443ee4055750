# SPDX-License-Identifier: BSD-3-Clause
"""Int8 and Int4: levels of 8 or 4 bits with scales, multiplied in integers with activations that are quantized to int8
at run time; see reference/integers.py.

Groups: integers of 1 to 4 bits with a float16 scale per group of columns, as GPTQ, AWQ and compressed-tensors publish
them, decoded and multiplied in floating point; see reference/groups.py. Each expert may have its own number of bits.

Gradients reach x, topk_weights and biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from switchgear.checks import Count, Range, checked
from switchgear.reference import groups, integers
from switchgear.reference.checks import divide_up
from switchgear.reference.formats import BITS
from switchgear.reference.minifloat import COLUMNS, ROWS
from switchgear.weights.form import KeyedForm, empty_tensor, encode_experts, has_encoder, on_huge_pages
from switchgear.weights.weight import Weight

_MOST_COLUMNS = 1 << 16  # of a weight in integers


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

    keys: ClassVar[Mapping[str, str]] = {
        "data": "_values", "scales": "_scales", "row_scales": "_row_scales", "zeros": "_zeros",
    }  # fmt: skip
    group_size: GroupSize = 0
    symmetric: bool = True

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(key for field, key in self.keys.items() if not (self.symmetric and field == "zeros"))

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        if weight.shape[2] > _MOST_COLUMNS:  # sums of more products do not fit int32
            return f"{name} has {weight.shape[2]} columns, and {self.name} takes at most {_MOST_COLUMNS}"
        bits, (num_experts, rows, cols) = BITS[self.name], weight.shape
        stored: Sequence[Tensor | None]
        if has_encoder(weight):
            blocks = num_experts, parts * divide_up(rows // parts, ROWS)
            shape = *blocks, divide_up(cols, self.group_size or cols), ROWS
            stored = (
                empty_tensor(*blocks, divide_up(cols, 8) * bits // 4, 64), empty_tensor(*shape, dtype=torch.int8),
                empty_tensor(*blocks, ROWS, dtype=torch.float32), None if self.symmetric else empty_tensor(*shape),
            )  # fmt: skip
        else:
            levels = integers.quantize(weight.detach(), bits, self.group_size, self.symmetric, name)
            stored = [
                None if tensor is None else on_huge_pages(tensor) for tensor in integers.to_blocks(levels, bits, parts)
            ]
        data, scales, row_scales, zeros = stored
        assert data is not None
        encoded = Weight(
            self.name, data, rows, cols, weight.dtype, scales, row_scales, zeros,
            parts=parts, group_size=self.group_size,
        )  # fmt: skip
        return encode_experts(name, weight, encoded) if has_encoder(weight) else encoded


@checked
@dataclass(frozen=True)
class Int8(_Integers):
    """8 bits per weight, and one scale per row or per `group_size` columns of it."""

    name: ClassVar[str] = "int8"


@checked
@dataclass(frozen=True)
class Int4(_Integers):
    """4 bits per weight, and one scale per `group_size` columns of a row."""

    name: ClassVar[str] = "int4"
    group_size: GroupSize = 32


@torch.inference_mode(False)  # a backward pass may save the result
def weight_of(levels: groups.Levels, dtype: torch.dtype, group_size: int, *, parts: int = 1) -> Weight:
    """The Weight of quantized `levels`, whoever chose them; `dtype` is that of the plain weight."""
    stored = groups.to_blocks(levels, parts)
    data, scales, zeros = (None if tensor is None else on_huge_pages(tensor) for tensor in stored[:3])
    assert data is not None
    _, rows, cols = levels.q.shape
    return Weight(
        "groups", data, rows, cols, dtype, scales, zeros=zeros, records=stored.records, parts=parts,
        group_size=group_size,
    )  # fmt: skip


class _MultipleOfColumns:
    @staticmethod
    def check(name: str, value: int, sizes: object) -> None:
        if value % COLUMNS:
            raise ValueError(f"{name}: expected 0 (the whole row) or a multiple of {COLUMNS}, got {value}")


Bits = Annotated[int, Range(1, groups.MOST_BITS)]


@checked
@dataclass(frozen=True)
class Groups(KeyedForm):
    """1 to 4 bits per weight, and one float16 scale per `group_size` columns of a row.

    bits: of all experts, or of each. group_size: a multiple of 32, or 0 for the whole row. symmetric: levels around
    zero. Otherwise each group also has a zero point, an integer; one bit has none.
    """

    name: ClassVar[str] = "groups"
    keys: ClassVar[Mapping[str, str]] = {"data": "_values", "scales": "_scales", "zeros": "_zeros"}
    bits: Bits | Sequence[Bits] = 4
    group_size: Annotated[Count, _MultipleOfColumns] = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int):
            object.__setattr__(self, "bits", tuple(self.bits))

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("_values", "_bits", "_scales", *(() if self.symmetric else ("_zeros",)))

    def bits_of(self, num_experts: int) -> tuple[int, ...]:
        """Of each expert. Raises ValueError for another number of experts than that of `bits`."""
        bits = (self.bits,) * num_experts if isinstance(self.bits, int) else tuple(self.bits)
        if len(bits) != num_experts:
            raise ValueError(f"bits: expected a number, or one of each of {num_experts} experts, got {len(bits)}")
        return bits

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        bits, (num_experts, rows, cols) = self.bits_of(len(weight)), weight.shape
        if not has_encoder(weight):
            levels = groups.quantize(weight.detach(), bits, self.group_size, self.symmetric, name)
            return weight_of(levels, weight.dtype, self.group_size, parts=parts)
        blocks = parts * divide_up(rows // parts, ROWS)
        scales = num_experts, blocks, divide_up(cols, self.group_size or cols), ROWS
        stored = Weight(
            self.name, empty_tensor(sum(bits), blocks, divide_up(cols, COLUMNS), groups.PLANE), rows, cols,
            weight.dtype, empty_tensor(*scales, dtype=torch.float16),
            zeros=None if self.symmetric else empty_tensor(*scales),
            records=groups.records_of(bits), parts=parts, group_size=self.group_size,
        )  # fmt: skip
        encoded = encode_experts(name, weight, stored)
        assert encoded.scales is not None
        groups.check_scales(name, encoded.scales, weight)
        return encoded

    def save(self, weight: Weight) -> dict[str, Tensor]:
        assert weight.records is not None
        return super().save(weight) | {"_bits": weight.records[:, 1].to(torch.uint8)}

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        if not torch.equal(bits := tensors["_bits"].cpu(), wanted := self.save(now)["_bits"].cpu()):
            raise ValueError(f"_bits: expected {wanted.tolist()}, got {bits.tolist()}")
        if not bool(tensors["_scales"].isfinite().all()):
            raise ValueError("_scales: expected finite numbers, got others")
        return super().load(tensors, now)
