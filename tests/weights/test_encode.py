# SPDX-License-Identifier: BSD-3-Clause
"""The kernels that encode weights have the bits of the definitions in plain torch."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear import weights
from switchgear.reference import formats, gguf
from switchgear.weights import Fp8, Groups, Int4, Int8, Mxfp4, Nf4, Nvfp4, Weight
from switchgear.weights.form import FORMS, Form
from switchgear.weights.gguf import encode_rows

NUMBERS = {
    "normal": lambda w: w,
    "an outlier": lambda w: torch.cat((w[..., :1] * 30, w[..., 1:]), -1),
    "constant": lambda w: torch.full_like(w, 0.37),
    "rows of zeros": lambda w: w * (torch.arange(w.shape[1]) % 2)[:, None],
    "zeros with signs": lambda w: w * 0,
    "subnormal": lambda w: w * 1e-40,
    "the smallest": lambda w: w * 1e-43,
    "huge": lambda w: (w * 1e38).clamp(-3.3e38, 3.3e38),
    "too small for float16": lambda w: w * 1e-7,
    "positive": lambda w: w.abs() + 1,
    "negative": lambda w: -w.abs() - 1,
    "ties": lambda w: (w * 4).round() / 2,
    "decoded": lambda w: weights.encode(w, "mxfp4").plain(),
}
BLOCKS = [
    Int8(), Int8(group_size=32, symmetric=False), Int4(), Int4(symmetric=False), Int4(group_size=0),
    *(Groups(bits=[bits, 5 - bits], group_size=32, symmetric=bits % 2 == 0) for bits in (1, 2, 3, 4)),
    Groups(bits=3, group_size=0), Groups(bits=2, group_size=128, symmetric=False),
    *(Fp8(block=block) for block in ("128x128", "64x128", "row")), Mxfp4(), Nf4(), Nvfp4(),
]  # fmt: skip
CASES = {
    str(form): (form, shape, parts)
    for form, (shape, parts) in itertools.chain(
        itertools.product(BLOCKS, [((2, 150, 100), 2)]),
        (
            (FORMS[name](), ((2, 6, 2 * kind.columns + 256 * (kind.columns < 256)), 2))
            for name, kind in gguf.TYPES.items()
        ),
    )
}
FIELDS = ("data", *formats.FIELDS)


@functools.cache
def case(name: str, numbers: str, dtype: torch.dtype) -> tuple[Tensor, Weight | None]:
    """Numbers, and the weight by the definition; None if it refuses them."""
    form, shape, parts = CASES[name]
    w = NUMBERS[numbers](torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchgear.weights.form.PANEL_DTYPES", {})
        try:
            return w, weights.encode(w, form, parts=parts)
        except ValueError:
            return w, None


def assert_equal(got: Weight, want: Weight) -> None:
    assert (got.form, got.is_exact) == (want.form, want.is_exact)
    for field in FIELDS:
        one, other = getattr(got, field), getattr(want, field)
        assert one is other is None or (one.dtype is other.dtype and torch.equal(one, other)), field


@pytest.mark.parametrize("name", CASES)
def test_kernels_have_the_bits_of_the_definitions(isa: str, name: str) -> None:
    form, _, parts = CASES[name]
    for numbers, dtype in itertools.product(NUMBERS, (torch.float32, torch.bfloat16, torch.float16)):
        if numbers == "decoded" or dtype is torch.float32 or numbers in ("normal", "subnormal"):
            w, want = case(name, numbers, dtype)
            if want is None:
                with raises(ValueError, "weight"):
                    weights.encode(w, form, parts=parts)
            else:
                assert_equal(weights.encode(w, form, parts=parts), want)


@pytest.mark.parametrize(
    "form", [Int8(), Int4(), Groups(), Mxfp4(), Nf4(), Nvfp4(), Fp8(), *(FORMS[n]() for n in ("q4_k", "q8_0"))]
)
def test_views_are_encoded_and_others_than_numbers_refused(form: Form) -> None:
    w = torch.randn(2, 512, 256)
    assert_equal(weights.encode(w.mT, form), weights.encode(w.mT.contiguous(), form))
    for bad in (torch.inf, -torch.inf, torch.nan):
        w[1, 100, 77] = bad
        with raises(ValueError, "weight"):
            weights.encode(w, form)


@pytest.mark.parametrize("name", gguf.TYPES)
def test_rows_of_any_shape(name: str) -> None:
    kind = gguf.TYPES[name]
    for shape in ((), (0,), (5,), (2, 0), (2, 3)):
        rows = torch.randn(*shape, 3 * kind.columns)
        for some in (rows, rows.bfloat16(), rows.double()):
            assert torch.equal(encode_rows(name, some), gguf.encode(name, some))
    with raises(ValueError, "rows"):
        encode_rows(name, rows / 0)
