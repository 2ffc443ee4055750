# SPDX-License-Identifier: BSD-3-Clause
"""The formats of a weight in plain torch: its tensors and their meaning. The specification.

A weight [E,N,C] is passed to the ops as tensors and a form, a few integers:

    form ()       plain: one tensor [E,N,C]
    form (format, rows, cols, parts, group_size, fields, element_bytes)
                  the index of the format in FORMATS; N and C; equal parts of the rows that are stored separately;
                  columns that share a scale (0: all); the tensors after the data, one bit each in order of FIELDS; and
                  bytes of an element of compact rows, 2 or 4 (0 in other formats)

`slots` [E] int32 locates the experts: expert e is at index slots[e] of the first dimension of all other tensors. In
groups, `records` has this dimension instead of the data.

The tensors of a stored format are contiguous, or each tensor[i] is, any multiple of 64 bytes after tensor[i - 1]. So
all tensors of an expert can be views of one record. The data of GGUF's formats is [E, parts, N/parts, bytes of a row]:
the rows of a part are contiguous, and experts and parts have any strides. In groups, records[e] = (first, bits): the
`bits` planes of an expert are consecutive in memory from data[first] on, and end within the memory of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.reference import compact, gguf, groups, integers, minifloat, nf4, panels
from switchgear.reference.checks import check, check_range, divide_up

FIELDS = ("scales", "row_scales", "zeros", "records", "slots")


class Format(NamedTuple):
    """A format. Its kernels' side is the table of include/switchgear/weight.h, by the same numbers."""

    name: str
    number: int  # in a form
    bits: int  # of a code; 0: of the dtype
    family: str  # "exact", "integers", "minifloats", "groups" or "gguf": how products multiply it
    needed: tuple[str, ...] = ()  # tensors beside the data
    scales: torch.dtype | None = None  # of the tensor `scales`
    on_cuda: bool = True  # CUDA's kernels read it


def _minifloat(kind: minifloat.Minifloat) -> Format:
    needed = ("scales", "row_scales") if kind.row_scales else ("scales",)
    return Format(kind.name, kind.number, kind.bits, "minifloats", needed, kind.scales)


_TABLE = (
    Format("plain", 0, 0, "exact"),
    Format("panels", 1, 0, "exact", on_cuda=False),
    Format("compact", 2, 0, "exact", on_cuda=False),
    Format("int8", 3, 8, "integers", ("scales", "row_scales"), torch.int8),
    Format("int4", 4, 4, "integers", ("scales", "row_scales"), torch.int8),
    *map(_minifloat, minifloat.MINIFLOATS.values()),
    Format("groups", 8, 4, "groups", ("scales", "records"), torch.float16),
    *(Format(name, gguf.FIRST + i, 0, "gguf", on_cuda=False) for i, name in enumerate(gguf.TYPES)),
)
TABLE = {row.name: row for row in sorted(_TABLE, key=lambda row: row.number)}
FORMATS = tuple(TABLE)  # by number
LOSSLESS = tuple(row.name for row in _TABLE if row.family == "exact")
ON_CUDA = tuple(row.name for row in _TABLE if row.on_cuda)
BITS = {row.name: row.bits for row in _TABLE if row.family == "integers"}
MINIFLOATS = tuple(minifloat.MINIFLOATS)
GGUF = tuple(gguf.TYPES)
DECODED = (*MINIFLOATS, "groups", *GGUF)  # multiplied in floating point, by exact values


class Stored(NamedTuple):
    """The parts of a weight."""

    format: str
    rows: int  # N
    cols: int  # C
    parts: int
    group_size: int
    element_bytes: int
    data: Tensor
    scales: Any  # Tensor | None, as are the others
    row_scales: Any
    zeros: Any
    records: Any
    slots: Any

    @property
    def num_stored(self) -> int:
        """The number of stored experts."""
        return len(self.data if self.records is None else self.records)


def format_of(form: Sequence[int]) -> str:
    """The name of the format."""
    return FORMATS[form[0]] if form else "plain"


def fields_of(form: Sequence[int]) -> tuple[str, ...]:
    """The names of the tensors; the first is `data`."""
    fields = form[5] if form else 0
    return ("data", *(field for bit, field in enumerate(FIELDS) if fields >> bit & 1))


def take_apart(name: str, tensors: Sequence[Tensor], form: Sequence[int]) -> Stored:
    """Splits a weight into its parts. Raises ValueError if the form does not match the tensors."""
    if not form:
        if len(tensors) != 1 or tensors[0].dim() != 3:
            raise ValueError(f"{name}: expected one tensor [E,N,C], got {[list(tensor.shape) for tensor in tensors]}")
        _, rows, cols = tensors[0].shape
        return Stored("plain", rows, cols, 1, 0, 0, tensors[0], None, None, None, None, None)
    if len(form) != 7:
        raise ValueError(f"{name}: expected a form of 7 numbers, got {len(form)}")
    number, rows, cols, parts, group_size, fields, element_bytes = form
    if not 0 <= number < len(FORMATS):
        raise ValueError(f"{name}: expected a format from 0 to {len(FORMATS) - 1}, got {number}")
    names = fields_of(form)
    if not 0 <= fields < 1 << len(FIELDS) or len(names) != len(tensors):
        raise ValueError(f"{name}: expected {len(names)} tensors for the fields {fields}, got {len(tensors)}")
    found = dict(zip(names, tensors, strict=True))
    for field in TABLE[FORMATS[number]].needed:
        if field not in found:
            raise ValueError(f"{name}_{field}: expected a tensor, got none")
    if parts < 1 or rows % parts:
        raise ValueError(f"{name}: expected parts that divide N={rows}, got {parts}")
    data, others = found["data"], (found.get(field) for field in FIELDS)
    return Stored(FORMATS[number], rows, cols, parts, group_size, element_bytes, data, *others)


def check_weight(
    name: str,
    tensors: Sequence[Tensor],
    form: Sequence[int],
    sizes: tuple[int | None, int | None, int | None],
    dtype: torch.dtype,
) -> tuple[int, int, int]:
    """Checks a weight for activations of `dtype` against `sizes` (None: any). Returns E, N and C."""
    stored = take_apart(name, tensors, form)
    experts, rows, cols = sizes
    if not form:
        check(name, stored.data, sizes, dtype)
        num_experts, rows, cols = stored.data.shape
        return num_experts, rows, cols
    if rows not in (None, stored.rows) or cols not in (None, stored.cols) or stored.rows < 1 or stored.cols < 1:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes[1:])
        raise ValueError(f"{name}: expected matrices [{wanted}], got [{stored.rows}, {stored.cols}] in {stored.format}")
    _check_storage(name, stored, dtype)
    if stored.format != "plain":
        for field in _INDEXED:
            label = name if field == "data" else f"{name}_{field}"
            _check_strides(label, getattr(stored, field), stored.format in GGUF)
    count = stored.num_stored
    if stored.slots is not None:
        check(f"{name}_slots", stored.slots, (experts,), torch.int32)
        check_range(f"{name}_slots", stored.slots, 0, count)
        count = len(stored.slots)
    if experts not in (None, count):
        raise ValueError(f"{name}: expected {experts} experts, got {count}")
    return count, stored.rows, stored.cols


def _check_storage(name: str, stored: Stored, dtype: torch.dtype) -> None:
    rows, cols = stored.rows, stored.cols
    if stored.format == "plain":
        check(name, stored.data, (None, rows, cols), dtype)
    elif stored.format == "panels":
        panels.check_storage(name, stored.data, rows, cols, dtype)
    elif stored.format == "compact":
        compact.check_storage(name, stored.data, rows, dtype, stored.element_bytes)
    elif stored.format in GGUF:
        row_bytes = gguf.row_bytes(stored.format, cols)
        check(name, stored.data, (None, stored.parts, rows // stored.parts, row_bytes), torch.uint8)
    else:
        if (allowed := _explain_group_size(stored)) is not None:
            raise ValueError(f"{name}: expected a group_size of {allowed}, got {stored.group_size}")
        for field, (shape, kind) in _list_tensors(stored).items():
            count = None if field in ("data", "records") else stored.num_stored
            check(name if field == "data" else f"{name}_{field}", getattr(stored, field), (count, *shape), kind)
        if stored.format == "groups":
            groups.check_records(name, _in_groups(stored))


def _explain_group_size(stored: Stored) -> str | None:
    """The group sizes that a format has, if that of a weight is none of them."""
    size = stored.group_size
    if stored.format in BITS:
        is_known = not size or (size >= 16 and not size & (size - 1))
        return None if is_known else "0 (the whole row) or a power of two from 16 on"
    kind = minifloat.MINIFLOATS.get(stored.format)
    if kind is not None and kind.group:
        return None if size == kind.group else str(kind.group)
    is_known = size >= 0 and not size % minifloat.COLUMNS
    return None if is_known else f"0 (the whole row) or a multiple of {minifloat.COLUMNS}"


def _list_tensors(stored: Stored) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape after the first dimension, and dtype, of each tensor of a weight in blocks of rows."""
    cols, block = stored.cols, minifloat.ROWS
    blocks = stored.parts * divide_up(stored.rows // stored.parts, block)
    scales = (blocks, divide_up(cols, stored.group_size or cols), block)
    tensors = {
        "scales": (scales, TABLE[stored.format].scales), "row_scales": ((blocks, block), torch.float32),
        "zeros": (scales, torch.uint8), "records": ((2,), torch.int32),
    }  # fmt: skip
    if stored.format == "groups":
        data = (blocks, divide_up(cols, minifloat.COLUMNS), groups.PLANE)
    elif stored.format in BITS:
        data = (blocks, divide_up(cols, 8) * BITS[stored.format] // 4, 64)
    else:
        data = minifloat.blocks_shape(stored.rows, cols, stored.format, stored.parts)
    return {"data": (data, torch.uint8), **tensors}


def _check_strides(name: str, tensor: Tensor | None, is_in_parts: bool) -> None:
    if tensor is None or tensor.is_contiguous():
        return
    if is_in_parts:
        if not tensor[0, 0].is_contiguous():
            raise ValueError(f"{name}: expected contiguous rows of a part, got strides {list(tensor.stride())}")
        return
    if not tensor[0].is_contiguous() or tensor.stride(0) * tensor.itemsize % 64:
        raise ValueError(
            f"{name}: expected contiguous experts, adjacent or a multiple of 64 bytes apart, got strides "
            f"{list(tensor.stride())} of {list(tensor.shape)}"
        )


_INDEXED = ("data", "scales", "row_scales", "zeros")  # by slots


def _in_order(stored: Stored) -> Stored:
    """The weight without slots: the data of expert e is at index e."""
    if stored.slots is None:
        return stored
    at = stored.slots.long()
    fields = ("scales", "row_scales", "zeros", "records") if stored.format == "groups" else _INDEXED
    moved: dict[str, Any] = {name: None if (t := getattr(stored, name)) is None else t[at] for name in fields}
    return stored._replace(**moved, slots=None)


def _in_groups(stored: Stored) -> groups.Blocks:
    return groups.Blocks(stored.data, stored.scales, stored.zeros, stored.records)


def _levels(stored: Stored) -> integers.Levels:
    blocks = integers.Quantized(stored.data, stored.scales, stored.row_scales, stored.zeros)
    return integers.from_blocks(blocks, stored.rows, stored.cols, BITS[stored.format], stored.parts)


def decode(tensors: Sequence[Tensor], form: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Decodes a weight to [E,N,C] in `dtype`: the original bits if the format is lossless, else rounded values."""
    stored = _in_order(take_apart("weight", tensors, form))
    if stored.format == "plain":
        return stored.data
    if stored.format == "panels":
        return panels.plain(stored.data, stored.cols, dtype)
    if stored.format == "compact":
        return compact.plain(stored.data, stored.cols, dtype, stored.element_bytes)
    if stored.format in BITS:
        return integers.dequantize(_levels(stored), BITS[stored.format], stored.group_size).to(dtype)
    if stored.format in GGUF:
        return gguf.decode(stored.format, stored.data).flatten(1, 2).to(dtype)
    if stored.format == "groups":
        levels = groups.from_blocks(_in_groups(stored), stored.rows, stored.cols, stored.parts)
        return groups.dequantize(levels, stored.group_size).to(dtype)
    return _decode_minifloat(stored).to(dtype)


def _decode_minifloat(stored: Stored) -> Tensor:
    """The weight in float32, exactly."""
    cols, parts, group = stored.cols, stored.parts, (1, stored.group_size)  # scales are stored for each row
    values, scales = minifloat.from_blocks(stored.data, stored.scales, stored.format, stored.rows, cols, parts, group)
    if stored.format == "nf4":
        return nf4.decode_nf4(values, scales, cols)
    return minifloat.decode(stored.format, values, scales, stored.row_scales, cols, parts, group)


def multiply_integers(rows: Tensor, tensors: Sequence[Tensor], form: Sequence[int], expert_offsets: Tensor) -> Tensor:
    """Multiplies rows [S,C] by each expert's matrix of int8 or int4, [S,N] float32."""
    stored = _in_order(take_apart("weight", tensors, form))
    return integers.multiply(rows, _levels(stored), BITS[stored.format], stored.group_size, expert_offsets)
