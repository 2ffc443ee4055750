# SPDX-License-Identifier: BSD-3-Clause
"""nvfp4: what encoding chooses, which decoded bits every backend has, and products in float64's bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends_in_use import ISAS, backend_named
from errors import raises
from switchgear import functional, weights
from switchgear.reference import minifloat

E = 3


def random_weight(rows: int, columns: int, spread: float = 3.0) -> Tensor:
    """[E,rows,columns], of blocks that differ by powers of two."""
    weight = torch.randn(E, rows, columns)
    return weight * torch.exp2(spread * torch.randn(E, rows, -(-columns // 16)).repeat_interleave(16, 2))[..., :columns]


def value_of(code: int) -> float:
    magnitude = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code & 7]
    return -magnitude if code & 8 else magnitude


def e4m3_of(code: int) -> float:
    exponent, fraction = code >> 3, code & 7
    return (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9


def test_every_code_and_scale() -> None:
    """Decoded bits by definition: value · (scale · tensor_scale), each product rounded to float32."""
    codes = torch.arange(16, dtype=torch.uint8)
    values = (codes[::2] | codes[1::2] << 4).expand(1, 127, 8)
    scales = torch.arange(127, dtype=torch.uint8).view(1, 127, 1)
    whole = torch.tensor([[0.1]])
    factors = torch.tensor([e4m3_of(code) for code in range(127)]) * whole[0, 0]
    wanted = factors[:, None] * torch.tensor([value_of(code) for code in range(16)])
    assert torch.equal(minifloat.decode_nvfp4(values, scales, whole)[0], wanted)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("columns", [64, 70, 33, 8])
def test_encode(columns: int, parts: int) -> None:
    weight = random_weight(24, columns)
    weight[0, 0] = 0
    weight[1] = 0
    values, scales, whole, lossless = minifloat.encode_nvfp4(weight, parts)
    assert not lossless
    amax = weight.view(E, parts, -1).abs().amax(-1)
    assert torch.equal(whole, torch.where(amax == 0, 1.0, amax / 2688))
    assert scales.shape == (E, 24, -(-columns // 16))
    assert int(scales.max()) == 0x7E  # 448, of the largest block
    decoded = minifloat.decode_nvfp4(values, scales, whole, columns)
    by_row = whole.repeat_interleave(24 // parts, 1)[..., None]
    factors = (scales.view(torch.float8_e4m3fn).float() * by_row).repeat_interleave(16, 2)[..., :columns]
    blocks = torch.nn.functional.pad(weight, (0, -columns % 16)).view(E, 24, -1, 16).abs().amax(-1)
    largest = blocks.repeat_interleave(16, 2)[..., :columns]
    # half of the widest spacing, 2, and what a scale that was rounded down, or to a subnormal number, cuts off
    assert bool(((decoded - weight).abs() <= factors * 1.001 + largest / 15 + by_row / 170).all())


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("columns", [64, 70, 33])
def test_storage(columns: int, parts: int) -> None:
    """The layout of the kernels and back, every byte; plain() has the specification's bits."""
    form, weight = weights.Nvfp4(), random_weight(20, columns)
    stored = weights.encode(weight, form, parts=parts)
    published = minifloat.encode_nvfp4(weight, parts)
    assert torch.equal(stored.plain(), minifloat.decode_nvfp4(*published[:3], columns))
    saved = form.save(stored)
    assert torch.equal(saved["_packed"], published.values)
    assert torch.equal(saved["_scale"].view(torch.uint8), published.scales)
    assert torch.equal(saved["_scale_2"], published.tensor_scales)
    assert torch.equal(form.load(saved, stored).plain(), stored.plain())
    for key, bad in (("_scale", 0x7F), ("_scale", 0x81)):
        spoilt = saved[key].view(torch.uint8).clone()
        spoilt[1, 2, 0] = bad
        with raises(ValueError):
            form.load({**saved, key: spoilt.view(torch.float8_e4m3fn)}, stored)
    with raises(ValueError, "tensor_scales"):
        form.load({**saved, "_scale_2": torch.full_like(saved["_scale_2"], torch.inf)}, stored)


@pytest.mark.parametrize("backend", ["reference", *ISAS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "gradient"])
def test_decoded_bits(backend: str, dtype: torch.dtype, transposed: bool) -> None:
    """Rows with a single 1 read single weights. Every scale occurs, subnormal ones too."""
    rows, columns = 127 * 16 // 8, 128
    values = torch.randint(256, (1, rows, columns // 2), dtype=torch.uint8)
    scales = torch.arange(rows * columns // 16, dtype=torch.int64).remainder(127).to(torch.uint8).view(1, rows, -1)
    whole = torch.tensor([[0.0137]])
    data, stored = minifloat.to_blocks(values, scales, "nvfp4")
    weight = weights.Weight(
        "nvfp4", data, rows, columns, dtype, stored, minifloat.to_row_scales(whole, rows), group_size=16
    )  # fmt: skip
    wanted = minifloat.decode_nvfp4(values, scales, whole)[0].to(dtype)
    assert torch.equal(weight.plain()[0], wanted)
    depth = rows if transposed else columns
    offsets = torch.tensor([0, depth], dtype=torch.int32)
    x = torch.eye(columns, dtype=dtype)
    with backend_named(backend):
        if transposed:
            x = torch.zeros(rows, columns, dtype=dtype, requires_grad=True)
            out = functional.grouped_gemm(x, weight, offsets)
            (got,) = torch.autograd.grad(out, x, torch.eye(rows, dtype=dtype))
        else:
            got = functional.grouped_gemm(x, weight, offsets).mT
    assert torch.equal(got, wanted)
