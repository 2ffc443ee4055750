# SPDX-License-Identifier: BSD-3-Clause
"""Weights of 8-bit and 4-bit floating-point numbers in plain torch: encoding, layouts and decoding. The specification.

    w = scale · value

fp8: values are e4m3fn. There is one float32 scale per group of rows and columns, as DeepSeek-V3 and Qwen3 publish it
(`weight_scale_inv`, 128 x 128), or per row. mxfp4 (OCP Microscaling v1.0): values are e2m1. There is one scale
2^(s - 127) per 32 columns of a row, as gpt-oss publishes it (`_blocks` and `_scales`). nf4: nf4.py has its numbers, and
its layouts are here. nvfp4: values are e2m1. There is one scale in e4m3 per 16 columns of a row, and one float32 for
each part of an expert's matrix, as ModelOpt and compressed-tensors publish it:

    w = value · (scale · tensor_scale)      each product rounded to float32

There are two layouts. The published one is in order of rows and columns. include/switchgear/minifloat.h defines the
stored one, which the kernels read. to_blocks and from_blocks convert between them without changing a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from switchgear.checks import OneOf, checked
from switchgear.reference.checks import check, divide_up

ROWS, COLUMNS = 16, 32  # of a step of the stored layout; mxfp4: 32 columns share a scale
BLOCK = (128, 128)  # rows and columns that share a scale of fp8
ROW = (1, 0)  # 0: all columns

FP8_MAX = 448.0
SMALLEST_SCALE = 2.0**-126  # of fp8: the smallest normal float32; below, amax / 448 loses bits, or is zero
NF4_BLOCK, NVFP4_BLOCK = 64, 16  # columns that share a scale
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0..7; bit 3 is the sign
E2M1_VALUES = (*MXFP4_VALUES, *(-value for value in MXFP4_VALUES))
NAN_SCALE = 255  # of e8m0


class Minifloat(NamedTuple):
    """A format of this file, and how a weight [E,N,C] is published."""

    name: str
    number: int  # of the format in a form
    bits: int
    group: int  # columns that share a scale; 0: any multiple of 32, or all
    scales: torch.dtype  # as stored
    shape: str  # of published values
    width: int  # columns of an index of the third dimension of published values
    row_scales: bool = False  # each row has one more scale, float32


MINIFLOATS = {
    kind.name: kind
    for kind in (
        Minifloat("fp8", 5, 8, 0, torch.float32, "[E,N,C]", 1),
        Minifloat("mxfp4", 6, 4, COLUMNS, torch.uint8, "[E,N,C/32,16]", COLUMNS),
        Minifloat("nf4", 7, 4, NF4_BLOCK, torch.float32, "[E,N,C/2]", 2),
        Minifloat("nvfp4", 9, 4, NVFP4_BLOCK, torch.uint8, "[E,N,C/2]", 2, row_scales=True),
    )
}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Encoded(NamedTuple):
    """A weight [E,N,C] in the published layout."""

    # fp8: [E,N,C] codes; mxfp4: [E,N,⌈C/32⌉,16], column 2i in the lower half of byte i; nf4: [E,N,⌈C/2⌉], in the upper;
    # nvfp4: [E,N,⌈C/2⌉], in the lower
    values: Tensor  # uint8
    # fp8: float32 [E, parts · ⌈N/parts/group[0]⌉, ⌈C/group[1]⌉]; mxfp4: uint8 [E,N,⌈C/32⌉]; nf4: float32 [E,N,⌈C/64⌉];
    # nvfp4: uint8 [E,N,⌈C/16⌉]
    scales: Tensor
    lossless: bool  # whether decoding to the dtype of the weight gives the weight, bit for bit


def row_slices(rows: Tensor, count: int = 64) -> list[Tensor]:
    """Splits rows into slices whose intermediate results fit in a cache and reuse memory."""
    return [rows[first : first + count] for first in range(0, max(len(rows), 1), count)]


def pad_zeros(tensor: Tensor, columns: int) -> Tensor:
    """Pads with zeros to the right. Returns the tensor itself, without a copy, if no padding is needed."""
    return pad(tensor, (0, columns)) if columns else tensor


# ---- numbers ---------------------------------------------------------------------------------------------------------


def e4m3_codes(x: Tensor) -> Tensor:
    """Rounds finite float32 to e4m3fn: to nearest, ties to even, at most ±448. uint8."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def e2m1_codes(x: Tensor) -> Tensor:
    """Rounds finite float32 to e2m1: to nearest, ties to even, at most ±6. uint8, 0..15.

    The spacing of values is 0.5 up to 2, 1 up to 4, then 2. With x in these units the code is x, x + 2 or x + 4: the
    minimum of the three, each rounded to an integer, half to even. Adding an even number does not change the rounding.
    """
    magnitude = x.abs()
    codes = torch.minimum((magnitude * 2).round_(), magnitude.round().add_(2))
    codes = torch.minimum(codes, magnitude.mul_(0.5).round_().add_(4)).clamp_(max=7).to(torch.uint8)
    return codes.bitwise_or_(x.signbit().to(torch.uint8).mul_(8))


def e8m0_scales(codes: Tensor) -> Tensor:
    """2^(code - 127) in float32; 255 is NaN. 2^-127 is subnormal."""
    bits = codes.int() << 23
    return torch.where(codes == 0, 1 << 22, torch.where(codes == NAN_SCALE, 0x7FC00000, bits)).view(torch.float32)


# ---- encode ----------------------------------------------------------------------------------------------------------


class _Group:
    """Rows and columns that fp8 supports as a group."""

    @staticmethod
    def check(name: str, value: tuple[int, int], sizes: Any) -> None:
        if value[0] < 1 or value[1] < 0 or value[1] % COLUMNS:
            raise ValueError(
                f"{name}: expected rows from 1 on and a multiple of {COLUMNS} columns, 0 for all of them, got {value}"
            )


Group = Annotated[tuple[int, int], _Group]


def _check_parts(rows: int, parts: int) -> None:
    if parts < 1 or rows % parts:
        raise ValueError(f"parts: expected a divisor of N={rows}, got {parts}")


def split_parts(matrix: Tensor, parts: int, multiple: int, fill: int = 0) -> Tensor:
    """[...,N,C] -> [..., parts, N/parts, C]; pads each part with rows of `fill` to a multiple."""
    *leading, rows, columns = matrix.shape
    shares = matrix.reshape(*leading, parts, rows // parts, columns)
    missing = -shares.shape[-2] % multiple
    return pad(shares, (0, 0, 0, missing), value=fill) if missing else shares


def finite_experts(weight: Tensor, name: str) -> Iterator[Tensor]:
    """The matrices [N,C] of a weight in float32, one at a time, since encoding needs several times their memory."""
    if weight.dim() != 3 or not weight.is_floating_point() or not len(weight):
        raise ValueError(f"{name}: expected floating-point numbers [E,N,C], got {weight.dtype} {list(weight.shape)}")
    for expert, matrix in enumerate(weight.detach()):
        w = matrix.float()
        if not bool(w.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, expert {expert} has NaN or infinities")
        yield w


def encode_experts(
    weight: Tensor, name: str, encode: Callable[[Tensor], tuple[Tensor, ...]], decode: Callable[..., Tensor]
) -> tuple[list[Tensor], bool]:
    """The tensors that `encode` makes of each matrix [N,C] of a weight, stacked, and whether `decode` of them gives the
    weight, bit for bit."""
    matrices = [encode(w) for w in finite_experts(weight, name)]
    lossless = all(
        torch.equal(_bits(decode(*(tensor[None] for tensor in tensors))[0].to(weight.dtype)), _bits(plain))
        for tensors, plain in zip(matrices, weight, strict=True)
    )
    return [torch.stack(tensors) for tensors in zip(*matrices, strict=True)], lossless


def encode_rows(w: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values and scales of a matrix; `encode` makes those of some rows [n,C]."""
    values, scales = zip(*map(encode, row_slices(w)), strict=True)
    return torch.cat(values), torch.cat(scales)


def _bits(tensor: Tensor) -> Tensor:
    """Integers, which distinguish the zeros."""
    return tensor.view(_INTEGERS[tensor.itemsize])


@checked
def encode_fp8(weight: Tensor, group: Group = BLOCK, parts: int = 1, name: str = "weight") -> Encoded:
    """Encodes a weight [E,N,C] in fp8: scale = amax / 448 of a group of rows and columns, value = weight / scale in
    float32, rounded to the nearest e4m3fn (ties to even, at most ±448).

    Groups do not cross the `parts` equal parts of the rows, because gates and ups are published separately. A group of
    zeros has scale 1, as in transformers' quantizer. Other scales are at least SMALLEST_SCALE, so all are finite and
    positive. Half a unit in the last place is 2^-4 of a normal value and 2^-10 for a subnormal one, so that

        |w - scale · value| <= max(|w| / 16, scale / 1024) · (1 + 2^-21),   and <= amax / 28 · (1 + 2^-21)

    ValueError for NaN and infinities; it names the weight by `name`.
    """
    _check_parts(weight.shape[-2], parts)

    def encode(w: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = w.shape
        size = group[1] or max(columns, 1)
        padded = pad_zeros(split_parts(w, parts, group[0]), -columns % size)
        tiles = padded.view(parts, padded.shape[1] // group[0], group[0], padded.shape[2] // size, size)
        amax = tiles.abs().amax((2, 4), keepdim=True)
        scale = torch.where(amax == 0, 1.0, (amax / FP8_MAX).clamp_(min=SMALLEST_SCALE))
        codes = e4m3_codes(tiles / scale).view(padded.shape)[:, : rows // parts, :columns]
        return codes.reshape(rows, columns), scale[:, :, 0, :, 0].flatten(0, 1)

    (values, scales), lossless = encode_experts(weight, name, encode, lambda v, s: decode_fp8(v, s, group, parts))
    return Encoded(values, scales, lossless)


def encode_mxfp4(weight: Tensor, name: str = "weight") -> Encoded:
    """Encodes a weight [E,N,C] in mxfp4: scale = 2^(⌊log2 amax⌋ - 2) of 32 columns (OCP Microscaling v1.0), at least
    2^-127; value = weight / scale, rounded to the nearest e2m1 (ties to even, at most ±6). Zeros pad the last block.

    The largest value of a block is 4 or 6. If a block has a 6 and neither 0.5 nor 1.5, its values are halved and its
    scale is doubled, which does not change the weights. A block of zeros has scale code 0, as in gpt-oss's quantizer.
    Zeros keep their signs.

    A weight decoded from mxfp4, as from a checkpoint, is encoded exactly. The bytes equal the published ones if the
    quantizer rounds amax / 6 up to a power of two, as gpt-oss's does: its largest values are 3, 4 and 6. The exception
    is a block with a 6 and neither 0.5 nor 1.5. For such blocks, and for other quantizers, bytes may differ but values
    are equal. Bytes that this function produced are reproduced.

    ValueError for NaN and infinities; it names the weight by `name`.
    """

    def encode(w: Tensor) -> tuple[Tensor, Tensor]:
        tiles = pad_zeros(w, -w.shape[1] % COLUMNS).view(len(w), divide_up(w.shape[1], COLUMNS), COLUMNS)
        exponent = tiles.abs().amax(-1).view(torch.int32) >> 23  # biased by 127, like scale codes
        scale = (exponent - 2).clamp_(min=0)
        codes = e2m1_codes(tiles * e8m0_scales(254 - scale)[..., None])  # exact, except for what rounds to zero anyway
        magnitude = codes & 7
        halve = (magnitude == 7).any(-1) & (magnitude & 5 != 1).all(-1)  # codes 1 and 3 are 0.5 and 1.5
        halves = torch.where(magnitude >= 4, codes - 2, codes & 8 | magnitude >> 1)
        codes = torch.where(halve[..., None], halves, codes)
        return codes[..., ::2] | codes[..., 1::2] << 4, (scale + halve).to(torch.uint8)

    (values, scales), lossless = encode_experts(
        weight, name, lambda w: encode_rows(w, encode), lambda v, s: decode_mxfp4(v, s, weight.shape[2])
    )
    return Encoded(values, scales, lossless)


class EncodedNvfp4(NamedTuple):
    """A weight [E,N,C] in nvfp4."""

    values: Tensor  # uint8 [E,N,⌈C/2⌉]
    scales: Tensor  # uint8 [E,N,⌈C/16⌉], codes of e4m3
    tensor_scales: Tensor  # float32 [E,parts]
    lossless: bool


def encode_nvfp4(weight: Tensor, parts: int = 1, name: str = "weight") -> EncodedNvfp4:
    """Encodes a weight [E,N,C] in nvfp4. For each of the `parts` equal parts of an expert's rows,

        tensor_scale = amax / (6 · 448)      amax of the part
        scale = amax / 6 / tensor_scale      amax of 16 columns; rounded to the nearest e4m3 (ties to even)
        value = w / (scale · tensor_scale)   rounded to the nearest e2m1 (ties to even, at most ±6)

    in float32. A part of zeros has tensor_scale 1, other ones at least SMALLEST_SCALE. A scale that is rounded to zero
    makes its 16 columns zeros. Zeros keep their signs and pad the last block.

    ValueError for NaN and infinities; it names the weight by `name`.
    """
    _check_parts(weight.shape[-2], parts)
    columns = weight.shape[-1]

    def encode_part(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        amax = w.abs().amax()
        whole = torch.where(amax == 0, 1.0, (amax / (MXFP4_VALUES[-1] * FP8_MAX)).clamp_(min=SMALLEST_SCALE))

        def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
            tiles = pad_zeros(rows, -columns % NVFP4_BLOCK).view(len(rows), -1, NVFP4_BLOCK)
            scales = e4m3_codes(tiles.abs().amax(-1) / MXFP4_VALUES[-1] / whole)
            factors = nvfp4_scales(scales, whole)
            codes = e2m1_codes(tiles / torch.where(factors == 0, torch.inf, factors)[..., None]).flatten(1)
            return (codes[:, ::2] | codes[:, 1::2] << 4)[:, : divide_up(columns, 2)], scales

        return *encode_rows(w, encode), whole

    def encode_matrix(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, scales, wholes = zip(*map(encode_part, w.chunk(parts)), strict=True)
        return torch.cat(values), torch.cat(scales), torch.stack(wholes)

    tensors, lossless = encode_experts(weight, name, encode_matrix, lambda v, s, t: decode_nvfp4(v, s, t, columns))
    values, scales, tensor_scales = tensors
    return EncodedNvfp4(values, scales, tensor_scales, lossless)


# ---- decode ----------------------------------------------------------------------------------------------------------


def decode_fp8(values: Tensor, scales: Tensor, group: tuple[int, int] = BLOCK, parts: int = 1) -> Tensor:
    """Decodes published fp8 to [E,N,C]: scale · value in float32, rounded once."""
    out = torch.empty(values.shape, device=values.device)
    columns = values.shape[2]
    tensors = out, values.view(torch.float8_e4m3fn), rows_of_scales(scales, values.shape[1], group, parts)
    slices = (row_slices(tensor.flatten(0, 1)) for tensor in tensors)
    for some, codes, scale in zip(*slices, strict=True):
        by_column = scale.repeat_interleave(group[1] or max(columns, 1), 1)[:, :columns]
        some.copy_(codes.float().mul_(by_column))
    return out


def decode_pairs(values: Tensor, table: Sequence[float], columns: int, scales: Tensor, size: int, first: int) -> Tensor:
    """Decodes codes of 4 bits [E,N,⌈C/2⌉] to table[code] · scale [E,N,C] in float32. Each of `scales` [E,N,G] float32
    is for `size` columns. first: the half of a byte with the even column, 0 for the lower."""
    out = torch.empty(*values.shape[:2], columns, device=values.device)
    low = torch.tensor(table, device=values.device)
    halves = low.repeat(16), low.repeat_interleave(16)  # of each byte
    pairs = torch.stack((halves[first], halves[1 - first]), -1)
    for some, codes, scale in zip(*(row_slices(t.flatten(0, 1)) for t in (out, values, scales)), strict=True):
        decoded = pairs[codes.int()].flatten(1)[:, :columns]
        some.copy_(decoded.mul_(scale.repeat_interleave(size, 1)[:, :columns]))
    return out


def decode_mxfp4(blocks: Tensor, scales: Tensor, columns: int | None = None) -> Tensor:
    """Decodes published mxfp4 to [E,N,C] exactly. float32 and bfloat16 represent every scale · value below 2^128;
    larger ones become infinity. Scale code 255 gives NaN. Pass `columns`, C, if the last block is padded."""
    columns = COLUMNS * blocks.shape[2] if columns is None else columns
    return decode_pairs(blocks.flatten(2), E2M1_VALUES, columns, e8m0_scales(scales), COLUMNS, 0)


def nvfp4_scales(codes: Tensor, tensor_scales: Tensor) -> Tensor:
    """Codes of e4m3 times scales that broadcast to them, in float32."""
    return codes.view(torch.float8_e4m3fn).float() * tensor_scales


def decode_nvfp4(values: Tensor, scales: Tensor, tensor_scales: Tensor, columns: int | None = None) -> Tensor:
    """Decodes published nvfp4 to [E,N,C]: value · (scale · tensor_scale), each product rounded to float32.
    `tensor_scales` is [E,parts]. Pass `columns`, C, if it is odd."""
    columns = 2 * values.shape[2] if columns is None else columns
    by_row = tensor_scales.repeat_interleave(values.shape[1] // tensor_scales.shape[1], 1)[..., None]
    factors = nvfp4_scales(scales.view(torch.uint8), by_row)
    return decode_pairs(values, E2M1_VALUES, columns, factors, NVFP4_BLOCK, 0)


def decode(
    format: str, values: Tensor, scales: Tensor, row_scales: Any, columns: int, parts: int, group: tuple[int, int]
) -> Tensor:
    """Decodes published values and scales of a format of this file to [E,N,C], float32."""
    if format == "mxfp4":
        return decode_mxfp4(values, scales, columns)
    if format == "nvfp4":
        return decode_nvfp4(values, scales, from_row_scales(row_scales, parts), columns)
    return decode_fp8(values, scales, group, parts)


def rows_of_scales(scales: Tensor, rows: int, group: tuple[int, int], parts: int) -> Tensor:
    """Repeats scales of fp8 [E, parts·R, G] for each of N rows: [E,N,G]."""
    shares = scales.view(len(scales), parts, scales.shape[1] // parts, scales.shape[2])
    return shares.repeat_interleave(group[0], 2)[:, :, : rows // parts].flatten(1, 2)


# ---- storage ---------------------------------------------------------------------------------------------------------


def _pack_fp8(codes: Tensor, data: Tensor) -> None:
    """[B,16,32·C] -> [B,C,512]. Pairs of columns stay together: the pair at row 4·i + k and column 32·c + 4·q + 2·j
    becomes pair (q, i, j, k) of step c."""
    count, steps, _ = data.shape
    codes = codes.clone() if codes.storage_offset() % 2 else codes  # pairs must start at even offsets
    pairs = codes.view(torch.int16).view(count, 4, 4, steps, 8, 2)
    data.view(torch.int16).view(count, steps, 8, 4, 2, 4).copy_(pairs.permute(0, 3, 4, 1, 5, 2))


def _unpack_fp8(data: Tensor) -> Tensor:
    count, steps, _ = data.shape
    pairs = data.view(torch.int16).view(count, steps, 8, 4, 2, 4)
    return pairs.permute(0, 3, 5, 1, 2, 4).reshape(count, ROWS, 16 * steps).view(torch.uint8)


def _pack_mxfp4(rows: Tensor, data: Tensor) -> None:
    """[B,16,16·C] -> [B,C,256]. Of each four bytes (eight columns), the first new byte holds the lower halves of the
    first two, the second those of the last two; the third and fourth hold the upper halves likewise."""
    for block, out in zip(row_slices(rows, 4), row_slices(data, 4), strict=True):
        count, steps, _ = out.shape
        words = block.view(count, ROWS, steps, 4, 2, 2).permute(0, 2, 3, 1, 4, 5)
        even, odd = words[..., 0], words[..., 1]
        halves = out.view(count, steps, 4, ROWS, 2, 2)
        halves[..., 0, :] = even & 15 | odd << 4
        halves[..., 1, :] = even >> 4 | odd & 240


def _unpack_mxfp4(data: Tensor) -> Tensor:
    count, steps, _ = data.shape
    words = data.view(count, steps, 4, ROWS, 2, 2)
    low, high = words[..., 0, :], words[..., 1, :]
    bytes_of = torch.stack((low & 15 | high << 4, low >> 4 | high & 240), -1)
    return bytes_of.permute(0, 3, 1, 2, 4, 5).reshape(count, ROWS, 16 * steps)


def _swap_nf4(bytes_: Tensor) -> Tensor:
    """Converts published bytes of nf4 to those that _pack_mxfp4 takes, and back: halves swapped, codes XOR 7, so that
    padding with zeros is padding with the value 0."""
    return (bytes_ << 4 | bytes_ >> 4) ^ 0x77


def to_row_blocks(matrix: Tensor, parts: int, fill: int = 0) -> Tensor:
    """[...,N,D] -> [..., parts·B, 16, D]; pads each part with rows of `fill`."""
    shares = split_parts(matrix, parts, ROWS, fill)
    return shares.reshape(*matrix.shape[:-2], parts * shares.shape[-2] // ROWS, ROWS, matrix.shape[-1])


def from_row_blocks(blocks: Tensor, rows: int, parts: int) -> Tensor:
    """The inverse of to_row_blocks, [...,N,D]."""
    *leading, count, _, depth = blocks.shape
    shares = blocks.reshape(*leading, parts, count // parts * ROWS, depth)
    return shares[..., : rows // parts, :].flatten(-3, -2)


def blocks_shape(rows: int, columns: int, format: str, parts: int = 1) -> tuple[int, int, int]:
    """Shape of an expert's data, for a matrix [N,C]: blocks of 16 rows, steps of 32 columns, bytes per step."""
    blocks = parts * divide_up(rows // parts, ROWS)
    return blocks, divide_up(columns, COLUMNS), ROWS * COLUMNS * MINIFLOATS[format].bits // 8


def to_row_scales(tensor_scales: Tensor, rows: int) -> Tensor:
    """Stores scales of parts, float32 [E,parts], for each row: [E,parts·B,16]. ValueError unless they are finite."""
    if not bool(tensor_scales.isfinite().all()):
        raise ValueError("tensor_scales: expected finite numbers, got others")
    blocks = divide_up(rows // tensor_scales.shape[1], ROWS)
    return tensor_scales.repeat_interleave(blocks, 1)[..., None].expand(-1, -1, ROWS).contiguous()


def from_row_scales(row_scales: Tensor, parts: int) -> Tensor:
    """The inverse of to_row_scales."""
    return row_scales[:, :: row_scales.shape[1] // parts, 0].contiguous()


def to_blocks(
    values: Tensor,
    scales: Tensor,
    format: str,
    parts: int = 1,
    group: tuple[int, int] = BLOCK,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Converts the published layout to that of the kernels, (data, scales) of include/switchgear/minifloat.h: blocks of
    16 rows, steps of 32 columns. Only the order changes. `group` is for fp8. Writes to `out` if given.

    Raises ValueError for wrong shapes, and for NaN or infinite codes and scales, which kernels do not support.
    """
    if scales.dtype is torch.float8_e4m3fn:  # copied as codes
        scales = scales.view(torch.uint8)
    check_published(values, scales, format, parts, group)
    is_fp8, (num_experts, rows) = format == "fp8", values.shape[:2]
    if is_fp8:
        scales = rows_of_scales(scales, rows, group, parts)
    shape = blocks_shape(rows, values.shape[2] * MINIFLOATS[format].width, format, parts)
    data, stored = out or (
        torch.empty(num_experts, *shape, dtype=torch.uint8, device=values.device),
        scales.new_empty(num_experts, shape[0], scales.shape[2], ROWS),
    )
    pack, width = (_pack_fp8 if is_fp8 else _pack_mxfp4), shape[1] * shape[2] // ROWS
    for expert in range(num_experts):
        matrix = values[expert].contiguous().view(torch.uint8).flatten(1)
        matrix = _swap_nf4(matrix) if format == "nf4" else matrix
        pack(to_row_blocks(pad_zeros(matrix, width - matrix.shape[1]), parts), data[expert])
        stored[expert] = to_row_blocks(scales[expert], parts).mT
    return data, stored


def from_blocks(
    data: Tensor,
    scales: Tensor,
    format: str,
    rows: int,
    columns: int,
    parts: int = 1,
    group: tuple[int, int] = BLOCK,
) -> tuple[Tensor, Tensor]:
    """The inverse of to_blocks: (values, scales) in the published layout."""
    num_experts, _, steps, _ = data.shape
    width = 16 * steps if format == "mxfp4" else divide_up(columns, MINIFLOATS[format].width)
    values = data.new_empty(num_experts, rows, width)
    by_row = scales.new_empty(num_experts, rows, scales.shape[2])
    unpack = _unpack_fp8 if format == "fp8" else _unpack_mxfp4
    for expert in range(num_experts):
        matrix = from_row_blocks(unpack(data[expert]), rows, parts)
        values[expert] = _swap_nf4(matrix[:, :width]) if format == "nf4" else matrix[:, :width]
        by_row[expert] = from_row_blocks(scales[expert].mT, rows, parts)
    if format == "mxfp4":
        return values.view(num_experts, rows, steps, 16), by_row
    if format != "fp8":
        return values, by_row
    shares = by_row.view(num_experts, parts, rows // parts, scales.shape[2])
    return values, shares[:, :, :: group[0]].flatten(1, 2)


@checked
def check_published(
    values: Tensor, scales: Tensor, format: Annotated[str, OneOf(tuple(MINIFLOATS))], parts: int, group: Group = BLOCK
) -> None:
    """Raises ValueError or TypeError with the argument's name unless this is a finite weight in published layout."""
    kind, is_fp8 = MINIFLOATS[format], format == "fp8"
    if values.dim() != kind.shape.count(",") + 1 or (format == "mxfp4" and values.shape[3] != 16):
        raise ValueError(f"values: expected {kind.shape}, got {list(values.shape)}")
    if values.dtype is not torch.uint8 and not (is_fp8 and values.dtype is torch.float8_e4m3fn):
        raise TypeError(f"values: expected torch.uint8{' or torch.float8_e4m3fn' * is_fp8}, got {values.dtype}")
    num_experts, rows, columns = values.shape[:3]
    _check_parts(rows, parts)
    scaled, size = kind.width * columns, kind.group or group[1] or max(columns, 1)
    scale_rows = parts * divide_up(rows // parts, group[0]) if is_fp8 else rows
    check("scales", scales, (num_experts, scale_rows, divide_up(scaled, size)), kind.scales)
    for expert in range(num_experts):
        if is_fp8 and any(map(_has_nan, row_slices(values[expert].view(torch.uint8)))):
            raise ValueError(f"values: expected numbers, expert {expert} has NaN")
        if format == "nvfp4":
            finite = scales[expert] < 0x7F  # codes of NaN, and of numbers with a sign, are above
        else:
            finite = scales[expert] != NAN_SCALE if format == "mxfp4" else scales[expert].isfinite()
        if not bool(finite.all()):
            raise ValueError(f"scales: expected finite numbers, expert {expert} has others")


def _has_nan(codes: Tensor) -> bool:
    return codes.numel() > 0 and int((codes & 0x7F).max()) == 0x7F  # 15× faster than any() of a comparison
