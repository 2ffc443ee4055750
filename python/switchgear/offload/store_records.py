# SPDX-License-Identifier: BSD-3-Clause
"""Records: where the tensors of an expert are in its record, and the weights of records in memory.

A record has all tensors of both projections of one expert in their stored form, one after the other at multiples of 64
bytes. Its size is a multiple of 4096 bytes, so that it can be read past the page cache. Kernels read a weight where its
records lie: its tensors are views of the records, and nothing is copied.

Records have one size in a layer, unless its experts have different numbers of bits (groups). Then the planes of bits,
which are the last parts, are as many as the expert has, and without gaps. In memory each record has room for the most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int32
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.files import DiskFull
from switchgear.weights.module import Kind
from switchgear.weights.weight import Weight


class StoreError(OSError):
    """A store of experts cannot be written, opened or read. The message names the file, and the expert if it is one."""


class StoreFull(StoreError, DiskFull):
    """There is no room for a store. Finished layers stay, and the same call continues with them."""


# ---- Records ---------------------------------------------------------------------------------------------------------


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
        file: name of the file in the store. Its records follow each other.
        record_bytes: of the largest record: the room of each in memory.
        kinds: of the two projections: format, sizes, dtype.
        parts: the tensors of a record with the most bits.
        checksums: of each record, as the reader compares them; empty while a store is written.
        bits: of each expert in the two projections, 0 where it is not in groups; empty if all have those of `parts`.
    """

    name: str
    file: str
    num_experts: int
    record_bytes: int
    kinds: tuple[Kind, Kind]
    parts: tuple[Part, ...]
    checksums: tuple[int, ...] = ()
    bits: tuple[tuple[int, int], ...] = ()

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each expert's record."""
        if not self.bits:
            return (self.record_bytes,) * self.num_experts
        return tuple(_end(self.parts_of(expert)) for expert in range(self.num_experts))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Of each expert in the file."""
        return tuple(accumulate(self.sizes[:-1], initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's records, padding included."""
        return sum(self.sizes)

    def parts_of(self, expert: int) -> tuple[Part, ...]:
        """The tensors of an expert's record."""
        if not self.bits:
            return self.parts
        found, spared = [], 0
        for part in self.parts:
            own = part._replace(offset=part.offset - spared)
            if self.has_planes(part):
                own = own._replace(shape=(self.bits[expert][part.projection], *part.shape[1:]))
                spared += part.nbytes - own.nbytes
            found.append(own)
        return tuple(found)

    def has_planes(self, part: Part) -> bool:
        """Whether its size depends on the number of bits."""
        return part.field == "data" and self.kinds[part.projection].format == "groups"

    def weights(self, arena: Tensor, slots: Tensor | None = None) -> tuple[Weight, Weight]:
        """The two projections, as views of records in memory: no copy.

        Args:
            arena: [S, record_bytes] uint8, records in any order.
            slots: [E] int32, the row of each expert in `arena`; None: expert e is in row e. Only the rows of experts
                that run must hold their records; `placing` says so to the weights if they have different bits.
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
            if self.has_planes(part):
                tensors["data"], tensors["records"] = self._planes(arena, part, slots is None)
            else:
                tensors[part.field] = part.view(arena)
        if slots is not None:
            found[0]["slots"] = found[1]["slots"] = slots
        return self.kinds[0].weight(found[0]), self.kinds[1].weight(found[1])

    def placing(self, weights: tuple[Weight, Weight]) -> Callable[[int, int], None] | None:
        """A function of (expert, row) that says to `weights` which expert's record is in a row of the arena; None if
        they need not know, since all have the same bits."""
        if not self.bits:
            return None
        tables = []  # torch takes µs to write an element
        for part in filter(self.has_planes, self.parts):
            held = weights[part.projection].records
            assert held is not None
            planes = [self._planes_of(part.projection, expert) for expert in range(self.num_experts)]
            tables.append(((c_int32 * held.numel()).from_address(held.data_ptr()), planes))

        def place(expert: int, row: int) -> None:
            for table, planes in tables:
                first, table[2 * row + 1] = planes[expert]
                table[2 * row] = row * step + first

        step = self.record_bytes // ALIGNMENT
        return place

    def _planes_of(self, projection: int, expert: int) -> tuple[int, int]:
        """Where the planes of an expert begin in its record, in units of 64 bytes, and how many there are."""
        part = next(p for p in self.parts_of(expert) if p.projection == projection and p.field == "data")
        return part.offset // ALIGNMENT, part.shape[0]

    def _planes(self, arena: Tensor, part: Part, is_in_order: bool) -> tuple[Tensor, Tensor]:
        """The data of groups, and where the planes of each row are: the first one, counted in strides of the data, and
        their number. They begin anywhere in a row, so the stride is 64 bytes."""
        _, *plane = part.shape
        step, rows, plane_bytes = arena.stride(0) // ALIGNMENT, len(arena), part.nbytes // part.shape[0]
        if rows * step >= 1 << 31:
            raise ValueError(f"arena: expected at most {ALIGNMENT << 31} bytes of groups, got {arena.nbytes}")
        end = (rows - 1) * arena.stride(0) + self.record_bytes if rows else 0
        count = (end - plane_bytes) // ALIGNMENT + 1 if rows else 0
        inner = part.view(arena)[:, 0].stride()[1:]
        data = arena.as_strided((count, *plane), (ALIGNMENT, *inner), arena.storage_offset())
        held = [self._planes_of(part.projection, 0)] * rows
        if self.bits and is_in_order:
            held = [self._planes_of(part.projection, expert) for expert in range(rows)]
        found = torch.tensor(held, dtype=torch.int32).view(rows, 2)
        found[:, 0] += torch.arange(rows, dtype=torch.int32) * step
        return data, found.to(arena.device)


def lay_out_records(name: str, file: str, weights: tuple[Weight, Weight]) -> Records:
    """The layout of records of these weights: planes of bits, if any, come last."""
    kinds, tensors = [], []
    for index, weight in enumerate(weights):
        kind = Kind.of(weight)
        kinds.append(kind._replace(fields=tuple(field for field in kind.fields if field != "slots")))
        tensors += [(index, field) for field in kinds[-1].fields if field != "records"]
    tensors.sort(key=lambda entry: entry[1] == "data" and weights[entry[0]].records is not None)
    num_experts = weights[0].shape[0]
    bits = tuple((_bits(weights[0], expert), _bits(weights[1], expert)) for expert in range(num_experts))
    parts: list[Part] = []
    for index, field in tensors:
        widest = max(range(num_experts), key=lambda expert: bits[expert][index])
        shape = _tensor_of(weights[index], field, widest).shape
        parts.append(Part(index, field, _end(parts, ALIGNMENT), tuple(shape), getattr(weights[index], field).dtype))
    own = bits if len(set(bits)) > 1 else ()
    return Records(name, file, num_experts, _end(parts), (kinds[0], kinds[1]), tuple(parts), bits=own)


def _bits(weight: Weight, expert: int) -> int:
    if weight.records is None:
        return 0
    return int(weight.records[expert if weight.slots is None else int(weight.slots[expert]), 1])


def fill(record: Tensor, records: Records, weights: tuple[Weight, Weight], expert: int) -> None:
    """Writes the tensors of an expert into a record [1, record_bytes]; what is between them stays."""
    for part in records.parts_of(expert):
        part.view(record)[0].copy_(_tensor_of(weights[part.projection], part.field, expert))


def _tensor_of(weight: Weight, field: str, expert: int) -> Tensor:
    at = expert if weight.slots is None else int(weight.slots[expert])
    tensor: Tensor = getattr(weight, field)
    if field == "data" and weight.records is not None:
        first, bits = weight.records[at].tolist()
        return tensor[first : first + bits]
    return tensor[at]


def _end(parts: Sequence[Part], unit: int = PAGE) -> int:
    """The first multiple of `unit` after parts."""
    size = parts[-1].offset + parts[-1].nbytes if parts else 0
    return -(-size // unit) * unit


def whole_tensors(records: Records, record: Tensor) -> Iterator[tuple[Kind, dict[str, Tensor]]]:
    """The tensors of each projection of one record [1, record_bytes], contiguous: all planes of groups are there."""
    for index, kind in enumerate(records.kinds):
        tensors = {part.field: part.view(record) for part in records.parts if part.projection == index}
        if kind.format == "groups":
            tensors["data"] = tensors["data"][0]
            tensors["records"] = torch.tensor([[0, len(tensors["data"])]], dtype=torch.int32)
        yield kind, tensors
