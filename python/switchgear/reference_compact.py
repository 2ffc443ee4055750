# SPDX-License-Identifier: BSD-3-Clause
"""Compact weights in plain torch: bfloat16 in three quarters of its memory, without loss. The specification.

Of the 256 exponents that a bfloat16 can have, weights use few. The 16 that most elements of an expert have get codes of
4 bits; sign and fraction keep their 8. A weight [E,N,C] becomes bytes [E,N,B]; each row is a header and then records of
128 elements (the last one padded):

    header  64 bytes or a multiple: the exponents of codes 0 to 15, ascending and the same in all rows of an expert;
            from byte 16 on the number n of elements with another exponent (uint16); from byte 20 on n times column and
            bits (uint16 each), columns ascending
    record  192 bytes: byte 64·h + place(i) is sign and fraction of element 64·h + i, i < 64 and h < 2; byte
            128 + place(i) holds the codes of elements i (low bits) and 64 + i

place(i) = i % 32 // 8 · 16 + i // 32 · 8 + i % 8 is where a processor's interleaving of bytes puts them in order. All
rows have headers of one length, for the row with the most exceptions. About one in 10,000 normally distributed weights
is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES = 16
RECORD, RECORD_BYTES = 128, 192
HEADER_UNIT, FIRST_EXCEPTION, EXCEPTION_BYTES = 64, 20, 4
MAX_COLUMNS = 32768

_PLACE = torch.tensor([i % 32 // 8 * 16 + i // 32 * 8 + i % 8 for i in range(64)])


def header_bytes(exceptions: int) -> int:
    """Of rows with so many exceptions."""
    return -(-(FIRST_EXCEPTION + EXCEPTION_BYTES * exceptions) // HEADER_UNIT) * HEADER_UNIT


def records_bytes(columns: int) -> int:
    """Of a row without its header."""
    return -(-columns // RECORD) * RECORD_BYTES


def _frequent(exponents: Tensor) -> Tensor:
    """The CODES exponents that most elements have, ascending; of two as frequent, the lower one."""
    counts = torch.bincount(exponents.flatten(), minlength=256)
    return counts.sort(descending=True, stable=True).indices[:CODES].sort().values


def _uint16_bytes(values: Tensor) -> Tensor:
    return torch.stack([values & 0xFF, values >> 8], -1).to(torch.uint8)


def compact(weight: Tensor) -> Tensor:
    """Compact rows [E,N,B] uint8 of a weight [E,N,C] bfloat16. ValueError for more than 32768 columns."""
    if weight.dtype is not torch.bfloat16:
        raise TypeError(f"weight: expected torch.bfloat16, got {weight.dtype}")
    num_experts, rows, columns = weight.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"weight: expected at most {MAX_COLUMNS} columns, got {columns}")
    bits = weight.contiguous().view(torch.int16).long() & 0xFFFF
    exponents = bits >> 7 & 0xFF
    tables = torch.stack([_frequent(exponents[e]) for e in range(num_experts)])
    code_of = torch.full((num_experts, 256), -1).scatter_(1, tables, torch.arange(CODES).expand(num_experts, -1))
    codes = code_of.gather(1, exponents.flatten(1)).view_as(exponents)
    exceptional = codes < 0
    counts = exceptional.sum(-1)

    header = torch.zeros(num_experts, rows, header_bytes(int(counts.max()) if counts.numel() else 0), dtype=torch.uint8)
    header[..., :CODES] = tables[:, None].to(torch.uint8)
    header[..., CODES : CODES + 2] = _uint16_bytes(counts)
    expert, row, column = exceptional.nonzero(as_tuple=True)
    number = exceptional.cumsum(-1)[expert, row, column] - 1
    entries = torch.cat([_uint16_bytes(column), _uint16_bytes(bits[expert, row, column])], -1)
    at = FIRST_EXCEPTION + EXCEPTION_BYTES * number[:, None] + torch.arange(EXCEPTION_BYTES)
    header[expert[:, None], row[:, None], at] = entries

    def halves(
        values: Tensor,
    ) -> Tensor:  # [E,N,C] -> [E,N,records,2,64], zeros behind the end, each element in its place
        padded = torch.nn.functional.pad(values, (0, -columns % RECORD)).view(num_experts, rows, -1, 2, 64)
        return torch.empty_like(padded).index_copy_(-1, _PLACE, padded)

    elements = halves(bits >> 8 & 0x80 | bits & 0x7F)
    low, high = halves(codes.clamp(min=0)).unbind(-2)
    records = torch.cat([elements.flatten(-2), low | high << 4], -1).to(torch.uint8)
    return torch.cat([header, records.flatten(-2)], -1)


def expand(rows: Tensor, columns: int) -> Tensor:
    """The weight [E,N,C] bfloat16 of which `rows` [E,N,B] are the compact ones."""
    wanted = records_bytes(columns)
    length = rows.shape[-1] - wanted
    if rows.dtype is not torch.uint8 or rows.dim() != 3 or length < HEADER_UNIT or length % HEADER_UNIT:
        raise ValueError(
            f"weight: expected compact rows, uint8 [E, N, {wanted} + a multiple of {HEADER_UNIT}] for {columns} "
            f"columns, got {rows.dtype} {list(rows.shape)}"
        )
    header, records = rows[..., :length].long(), rows[..., length:].long()
    records = records.view(*rows.shape[:2], -1, RECORD_BYTES)
    place = _PLACE.to(rows.device)
    elements = records[..., :RECORD].reshape(*records.shape[:-1], 2, 64)[..., place]
    codes = records[..., RECORD:][..., place]
    exponents = header[..., None, None, :CODES].expand(*elements.shape[:-1], CODES)
    chosen = exponents.gather(-1, torch.stack([codes & 0xF, codes >> 4], -2))
    bits = ((elements & 0x80) << 8 | chosen << 7 | elements & 0x7F).flatten(-3)[..., :columns].contiguous()

    counts = header[..., CODES] | header[..., CODES + 1] << 8
    entries = header[..., FIRST_EXCEPTION:].reshape(*rows.shape[:2], -1, EXCEPTION_BYTES)
    used = torch.arange(entries.shape[-2], device=rows.device) < counts[..., None]
    expert, row, number = used.nonzero(as_tuple=True)
    low_column, high_column, low, high = entries[expert, row, number].unbind(-1)
    bits[expert, row, low_column | high_column << 8] = low | high << 8
    return torch.where(bits < 0x8000, bits, bits - 0x10000).to(torch.int16).view(torch.bfloat16)


def plain(weight: Tensor, columns: int) -> Tensor:
    """A weight that may be compact."""
    return expand(weight, columns) if weight.dtype is torch.uint8 else weight
