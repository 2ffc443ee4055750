# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch

import switchgear
from errors import raises
from switchgear import testing
from switchgear.testing import assert_close, exact
from switchgear.weights import encode

pytestmark = pytest.mark.in_turns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 64, 48), (16, 48, 1), (7, 1, 33), (70, 96, 130), (0, 8, 8))  # T, C, N


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, columns, width = shape
    x, weight, bias, grad = (
        torch.randn(size, dtype=torch.float64).to(dtype)
        for size in ((num_tokens, columns), (width, columns), (width,), (num_tokens, width))
    )
    offsets = torch.tensor([0, num_tokens], dtype=torch.int32)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    out = switchgear.linear(*leaves)
    assert_close(out.detach(), testing.gemm(exact(x), weight[None], bias[None], offsets).rounded(dtype))
    out.backward(grad)
    grad_x = testing.gemm(exact(grad), weight.mT[None], None, offsets).rounded(dtype)
    grad_weight = testing.wgrad(exact(grad), exact(x), offsets).rounded(dtype)
    grad_bias = testing.wgrad(exact(grad), exact(torch.ones(num_tokens, 1)), offsets).rounded(dtype)
    assert_close(leaves[0].grad, grad_x, "gradient of x")
    assert_close(leaves[1].grad[None], grad_weight, "gradient of weight")
    assert_close(leaves[2].grad[None, :, None], grad_bias, "gradient of bias")


def test_leading_dimensions_and_batches(backend: str) -> None:
    x, weight = torch.randn(2, 3, 5, 32), torch.randn(24, 32)
    out = switchgear.linear(x, weight)
    assert out.shape == (2, 3, 5, 24)
    for index in ((0, 0, 0), (1, 2, 4)):
        alone = switchgear.linear(x[index], weight)
        assert torch.equal(alone, out[index]) or backend == "reference"  # which uses torch's product
        torch.testing.assert_close(alone, out[index])


def test_stored_weights(backend: str) -> None:
    x, weight = torch.randn(4, 64), encode(torch.randn(1, 32, 64), "int8")
    torch.testing.assert_close(switchgear.linear(x, weight), x @ weight.plain()[0].mT, rtol=0.02, atol=0.2)


def test_errors() -> None:
    with raises(ValueError, "weight"):
        switchgear.linear(torch.ones(2, 4), torch.ones(3, 5, 4))
    with raises(ValueError, "weight"):
        switchgear.linear(torch.ones(2, 4), torch.ones(5, 3))
