# SPDX-License-Identifier: BSD-3-Clause
"""Weights of 8 and 4 bits in plain torch: how they are made, stored, read back and multiplied. The specification of the
quantised ops, as reference.py is of the others.

    w = row_scale · scale · (q - zero · 2^(bits-8))          0 <= q < 2^bits

row_scale, a float32, belongs to a row; scale (int8) and zero (uint8) to a row and a group of `group_size` columns.
Weights are symmetric where all zeros are 128, which is then not stored. group_size 0 stands for the whole row.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.reference import (
    _check,
    _check_layer,
    _check_offsets,
    _gather_rows,
    _glu,
    _segments,
    _wide,
    combine,
    plan,
)

BLOCK_ROWS = 16
ACTIVATION_BLOCK = 256  # columns of activations that share a scale, where weights have groups that are not larger
SMALLEST = 2.0**-100  # blocks of activations below are zero: their scale has no inverse


class Levels(NamedTuple):
    """A weight [E,N,C] in the order of its rows and columns."""

    q: Tensor  # [E,N,C] uint8
    scales: Tensor  # [E,N,G] int8
    row_scales: Tensor  # [E,N] float32
    zeros: Tensor | None  # [E,N,G] uint8; None: 128 everywhere


class Quantized(NamedTuple):
    """The same in blocks, as the kernels read it: QuantizedMatrices of include/switchgear/ops.h."""

    values: Tensor  # [E, parts·B, W, 64] uint8
    scales: Tensor  # [E, parts·B, G, 16] int8
    row_scales: Tensor  # [E, parts·B, 16] float32
    zeros: Tensor | None  # [E, parts·B, G, 16] uint8


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


# ---- weights ---------------------------------------------------------------------------------------------------------

# Shares of the range that scales are tried for: a group loses less where its extremes are clipped a little. With zeros
# each end is clipped by a share of its own.
_SHARES = (1.1, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_SHARES_OF_ENDS = tuple(itertools.product((1.03, 0.95, 0.87, 0.79), repeat=2))
_STEPS = 2  # of least squares from each of them


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Levels:
    """The levels of a weight [E,N,C].

    8 bits: the largest magnitude, or the range, maps to the ends. 4 bits: from some shares of the range, scales and
    zeros are fitted to the levels that they lead to (least squares), and each group takes those with the smallest
    squared error. Levels are the nearest for the rounded scale and zero. NaN and infinities are a ValueError.
    """
    num_experts, rows, columns = weight.shape
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite numbers")
    size = group_size or columns
    groups = _divide_up(columns, size)
    q = weight.new_empty(weight.shape, dtype=torch.uint8)
    scales = weight.new_empty(num_experts, rows, groups, dtype=torch.int8)
    row_scales = weight.new_empty(num_experts, rows, dtype=torch.float32)
    zeros = None if symmetric else weight.new_empty(scales.shape, dtype=torch.uint8)
    present = (torch.arange(groups * size, device=weight.device) < columns).view(groups, size)  # of the last group
    for expert in range(num_experts):
        for row in range(0, rows, 64):  # slices that stay in a cache
            some = slice(row, row + 64)
            w = torch.nn.functional.pad(weight[expert, some].float(), (0, groups * size - columns)).view(
                -1, groups, size
            )
            scale, zero = _fit(w, present, bits, symmetric)
            # Scales as multiples of the row's largest over 127; a single group needs no rounding.
            largest = scale.abs().amax(1, keepdim=True)
            unit = largest if groups == 1 else largest / 127
            code = (scale * _inverse(unit)).round_()
            levels = _levels(w, code * unit, zero, bits, symmetric)
            q[expert, some] = levels.flatten(1)[:, :columns].to(torch.uint8)
            scales[expert, some] = code.squeeze(-1).to(torch.int8)
            row_scales[expert, some] = unit.flatten()
            if zeros is not None:
                zeros[expert, some] = (zero * 2 ** (8 - bits)).squeeze(-1).to(torch.uint8)
    return Levels(q, scales, row_scales, zeros)


def _levels(w: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    lowest = 1 if bits == 8 and symmetric else 0  # as far down as up
    return (w * _inverse(scale) + zero).round_().clamp_(lowest, 2**bits - 1)


def _round_zero(zero: Tensor, bits: int) -> Tensor:
    """To what eight bits hold: 1/16 of a level for 4 bits, a level for 8."""
    unit = float(1 << (8 - bits))
    return (zero * unit).round_().clamp_(0, 255) / unit


def _fit(w: Tensor, present: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros [R,G,1] of groups w [R,G,g], float32; columns that are not `present` [G,g] are zero."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    half = torch.full_like(low, middle)
    if symmetric:
        extreme = torch.where(high > -low, high, low)  # maps to an end: at 4 bits to the lower, the farther one
        start = extreme.abs() / 127 if bits == 8 else -extreme / middle
    else:
        start = (high - low) / top
    if bits == 8:
        return start, half if symmetric else _round_zero(-low * _inverse(start), bits)

    weights = present.to(w.dtype)
    count = weights.sum(-1, keepdim=True)
    best_scale, best_zero, best_error = start, half, torch.full_like(start, torch.inf)
    for low_share, high_share in zip(_SHARES, _SHARES, strict=True) if symmetric else _SHARES_OF_ENDS:
        if symmetric:
            scale, zero = start * low_share, half
        else:
            scale = (high * high_share - low * low_share) / top
            zero = _round_zero(-low * low_share * _inverse(scale), bits)
        for _ in range(_STEPS):
            levels = _levels(w, scale, zero, bits, symmetric)
            if not symmetric:  # the line w = scale · (q - zero) through all (q, w)
                mean = (levels * weights).sum(-1, keepdim=True) / count
                centred = (levels - mean) * weights
                norm = centred.square().sum(-1, keepdim=True)
                scale = torch.where(norm > 0, (centred * w).sum(-1, keepdim=True) / norm, scale)
                zero = _round_zero(mean - w.sum(-1, keepdim=True) / count * _inverse(scale), bits)
            centred = (levels - zero) * weights  # the scale that fits these levels and this zero best
            norm = centred.square().sum(-1, keepdim=True)
            scale = torch.where(norm > 0, (centred * w).sum(-1, keepdim=True) / norm, scale)
        levels = _levels(w, scale, zero, bits, symmetric)
        error = (((levels - zero) * scale - w) * weights).square().sum(-1, keepdim=True)
        better = error < best_error
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_error = torch.minimum(error, best_error)
    return best_scale, best_zero


def dequantize(levels: Levels, bits: int, group_size: int) -> Tensor:
    """The weight [E,N,C] in float32: two roundings."""
    columns = levels.q.shape[2]
    size = group_size or columns

    def by_column(values: Tensor) -> Tensor:
        return values.float().repeat_interleave(size, -1)[..., :columns]

    zero = 128.0 if levels.zeros is None else by_column(levels.zeros)
    scale = levels.row_scales[..., None] * by_column(levels.scales)
    return (levels.q.float() - zero * 2.0 ** (bits - 8)) * scale


# ---- storage ---------------------------------------------------------------------------------------------------------


def _pad_rows(tensor: Tensor, parts: int) -> Tensor:
    """[E,N,D] -> [E, parts·B, 16, D], zeros below each part."""
    num_experts, rows, depth = tensor.shape
    part_rows = rows // parts
    blocks = _divide_up(part_rows, BLOCK_ROWS)
    padded = tensor.new_zeros(num_experts, parts, blocks * BLOCK_ROWS, depth)
    padded[:, :, :part_rows] = tensor.reshape(num_experts, parts, part_rows, depth)
    return padded.view(num_experts, parts * blocks, BLOCK_ROWS, depth)


def _unpad_rows(blocks: Tensor, rows: int, parts: int) -> Tensor:
    num_experts, _, _, depth = blocks.shape
    return blocks.reshape(num_experts, parts, -1, depth)[:, :, : rows // parts].reshape(num_experts, rows, depth)


def to_blocks(levels: Levels, bits: int, parts: int) -> Quantized:
    """Levels in the order in which kernels read them."""
    q = levels.q
    padded = torch.nn.functional.pad(q, (0, _divide_up(q.shape[2], 8) * 8 - q.shape[2]))
    blocks = _pad_rows(padded, parts)
    halves = blocks.view(*blocks.shape[:3], -1, 8 // bits, 4)  # E, B, 16 rows, words, halves, 4 columns
    values = halves[..., 0, :] if bits == 8 else halves[..., 0, :] | halves[..., 1, :] << 4

    def by_group(tensor: Tensor) -> Tensor:
        return _pad_rows(tensor, parts).transpose(2, 3).contiguous()

    return Quantized(
        values.transpose(2, 3).flatten(3).contiguous(),
        by_group(levels.scales),
        _pad_rows(levels.row_scales[..., None], parts).squeeze(-1),
        None if levels.zeros is None else by_group(levels.zeros),
    )


def from_blocks(weight: Quantized, rows: int, columns: int, bits: int, parts: int) -> Levels:
    """The inverse of to_blocks."""
    values = weight.values.view(*weight.values.shape[:3], BLOCK_ROWS, 4).transpose(2, 3)  # E, B, 16 rows, words, 4
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), -2)

    def by_row(tensor: Tensor) -> Tensor:
        return _unpad_rows(tensor.transpose(2, 3), rows, parts)

    return Levels(
        _unpad_rows(values.flatten(3), rows, parts)[..., :columns].contiguous(),
        by_row(weight.scales),
        _unpad_rows(weight.row_scales[..., None], rows, parts).squeeze(-1),
        None if weight.zeros is None else by_row(weight.zeros),
    )


# ---- ops -------------------------------------------------------------------------------------------------------------


def activation_block(group_size: int, columns: int) -> int:
    """Columns of activations that share a scale: the whole row where weights have no groups."""
    return max(group_size, ACTIVATION_BLOCK) if group_size else columns


def quantize_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x [R,C] as int8 [R,C] and scales [R,B] float32, one for each `block` columns: x ≈ scales · values, with the
    largest magnitude of a block at 127.

    Blocks whose largest magnitude is below 2^-100 are zero; those with an infinity or a NaN have a NaN for their scale.
    """
    columns = x.shape[1]
    count = _divide_up(columns, block)
    x = torch.nn.functional.pad(x.float(), (0, count * block - columns)).view(-1, count, block)
    largest = x.abs().amax(-1)
    finite = largest.isfinite()
    inverse = torch.where(finite & (largest >= SMALLEST), torch.full_like(largest, 127) / largest, 0)  # one rounding
    values = (torch.where(finite[..., None], x, 0) * inverse[..., None]).round().to(torch.int8)
    scales = torch.where(largest < SMALLEST, 0, largest / 127)
    return values.flatten(1)[:, :columns], torch.where(finite, scales, torch.nan)


def _product(
    x: Tensor,
    levels: Levels,
    bits: int,
    group_size: int,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
) -> Tensor:
    """[S,N] float32: rows of x in int8 times each expert's matrix. Sums are exact in a group, float32 over groups."""
    _, rows, columns = levels.q.shape
    size = group_size or columns
    block = activation_block(group_size, columns)
    values, x_scales = quantize_rows(x, block)
    if token_indices is not None:
        values, x_scales = _gather_rows(values, token_indices), _gather_rows(x_scales, token_indices)
    out = torch.zeros(values.shape[0], rows, device=x.device)
    for expert, slots in _segments(expert_offsets):
        total = torch.zeros(slots.stop - slots.start, rows, device=x.device)
        for group, begin in enumerate(range(0, columns, size)):
            a = values[slots, begin : begin + size].double()  # whose products and sums are exact in float64
            q = levels.q[expert, :, begin : begin + size].double()
            scale = levels.scales[expert, :, group].float()
            if levels.zeros is None:
                total = total + (a @ (q - 2 ** (bits - 1)).mT).float() * scale
            else:
                zero = levels.zeros[expert, :, group].float() * 2.0 ** (bits - 8)
                total = total + (a @ q.mT).float() * scale
                total = total - a.sum(-1, keepdim=True).float() * (scale * zero)
            if begin + size >= columns or (begin + size) % block == 0:
                out[slots] += total * x_scales[slots, begin // block, None]
                total = torch.zeros_like(total)
        out[slots] *= levels.row_scales[expert]
    return out


def _check_quantized(
    name: str,
    weight: Quantized,
    bits: int,
    group_size: int,
    num_experts: int | None,
    rows: int,
    columns: int,
    parts: int,
) -> None:
    if bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, got {bits}")
    if group_size and (group_size < 16 or group_size & (group_size - 1)):
        raise ValueError(f"group_size: expected 0 (the whole row) or a power of two from 16 on, got {group_size}")
    if parts < 1 or rows % parts:
        raise ValueError(f"parts: expected a divisor of N={rows}, got {parts}")
    blocks = parts * _divide_up(rows // parts, BLOCK_ROWS)
    groups, words = _divide_up(columns, group_size or columns), _divide_up(columns, 8) * (2 if bits == 8 else 1)
    _check(name, weight.values, (num_experts, blocks, words, 64), torch.uint8)
    num_experts = weight.values.shape[0]
    _check(f"{name}_scales", weight.scales, (num_experts, blocks, groups, BLOCK_ROWS), torch.int8)
    _check(f"{name}_row_scales", weight.row_scales, (num_experts, blocks, BLOCK_ROWS), torch.float32)
    _check(f"{name}_zeros", weight.zeros, (num_experts, blocks, groups, BLOCK_ROWS), torch.uint8)


def quantized_grouped_gemm(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    rows: int,
    columns: int,
    parts: int,
    bits: int,
    group_size: int,
    transposed: bool,
) -> Tensor:
    """grouped_gemm with a weight [E,N,C] = [E,rows,columns] of 8 or 4 bits: out[s] = x[r(s)] · Wᵀ + bias, [S,N].

    Each row of x is rounded to int8, in blocks of columns (see quantize_rows). With `transposed`, which gradients need,
    out[s] = x[r(s)] · W, [S,C], in the float dtype of x, to which the weight is rounded; there is no bias.
    """
    weight = Quantized(values, scales, row_scales, zeros)
    _check("x", x, (None, rows if transposed else columns))
    _check_quantized("weight", weight, bits, group_size, None, rows, columns, parts)
    if transposed and bias is not None:
        raise ValueError("bias: expected none for a transposed weight")
    _check("bias", bias, (values.shape[0], rows), x.dtype)
    _check_offsets(expert_offsets, len(x if token_indices is None else token_indices), token_indices, len(x))
    plain = from_blocks(weight, rows, columns, bits, parts)
    if transposed:
        matrices = dequantize(plain, bits, group_size).to(x.dtype)
        grad = _wide(x if token_indices is None else _gather_rows(x, token_indices))
        out = grad.new_zeros(grad.shape[0], columns)
        for expert, slots in _segments(expert_offsets):
            out[slots] = grad[slots] @ _wide(matrices[expert])
        return out.to(x.dtype)
    out = _product(x, plain, bits, group_size, expert_offsets, token_indices)
    if bias is not None:
        for expert, slots in _segments(expert_offsets):
            out[slots] += bias[expert].float()
    return out.to(x.dtype)


def quantized_moe_forward(
    x: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    gate_up_row_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_values: Tensor,
    down_scales: Tensor,
    down_row_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    """moe_forward with quantised weights: y [T,H], and h [S,N] in slot order (empty unless save_h).

    x is rounded to int8 (see quantize_rows), and so is a = glu(h), once it is rounded to the dtype of x.
    """
    num_experts, hidden_size = gate_up_values.shape[0], x.shape[-1]
    width = 2 * intermediate_size if gated else intermediate_size
    parts = 2 if gated and not interleaved else 1
    gate_up = Quantized(gate_up_values, gate_up_scales, gate_up_row_scales, gate_up_zeros)
    down = Quantized(down_values, down_scales, down_row_scales, down_zeros)
    _check("x", x, (None, None))
    meta = torch.empty(1, device="meta", dtype=x.dtype)
    _check_layer(
        x, meta.expand(num_experts, width, hidden_size), meta.expand(num_experts, hidden_size, intermediate_size),
        gate_up_bias, down_bias, topk_ids, topk_weights, activation, gated, alpha, limit,
    )  # fmt: skip
    _check_quantized("gate_up_proj", gate_up, bits, group_size, None, width, hidden_size, parts)
    _check_quantized("down_proj", down, bits, group_size, num_experts, hidden_size, intermediate_size, 1)
    expert_offsets, token_indices, slot_indices = plan(topk_ids, num_experts)

    plain = from_blocks(gate_up, width, hidden_size, bits, parts)
    h = _product(x, plain, bits, group_size, expert_offsets, token_indices)
    plain_down = from_blocks(down, hidden_size, intermediate_size, bits, 1)
    for expert, slots in _segments(expert_offsets):
        if gate_up_bias is not None:
            h[slots] += gate_up_bias[expert].float()
    a = _glu(h, activation, gated, interleaved, alpha, limit).to(x.dtype)
    permuted_y = _product(a, plain_down, bits, group_size, expert_offsets, None)
    for expert, slots in _segments(expert_offsets):
        if down_bias is not None:
            permuted_y[slots] += down_bias[expert].float()
    y = combine(permuted_y, expert_offsets, token_indices, slot_indices, topk_weights.float())
    return y.to(x.dtype), h.to(x.dtype) if save_h else x.new_empty(0, width)
