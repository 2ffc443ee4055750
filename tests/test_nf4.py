# SPDX-License-Identifier: BSD-3-Clause
"""nf4: its values by the paper's formula, rounding against exact fractions, extremes, and layouts."""

from __future__ import annotations

import itertools
from fractions import Fraction
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear import ops
from switchgear.reference import minifloat, nf4
from switchgear.weights import Weight, encode

FLT_MAX = torch.finfo(torch.float32).max
EXACT = [Fraction(value) for value in nf4.VALUES]
MIDDLES = [(a + b) / 2 for a, b in itertools.pairwise(EXACT)]


def test_the_values_are_quantiles_of_the_normal_distribution() -> None:
    """8 of the negative half and 9 of the positive one, zero in both, without the tails, and divided by the largest."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(8)]
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(9)]
    wanted = torch.tensor([*negative[:-1], 0.0, *positive[:-1][::-1]], dtype=torch.float64) / quantile(offset)
    # The published numbers have probabilities in float32: 2^-25, times the slope of the quantile, 1 / pdf.
    tolerance = 2.0**-25 / NormalDist().pdf(quantile(offset)) / quantile(offset)
    assert torch.allclose(torch.tensor(nf4.VALUES, dtype=torch.float64), wanted, rtol=0, atol=tolerance)
    assert torch.equal(torch.tensor(nf4.VALUES).double(), torch.tensor(nf4.VALUES, dtype=torch.float64))  # float32


def nearest(x: float) -> int:
    """A tie goes to the lower one."""
    distances = [abs(Fraction(x) - value) for value in EXACT]
    return distances.index(min(distances))


def test_numbers_round_to_the_nearest_value_and_ties_to_the_lower() -> None:
    at = torch.tensor([float(x) for x in (*EXACT, *MIDDLES)])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.cat((at, at.nextafter(up), at.nextafter(down), torch.linspace(-1, 1, 999)))
    near = torch.cat((near, torch.tensor([0.0, -0.0, 1e-45, -1e-45])))
    assert nf4.nf4_codes(near).tolist() == [nearest(x) for x in near.tolist()]
    ties = [middle for middle in MIDDLES if Fraction(float(torch.tensor(float(middle)))) == middle]
    assert ties  # some middles are float32
    codes = nf4.nf4_codes(torch.tensor([float(tie) for tie in ties])).tolist()
    assert codes == [MIDDLES.index(tie) for tie in ties]


def bytes_of(codes: Tensor) -> Tensor:
    return codes[..., ::2] << 4 | codes[..., 1::2]


def test_every_code_decodes_with_every_kind_of_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 2, 128)[:, [0, 1] * 6]  # bytes: every pair of codes
    absmax = torch.tensor([0.0, 2.0**-149, 1e-40, 2.0**-126, 0.7, 3.0, 1e9, FLT_MAX, -2.0, torch.inf, torch.nan, 1.0])
    decoded = nf4.decode_nf4(codes, absmax.view(1, 12, 1).expand(1, 12, 4))
    values = torch.tensor(nf4.VALUES)
    for row, scale in enumerate(absmax):
        bytes_ = codes[0, row].int()
        wanted = torch.stack((values[bytes_ >> 4], values[bytes_ & 15]), -1).flatten() * scale
        assert torch.equal(decoded[0, row].nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_encode_against_a_loop_in_float64() -> None:
    weight = torch.randn(2, 3, 133) * torch.exp2(torch.randint(-20, 3, (2, 3, 133)).float())
    values, absmax, lossless = nf4.encode_nf4(weight)
    assert (values.shape, absmax.shape, lossless) == ((2, 3, 67), (2, 3, 3), False)
    decoded = nf4.decode_nf4(values, absmax, 133)
    for expert, row, group in itertools.product(range(2), range(3), range(3)):
        block = weight[expert, row, 64 * group : 64 * group + 64].double()
        largest = float(block.abs().max())
        assert absmax[expert, row, group] == largest
        for column, x in enumerate(block.tolist(), 64 * group):
            byte = int(values[expert, row, column // 2])
            code = byte >> 4 if column % 2 == 0 else byte & 15
            distances = [abs(x / largest - value) for value in nf4.VALUES]
            assert distances[code] <= min(distances) + 2.0**-23  # the quotient is rounded to float32
            assert abs(float(decoded[expert, row, column]) - largest * nf4.VALUES[code]) <= largest * 2.0**-24
    assert ((decoded - weight).abs() <= 0.152 * absmax.repeat_interleave(64, 2)[..., :133]).all()
    assert (values[..., -1] & 15 == 7).all()  # column 134, which does not exist, is 0


EXTREMES = {"zero": 0.0, "smallest": 2.0**-149, "1e-38": 1e-38, "normal": 2.0**-126, "one": 1.0, "largest": FLT_MAX}


@pytest.mark.parametrize("amax", EXTREMES.values(), ids=EXTREMES)
def test_any_largest_weight(amax: float) -> None:
    weight = (torch.linspace(-1, 1, 4 * 64).view(1, 4, 64).double() * amax).float()
    values, absmax, _ = nf4.encode_nf4(weight)
    assert torch.equal(absmax[..., 0], weight.abs().amax(-1))
    decoded = nf4.decode_nf4(values, absmax)
    assert ((decoded.double() - weight.double()).abs() <= 0.152 * absmax.double() + 2.0**-149).all()


def test_zeros_are_exact_but_for_their_signs() -> None:
    weight = torch.zeros(1, 2, 128)
    weight[0, 0, 3] = 2.5
    values, absmax, lossless = nf4.encode_nf4(weight)
    assert lossless
    assert absmax.flatten().tolist() == [2.5, 0, 0, 0]
    assert values[0, 0, 1] == 0x7F
    assert (values.flatten()[2:] == 0x77).all()
    weight[0, 1, 100] = -0.0
    assert not nf4.encode_nf4(weight).lossless


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight = torch.ones(3, 16, 64, dtype=torch.bfloat16)
    weight[2, 5, 7] = bad
    with raises(ValueError, "down_proj"):
        nf4.encode_nf4(weight, "down_proj")


def test_what_nf4_makes_is_kept_by_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first = nf4.encode_nf4(torch.randn(2, 64, 192).to(dtype))
        again = nf4.encode_nf4(nf4.decode_nf4(*first[:2]).to(dtype))
        assert torch.equal(again.values, first.values)
        assert torch.equal(again.scales, first.scales)
        assert (first.lossless, again.lossless) == (False, True)


def test_the_error_of_normal_weights_is_that_of_the_documentation() -> None:
    weight = torch.randn(1, 256, 1024)
    decoded = encode(weight, "nf4").plain()
    assert abs(float((decoded - weight).norm() / weight.norm()) - 0.092) < 0.003


# ---- storage ---------------------------------------------------------------------------------------------------------

SHAPES = [(1, 16, 64), (3, 32, 128), (2, 34, 96), (2, 66, 71), (1, 2, 1), (2, 6, 300)]


@pytest.mark.parametrize("parts", [1, 2])
def test_storage_is_that_of_the_header(parts: int) -> None:
    """Code XOR 7 is where mxfp4 has its code."""
    codes = torch.randint(0, 16, (2, 20, 72), dtype=torch.uint8)
    absmax = torch.rand(2, 20, 2)
    data, stored = minifloat.to_blocks(bytes_of(codes), absmax, "nf4", parts)
    assert data.shape == (2, 2, 3, 256)
    assert stored.shape == (2, 2, 2, 16)
    swapped = torch.nn.functional.pad(codes ^ 7, (0, 24)).unflatten(2, (3, 16, 2))
    blocks = swapped[..., 0] | swapped[..., 1] << 4
    wanted, _ = minifloat.to_blocks(blocks, torch.zeros(2, 20, 3, dtype=torch.uint8), "mxfp4", parts)
    assert torch.equal(data, wanted)
    for row in range(20):
        block, inside = divmod(row % (20 // parts), 16)
        block += row // (20 // parts) * (2 // parts)
        assert torch.equal(stored[:, block, :, inside], absmax[:, row])
        stored[:, block, :, inside] = 0
    assert not stored.any()  # padding


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_nf4_goes_into_blocks_and_back(shape: tuple[int, ...], parts: int) -> None:
    weight = torch.randn(shape)
    values, absmax, _ = nf4.encode_nf4(weight)
    data, stored = minifloat.to_blocks(values, absmax, "nf4", parts)
    again, absmax_again = minifloat.from_blocks(data, stored, "nf4", *shape[1:], parts)
    assert torch.equal(again, values)
    assert torch.equal(absmax_again, absmax)
    assert torch.equal(encode(weight, "nf4", parts=parts).plain(), nf4.decode_nf4(values, absmax, shape[2]))


@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_have_the_values_of_the_reference(isa: str, transposed: bool) -> None:
    """Products with the identity decode; scale · value is rounded once."""
    codes = torch.arange(16 * 16, dtype=torch.uint8).view(1, 16, 16).expand(2, 16, 16).contiguous()  # all pairs
    absmax = torch.rand(2, 16, 1) + 0.5
    data, scales = minifloat.to_blocks(codes, absmax, "nf4")
    weight = Weight("nf4", data, 16, 32, torch.float32, scales, group_size=64)
    rows = 16 if transposed else 32
    x, offsets = torch.eye(rows).repeat(2, 1), torch.tensor([0, rows, 2 * rows], dtype=torch.int32)
    y = ops.grouped_gemm(x, weight.tensors, weight.form, None, offsets, None, transposed, False)
    wanted = nf4.decode_nf4(codes, absmax)
    assert torch.equal(y.view(2, rows, -1), wanted if transposed else wanted.mT)


def test_arguments_are_named() -> None:
    values, absmax, _ = nf4.encode_nf4(torch.randn(2, 16, 128))
    with raises(ValueError, "scales"):
        minifloat.to_blocks(values, absmax[..., :1], "nf4")
    with raises(TypeError, "scales"):
        minifloat.to_blocks(values, absmax.double(), "nf4")
    with raises(ValueError, "values"):
        minifloat.to_blocks(values[..., 0], absmax, "nf4")
    for bad in (torch.nan, torch.inf):
        spoilt = absmax.clone()
        spoilt[1, 2] = bad
        with raises(ValueError, "scales"):
            minifloat.to_blocks(values, spoilt, "nf4")
    with raises(ValueError, "weight"):
        nf4.encode_nf4(torch.zeros(2, 16, 64, dtype=torch.int8))
