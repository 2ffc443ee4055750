# SPDX-License-Identifier: BSD-3-Clause
"""permute and combine, which are transposes of each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import switchgear
from errors import raises
from switchgear import reference, testing
from switchgear.testing import CASES, Case, assert_close, exact, times, topk_ids_of

pytestmark = pytest.mark.in_turns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(case: Case, dtype: torch.dtype) -> tuple[switchgear.Plan, Tensor, Tensor, Tensor]:
    """plan, x [T,H], permuted_y [S,H], topk_weights"""
    topk_ids = topk_ids_of(case)
    x = torch.randn(case.num_tokens, case.hidden_size).to(dtype)
    permuted_y = torch.randn(topk_ids.numel(), case.hidden_size).to(dtype)
    return switchgear.plan(topk_ids, case.num_experts), x, permuted_y, torch.randn(topk_ids.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_permute(backend: str, case: Case, dtype: torch.dtype) -> None:
    plan, x, grad, weights = draw(case, dtype)
    rows = reference.gather_rows(x, plan.token_indices)
    assert torch.equal(switchgear.permute(x, plan), rows)
    slot_weights = reference.to_slots(weights, plan.slot_indices)[:, None]
    leaf, leaf_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    permuted_x = switchgear.permute(leaf, plan, leaf_weights)
    assert_close(permuted_x.detach(), times(exact(rows), exact(slot_weights)).rounded(dtype))

    permuted_x.backward(grad)
    assert_close(leaf.grad, testing.combine(exact(grad), plan, weights).rounded(dtype), "gradient of x")
    each = testing.row_dot(
        exact(reference.gather_rows(grad, plan.slot_indices)), exact(x[:, None].expand(-1, case.top_k, -1))
    )
    assert_close(leaf_weights.grad, each.rounded(torch.float32), "gradient of topk_weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_combine(backend: str, case: Case, dtype: torch.dtype) -> None:
    plan, grad, permuted_y, weights = draw(case, dtype)
    assert_close(switchgear.combine(permuted_y, plan), testing.combine(exact(permuted_y), plan, None).rounded(dtype))
    leaf, leaf_weights = permuted_y.clone().requires_grad_(), weights.clone().requires_grad_()
    y = switchgear.combine(leaf, plan, leaf_weights)
    assert_close(y.detach(), testing.combine(exact(permuted_y), plan, weights).rounded(dtype))

    y.backward(grad)
    rows = reference.gather_rows(grad, plan.token_indices)
    slot_weights = reference.to_slots(weights, plan.slot_indices)[:, None]
    assert_close(leaf.grad, times(exact(rows), exact(slot_weights)).rounded(dtype), "gradient of permuted_y")
    rows_of_tokens = reference.gather_rows(permuted_y, plan.slot_indices)
    each = testing.row_dot(exact(rows_of_tokens), exact(grad[:, None].expand(-1, case.top_k, -1)))
    assert_close(leaf_weights.grad, each.rounded(torch.float32), "gradient of topk_weights")
    assert not leaf_weights.grad[plan.slot_indices < 0].any()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.some(8)
def test_gradcheck(case: Case) -> None:
    small = case._replace(num_tokens=min(case.num_tokens, 5), hidden_size=3, top_k=min(case.top_k, 3))
    plan, x, permuted_y, weights = draw(small, torch.float64)
    x, permuted_y, weights = (t.double().requires_grad_() for t in (x, permuted_y, weights))
    assert torch.autograd.gradcheck(lambda x: switchgear.permute(x, plan), (x,))
    assert torch.autograd.gradcheck(lambda x, w: switchgear.permute(x, plan, w), (x, weights))
    assert torch.autograd.gradcheck(lambda y: switchgear.combine(y, plan), (permuted_y,))
    assert torch.autograd.gradcheck(lambda y, w: switchgear.combine(y, plan, w), (permuted_y, weights))


@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 40))
def test_combine_undoes_permute(backend: str, num_tokens: int, top_k: int, hidden_size: int) -> None:
    """Exactly with one choice per token; with K equal ones, K times x, exact for small integers."""
    topk_ids = torch.randint(0, 5, (num_tokens, top_k), dtype=torch.int32)
    plan = switchgear.plan(topk_ids, 5)
    x = torch.randint(-50, 50, (num_tokens, hidden_size)).float()
    assert torch.equal(switchgear.combine(switchgear.permute(x, plan), plan), top_k * x)


def test_tail_rows_do_not_matter(backend: str) -> None:
    """combine reads neither rows past expert_offsets[E] nor weights of empty choices."""
    plan, _, permuted_y, weights = draw(Case("tail", 11, 3, 4, 9, 4, "holes"), torch.float32)
    wanted = switchgear.combine(permuted_y, plan, weights)
    permuted_y[int(plan.expert_offsets[-1]) :] = torch.nan
    weights[plan.slot_indices < 0] = torch.nan
    assert torch.equal(switchgear.combine(permuted_y, plan, weights), wanted)
    assert not switchgear.permute(torch.ones(11, 9), plan, weights).isnan().any()


def test_errors(backend: str) -> None:
    plan, x, permuted_y, weights = draw(Case("errors", 4, 2, 3, 5, 4), torch.float32)
    with raises(ValueError):
        switchgear.permute(x[:3], plan)
    with raises(ValueError, "permuted_y"):
        switchgear.combine(permuted_y[:3], plan)
    with raises(ValueError, "topk_weights"):
        switchgear.combine(permuted_y, plan, weights[:, :1])
    with raises(TypeError, "token_indices"):
        switchgear.permute(x, plan._replace(token_indices=plan.token_indices.long()))
