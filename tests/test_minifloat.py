# SPDX-License-Identifier: BSD-3-Clause
"""fp8 and mxfp4: every number that they have, how they round, their extremes, and their layouts."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear.reference import minifloat

FLT_MAX = torch.finfo(torch.float32).max
GROUPS = {"block": minifloat.BLOCK, "row": minifloat.ROW, "small": (3, 32)}
groups = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)


def every_bfloat16() -> Tensor:
    """The finite ones, in float32."""
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    numbers = bits.view(torch.float32)
    return numbers[numbers.isfinite()]


# ---- numbers, against exact fractions --------------------------------------------------------------------------------


def value_of(code: int, mantissa: int, bias: int) -> Fraction:
    """The value of a float format without infinities, by definition."""
    exponent, fraction = code >> mantissa, Fraction(code & ((1 << mantissa) - 1), 1 << mantissa)
    power = Fraction(2) ** (max(exponent, 1) - bias)
    return (fraction + (exponent > 0)) * power


E4M3 = [value_of(code, 3, 7) for code in range(0x7F)]  # ascending; 0x7f is NaN
E2M1 = [value_of(code, 1, 1) for code in range(8)]


def nearest(x: Fraction, table: list[Fraction]) -> int:
    """The code of the value in the table that is nearest to x >= 0; ties go to even."""
    above = bisect.bisect_left(table, x)
    if above == len(table):
        return len(table) - 1
    if above == 0 or table[above] == x:
        return above
    down, up = x - table[above - 1], table[above] - x
    return min((down, (above - 1) % 2, above - 1), (up, above % 2, above))[2]


def expected_codes(numbers: Tensor, table: list[Fraction], sign: int) -> Tensor:
    codes = [nearest(abs(Fraction(x)), table) for x in numbers.tolist()]
    return torch.tensor(codes, dtype=torch.uint8) | numbers.signbit().to(torch.uint8) * sign


def neighbours(table: list[Fraction]) -> Tensor:
    """Every value, every midpoint of two, and the float32 next to each, of either sign."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(table)]
    at = torch.tensor([float(x) for x in (*table, *middles, table[-1] * 2, Fraction(FLT_MAX))])
    near = torch.cat((at, at.nextafter(torch.tensor(torch.inf)), at.nextafter(torch.tensor(0.0))))
    near = near[near.isfinite()]
    return torch.cat((near, -near))


def test_the_tables_are_those_of_the_formats() -> None:
    assert (max(E4M3), E4M3[1], E4M3[8]) == (448, Fraction(1, 512), Fraction(1, 64))
    assert tuple(map(float, E2M1)) == minifloat.MXFP4_VALUES


def test_every_bfloat16_rounds_to_the_nearest_e4m3() -> None:
    numbers = every_bfloat16()
    assert torch.equal(minifloat.e4m3_codes(numbers), expected_codes(numbers, E4M3, 0x80))


def test_every_bfloat16_rounds_to_the_nearest_e2m1() -> None:
    numbers = every_bfloat16()
    assert torch.equal(minifloat.e2m1_codes(numbers), expected_codes(numbers, E2M1, 8))


def test_middles_of_values_go_to_the_even_code() -> None:
    for numbers in (neighbours(E4M3), neighbours(E2M1)):
        assert torch.equal(minifloat.e4m3_codes(numbers), expected_codes(numbers, E4M3, 0x80))
        assert torch.equal(minifloat.e2m1_codes(numbers), expected_codes(numbers, E2M1, 8))


def test_every_code_of_fp8_decodes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    decoded = minifloat.decode_fp8(codes, torch.ones(1, 1, 1), minifloat.ROW).flatten()
    expected = torch.tensor([float(x) for x in E4M3] + [torch.nan])
    assert torch.equal(decoded[:127], expected[:127])
    assert torch.equal(decoded[128:255], -expected[:127])
    assert bool(decoded[128].signbit())
    assert decoded[[127, 255]].isnan().all()


def test_every_pair_of_value_and_scale_of_mxfp4_decodes() -> None:
    low = torch.arange(16, dtype=torch.uint8)
    blocks = (low | low.flip(0) << 4).expand(256, 1, 1, 16)  # columns 2i hold code i, columns 2i + 1 code 15 - i
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1, 1)
    decoded = minifloat.decode_mxfp4(blocks, scales)
    for scale in range(255):
        expected = [Fraction(2) ** (scale - 127) * value for value in E2M1]
        row = torch.tensor([float(x) if x <= Fraction(FLT_MAX) else torch.inf for x in expected])
        assert torch.equal(decoded[scale, 0, ::2], torch.cat((row, -row)))
        assert torch.equal(decoded[scale, 0, 1::2], torch.cat((row, -row)).flip(0))
        assert torch.equal(decoded[scale].signbit(), decoded[127].signbit())
    assert decoded[255].isnan().all()
    assert torch.equal(minifloat.decode_mxfp4(blocks[:255], scales[:255]).bfloat16().float(), decoded[:255])


# ---- encode ----------------------------------------------------------------------------------------------------------

EXTREMES = {"zero": 0.0, "smallest": 2.0**-149, "1e-38": 1e-38, "normal": 2.0**-126, "one": 1.0, "largest": FLT_MAX}


@pytest.mark.parametrize("amax", EXTREMES.values(), ids=EXTREMES)
@groups
def test_any_largest_weight_has_a_finite_scale(amax: float, group: tuple[int, int]) -> None:
    weight = torch.linspace(-1, 1, 4 * 64).view(1, 4, 64) * amax
    fp8 = minifloat.encode_fp8(weight, group)
    assert fp8.scales.isfinite().all()
    assert (fp8.scales >= minifloat.SMALLEST_SCALE).all()
    assert (fp8.values & 0x7F != 0x7F).all()
    assert minifloat.decode_fp8(fp8.values, fp8.scales, group).isfinite().all()
    mxfp4 = minifloat.encode_mxfp4(weight)
    assert (mxfp4.scales != minifloat.NAN_SCALE).all()
    assert minifloat.decode_mxfp4(mxfp4.values, mxfp4.scales).isfinite().all()
    if amax >= 2.0**-126:  # below that, the largest value is not 448
        decoded = minifloat.decode_fp8(fp8.values, fp8.scales, group)
        assert bool((decoded.amax() - amax).abs() <= amax * 2.0**-23)


def test_a_block_of_zeros_has_scale_one_and_keeps_signs() -> None:
    weight = torch.zeros(1, 256, 128)
    weight[0, 0, 0] = -0.0
    weight[0, 128:] = 3.5
    values, scales, lossless = minifloat.encode_fp8(weight)
    assert scales.flatten().tolist() == [1.0, 3.5 / 448]
    assert values[0, 0, 0] == 0x80
    assert lossless
    values, scales, lossless = minifloat.encode_mxfp4(weight[:, :128])
    assert scales[0, 0, 0] == 0
    assert values[0, 0, 0, 0] == 8
    assert lossless


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("encode", [minifloat.encode_fp8, minifloat.encode_mxfp4])
def test_weights_that_are_not_finite_are_refused_by_name(encode: Callable[..., Any], bad: float) -> None:
    weight = torch.ones(3, 16, 32, dtype=torch.bfloat16)
    weight[2, 5, 7] = bad
    with raises(ValueError, "down_proj"):
        encode(weight, name="down_proj")


@groups
@pytest.mark.parametrize("parts", [1, 2])
def test_fp8_is_as_close_as_half_a_unit_in_the_last_place(group: tuple[int, int], parts: int) -> None:
    weight = torch.randn(2, 2 * 131, 133) * torch.exp2(torch.randint(-20, 3, (2, 2 * 131, 133)).float())
    values, scales, lossless = minifloat.encode_fp8(weight, group, parts)
    decoded = minifloat.decode_fp8(values, scales, group, parts)
    by_row = minifloat.rows_of_scales(scales, weight.shape[1], group, parts)
    scale = by_row.repeat_interleave(group[1] or 133, 2)[:, :, :133]
    error = (decoded - weight).abs()
    rounding = 1 + 2.0**-21  # of the quotient, the product, and the scale, 2^-24 each
    assert (error <= torch.maximum(weight.abs() / 16, scale / 1024) * rounding).all()
    assert (error <= 16 * scale * rounding).all()  # amax / 28
    assert not lossless


def test_groups_start_anew_in_each_part() -> None:
    weight = torch.randn(1, 2 * 40, 64)
    group = (32, 32)
    both = minifloat.encode_fp8(weight, group, 2)
    gates, ups = (minifloat.encode_fp8(half.contiguous(), group) for half in weight.chunk(2, 1))
    assert torch.equal(both.values, torch.cat((gates.values, ups.values), 1))
    assert torch.equal(both.scales, torch.cat((gates.scales, ups.scales), 1))


def test_mxfp4_scales_follow_the_largest_weight() -> None:
    weight = torch.zeros(1, 7, 32)
    weight[0, :, 3] = torch.tensor([1.0, 1.9, 4.0, 5.1, 7.9, -8.0, 0.3])
    weight[0, :, 4] = weight[0, :, 3] / 16  # becomes 0.5, except in row 1
    weight[0, 1, 4] = 0
    values, scales, _ = minifloat.encode_mxfp4(weight)
    exponents = weight[0, :, 3].abs().log2().floor() - 2
    codes = torch.stack((values & 15, values >> 4), -1).flatten(2).view(7, 32)
    halved = (codes[:, 3] & 7) == 5
    assert torch.equal(scales.view(7) - 127.0 - halved.float(), exponents)
    assert codes[:, 3].tolist() == [6, 5, 6, 7, 7, 14, 6]  # 4, 3 at twice the scale, 4, 6, 6, -4, 4
    assert minifloat.decode_mxfp4(values, scales)[0, 4, 3] == 6  # 7.9 saturates


# ---- published bytes -------------------------------------------------------------------------------------------------


def published(experts: int, rows: int, steps: int) -> tuple[Tensor, Tensor]:
    """Random bytes whose blocks have a largest value of 3, 4 or 6 and a 0.5, or are zero with scale 0."""
    codes = torch.randint(0, 16, (experts, rows, steps, 32), dtype=torch.uint8)
    codes[..., 4] = torch.randint(5, 8, codes.shape[:3])
    codes[..., 9] = 1
    largest = torch.randint(5, 8, (experts, rows, steps, 1))
    codes = torch.where((codes & 7) > largest, codes & 8 | largest, codes).to(torch.uint8)
    scales = torch.randint(1, 252, (experts, rows, steps), dtype=torch.uint8)
    codes[0, 0, 0], scales[0, 0, 0] = codes[0, 0, 0] & 8, 0
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_published_mxfp4_comes_back_byte_by_byte(dtype: torch.dtype) -> None:
    blocks, scales = published(3, 40, 5)
    again = minifloat.encode_mxfp4(minifloat.decode_mxfp4(blocks, scales).to(dtype))
    assert torch.equal(again.values, blocks)
    assert torch.equal(again.scales, scales)
    assert again.lossless


def test_any_bytes_of_mxfp4_come_back_with_equal_values() -> None:
    codes = torch.randint(0, 16, (2, 64, 4, 16), dtype=torch.uint8)
    blocks, scales = codes | codes.flip(-1) << 4, torch.randint(0, 252, (2, 64, 4), dtype=torch.uint8)
    blocks[:, 32:] &= 0b10101010  # even codes only
    scales[0] = scales[0] % 4  # scales at the lower end cannot decrease
    weight = minifloat.decode_mxfp4(blocks, scales)
    again = minifloat.encode_mxfp4(weight)
    assert again.lossless
    decoded = minifloat.decode_mxfp4(again.values, again.scales)
    assert torch.equal(decoded.view(torch.int32), weight.view(torch.int32))  # including the signs of zeros
    twice = minifloat.encode_mxfp4(decoded)
    assert torch.equal(twice.values, again.values)
    assert torch.equal(twice.scales, again.scales)


def test_what_mxfp4_makes_is_kept_by_it() -> None:
    weight = torch.randn(2, 64, 96).bfloat16()
    first = minifloat.encode_mxfp4(weight)
    assert not first.lossless
    again = minifloat.encode_mxfp4(minifloat.decode_mxfp4(*first[:2]).bfloat16())
    assert torch.equal(again.values, first.values)
    assert torch.equal(again.scales, first.scales)
    assert again.lossless


# ---- storage ---------------------------------------------------------------------------------------------------------

SHAPES = [(1, 16, 32), (3, 32, 128), (2, 34, 64), (2, 66, 71), (1, 2, 1), (2, 6, 300)]


def numbers(data: Tensor, format: str) -> Tensor:
    """Codes of a block in the layout of the kernels' header, [B,16,32·C], one at a time."""
    count, steps, size = data.shape
    out = torch.zeros(count, 16, 32 * steps, dtype=torch.uint8)
    for step in range(steps):
        for vector in range(size // 64):
            for row in range(16):
                for j in range(4):
                    if format == "fp8":
                        at = 64 * vector + 16 * (row // 4) + 8 * (j // 2) + 2 * (row % 4) + j % 2
                        out[:, row, 32 * step + 4 * vector + j] = data[:, step, at]
                    else:
                        byte = data[:, step, 64 * vector + 4 * row + j]
                        column = 32 * step + 8 * vector + 4 * (j % 2) + j // 2
                        out[:, row, column], out[:, row, column + 2] = byte & 15, byte >> 4
    return out


@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
@pytest.mark.parametrize("parts", [1, 2])
def test_storage_is_that_of_the_header(format: str, parts: int) -> None:
    weight = torch.randn(2, 20, 72)
    if format == "fp8":
        values, scales, _ = minifloat.encode_fp8(weight, (6, 32), parts)
        codes = values
        by_row = minifloat.rows_of_scales(scales, 20, (6, 32), parts)
    else:
        values, scales, _ = minifloat.encode_mxfp4(weight)
        codes = torch.stack((values & 15, values >> 4), -1).flatten(2)
        by_row = scales
    data, stored = minifloat.to_blocks(values, scales, format, parts, (6, 32))
    part_rows = 20 // parts
    assert data.shape == (2, 2, 3, 512 if format == "fp8" else 256)
    assert stored.shape == (2, 2, 3, 16)
    for expert in range(2):
        found = numbers(data[expert], format)
        for row in range(20):
            block, inside = divmod(row % part_rows, 16)
            block += row // part_rows * (2 // parts)
            assert torch.equal(found[block, inside, : codes.shape[2]], codes[expert, row])
            assert torch.equal(stored[expert, block, :, inside], by_row[expert, row])
            found[block, inside] = 0
            stored[expert, block, :, inside] = 0
        assert not found.any()  # padding is zero, and so are columns >= 72, which the fp8 codes lack
        assert not stored[expert].any()


@groups
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_fp8_goes_into_blocks_and_back(shape: tuple[int, ...], parts: int, group: tuple[int, int]) -> None:
    values, scales, _ = minifloat.encode_fp8(torch.randn(shape), group, parts)
    data, stored = minifloat.to_blocks(values, scales, "fp8", parts, group)
    again, scales_again = minifloat.from_blocks(data, stored, "fp8", *shape[1:], parts, group)
    assert torch.equal(again, values)
    assert torch.equal(scales_again, scales)
    for ours, theirs in zip(minifloat.to_blocks(again, scales_again, "fp8", parts, group), (data, stored), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_mxfp4_goes_into_blocks_and_back(shape: tuple[int, ...], parts: int) -> None:
    values, scales, _ = minifloat.encode_mxfp4(torch.randn(shape))
    data, stored = minifloat.to_blocks(values, scales, "mxfp4", parts)
    again, scales_again = minifloat.from_blocks(data, stored, "mxfp4", *shape[1:], parts)
    assert torch.equal(again, values)
    assert torch.equal(scales_again, scales)
    assert minifloat.decode_mxfp4(again, scales_again, shape[2]).shape == shape


@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_values_may_lie_anywhere(format: str) -> None:
    weight = torch.randn(2, 32, 64)
    values, scales, _ = minifloat.encode_fp8(weight) if format == "fp8" else minifloat.encode_mxfp4(weight)
    odd = torch.empty(values.numel() + 1, dtype=torch.uint8)[1:].view(values.shape).copy_(values)
    strided = torch.stack((values, values), -1)[..., 0]
    want = minifloat.to_blocks(values, scales, format)
    out = tuple(torch.empty_like(tensor).fill_(1) for tensor in want)
    for got in (
        minifloat.to_blocks(odd, scales, format),
        minifloat.to_blocks(strided, scales, format),
        minifloat.to_blocks(values, scales, format, out=(out[0], out[1])),
        out,
    ):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_numbers_that_kernels_do_not_have_are_not_stored() -> None:
    values, scales, _ = minifloat.encode_fp8(torch.randn(2, 16, 32), minifloat.ROW)
    for bad in (0x7F, 0xFF):
        spoilt = values.clone()
        spoilt[1, 2, 3] = bad
        with raises(ValueError, "values"):
            minifloat.to_blocks(spoilt, scales, "fp8", 1, minifloat.ROW)
    for bad_scale in (torch.nan, torch.inf):
        spoilt = scales.clone()
        spoilt[1, 2] = bad_scale
        with raises(ValueError, "scales"):
            minifloat.to_blocks(values, spoilt, "fp8", 1, minifloat.ROW)
    blocks, codes, _ = minifloat.encode_mxfp4(torch.randn(2, 16, 32))
    codes[0, 1] = 255
    with raises(ValueError, "scales"):
        minifloat.to_blocks(blocks, codes, "mxfp4")


def test_arguments_are_named() -> None:
    values, scales, _ = minifloat.encode_fp8(torch.randn(2, 16, 64), (8, 32))
    with raises(ValueError, "format"):
        minifloat.to_blocks(values, scales, "int8")
    with raises(ValueError, "scales"):
        minifloat.to_blocks(values, scales, "fp8")
    with raises(TypeError, "scales"):
        minifloat.to_blocks(values, scales.bfloat16(), "fp8", 1, (8, 32))
    with raises(ValueError, "parts"):
        minifloat.to_blocks(values, scales, "fp8", 3, (8, 32))
    with raises(ValueError, "group"):
        minifloat.encode_fp8(torch.randn(2, 16, 64), (8, 24))
    with raises(ValueError, "weight"):
        minifloat.encode_mxfp4(torch.zeros(2, 16, 64, dtype=torch.int8))
