# SPDX-License-Identifier: BSD-3-Clause
"""Records: where the tensors of an expert are in its record, and the weights of records in memory.

A record has all tensors of both projections of one expert in their stored form, one after the other at multiples of 64
bytes. Records have one size in a layer, a multiple of 4096 bytes, so that they can be read past the page cache. Kernels
read a weight where its records lie: its tensors are views of the records, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.weights.module import Kind
from switchgear.weights.weight import Weight

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
PAGE = 4096  # bytes: what O_DIRECT takes everywhere


class Part(NamedTuple):
    """A tensor of a projection in the record of an expert."""

    projection: int  # 0 or 1
    field: str  # of Weight
    offset: int  # bytes, in the record
    shape: tuple[int, ...]  # of one expert; planes come first for the data of groups
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's tensor."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def view(self, records: Tensor) -> Tensor:
        """[S, *shape] of records [S, record_bytes]."""
        return records[:, self.offset : self.offset + self.nbytes].view(self.dtype).view(-1, *self.shape)


@dataclass(frozen=True)
class Records:
    """The experts of a layer in a store.

    Attributes:
        name: of the module, as in model.named_modules().
        file: name of the file in the store. Expert e is at byte e · record_bytes.
        kinds: of the two projections: format, sizes, dtype.
        parts: the tensors of a record.
        checksums: of each record, as the reader compares them; empty while a store is written.
    """

    name: str
    file: str
    num_experts: int
    record_bytes: int
    kinds: tuple[Kind, Kind]
    parts: tuple[Part, ...]
    checksums: tuple[int, ...] = ()

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of each expert in the file."""
        return tuple(expert * self.record_bytes for expert in range(self.num_experts))

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's records, padding included."""
        return self.num_experts * self.record_bytes

    def weights(self, arena: Tensor, slots: Tensor | None = None) -> tuple[Weight, Weight]:
        """The two projections, as views of records in memory: no copy.

        Args:
            arena: [S, record_bytes] uint8, records in any order.
            slots: [E] int32, the row of each expert in `arena`; None: expert e is in row e. Only the rows of experts
                that run must hold their records.
        """
        if arena.dtype is not torch.uint8 or arena.dim() != 2 or arena.shape[1] != self.record_bytes:
            got = f"{arena.dtype} {list(arena.shape)}"
            raise ValueError(f"arena: expected torch.uint8 [S, {self.record_bytes}], got {got}")
        if arena.stride(1) != 1 or arena.stride(0) % ALIGNMENT or arena.stride(0) < self.record_bytes:
            raise ValueError(f"arena: expected contiguous records, got strides {list(arena.stride())}")
        if slots is None and len(arena) != self.num_experts:
            raise ValueError(f"arena: expected {self.num_experts} records without slots, got {len(arena)}")
        if slots is not None and (slots.dtype is not torch.int32 or tuple(slots.shape) != (self.num_experts,)):
            got = f"{slots.dtype} {list(slots.shape)}"
            raise ValueError(f"slots: expected torch.int32 [{self.num_experts}], got {got}")
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for part in self.parts:
            tensors = found[part.projection]
            if self.kinds[part.projection].format == "groups" and part.field == "data":
                tensors["data"], tensors["records"] = _planes(arena, part)
            else:
                tensors[part.field] = part.view(arena)
        if slots is not None:
            found[0]["slots"] = found[1]["slots"] = slots
        return self.kinds[0].weight(found[0]), self.kinds[1].weight(found[1])


def _planes(arena: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """The data of groups, and where each record's planes are. Records have several planes, so the data has a stride of
    64 bytes, in which records begin: with that of records, the last one would end outside."""
    bits, *plane = part.shape
    step = arena.stride(0) // ALIGNMENT
    last = (len(arena) - 1) * step if len(arena) else 0
    if last >= 1 << 31:
        raise ValueError(f"arena: expected at most {ALIGNMENT << 31} bytes of groups, got {arena.nbytes}")
    spare = (bits - 1) * (part.nbytes // bits) // ALIGNMENT  # planes are multiples of 64 bytes
    inner = part.view(arena)[:, 0].stride()[1:]
    data = arena.as_strided((last + spare + 1, *plane), (ALIGNMENT, *inner), arena.storage_offset() + part.offset)
    first = torch.arange(len(arena), dtype=torch.int32) * step
    return data, torch.stack([first, torch.full_like(first, bits)], 1).to(arena.device)


def records_for(name: str, file: str, weights: tuple[Weight, Weight]) -> Records:
    """The layout of records of these weights. Raises ValueError for weights whose experts have records of several
    sizes."""
    kinds, parts, at = [], [], 0
    for index, weight in enumerate(weights):
        kind = Kind.of(weight)
        kinds.append(kind._replace(fields=tuple(field for field in kind.fields if field != "slots")))
        for field in kinds[-1].fields:
            if field != "records":
                shape = _tensor_of(weight, field, 0).shape
                parts.append(Part(index, field, at, tuple(shape), getattr(weight, field).dtype))
                at = _padded(at + parts[-1].nbytes, ALIGNMENT)
        if weight.records is not None and len(set(bits := weight.records[:, 1].tolist())) > 1:
            raise ValueError(
                f"{name}: expected experts of one number of bits in a layer, got {min(bits)} to {max(bits)}"
            )
    return Records(name, file, weights[0].shape[0], _padded(at, PAGE), (kinds[0], kinds[1]), tuple(parts))


def fill(record: Tensor, records: Records, weights: tuple[Weight, Weight], expert: int) -> None:
    """Writes the tensors of an expert into a record [1, record_bytes]; what is between them stays."""
    for part in records.parts:
        part.view(record)[0].copy_(_tensor_of(weights[part.projection], part.field, expert))


def _tensor_of(weight: Weight, field: str, expert: int) -> Tensor:
    at = expert if weight.slots is None else int(weight.slots[expert])
    tensor: Tensor = getattr(weight, field)
    if field == "data" and weight.records is not None:
        first, bits = weight.records[at].tolist()
        return tensor[first : first + bits]
    return tensor[at]


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def whole_tensors(records: Records, record: Tensor) -> Iterator[tuple[Kind, dict[str, Tensor]]]:
    """The tensors of each projection of one record [1, record_bytes], contiguous: all planes of groups are there."""
    for index, kind in enumerate(records.kinds):
        tensors = {part.field: part.view(record) for part in records.parts if part.projection == index}
        if kind.format == "groups":
            tensors["data"] = tensors["data"][0]
            tensors["records"] = torch.tensor([[0, len(tensors["data"])]], dtype=torch.int32)
        yield kind, tensors
