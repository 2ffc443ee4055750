# SPDX-License-Identifier: BSD-3-Clause
"""The block types of GGUF files in plain torch: decoding and encoding. The specification.

A row is a run of blocks, each of 32 or 256 columns in TYPES[name].bytes bytes, in the bytes of the file. A code q is an
integer, or the entry of a table of 16. Numbers of 16 bits are little-endian, d and m are float16.

    q8_0, q4_0, q5_0, iq4_nl   w = d · q                    32 columns share d
    mxfp4                      w = 2^(e - 128) · q          32 columns share e, one byte
    q4_1, q5_1                 w = d · q + m                32 columns share d and m
    q3_k, q6_k, iq4_xs         w = (d · s) · q              256 share d; 16, in iq4_xs 32, share the integer s
    q2_k, q4_k, q5_k           w = (d · s) · q - (m · t)    256 share d and m; 32, in q2_k 16, share the integers s, t

Each product and difference is rounded to float32. Only the last one can be inexact, so a multiply-add has the same
bits. Products round activations to 8 bits (round_rows). A weight [E,N,C] is data [E, parts, N/parts, bytes of a row]
uint8; "mxfp4_gguf" is GGUF's mxfp4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.checks import checked
from switchgear.reference.integers import sum_columns

FIRST = 10  # number of the first type in a form
WIDE = 256  # columns of a block of the types with integer scales

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class BlockType(NamedTuple):
    """A type of blocks."""

    columns: int  # of a block
    bytes: int  # of a block
    ggml: int  # its number in GGUF files
    decode: Callable[[Tensor], Tensor]  # [n, bytes] uint8 -> [n, columns] float32
    encode: Callable[[Tensor], Tensor]  # [n, columns] finite float32 -> [n, bytes]


# ---- parts of blocks -------------------------------------------------------------------------------------------------


def _halves(b: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, [n,1] float32."""
    return b[:, at : at + 2].clone().view(torch.float16).float()


def _bytes_of(halves: Tensor) -> Tensor:
    """[n] float32 as the two bytes of float16; too large ones become the largest."""
    return halves.clamp(-65504, 65504).half()[:, None].view(torch.uint8)


def _spread(b: Tensor, begin: int, end: int, run: int, bits: int) -> Tensor:
    """Codes of 1, 2 or 4 bits of bytes [begin, end), [n, codes] uint8. `run` bytes hold the lowest bits of `run`
    columns, then the next bits of as many columns; the next run follows."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=b.device)
    codes = b[:, begin:end].view(len(b), -1, 1, run) >> shifts[:, None] & (1 << bits) - 1
    return codes.flatten(1)


def _gather(codes: Tensor, run: int, bits: int) -> Tensor:
    """The inverse of _spread, [n, codes · bits / 8] uint8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    shifted = codes.view(len(codes), -1, 8 // bits, run) << shifts[:, None]
    return shifted.sum(2, dtype=torch.uint8).flatten(1)


def _look_up(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.int()]


def _scaled(factors: Tensor, codes: Tensor) -> Tensor:
    """Codes [n, columns] times factors [n, groups] of equal groups of columns."""
    return (codes.float().view(*factors.shape, -1) * factors[..., None]).flatten(1)


# ---- blocks of 32 columns --------------------------------------------------------------------------------------------


def _decode_q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8) * _halves(b, 0)


def _decode_q4_0(b: Tensor) -> Tensor:
    return (_spread(b, 2, 18, 16, 4).float() - 8) * _halves(b, 0)


def _decode_q4_1(b: Tensor) -> Tensor:
    return _spread(b, 4, 20, 16, 4) * _halves(b, 0) + _halves(b, 2)


def _high_bits(b: Tensor, begin: int) -> Tensor:
    """Bit 4 of the codes of 5 bits: one bit a column, in order."""
    return _spread(b, begin, begin + 4, 1, 1) << 4


def _decode_q5_0(b: Tensor) -> Tensor:
    codes = _spread(b, 6, 22, 16, 4) | _high_bits(b, 2)
    return (codes.float() - 16) * _halves(b, 0)


def _decode_q5_1(b: Tensor) -> Tensor:
    codes = _spread(b, 8, 24, 16, 4) | _high_bits(b, 4)
    return codes * _halves(b, 0) + _halves(b, 2)


def _decode_iq4_nl(b: Tensor) -> Tensor:
    return _look_up(_spread(b, 2, 18, 16, 4), IQ4_VALUES) * _halves(b, 0)


def _decode_mxfp4(b: Tensor) -> Tensor:
    return _look_up(_spread(b, 1, 17, 16, 4), MXFP4_VALUES) * _powers(b[:, :1])


def _powers(exponents: Tensor) -> Tensor:
    """2^(e - 128); the first two are subnormal."""
    e = exponents.int()
    return torch.where(e < 2, 0x00200000 << e, e - 1 << 23).view(torch.float32)


def _largest(x: Tensor) -> Tensor:
    """The number with the largest magnitude in the last dimension, the first of several, [...,1]."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / d)


def _encode_q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    codes = (scaled.abs() + 0.5).floor().copysign(scaled).clamp(-127, 127)  # halves away from zero
    return torch.cat((_bytes_of(d[:, 0]), codes.to(torch.int8).view(torch.uint8)), 1)


def _symmetric(x: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """d and codes in [0, 2 · middle) of w = d · (q - middle). The number of largest magnitude becomes -middle."""
    d = _largest(x) / -middle
    codes = (x * _inverse(d) + (middle + 0.5)).trunc().clamp(0, 2 * middle - 1)
    return d[:, 0], codes.to(torch.uint8)


def _between(x: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """d, m and codes in [0, most] of w = d · q + m."""
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    low, high = low + 0, high + 0  # no -0
    d = (high - low) / most
    codes = ((x - low) * _inverse(d) + 0.5).trunc().clamp(0, most)
    return d[:, 0], low[:, 0], codes.to(torch.uint8)


def _encode_q4_0(x: Tensor) -> Tensor:
    d, codes = _symmetric(x, 8)
    return torch.cat((_bytes_of(d), _gather(codes, 16, 4)), 1)


def _encode_q4_1(x: Tensor) -> Tensor:
    d, m, codes = _between(x, 15)
    return torch.cat((_bytes_of(d), _bytes_of(m), _gather(codes, 16, 4)), 1)


def _encode_q5_0(x: Tensor) -> Tensor:
    d, codes = _symmetric(x, 16)
    return torch.cat((_bytes_of(d), _gather(codes >> 4, 1, 1), _gather(codes & 15, 16, 4)), 1)


def _encode_q5_1(x: Tensor) -> Tensor:
    d, m, codes = _between(x, 31)
    return torch.cat((_bytes_of(d), _bytes_of(m), _gather(codes >> 4, 1, 1), _gather(codes & 15, 16, 4)), 1)


def _nearest(x: Tensor, ascending: Sequence[int]) -> Tensor:
    """The indices of the nearest entries of a table, of two the lower one, uint8."""
    middles = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(ascending)], device=x.device)
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)


def _search_table(x: Tensor) -> Tensor:
    """For groups [..., columns] the scale with the smallest squared error of scale · IQ4_VALUES[q], [...]."""
    whole = torch.arange(-128.0, 128.0, device=x.device)
    nearest = _look_up(_nearest(whole, IQ4_VALUES), IQ4_VALUES)
    largest = _largest(x)[..., 0]
    return _search(
        x,
        [largest / end for end in (*range(-139, -112, 3), *range(101, 128, 3))],
        lambda scaled: nearest[scaled.nan_to_num_(0).round_().clamp_(-128, 127).add_(128).int()],
    )


def _search(x: Tensor, scales: Sequence[Tensor], round_: Callable[[Tensor], Tensor]) -> Tensor:
    """The scale with the smallest squared error of scale · round_(x / tried), fitted for each of the tried `scales`,
    [...]."""
    best, gain = torch.zeros_like(scales[0]), torch.zeros_like(scales[0])
    for tried in scales:
        q = round_(x * _inverse(tried)[..., None])
        products, squares = sum_columns(q * x)[..., 0], sum_columns(q * q)[..., 0].clamp_(min=1)
        removed = products * products / squares  # from the sum of squares
        best = torch.where(removed > gain, products / squares, best)
        gain = torch.maximum(gain, removed)
    return best


def _encode_iq4_nl(x: Tensor) -> Tensor:
    d = _search_table(x).clamp(-65504, 65504).half().float()
    codes = _nearest(x * _inverse(d)[:, None], IQ4_VALUES)
    return torch.cat((_bytes_of(d), _gather(codes, 16, 4)), 1)


def _encode_mxfp4(x: Tensor) -> Tensor:
    largest = x.abs().amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent + 124  # the largest number is 8 to 16 times 2^(e - 128)
    e = torch.where(largest > 0, exponent, 0).clamp(0, 254)
    codes = _nearest(x.abs() / _powers(e), MXFP4_VALUES[:8])
    codes = codes + 8 * ((x < 0) & (codes > 0))
    return torch.cat((e.to(torch.uint8), _gather(codes, 16, 4)), 1)


# ---- blocks of 256 columns -------------------------------------------------------------------------------------------


def _decode_q2_k(b: Tensor) -> Tensor:
    scales, codes = b[:, :16], _spread(b, 16, 80, 32, 2)
    return _lowered(b, 80, scales & 15, scales >> 4, codes)


def _lowered(b: Tensor, at: int, scales: Tensor, mins: Tensor, codes: Tensor) -> Tensor:
    """(d · scale) · code - (m · min), d and m at byte `at` of each block."""
    factors, offsets = scales * _halves(b, at), mins * _halves(b, at + 2)
    return _scaled(factors, codes) - offsets.repeat_interleave(WIDE // offsets.shape[1], 1)


def _decode_q3_k(b: Tensor) -> Tensor:
    codes = (_spread(b, 32, 96, 32, 2) | _spread(b, 0, 32, 32, 1) << 2).float() - 4
    scales = (_spread(b, 96, 104, 8, 4) | _spread(b, 104, 108, 4, 2) << 4).float() - 32
    return _scaled(scales * _halves(b, 108), codes)


def _six_bits(b: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """8 scales and 8 mins of 6 bits in 12 bytes: the first four of each are the lower bits of bytes 0 to 3 and 4 to 7,
    whose upper two belong to the last four, as do the halves of bytes 8 to 11."""
    one, other, last = b[:, begin : begin + 4], b[:, begin + 4 : begin + 8], b[:, begin + 8 : begin + 12]
    scales = torch.cat((one & 63, last & 15 | one >> 6 << 4), 1)
    return scales, torch.cat((other & 63, last >> 4 | other >> 6 << 4), 1)


def _pack_six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    last = scales[:, 4:] & 15 | mins[:, 4:] << 4
    return torch.cat((scales[:, :4] | scales[:, 4:] >> 4 << 6, mins[:, :4] | mins[:, 4:] >> 4 << 6, last), 1)


def _decode_q4_k(b: Tensor) -> Tensor:
    return _lowered(b, 0, *_six_bits(b, 4), _spread(b, 16, 144, 32, 4))


def _decode_q5_k(b: Tensor) -> Tensor:
    codes = _spread(b, 48, 176, 32, 4) | _spread(b, 16, 48, 32, 1) << 4
    return _lowered(b, 0, *_six_bits(b, 4), codes)


def _decode_q6_k(b: Tensor) -> Tensor:
    codes = (_spread(b, 0, 128, 64, 4) | _spread(b, 128, 192, 32, 2) << 4).float() - 32
    return _scaled(b[:, 192:208].view(torch.int8) * _halves(b, 208), codes)


def _decode_iq4_xs(b: Tensor) -> Tensor:
    scales = (_spread(b, 4, 8, 1, 4) | _spread(b, 2, 4, 1, 2) << 4).float() - 32
    return _scaled(scales * _halves(b, 0), _look_up(_spread(b, 8, 136, 16, 4), IQ4_VALUES))


def _search_scale(x: Tensor, low: int, high: int) -> Tensor:
    """For groups [..., columns] the scale with the smallest squared error of scale · q, low <= q <= high, [...]."""
    largest = _largest(x)[..., 0]
    tried = [largest / (low - 0.2 * step) for step in range(-4, 5)]
    return _search(x, tried, lambda scaled: scaled.round_().clamp_(low, high))


def _search_range(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """For groups [..., columns] the scale and the min, at least 0, of scale · q - min, 0 <= q <= most, [...]."""
    low, high = torch.aminmax(x, dim=-1)
    low, high = low.clamp(max=0), high + 0  # no -0
    best, lowest = (high - low) / most, 0 - low
    error = torch.full_like(low, torch.inf)
    for step in range(-4, 9, 2):
        inverse = _inverse(high - low)[..., None] * (most + 0.1 * step)
        q = ((x - low[..., None]) * inverse).round_().clamp_(0, most)
        # least squares of scale and min for these codes
        n, sums, squares = x.shape[-1], sum_columns(q)[..., 0], sum_columns(q * q)[..., 0]
        of_x, products = sum_columns(x)[..., 0], sum_columns(q * x)[..., 0]
        determinant = n * squares - sums * sums
        scale = (n * products - sums * of_x) / torch.where(determinant > 0, determinant, 1)
        offset = (squares * of_x - sums * products) / torch.where(determinant > 0, determinant, 1)
        alone = products / squares.clamp(min=1)
        scale, offset = torch.where(offset > 0, alone, scale), offset.clamp(max=0)
        left = sum_columns((scale[..., None] * q + offset[..., None] - x).square())[..., 0]
        is_better = (left < error) & (determinant > 0) & (scale > 0)
        best, lowest = torch.where(is_better, scale, best), torch.where(is_better, 0 - offset, lowest)
        error = torch.where(is_better, left, error)
    return best, lowest


def _round_factors(values: Tensor, most: int, least: int = 0) -> tuple[Tensor, Tensor]:
    """Values [n, groups] as d [n] in float16, widened, times integers in [least, most]."""
    d = _largest(values)[:, 0] / (least or most)  # with a least one, values have either sign
    d = d.clamp(-65504, 65504).half().float()
    return d, (values * _inverse(d)[:, None]).round_().clamp_(least, most)


def _codes(x: Tensor, factors: Tensor, low: int, high: int) -> Tensor:
    """Codes of groups [n, groups, columns] for factors [n, groups], minus `low`, [n, 256] uint8."""
    q = (x * _inverse(factors)[..., None]).round_().clamp_(low, high) - low
    return q.to(torch.uint8).flatten(1)


def _encode_scaled(x: Tensor, columns: int, low: int, high: int, least: int, most: int) -> tuple[Tensor, ...]:
    """d, integer scales and codes of w = d · s · q for groups of `columns`."""
    groups = x.view(len(x), x.shape[1] // columns, columns)
    d, scales = _round_factors(_search_scale(groups, low, high), most, least)
    return d, scales, _codes(groups, d[:, None] * scales, low, high)


def _encode_lowered(x: Tensor, columns: int, most: int, factor: int) -> tuple[Tensor, ...]:
    """d and m, integer scales and mins, and codes of w = d · s · q - m · t for groups of `columns`."""
    groups = x.view(len(x), x.shape[1] // columns, columns)
    found, lowest = _search_range(groups, most)
    (d, scales), (m, mins) = _round_factors(found, factor), _round_factors(lowest, factor)
    codes = _codes(groups + (m[:, None] * mins)[..., None], d[:, None] * scales, 0, most)
    return d, m, scales.to(torch.uint8), mins.to(torch.uint8), codes


def _encode_q2_k(x: Tensor) -> Tensor:
    d, m, scales, mins, codes = _encode_lowered(x, 16, 3, 15)
    return torch.cat((scales | mins << 4, _gather(codes, 32, 2), _bytes_of(d), _bytes_of(m)), 1)


def _encode_q3_k(x: Tensor) -> Tensor:
    d, scales, codes = _encode_scaled(x, 16, -4, 3, -32, 31)
    stored = (scales + 32).to(torch.uint8)
    packed = _gather(stored & 15, 8, 4), _gather(stored >> 4, 4, 2)
    return torch.cat((_gather(codes >> 2, 32, 1), _gather(codes & 3, 32, 2), *packed, _bytes_of(d)), 1)


def _encode_q4_k(x: Tensor) -> Tensor:
    d, m, scales, mins, codes = _encode_lowered(x, 32, 15, 63)
    return torch.cat((_bytes_of(d), _bytes_of(m), _pack_six_bits(scales, mins), _gather(codes, 32, 4)), 1)


def _encode_q5_k(x: Tensor) -> Tensor:
    d, m, scales, mins, codes = _encode_lowered(x, 32, 31, 63)
    high, low = _gather(codes >> 4, 32, 1), _gather(codes & 15, 32, 4)
    return torch.cat((_bytes_of(d), _bytes_of(m), _pack_six_bits(scales, mins), high, low), 1)


def _encode_q6_k(x: Tensor) -> Tensor:
    d, scales, codes = _encode_scaled(x, 16, -32, 31, -128, 127)
    stored = scales.to(torch.int8).view(torch.uint8)
    return torch.cat((_gather(codes & 15, 64, 4), _gather(codes >> 4, 32, 2), stored, _bytes_of(d)), 1)


def _encode_iq4_xs(x: Tensor) -> Tensor:
    groups = x.view(len(x), 8, 32)
    d, scales = _round_factors(_search_table(groups), 31, -32)
    factors = d[:, None] * scales
    codes = _nearest(groups * _inverse(factors)[..., None], IQ4_VALUES).flatten(1)
    stored = (scales + 32).to(torch.uint8)
    packed = _gather(stored >> 4, 1, 2), _gather(stored & 15, 1, 4)
    return torch.cat((_bytes_of(d), *packed, _gather(codes, 16, 4)), 1)


TYPES = {
    "q8_0": BlockType(32, 34, 8, _decode_q8_0, _encode_q8_0),
    "q4_0": BlockType(32, 18, 2, _decode_q4_0, _encode_q4_0),
    "q4_1": BlockType(32, 20, 3, _decode_q4_1, _encode_q4_1),
    "q5_0": BlockType(32, 22, 6, _decode_q5_0, _encode_q5_0),
    "q5_1": BlockType(32, 24, 7, _decode_q5_1, _encode_q5_1),
    "iq4_nl": BlockType(32, 18, 20, _decode_iq4_nl, _encode_iq4_nl),
    "mxfp4_gguf": BlockType(32, 17, 39, _decode_mxfp4, _encode_mxfp4),
    "q2_k": BlockType(WIDE, 84, 10, _decode_q2_k, _encode_q2_k),
    "q3_k": BlockType(WIDE, 110, 11, _decode_q3_k, _encode_q3_k),
    "q4_k": BlockType(WIDE, 144, 12, _decode_q4_k, _encode_q4_k),
    "q5_k": BlockType(WIDE, 176, 13, _decode_q5_k, _encode_q5_k),
    "q6_k": BlockType(WIDE, 210, 14, _decode_q6_k, _encode_q6_k),
    "iq4_xs": BlockType(WIDE, 136, 23, _decode_iq4_xs, _encode_iq4_xs),
}
"""By the name of the format. The numbers of formats in a form are FIRST and those after, in this order."""


def round_rows(name: str, x: Tensor) -> Tensor:
    """Activations [S,C] as products with a type round them: float32, the nearest of 255 multiples of a scale that each
    block's columns share. A block below 2^-100 becomes zero, one with an infinity or a NaN becomes NaN."""
    blocks = x.float().view(len(x), x.shape[1] // TYPES[name].columns, TYPES[name].columns)
    largest = blocks.abs().amax(-1, keepdim=True)
    is_finite, is_zero = largest.isfinite(), largest < 2.0**-100
    inverse = torch.where(is_zero | ~is_finite, 0.0, 127 / largest)
    values = torch.where(is_finite, blocks, 0.0).mul_(inverse).round_()
    scales = torch.where(is_finite, torch.where(is_zero, 0.0, largest / 127), torch.nan)
    return values.mul_(scales).flatten(1)


_SLICE = 1 << 16  # numbers that are decoded or encoded at once: intermediate results stay in a cache


def row_bytes(name: str, columns: int) -> int:
    """Bytes of a row. ValueError unless the columns are a multiple of a block's."""
    kind = TYPES[name]
    if columns < 1 or columns % kind.columns:
        raise ValueError(f"columns: expected a multiple of {kind.columns} in {name}, got {columns}")
    return columns // kind.columns * kind.bytes


def _slices(kind: BlockType, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, _SLICE // kind.columns) for tensor in tensors), strict=True)


def decode(name: str, data: Tensor) -> Tensor:
    """Decodes rows of blocks [..., bytes of a row] uint8 to [..., C] float32, exactly."""
    kind = TYPES[name]
    blocks = data.reshape(-1, kind.bytes)
    out = torch.empty(len(blocks), kind.columns, device=data.device)
    for some, codes in _slices(kind, out, blocks):
        some.copy_(kind.decode(codes))
    return out.view(*data.shape[:-1], data.shape[-1] // kind.bytes * kind.columns)


@checked
def encode(name: str, weight: Tensor) -> Tensor:
    """Encodes finite numbers [..., C] to rows of blocks [..., bytes of a row] uint8. q8_0, q4_0, q4_1, q5_0 and q5_1
    have one definition; the others take scales that a search finds, by squared error."""
    kind, length = TYPES[name], row_bytes(name, weight.shape[-1])
    blocks = weight.detach().reshape(-1, kind.columns)
    out = torch.empty(len(blocks), kind.bytes, dtype=torch.uint8, device=weight.device)
    for some, numbers in _slices(kind, out, blocks):
        if len(some):
            some.copy_(kind.encode(numbers.float()))
    return out.view(*weight.shape[:-1], length)
