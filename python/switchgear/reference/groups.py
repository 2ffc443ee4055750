# SPDX-License-Identifier: BSD-3-Clause
"""Weights of 1 to 4 bits with float16 scales in plain torch: quantization, storage and decoding. The specification.

    w = scale · (q - zero)          0 <= q < 2^bits

Each group of `group_size` columns of a row has a scale (float16) and a zero (uint8). Without zeros a zero is
2^(bits-1). One bit has no zero and means w = ±scale. group_size 0 means the whole row. Each expert has its own number
of bits. GPTQ, AWQ and compressed-tensors publish weights in these numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from switchgear.reference.checks import divide_up
from switchgear.reference.integers import inverse, present_columns, slice_rows, sum_columns
from switchgear.reference.minifloat import (
    COLUMNS,
    ROWS,
    finite_experts,
    from_row_blocks,
    row_slices,
    to_row_blocks,
)

MOST_BITS = 4
PLANE = ROWS * COLUMNS // 8  # bytes of a step for each bit
_SPLIT = 15  # of 16 codes of 3 bits, the one whose bits are apart
# Fractions of the range to try for scales: clipping the extremes reduces the error of a group.
_SHARES = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_SHARES_OF_ENDS = tuple(itertools.product((1.0, 0.85, 0.7, 0.55), repeat=2))


class Levels(NamedTuple):
    """A weight [E,N,C] in the order of its rows and columns."""

    q: Tensor  # [E,N,C] uint8
    scales: Tensor  # [E,N,G] float16
    zeros: Tensor | None  # [E,N,G] uint8; None: 2^(bits-1)
    bits: tuple[int, ...]  # of each expert


class Blocks(NamedTuple):
    """The same as kernels read it: include/switchgear/groups.h."""

    data: Tensor  # [P, parts·B, C, 64] uint8; the planes of an expert are consecutive in memory
    scales: Tensor  # [E, parts·B, G, 16] float16
    zeros: Tensor | None  # [E, parts·B, G, 16] uint8
    records: Tensor  # [E, 2] int32: first plane and bits of each expert


# ---- quantization ----------------------------------------------------------------------------------------------------


def quantize(
    weight: Tensor, bits: Sequence[int], group_size: int, symmetric: bool = True, name: str = "weight"
) -> Levels:
    """Quantizes a weight [E,N,C] to `bits[e]` bits for expert e: `fit` of each group, then levels to nearest.

    ValueError for NaN and infinities, and for weights whose scales float16 does not hold: too large, or all those of an
    expert zero whose weights are not. It names the weight by `name`. A group that small among others becomes zero.
    """
    num_experts, rows, columns = weight.shape
    size = group_size or max(columns, 1)
    q = weight.new_empty(weight.shape, dtype=torch.uint8)
    scales = weight.new_empty(num_experts, rows, divide_up(columns, size), dtype=torch.float16)
    zeros = None if symmetric else weight.new_zeros(scales.shape, dtype=torch.uint8)
    present = present_columns(columns, size, weight.device)
    experts = finite_experts(weight, name)
    for some, some_bits, w in slice_rows(experts, weight.shape, bits, size):
        scale, zero = fit(w, present, some_bits, symmetric)
        q.flatten(0, 1)[some] = round_to_levels(w, scale, zero, some_bits).flatten(1)[:, :columns]
        scales.flatten(0, 1)[some] = scale
        if zeros is not None and some_bits > 1:
            zeros.flatten(0, 1)[some] = zero
    check_scales(name, scales, weight)
    return Levels(q, scales, zeros, tuple(bits))


def check_scales(name: str, scales: Tensor, weight: Tensor) -> None:
    """Raises ValueError if float16 does not hold the scales of a weight."""
    for expert, (own, plain) in enumerate(zip(scales, weight, strict=True)):
        if not bool(own.isfinite().all()):
            raise ValueError(f"{name}: expected weights whose scales fit float16, those of expert {expert} do not")
        if not bool(own.any()) and bool(plain.any()):
            raise ValueError(
                f"{name}: expected weights whose scales fit float16, those of expert {expert} would all be zero"
            )


def round_to_levels(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest levels, uint8, of groups w [...,G,g] float32 for scales and zeros [...,G]."""
    if bits == 1:
        return ((w * scale[..., None]) >= 0).to(torch.uint8)
    return (w * inverse(scale.float())[..., None] + zero[..., None].float()).round_().clamp_(0, 2**bits - 1).byte()


def fit(w: Tensor, present: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales (float16) and zeros (uint8) [...,G] of groups w [...,G,g] float32; `present` [G,g] is false for padding,
    which is zero.

    One bit: the mean magnitude, which has the smallest squared error. More bits: for some fractions of the range, the
    scale is fitted to the resulting levels (least squares) and rounded; each group uses that with the smallest squared
    error.
    """
    middle, top = 2 ** (bits - 1), 2**bits - 1
    zero = torch.full(w.shape[:-1], middle, dtype=torch.uint8, device=w.device)
    if bits == 1:
        return (sum_columns(w.abs())[..., 0] / present.sum(-1)).half(), zero
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    extreme = torch.where(high > -low, high, low)  # symmetric: maps to the lower end, the farther one
    best = torch.full_like(low, torch.inf, dtype=torch.float16), zero  # stays where float16 holds no scale
    best_error = torch.full_like(low, torch.inf)
    for low_share, high_share in zip(_SHARES, _SHARES, strict=True) if symmetric else _SHARES_OF_ENDS:
        if symmetric:
            scale = extreme * (-low_share / middle)
        else:
            scale = (high * high_share - low * low_share) / top
            zero = (-low * low_share * inverse(scale)).round_().clamp_(0, top).byte()
        levels = round_to_levels(w, scale, zero, bits).float()
        centred = (levels - zero[..., None].float()).where(present, 0)
        norm = sum_columns(centred.square())[..., 0]
        rounded = torch.where(norm > 0, sum_columns(centred * w)[..., 0] / norm, scale).half()
        levels = round_to_levels(w, rounded, zero, bits).float()
        difference = (levels - zero[..., None].float()) * rounded.float()[..., None] - w
        error = sum_columns(difference.where(present, 0).square())[..., 0]
        better = error < best_error
        best = torch.where(better, rounded, best[0]), torch.where(better, zero, best[1])
        best_error = torch.where(better, error, best_error)
    return best


def dequantize(levels: Levels, group_size: int) -> Tensor:
    """Decodes levels to the weight [E,N,C] in float32, exactly: 11 bits times 5."""
    columns = levels.q.shape[2]
    size = group_size or max(columns, 1)

    def by_column(values: Tensor) -> Tensor:
        return values.float().repeat_interleave(size, -1)[..., :columns]

    out = torch.empty(levels.q.shape, device=levels.q.device)
    for expert, bits in enumerate(levels.bits):
        q = levels.q[expert].float()
        if bits == 1:
            q = 2 * q - 1
        else:
            q -= 2 ** (bits - 1) if levels.zeros is None else by_column(levels.zeros[expert])
        out[expert] = q * by_column(levels.scales[expert])
    return out


# ---- storage ---------------------------------------------------------------------------------------------------------


def records_of(bits: Sequence[int]) -> Tensor:
    """[E,2] int32: experts one after the other."""
    firsts = itertools.accumulate(bits, initial=0)
    return torch.tensor([[first, b] for first, b in zip(firsts, bits, strict=False)], dtype=torch.int32)


def _places(bits: int) -> list[tuple[int, int]]:
    """(vector, lowest bit) of the codes i of 16 columns in half a word; of 3 bits, without the split one."""
    count = 16 // bits
    return [(i // count, bits * (i % count)) for i in range(bits * count)]


def _pack(q: Tensor, bits: int) -> Tensor:
    """Levels [B,16,32·C] -> bytes [B, C, 64·bits]."""
    blocks, _, columns = q.shape
    codes = (q ^ 1 << (bits - 1)).view(blocks, ROWS, columns // COLUMNS, 16, 2).permute(3, 0, 2, 1, 4).int()
    words = codes.new_zeros(bits, *codes.shape[1:])  # [bits, B, C, 16, 2]
    for code, (vector, shift) in zip(codes, _places(bits), strict=False):
        words[vector] |= code << shift
    if bits == 3:
        for vector in range(bits):
            words[vector] |= (codes[_SPLIT] >> vector & 1) << 15
    return words.to(torch.int16).permute(1, 2, 0, 3, 4).contiguous().view(torch.uint8).flatten(2)


def _unpack(data: Tensor, bits: int) -> Tensor:
    blocks, steps, _ = data.shape
    words = data.contiguous().view(torch.int16).view(blocks, steps, bits, ROWS, 2).int()
    codes = [words[:, :, vector] >> shift & ((1 << bits) - 1) for vector, shift in _places(bits)]
    if bits == 3:
        codes.append(sum((words[:, :, vector] >> 15 & 1) << vector for vector in range(bits)))  # type: ignore[arg-type]
    q = torch.stack(codes, 3) ^ 1 << (bits - 1)  # [B, C, 16 rows, 16, 2]
    return q.to(torch.uint8).permute(0, 2, 1, 3, 4).reshape(blocks, ROWS, steps * COLUMNS)


def to_blocks(levels: Levels, parts: int = 1) -> Blocks:
    """Reorders levels into the storage that kernels read."""
    num_experts, rows, columns = levels.q.shape
    blocks, steps = parts * divide_up(rows // parts, ROWS), divide_up(columns, COLUMNS)
    data = levels.q.new_empty(sum(levels.bits), blocks, steps, PLANE)
    scales = levels.scales.new_empty(num_experts, blocks, levels.scales.shape[2], ROWS)
    zeros = None if levels.zeros is None else levels.zeros.new_empty(scales.shape)
    first = 0
    for expert, bits in enumerate(levels.bits):
        zero = 1 << (bits - 1)  # of code 0, with which storage is padded
        q = to_row_blocks(pad(levels.q[expert], (0, steps * COLUMNS - columns), value=zero), parts, zero)
        record = data[first : first + bits].view(blocks, steps, bits * PLANE)
        for some, out in zip(row_slices(q, 4), row_slices(record, 4), strict=True):
            out.copy_(_pack(some, bits))
        first += bits
        scales[expert] = to_row_blocks(levels.scales[expert], parts).mT
        if zeros is not None and levels.zeros is not None:
            zeros[expert] = to_row_blocks(levels.zeros[expert], parts).mT
    return Blocks(data, scales, zeros, records_of(levels.bits))


def from_blocks(weight: Blocks, rows: int, columns: int, parts: int = 1) -> Levels:
    """The inverse of to_blocks, for experts at any records."""
    blocks, steps = weight.data.shape[1:3]
    records: list[list[int]] = weight.records.tolist()
    q = weight.data.new_empty(len(records), rows, columns, dtype=torch.uint8)

    def by_row(tensor: Tensor) -> Tensor:
        return torch.stack([from_row_blocks(one.mT, rows, parts) for one in tensor])

    for expert, (first, bits) in enumerate(records):
        record = weight.data[first].as_strided((blocks, steps, bits * PLANE), (steps * bits * PLANE, bits * PLANE, 1))
        unpacked = torch.cat([_unpack(some, bits) for some in row_slices(record, 4)])
        q[expert] = from_row_blocks(unpacked, rows, parts)[:, :columns]
    return Levels(
        q, by_row(weight.scales), None if weight.zeros is None else by_row(weight.zeros), tuple(b for _, b in records)
    )


def check_records(name: str, weight: Blocks) -> None:
    """Checks that the records are within the planes of `data`."""
    planes, stride = len(weight.data), weight.data.stride(0)
    plane = weight.data.shape[1:].numel()
    end = (planes - 1) * stride + plane
    for i, (first, bits) in enumerate(weight.records.tolist()):
        if not 1 <= bits <= MOST_BITS:
            raise ValueError(f"{name}_records: expected 1 to {MOST_BITS} bits, got {bits} at [{i}]")
        if not 0 <= first < planes or first * stride + bits * plane > end:
            raise ValueError(f"{name}_records: expected {bits} of {planes} planes, got those from {first} on at [{i}]")
