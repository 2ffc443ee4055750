# SPDX-License-Identifier: BSD-3-Clause
"""Rows in 8 bits: the stated error, and layers that compute what one process does with rows rounded in the same way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_pool import Pool, subgroup
from torch import Tensor

import switchgear
from errors import raises
from switchgear.parallel import ExpertParallel
from switchgear.parallel.rows import WIRES, Fp8

HIDDEN, EXPERTS, TOP_K = 24, 6, 3
SMALLEST = 2.0**-10 / 448  # half a step of the smallest numbers, of the largest element of a row


def rounded(rows: Tensor) -> Tensor:
    form = Fp8()
    return form.decode(form.encode(rows), rows.dtype)


@given(
    st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_the_error_is_as_stated(values: list[list[float]], dtype: torch.dtype) -> None:
    rows = torch.tensor(values, dtype=torch.float64).to(dtype)
    rows = rows[rows.isfinite().all(1)]
    got, want = rounded(rows).double(), rows.double()
    largest = want.abs().amax(1, keepdim=True) if len(rows) else want.new_zeros(0, 1)
    relative = (1 + 2.0**-22) * torch.maximum(want.abs() * 2.0**-4, largest * SMALLEST)
    # of the dtype, also for what is too small for its normal numbers, and for a scale below those of float32
    rounding = want.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal + 2.0**-117
    assert bool(((got - want).abs() <= relative + rounding).all()), (got - want).abs().max()


def test_odd_rows() -> None:
    rows = torch.tensor([[0.0, 0.0], [448.0, -448.0], [1e-38, 1e-39], [float("inf"), 1.0], [float("nan"), 2.0]])
    got = rounded(rows)
    assert torch.equal(got[:2], rows[:2])
    assert bool(((got[2] - rows[2]).abs() <= 1e-38 / 16).all())
    assert bool(got[3:].isnan().all())
    assert rounded(torch.zeros(0, 5)).shape == (0, 5)
    assert Fp8().encode(torch.zeros(3, 5)).shape == (3, 9)
    assert Fp8().row_bytes(5, 4) == 9


def one_process(moe: switchgear.MoE, x: Tensor, ids: Tensor, weights: Tensor, both_ways: bool) -> Tensor:
    """With `invariant`: a row per choice, summed in float32, experts ascending."""
    rows = rounded(x)
    order = ids.argsort(dim=1, stable=True)
    total = torch.zeros_like(x)
    for column in order.unbind(1):
        chosen = column[:, None]
        y = moe.experts(rows, ids.gather(1, chosen), torch.ones(len(x), 1))
        total += (rounded(y) if both_ways else y) * weights.gather(1, chosen)
    return total


def compare(rank: int, wire: str, nodes: Any, size: int) -> Tensor:
    """Returns y of all ranks' tokens."""
    if rank >= size:
        return torch.empty(0)
    torch.manual_seed(2)
    tokens = 40
    x, grad = torch.randn(2, tokens, HIDDEN)
    mine = slice(tokens * rank // size, tokens * (rank + 1) // size)
    options = {"wire": wire, "nodes": nodes, "invariant": True, "num_chunks": 2}
    with ExpertParallel(subgroup(size), timeout=20, **options) as parallel:
        layers = []
        for group in (parallel, None):
            torch.manual_seed(1)
            layers.append(switchgear.MoE(HIDDEN, 20, EXPERTS, TOP_K, parallel=group))
        moe, whole = layers
        routing = whole.gate(x)
        ids, weights = routing.topk_ids, routing.topk_weights.detach()
        leaf = x[mine].clone().requires_grad_()
        y = moe.experts(leaf, ids[mine], weights[mine])
        with torch.no_grad():
            want = one_process(whole, x, ids, weights, wire == "fp8")
        # products of 24 and 20 terms and a sum of 3 rows, in any order of fused multiply-adds
        torch.testing.assert_close(y, want[mine], rtol=1e-5, atol=1e-6)
        assert not torch.equal(want, whole.experts(x, ids, weights))
        y.backward(grad[mine])
        exact = x.clone().requires_grad_()
        whole.experts(exact, ids, weights).backward(grad)
        # gradients pass the roundings straight through, and are rounded themselves: four roundings of at most 2^-4
        assert (leaf.grad - exact.grad[mine]).norm() < 4 * 2.0**-4 * exact.grad[mine].norm()
        row = HIDDEN + 4
        sent = parallel.record.bytes["dispatch"] + parallel.record.bytes["dispatch within"]
        assert sent % row == 0
        back = HIDDEN * 4 if wire == "fp8_dispatch" else row
        assert (parallel.record.bytes["combine"] + parallel.record.bytes["combine within"]) % back == 0
        return y.detach()


@pytest.mark.parametrize("wire", ["fp8", "fp8_dispatch"])
def test_layers(pool: Pool, wire: str) -> None:
    """The same bits on 1, 2 and 4 ranks and with two levels."""
    alone = pool.run(compare, wire, None, 1)[0]
    for nodes, size in ((None, 2), (None, 4), (2, 4), (((0, 2, 3), (1,)), 4)):
        assert torch.equal(torch.cat(pool.run(compare, wire, nodes, size)[:size]), alone), (nodes, size)


def sums(rank: int, nodes: Any, dtype: torch.dtype) -> None:
    """Without `invariant`: rows are rounded once more for each level."""
    torch.manual_seed(rank)
    x = torch.randn(30, HIDDEN, dtype=dtype)
    results = []
    for wire in WIRES:
        torch.manual_seed(1)
        with ExpertParallel(timeout=20, wire=wire, nodes=nodes, num_chunks=4) as parallel:
            moe = switchgear.MoE(HIDDEN, 20, EXPERTS, TOP_K, parallel=parallel, dtype=dtype)
            results.append(moe(x).float().detach())
    exact = results[0].norm()
    assert 0 < (results[2] - results[0]).norm() < 2.0**-4 * exact
    assert 0 < (results[1] - results[0]).norm() < 3 * 2.0**-4 * exact


@pytest.mark.parametrize("nodes", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums(pool: Pool, nodes: Any, dtype: torch.dtype) -> None:
    pool.run(sums, nodes, dtype)


def test_unknown_formats_are_refused() -> None:
    with raises(ValueError, "wire"):
        ExpertParallel(wire="fp4")
