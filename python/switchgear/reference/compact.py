# SPDX-License-Identifier: BSD-3-Clause
"""Compact weights in plain torch: bfloat16 in 12 bits and float32 in 28, without loss. The specification.

Weights use few of the 256 exponents of bfloat16 and float32. The 16 most frequent exponents of an expert get 4-bit
codes; sign and fraction are stored unchanged. A weight [E,N,C] becomes bytes [E,N,B]. Each row is a header, then
records of 128 elements (the last one padded):

    header  a multiple of 64 bytes. Bytes 0 to 15: the exponents of codes 0 to 15, ascending, the same in all rows of an
            expert; bytes 16 and 17: the number n of elements with another exponent (uint16); byte 18: bytes per
            element, 2 or 4; from byte 20 on: n times column and upper 16 bits (uint16 each), columns ascending
    record  192 bytes: byte 64·h + place(i) is sign and fraction of element 64·h + i, i < 64 and h < 2; byte
            128 + place(i) holds the codes of elements i (low bits) and 64 + i
            448 bytes for float32: such a record of the upper halves, with element i at half(i); then the lower halves
            (uint16), with element i at half(i)

place(i) = i % 32 // 8 · 16 + i // 32 · 8 + i % 8, half(i) = i // 32 · 32 + i % 16 // 4 · 8 + i % 32 // 16 · 4 + i % 4
are the positions from which a processor that interleaves bytes, or halves, restores the order. All headers have the
length that the row with the most exceptions needs. About one in 10,000 normally distributed weights is an exception.

float32 weights whose lower halves are all zero, as from a bfloat16 checkpoint, are stored as bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES = 16
RECORD = 128
RECORD_BYTES = {torch.bfloat16: 192, torch.float32: 448}  # the dtypes that can be compact
HEADER_UNIT, ELEMENT_BYTES, FIRST_EXCEPTION, EXCEPTION_BYTES = 64, 18, 20, 4
MAX_COLUMNS = 32768

_PLACE = torch.tensor([i % 32 // 8 * 16 + i // 32 * 8 + i % 8 for i in range(64)], device="cpu")
_HALF = torch.tensor([i // 32 * 32 + i % 16 // 4 * 8 + i % 32 // 16 * 4 + i % 4 for i in range(RECORD)], device="cpu")


def header_bytes(exceptions: int) -> int:
    """The header size of rows with this many exceptions."""
    return -(-(FIRST_EXCEPTION + EXCEPTION_BYTES * exceptions) // HEADER_UNIT) * HEADER_UNIT


def records_bytes(columns: int, dtype: torch.dtype) -> int:
    """The size of a row without its header."""
    return -(-columns // RECORD) * RECORD_BYTES[dtype]


def _frequent(exponents: Tensor) -> Tensor:
    """The CODES most frequent exponents, ascending; ties go to the lower exponent."""
    counts = torch.bincount(exponents.flatten(), minlength=256)
    return counts.sort(descending=True, stable=True).indices[:CODES].sort().values


def _uint16_bytes(values: Tensor) -> Tensor:
    """The two bytes of each value, the lower one first, in a new last dimension."""
    return torch.stack([values & 0xFF, values >> 8], -1)


def elements_of(weight: Tensor) -> Tensor:
    """The elements to store of a contiguous weight: the upper halves, bfloat16, if the lower are zero; else itself."""
    if weight.dtype is not torch.float32 or weight.numel() == 0:
        return weight
    lower, upper = weight.view(torch.int16).view(*weight.shape, 2).unbind(-1)
    return weight if lower.any() else upper.contiguous().view(torch.bfloat16)


def compact(weight: Tensor) -> Tensor:
    """Packs a weight [E,N,C], bfloat16 or float32, into rows [E,N,B] uint8. ValueError for more than 32768 columns."""
    if weight.dtype not in RECORD_BYTES:
        raise TypeError(f"weight: expected torch.bfloat16 or torch.float32, got {weight.dtype}")
    weight = elements_of(weight.contiguous())
    num_experts, rows, columns = weight.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"weight: expected at most {MAX_COLUMNS} columns, got {columns}")
    has_halves = weight.dtype is torch.float32
    bits = weight.view(torch.int32 if has_halves else torch.int16).long()
    upper = (bits >> 16 if has_halves else bits) & 0xFFFF
    exponents = upper >> 7 & 0xFF
    tables = torch.stack([_frequent(exponents[e]) for e in range(num_experts)])
    code_of = torch.full((num_experts, 256), -1).scatter_(1, tables, torch.arange(CODES).expand(num_experts, -1))
    codes = code_of.gather(1, exponents.flatten(1)).view_as(exponents)
    exceptional = codes < 0
    counts = exceptional.sum(-1)

    header = torch.zeros(num_experts, rows, header_bytes(int(counts.max()) if counts.numel() else 0), dtype=torch.long)
    header[..., :CODES] = tables[:, None]
    header[..., CODES : CODES + 2] = _uint16_bytes(counts)
    header[..., ELEMENT_BYTES] = weight.itemsize
    expert, row, column = exceptional.nonzero(as_tuple=True)
    number = exceptional.cumsum(-1)[expert, row, column] - 1
    entries = torch.cat([_uint16_bytes(column), _uint16_bytes(upper[expert, row, column])], -1)
    at = FIRST_EXCEPTION + EXCEPTION_BYTES * number[:, None] + torch.arange(EXCEPTION_BYTES)
    header[expert[:, None], row[:, None], at] = entries

    def records(values: Tensor) -> Tensor:  # [E,N,C] -> [E,N,records,128], padded with zeros
        padded = torch.nn.functional.pad(values, (0, -columns % RECORD)).view(num_experts, rows, -1, RECORD)
        return torch.empty_like(padded).index_copy_(-1, _HALF, padded) if has_halves else padded

    def placed(values: Tensor) -> Tensor:  # [E,N,C] -> [E,N,records,2,64]
        halves = records(values).view(num_experts, rows, -1, 2, 64)
        return torch.empty_like(halves).index_copy_(-1, _PLACE, halves)

    elements = placed(upper >> 8 & 0x80 | upper & 0x7F)
    low, high = placed(codes.clamp(min=0)).unbind(-2)
    parts = [elements.flatten(-2), low | high << 4]
    if has_halves:
        parts.append(_uint16_bytes(records(bits & 0xFFFF)).flatten(-2))
    return torch.cat([header, torch.cat(parts, -1).flatten(-2)], -1).to(torch.uint8)


def expand(rows: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Expands compact `rows` [E,N,B] with elements of `dtype` to the weight [E,N,C]."""
    if dtype not in RECORD_BYTES:
        raise TypeError(f"weight: expected {dtype}, got compact rows, which hold torch.bfloat16 or torch.float32")
    wanted = records_bytes(columns, dtype)
    length = rows.shape[-1] - wanted
    if rows.dtype is not torch.uint8 or rows.dim() != 3 or length < HEADER_UNIT or length % HEADER_UNIT:
        raise ValueError(
            f"weight: expected compact rows, uint8 [E, N, {wanted} + a multiple of {HEADER_UNIT}] for {columns} "
            f"columns of {dtype}, got {rows.dtype} {list(rows.shape)}"
        )
    header, records = rows[..., :length].long(), rows[..., length:].long()
    records = records.view(*rows.shape[:2], -1, RECORD_BYTES[dtype])
    place, half = _PLACE.to(rows.device), _HALF.to(rows.device)
    has_halves = dtype is torch.float32
    elements = records[..., :RECORD].reshape(*records.shape[:-1], 2, 64)[..., place]
    codes = records[..., RECORD : RECORD + 64][..., place]
    exponents = header[..., None, None, :CODES].expand(*elements.shape[:-1], CODES)
    chosen = exponents.gather(-1, torch.stack([codes & 0xF, codes >> 4], -2))
    upper = ((elements & 0x80) << 8 | chosen << 7 | elements & 0x7F).flatten(-2)
    upper = (upper[..., half] if has_halves else upper).flatten(-2)[..., :columns].contiguous()

    counts = header[..., CODES] | header[..., CODES + 1] << 8
    entries = header[..., FIRST_EXCEPTION:].reshape(*rows.shape[:2], -1, EXCEPTION_BYTES)
    used = torch.arange(entries.shape[-2], device=rows.device) < counts[..., None]
    expert, row, number = used.nonzero(as_tuple=True)
    low_column, high_column, low, high = entries[expert, row, number].unbind(-1)
    upper[expert, row, low_column | high_column << 8] = low | high << 8
    if not has_halves:
        return torch.where(upper < 0x8000, upper, upper - 0x10000).to(torch.int16).view(torch.bfloat16)
    lower = records[..., RECORD_BYTES[torch.bfloat16] :].reshape(*records.shape[:-1], RECORD, 2)
    lower = (lower[..., 0] | lower[..., 1] << 8)[..., half].flatten(-2)[..., :columns]
    bits = upper << 16 | lower
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)


def check_storage(name: str, packed: Tensor, rows: int, dtype: torch.dtype, element_bytes: int) -> None:
    """Checks that `packed` are compact rows of `rows` of each expert, whose elements a weight of `dtype` can have."""
    if packed.dtype is not torch.uint8 or dtype not in RECORD_BYTES:
        raise TypeError(f"{name}: expected {dtype}, got compact rows of torch.bfloat16 or torch.float32")
    if element_bytes not in (torch.bfloat16.itemsize, dtype.itemsize):
        raise TypeError(f"{name}: expected compact {dtype}, got compact elements of {element_bytes} bytes")
    if packed.dim() != 3 or packed.shape[1] != rows:
        raise ValueError(f"{name}: expected compact rows [E, {rows}, any], got shape {list(packed.shape)}")


def plain(weight: Tensor, columns: int, dtype: torch.dtype, element_bytes: int) -> Tensor:
    """Expands compact rows to the weight of `dtype`. The elements of a float32 weight may be bfloat16."""
    is_low = dtype is torch.float32 and element_bytes == torch.bfloat16.itemsize
    return expand(weight, columns, torch.bfloat16 if is_low else dtype).to(dtype)
