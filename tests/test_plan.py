# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import switchgear
from errors import raises
from switchgear import reference
from switchgear.testing import CASES, Case, topk_ids_of


def check(topk_ids: Tensor, num_experts: int) -> None:
    """The definition, slot by slot, and the same bits as the reference."""
    expert_offsets, token_indices, slot_indices = plan = switchgear.plan(topk_ids, num_experts)
    assert all(part.dtype == torch.int32 for part in plan)
    assert all(torch.equal(a, b) for a, b in zip(plan, reference.plan(topk_ids, num_experts), strict=True))

    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.tolist()
    pairs = sorted((ids[t][k], t, k) for t in range(num_tokens) for k in range(top_k) if ids[t][k] >= 0)
    counts = [sum(expert == e for expert, _, _ in pairs) for e in range(num_experts)]
    assert expert_offsets.tolist() == [sum(counts[:e]) for e in range(num_experts + 1)]
    assert token_indices.tolist() == [t for _, t, _ in pairs] + [-1] * (num_tokens * top_k - len(pairs))
    slots = {(t, k): slot for slot, (_, t, k) in enumerate(pairs)}
    assert slot_indices.tolist() == [[slots.get((t, k), -1) for k in range(top_k)] for t in range(num_tokens)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan(backend: str, case: Case) -> None:
    check(topk_ids_of(case), case.num_experts)


@given(st.data())
def test_any_ids(backend: str, data: st.DataObject) -> None:
    num_experts, top_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k)
    rows = data.draw(st.lists(row, max_size=30))
    check(torch.tensor(rows, dtype=torch.int32).reshape(len(rows), top_k), num_experts)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_many_tokens(backend: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    topk_ids = torch.randint(-1, 64, (5000, 4), dtype=torch.int32)
    plan = switchgear.plan(topk_ids, 64)
    assert all(torch.equal(a, b) for a, b in zip(plan, reference.plan(topk_ids, 64), strict=True))


def test_int64_and_strides(backend: str) -> None:
    topk_ids = torch.randint(-1, 6, (2, 9)).t()
    assert all(
        torch.equal(a, b)
        for a, b in zip(switchgear.plan(topk_ids, 6), switchgear.plan(topk_ids.int().contiguous(), 6), strict=True)
    )


@pytest.mark.parametrize("bad", [4, -2, 2**31 - 1, -(2**31), 2**31, 2**32, -(2**63)])
def test_bad_ids(backend: str, bad: int) -> None:
    topk_ids = torch.zeros(3, 2, dtype=torch.int64)
    topk_ids[1, 1] = bad
    with raises(ValueError, "topk_ids"):
        switchgear.plan(topk_ids, 4)


def test_errors(backend: str) -> None:
    with raises(TypeError, "topk_ids"):
        switchgear.plan(torch.zeros(3, 2), 4)
    with raises(ValueError, "topk_ids"):
        switchgear.plan(torch.zeros(3, dtype=torch.int32), 4)
    with raises(ValueError, "num_experts"):
        switchgear.plan(torch.zeros(3, 2, dtype=torch.int32), 0)
