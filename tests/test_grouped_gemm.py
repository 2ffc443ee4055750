# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import switchgear
from errors import raises
from switchgear import _C, ops, testing
from switchgear.testing import CASES, Case, assert_close, exact, topk_ids_of

pytestmark = pytest.mark.in_turns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan_of(case: Case) -> switchgear.Plan:
    return switchgear.plan(topk_ids_of(case), case.num_experts)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Both storage orders of the weight; rows in slot order, and rows of tokens."""
    offsets, token_indices, _ = plan_of(case)
    bias = draw(case.num_experts, case.intermediate_size, dtype=dtype)
    for indices, transposed in ((None, False), (token_indices, True)):
        x = draw(token_indices.numel() if indices is None else case.num_tokens, case.hidden_size, dtype=dtype)
        weight = draw(case.num_experts, case.intermediate_size, case.hidden_size, dtype=dtype)
        weight = weight.mT.contiguous().mT if transposed else weight
        leaf, leaf_weight, leaf_bias = (t.detach().requires_grad_() for t in (x, weight, bias))
        out = switchgear.grouped_gemm(leaf, leaf_weight, offsets, bias=leaf_bias, token_indices=indices)
        assert_close(out.detach(), testing.gemm(exact(x), weight, bias, offsets, indices).rounded(dtype))
        assert not out[int(offsets[-1]) :].any()

        grad = draw(*out.shape, dtype=dtype)
        out.backward(grad)
        wanted = testing.wgrad(exact(grad), exact(x), offsets, indices).rounded(dtype)
        assert_close(leaf_weight.grad, wanted, "gradient of weight")
        assert leaf_weight.grad.stride() == torch.empty_like(weight).stride()
        ones = exact(torch.ones(len(grad), 1))
        wanted_bias = testing.wgrad(exact(grad), ones, offsets).rounded(dtype)
        assert_close(leaf_bias.grad[..., None], wanted_bias, "gradient of bias")
        grad_x = testing.gemm(exact(grad), weight.mT, None, offsets).rounded(dtype)
        if indices is not None:  # the sum over a token's slots, k ascending
            grad_x = testing.combine(grad_x, (offsets, token_indices, _slots(indices, case)), None).rounded(dtype)
        assert_close(leaf.grad, grad_x, "gradient of x")


def _slots(token_indices: Tensor, case: Case) -> Tensor:
    """slot_indices [T,K] up to the order of choices."""
    slots: list[list[int]] = [[] for _ in range(case.num_tokens)]
    for slot, token in enumerate(token_indices.tolist()):
        if token >= 0:
            slots[token].append(slot)
    rows = [row + [-1] * (case.top_k - len(row)) for row in slots]
    return torch.tensor(rows, dtype=torch.int32).reshape(case.num_tokens, case.top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_of_different_heights(backend: str, dtype: torch.dtype) -> None:
    """A list of matrices: the columns beyond an expert's height are zero, and so are their gradients."""
    case = Case("ragged", 17, 2, 4, 23, 8)
    offsets, token_indices, _ = plan_of(case)
    heights = (5, 40, 1, 17)
    x, bias = draw(17, 23, dtype=dtype), draw(4, 40, dtype=dtype)
    weight = [draw(height, 23, dtype=dtype).requires_grad_() for height in heights]
    leaf, leaf_bias = x.requires_grad_(), bias.requires_grad_()
    out = switchgear.grouped_gemm(leaf, weight, offsets, bias=leaf_bias, token_indices=token_indices)
    plain = [matrix.detach() for matrix in weight]
    assert_close(
        out.detach(), testing.gemm(exact(x.detach()), plain, bias.detach(), offsets, token_indices).rounded(dtype)
    )
    grad = draw(*out.shape, dtype=dtype)
    out.backward(grad)
    wanted = testing.wgrad(exact(grad), exact(x.detach()), offsets, token_indices).rounded(dtype)
    for e, (height, matrix) in enumerate(zip(heights, weight, strict=True)):
        assert_close(matrix.grad, testing.Bounded(wanted.value[e, :height], wanted.error[e, :height]))
        assert not out[offsets[e] : offsets[e + 1], height:].any()
        assert not leaf_bias.grad[e, height:].any()
    assert leaf.grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [[], [0], [1, 3], [0, 1, 2, 3, 4]], ids=str)
def test_gradient_of_some_experts(backend: str, experts: list[int], dtype: torch.dtype) -> None:
    """The matrices of the listed experts alone, with the bits that they have among all; experts without rows too."""
    offsets = torch.tensor([0, 3, 3, 8, 9, 12], dtype=torch.int32)
    listed = torch.tensor(experts, dtype=torch.int32)
    for transposed in (False, True):
        for indices in (None, torch.tensor([4, 1, 0, 2, 3, 4, 0, 0, 1, 2, 3, 4, -1], dtype=torch.int32)):
            grad, x = draw(13, 40, dtype=dtype), draw(13 if indices is None else 5, 23, dtype=dtype)
            everything = ops.grouped_gemm_wgrad(grad, x, offsets, indices, transposed)
            some = ops.grouped_gemm_wgrad(grad, x, offsets, indices, transposed, listed)
            assert some.shape == (len(experts), 40, 23)
            assert torch.equal(some, everything[experts])
            assert (some.stride(-2) == 1) == transposed


@pytest.mark.parametrize(
    ("experts", "error"),
    [
        (torch.tensor([1, 1], dtype=torch.int32), ValueError),
        (torch.tensor([2, 1], dtype=torch.int32), ValueError),
        (torch.tensor([-1], dtype=torch.int32), ValueError),
        (torch.tensor([5], dtype=torch.int32), ValueError),
        (torch.tensor([[1]], dtype=torch.int32), ValueError),
        (torch.tensor([1]), TypeError),
    ],
    ids=str,
)
def test_wrong_lists_of_experts(backend: str, experts: Tensor, error: type[Exception]) -> None:
    offsets = torch.tensor([0, 3, 3, 8, 9, 12], dtype=torch.int32)
    with raises(error):
        ops.grouped_gemm_wgrad(torch.zeros(12, 4), torch.zeros(12, 3), offsets, None, False, experts)


def test_gradcheck() -> None:
    case = Case("tiny", 5, 2, 4, 3, 2, "holes")
    offsets, token_indices, _ = plan_of(case)
    kind = {"dtype": torch.float64}
    x, rows, weight, bias = (draw(*shape, **kind).requires_grad_() for shape in ((5, 3), (10, 3), (4, 2, 3), (4, 2)))
    gemm = switchgear.grouped_gemm
    check = torch.autograd.gradcheck
    assert check(lambda x, w, b: gemm(x, w, offsets, bias=b), (rows, weight, bias))
    assert check(lambda x, w, b: gemm(x, w, offsets, bias=b, token_indices=token_indices), (x, weight, bias))
    ragged = [draw(height, 3, **kind).requires_grad_() for height in (1, 2, 2, 1)]
    assert check(lambda x, b, *w: gemm(x, w, offsets, bias=b, token_indices=token_indices), (x, bias, *ragged))
    equal = [draw(2, 3, **kind).requires_grad_() for _ in range(4)]
    assert check(lambda x, *w: gemm(x, w, offsets), (rows, *equal))


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 5),
)
def test_small_integers_are_exact(
    backend: str, counts: list[int], rows: int, columns: int, transposed: bool, tail: int
) -> None:
    """Products of small integers need no tolerance: every shape, both storage orders, tail rows."""
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    num_slots = int(offsets[-1]) + tail
    x = torch.randint(-4, 5, (num_slots, columns)).float()
    weight = torch.randint(-4, 5, (len(counts), rows, columns)).float()
    weight = weight.mT.contiguous().mT if transposed else weight
    out = switchgear.grouped_gemm(x, weight, offsets)
    wanted = torch.zeros(num_slots, rows)
    for e in range(len(counts)):
        wanted[offsets[e] : offsets[e + 1]] = x[offsets[e] : offsets[e + 1]] @ weight[e].T
    assert torch.equal(out, wanted)
    grad_weight = ops.grouped_gemm_wgrad(out, x, offsets, None, transposed)
    sizes = zip(weight.shape, grad_weight.stride(), torch.empty_like(weight).stride(), strict=True)
    assert all(stride == like for size, stride, like in sizes if size > 1)
    for e in range(len(counts)):
        segment = slice(int(offsets[e]), int(offsets[e + 1]))
        assert torch.equal(grad_weight[e], wanted[segment].T @ x[segment])


def test_rows_that_share_memory(isa: str) -> None:
    """Expanded weights have strides of 0."""
    weight = draw(1, 1, 40, dtype=torch.float32).expand(3, 70, 40)
    for rows in (1, 30):
        x, offsets = draw(rows, 40, dtype=torch.float32), torch.tensor([0, 0, rows, rows], dtype=torch.int32)
        wanted = switchgear.grouped_gemm(x, weight.contiguous(), offsets)
        assert torch.equal(switchgear.grouped_gemm(x, weight, offsets), wanted)


def test_autocast(backend: str) -> None:
    case = Case("autocast", 6, 2, 3, 8, 4)
    offsets, token_indices, _ = plan_of(case)
    x, weight = torch.randn(6, 8), torch.randn(3, 4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = switchgear.grouped_gemm(x, weight, offsets, token_indices=token_indices)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_errors(backend: str) -> None:
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    x, weight = torch.zeros(4, 8), torch.zeros(2, 3, 8)
    with raises(ValueError):
        switchgear.grouped_gemm(x, torch.zeros(2, 3, 7), offsets)
    with raises(ValueError):
        switchgear.grouped_gemm(x, torch.zeros(3, 3, 8), offsets)
    with raises(TypeError):
        switchgear.grouped_gemm(x, weight.bfloat16(), offsets)
    with raises(ValueError):
        switchgear.grouped_gemm(x, weight, offsets, bias=torch.zeros(2, 4))
    with raises(ValueError):
        switchgear.grouped_gemm(x, [], offsets)
    with raises(ValueError, "expert_offsets"):
        switchgear.grouped_gemm(x, weight, torch.tensor([0, 5, 4], dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_of_many_slots(isa: str, dtype: torch.dtype) -> None:
    """More slots than a panel holds (1024, in bfloat16 2048), so sums continue across chunks. Their number is odd."""
    offsets = torch.tensor([0, 2053, 2053, 3078], dtype=torch.int32)
    grad, x = draw(3078, 50, dtype=dtype), draw(3078, 67, dtype=dtype)
    wanted = testing.wgrad(exact(grad), exact(x), offsets).rounded(dtype)
    for transposed in (False, True):
        assert_close(ops.grouped_gemm_wgrad(grad, x, offsets, None, transposed), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [2112, 2080, 2056])  # whole panels; whole lines; neither
def test_weight_gradient_past_the_caches(isa: str, columns: int, dtype: torch.dtype) -> None:
    """A gradient above 16 MB is written past the caches. Every element has the bits of smaller parts, which are not,
    including results that round to subnormal numbers; also in memory that does not start at a cache line."""
    offsets = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    grad, x = draw(9, 2053, dtype=dtype), draw(9, columns, dtype=dtype)
    x[:, 64:128] *= 1e-20
    grad[:, ::7] *= 1e-19
    whole = ops.grouped_gemm_wgrad(grad, x, offsets, None, False)
    assert whole.nbytes > 1 << 24
    for first in range(0, columns, 352):
        part = ops.grouped_gemm_wgrad(grad, x[:, first : first + 352].contiguous(), offsets, None, False)
        assert torch.equal(whole[:, :, first : first + 352], part)
    shifted = torch.empty(whole.numel() + 1, dtype=dtype)[1:].view(whole.shape)
    _C.grouped_gemm_wgrad((grad, x, offsets, None, None), (), (shifted,), 1)
    assert torch.equal(shifted, whole)
