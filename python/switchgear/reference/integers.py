# SPDX-License-Identifier: BSD-3-Clause
"""Weights of 8 and 4 bits in plain torch: quantization, storage, decoding and products. The specification.

    w = row_scale · scale · (q - zero · 2^(bits-8))          0 <= q < 2^bits

Each row has a row_scale (float32). Each group of `group_size` columns of a row has a scale (int8) and a zero (uint8).
Weights are symmetric if all zeros are 128; zeros are then not stored. group_size 0 means the whole row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from switchgear.reference.checks import divide_up
from switchgear.reference.minifloat import ROWS, from_row_blocks, row_slices, to_row_blocks
from switchgear.reference.stages import segments

ACTIVATION_BLOCK = 256  # columns of activations that share a scale, if groups of weights are not larger
SMALLEST = 2.0**-100  # smaller blocks of activations become zero: their scale has no inverse


class Levels(NamedTuple):
    """A weight [E,N,C] in the order of its rows and columns."""

    q: Tensor  # [E,N,C] uint8
    scales: Tensor  # [E,N,G] int8
    row_scales: Tensor  # [E,N] float32
    zeros: Tensor | None  # [E,N,G] uint8; None: 128 everywhere


class Quantized(NamedTuple):
    """The same in the blocks that kernels read: include/switchgear/integers.h."""

    values: Tensor  # [E, parts·B, W, 64] uint8
    scales: Tensor  # [E, parts·B, G, 16] int8
    row_scales: Tensor  # [E, parts·B, 16] float32
    zeros: Tensor | None  # [E, parts·B, G, 16] uint8


# ---- weights ---------------------------------------------------------------------------------------------------------

# Fractions of the range to try for scales: clipping the extremes a little reduces the error of a group. With zeros,
# each end has its own fraction.
_SHARES = (1.1, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_SHARES_OF_ENDS = tuple(itertools.product((1.03, 0.95, 0.87, 0.79), repeat=2))
_STEPS = 2  # least-squares steps for each fraction
_SLICE = 2**17  # elements at a time, of one expert or of several small ones, whose intermediate results fit in a cache


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def sum_columns(x: Tensor) -> Tensor:
    """Sums of the last dimension, [..., 1], with the same bits in vectors of any length: halves of it, filled up to a
    power of two with zeros, are added until one number is left."""
    width = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x


def quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool, name: str = "weight") -> Levels:
    """Quantizes a weight [E,N,C] to levels.

    8 bits: the largest magnitude, or the range, maps to the ends. 4 bits: for some fractions of the range, scales and
    zeros are fitted to the resulting levels (least squares); each group uses the fit with the smallest squared error.
    Levels are rounded to nearest for the rounded scale and zero. Raises ValueError for NaN and infinities.
    """
    num_experts, rows, columns = weight.shape
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinities")
    size = group_size or columns
    groups = divide_up(columns, size)
    q = weight.new_empty(weight.shape, dtype=torch.uint8)
    scales = weight.new_empty(num_experts, rows, groups, dtype=torch.int8)
    row_scales = weight.new_empty(num_experts, rows, dtype=torch.float32)
    zeros = None if symmetric else weight.new_empty(scales.shape, dtype=torch.uint8)
    present = present_columns(columns, size, weight.device)
    for some, _, w in slice_rows(map(Tensor.float, weight), weight.shape, [bits] * num_experts, size):
        scale, zero = _fit(w, present, bits, symmetric)
        # Scales as multiples of the row's largest over 127; a single group needs no rounding.
        largest = scale.abs().amax(1, keepdim=True)
        unit = largest if groups == 1 else largest / 127
        code = (scale * inverse(unit)).round_()
        rounded = _levels(w, code * unit, zero, bits, symmetric)
        q.flatten(0, 1)[some] = rounded.flatten(1)[:, :columns].to(torch.uint8)
        scales.flatten(0, 1)[some] = code.to(torch.int8).flatten(1)
        row_scales.flatten()[some] = unit.flatten()
        if zeros is not None:
            zeros.flatten(0, 1)[some] = (zero * 2 ** (8 - bits)).to(torch.uint8).flatten(1)
    return Levels(q, scales, row_scales, zeros)


def present_columns(columns: int, size: int, device: torch.device) -> Tensor:
    """[G,size]: false for the padding of the last group of `size` columns."""
    groups = divide_up(columns, size)
    return (torch.arange(groups * size, device=device) < columns).view(groups, size)


def slice_rows(
    matrices: Iterable[Tensor], shape: Sequence[int], bits: Sequence[int], size: int
) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows to quantize at once, of one expert or of several small ones with the same bits, so that intermediate results
    fit in a cache: their places in [E·N], their bits, and the rows in groups of `size` columns, [R,G,size].

    matrices: [N,C] float32 of each expert of a weight of this shape.
    """
    _, rows, columns = shape
    rows_at_once = max(_SLICE // max(columns, 1), 64)
    experts_at_once = max(rows_at_once // max(rows, 1), 1)
    runs = itertools.groupby(enumerate(matrices), lambda item: (bits[item[0]], item[0] // experts_at_once))
    for (some_bits, _), run in runs:
        experts, found = zip(*run, strict=True)
        begin = experts[0] * rows
        for part in row_slices(torch.cat(found) if len(found) > 1 else found[0], rows_at_once):
            plain = pad(part.contiguous(), (0, -columns % size))  # sums of other strides have another order
            yield slice(begin, begin + len(part)), some_bits, plain.view(len(part), -1, size)
            begin += len(part)


def _levels(w: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    lowest = 1 if bits == 8 and symmetric else 0  # a symmetric range
    return (w * inverse(scale) + zero).round_().clamp_(lowest, 2**bits - 1)


def _round_zero(zero: Tensor, bits: int) -> Tensor:
    """Rounds a zero to its eight bits: to 1/16 of a level for 4 bits, to a level for 8."""
    unit = float(1 << (8 - bits))
    return (zero * unit).round_().clamp_(0, 255) / unit


def _fit(w: Tensor, present: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros [R,G,1] of groups w [R,G,g], float32; columns outside `present` [G,g] are zero."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    half = torch.full_like(low, middle)
    if symmetric:
        extreme = torch.where(high > -low, high, low)  # maps to an end; for 4 bits to the lower, the farther one
        start = extreme.abs() / 127 if bits == 8 else -extreme / middle
    else:
        start = (high - low) / top
    if bits == 8:
        return start, half if symmetric else _round_zero(-low * inverse(start), bits)

    count = present.sum(-1, keepdim=True).to(w.dtype)
    best_scale, best_zero, best_error = start, half, torch.full_like(start, torch.inf)
    for low_share, high_share in zip(_SHARES, _SHARES, strict=True) if symmetric else _SHARES_OF_ENDS:
        if symmetric:
            scale, zero = start * low_share, half
        else:
            scale = (high * high_share - low * low_share) / top
            zero = _round_zero(-low * low_share * inverse(scale), bits)
        for _ in range(_STEPS):
            levels = _levels(w, scale, zero, bits, symmetric)
            if not symmetric:  # fit the line w = scale · (q - zero) to all (q, w)
                mean = sum_columns(levels.where(present, 0)) / count
                centred = (levels - mean).where(present, 0)
                norm = sum_columns(centred.square())
                scale = torch.where(norm > 0, sum_columns(centred * w) / norm, scale)
                zero = _round_zero(mean - sum_columns(w) / count * inverse(scale), bits)
            centred = (levels - zero).where(present, 0)  # the best scale for these levels and this zero
            norm = sum_columns(centred.square())
            scale = torch.where(norm > 0, sum_columns(centred * w) / norm, scale)
        levels = _levels(w, scale, zero, bits, symmetric)
        error = sum_columns(((levels - zero) * scale - w).where(present, 0).square())
        better = error < best_error
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_error = torch.minimum(error, best_error)
    return best_scale, best_zero


def dequantize(levels: Levels, bits: int, group_size: int) -> Tensor:
    """Decodes levels to the weight [E,N,C] in float32, with two roundings."""
    columns = levels.q.shape[2]
    size = group_size or columns

    def by_column(values: Tensor) -> Tensor:
        return values.float().repeat_interleave(size, -1)[..., :columns]

    zero = 128.0 if levels.zeros is None else by_column(levels.zeros)
    scale = levels.row_scales[..., None] * by_column(levels.scales)
    return (levels.q.float() - zero * 2.0 ** (bits - 8)) * scale


# ---- storage ---------------------------------------------------------------------------------------------------------


def to_blocks(levels: Levels, bits: int, parts: int) -> Quantized:
    """Reorders levels into the blocks that kernels read."""
    blocks = to_row_blocks(pad(levels.q, (0, -levels.q.shape[2] % 8)), parts)
    halves = blocks.view(*blocks.shape[:3], -1, 8 // bits, 4)  # E, B, 16 rows, words, halves, 4 columns
    values = halves[..., 0, :] if bits == 8 else halves[..., 0, :] | halves[..., 1, :] << 4

    def by_group(tensor: Tensor) -> Tensor:
        return to_row_blocks(tensor, parts).mT.contiguous()

    return Quantized(
        values.transpose(2, 3).flatten(3).contiguous(),
        by_group(levels.scales),
        to_row_blocks(levels.row_scales[..., None], parts).squeeze(-1),
        None if levels.zeros is None else by_group(levels.zeros),
    )


def from_blocks(weight: Quantized, rows: int, columns: int, bits: int, parts: int) -> Levels:
    """The inverse of to_blocks."""
    values = weight.values.view(*weight.values.shape[:3], ROWS, 4).transpose(2, 3)  # E, B, 16 rows, words, 4
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), -2)

    def by_row(tensor: Tensor) -> Tensor:
        return from_row_blocks(tensor.mT, rows, parts)

    return Levels(
        from_row_blocks(values.flatten(3), rows, parts)[..., :columns].contiguous(),
        by_row(weight.scales),
        from_row_blocks(weight.row_scales[..., None], rows, parts).squeeze(-1),
        None if weight.zeros is None else by_row(weight.zeros),
    )


# ---- products -------------------------------------------------------------------------------------------------------


def activation_block(group_size: int, columns: int) -> int:
    """Columns of activations that share a scale: the whole row if weights have no groups."""
    return max(group_size, ACTIVATION_BLOCK) if group_size else columns


def quantize_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantizes x [R,C] to int8 [R,C] and scales [R,B] float32, one per `block` columns: x ≈ scales · values. The
    largest magnitude of a block maps to 127.

    A block whose largest magnitude is below 2^-100 becomes zero. A block with an infinity or a NaN has scale NaN.
    """
    columns = x.shape[1]
    count = divide_up(columns, block)
    x = pad(x.float(), (0, count * block - columns)).view(-1, count, block)
    largest = x.abs().amax(-1)
    finite = largest.isfinite()
    inverse = torch.where(finite & (largest >= SMALLEST), torch.full_like(largest, 127) / largest, 0)  # one rounding
    values = (torch.where(finite[..., None], x, 0) * inverse[..., None]).round().to(torch.int8)
    scales = torch.where(largest < SMALLEST, 0, largest / 127)
    return values.flatten(1)[:, :columns], torch.where(finite, scales, torch.nan)


def multiply(rows: Tensor, levels: Levels, bits: int, group_size: int, expert_offsets: Tensor) -> Tensor:
    """Multiplies rows [S,C], rounded to int8, by each expert's matrix, [S,N] float32. Sums within a group are exact;
    those over groups are float32."""
    _, height, columns = levels.q.shape
    size = group_size or columns
    block = activation_block(group_size, columns)
    values, scales = quantize_rows(rows, block)
    out = torch.zeros(len(rows), height, device=rows.device)
    for expert, slots in segments(expert_offsets):
        total = torch.zeros(slots.stop - slots.start, height, device=rows.device)
        for group, begin in enumerate(range(0, columns, size)):
            a = values[slots, begin : begin + size].double()  # products and sums are exact in float64
            q = levels.q[expert, :, begin : begin + size].double()
            scale = levels.scales[expert, :, group].float()
            if levels.zeros is None:
                total = total + (a @ (q - 2 ** (bits - 1)).mT).float() * scale
            else:
                zero = levels.zeros[expert, :, group].float() * 2.0 ** (bits - 8)
                total = total + (a @ q.mT).float() * scale
                total = total - a.sum(-1, keepdim=True).float() * (scale * zero)
            if begin + size >= columns or (begin + size) % block == 0:
                out[slots] += total * scales[slots, begin // block, None]
                total = torch.zeros_like(total)
        out[slots] *= levels.row_scales[expert]
    return out
