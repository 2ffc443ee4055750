# SPDX-License-Identifier: BSD-3-Clause
"""The kernels that quantize weights have the bits of the definitions in plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear import ops
from switchgear.reference import groups, integers

NUMBERS = {
    "normal": lambda w: w,
    "an outlier": lambda w: torch.cat((w[..., :1] * 30, w[..., 1:]), -1),
    "constant": lambda w: torch.full_like(w, 0.37),
    "rows of zeros": lambda w: w * (torch.arange(w.shape[1]) % 2)[:, None],
    "subnormal": lambda w: w * 1e-40,
    "huge": lambda w: w * 1e37,
    "too small for float16": lambda w: w * 1e-7,
    "positive": lambda w: w.abs() + 1,
}


def assert_equal(got: tuple[Tensor | None, ...], want: tuple[Tensor | None, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_kernels_have_the_bits_of_the_definitions(numbers: str) -> None:
    torch.manual_seed(0)
    for shape, symmetric in itertools.product(((2, 5, 32), (3, 7, 100), (1, 2, 1)), (True, False)):
        w = NUMBERS[numbers](torch.randn(shape))
        for bits, size in itertools.product((4, 8), (0, 16, 128)):
            want = integers.quantize(w, bits, size, symmetric)
            got = integers.quantize(w, bits, size, symmetric, kernel=ops.quantize_integers)
            assert_equal(got, want)
        for bits, size in itertools.product((1, 2, 3, 4), (0, 32)):
            each = (bits,) * len(w)
            try:
                found = groups.quantize(w, each, size, symmetric)
            except ValueError:
                with raises(ValueError, "weight"):
                    groups.quantize(w, each, size, symmetric, kernel=ops.quantize_groups)
            else:
                got = groups.quantize(w, each, size, symmetric, kernel=ops.quantize_groups)
                assert_equal(got[:3], found[:3])
