# SPDX-License-Identifier: BSD-3-Clause
"""Exchanges of a fixed size: values and gradients of one process, nothing read on the host, overflow, compilation."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from parallel_pool import Pool, subgroup
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import switchgear
from errors import raises
from switchgear.adapters import add_lora
from switchgear.parallel import ExpertParallel, ExpertParallelError, Placement
from switchgear.parallel.cost import draw_routing
from switchgear.parallel.experts import exchange_moe
from switchgear.parallel.static import exchange_rows, fill_buckets

HIDDEN, EXPERTS, TOP_K = 64, 6, 3
TOKENS = (13, 40, 0, 22)


def layers(parallel: ExpertParallel, **options: Any) -> tuple[switchgear.MoE, switchgear.MoE]:
    made = []
    for group in (parallel, None):
        torch.manual_seed(1)
        made.append(switchgear.MoE(HIDDEN, 32, EXPERTS, TOP_K, parallel=group, **options))
    return made[0], made[1]


def everything(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, grad_y, topk_ids and topk_weights of all ranks; some choices are empty."""
    torch.manual_seed(2)
    total = sum(TOKENS[:size])
    x, grad = torch.randn(2, total, HIDDEN)
    ids = draw_routing(total, EXPERTS, TOP_K).masked_fill(torch.rand(total, TOP_K) < 0.2, -1)
    return x, grad, ids, torch.rand(total, TOP_K)


def close(got: Tensor, want: Tensor, terms: int) -> None:
    """Sums of terms of order 1 in another order."""
    size = 1 + float(want.abs().max()) if want.numel() else 1.0
    assert got.shape == want.shape
    assert not got.numel() or float((got - want).abs().max()) <= 4 * terms * 2.0**-24 * size


def compare(rank: int, size: int, how: str, mean: bool, options: dict[str, Any], ranks: Any) -> None:
    if rank >= size:
        return
    placement = None if ranks is None else Placement(EXPERTS, ranks)
    given: dict[str, Any] = {"average_gradients": mean, "placement": placement}
    with ExpertParallel(subgroup(size), timeout=20, capacity=40, **given) as parallel:
        moe, whole = layers(parallel, **options)
        mine = list(moe.experts.placement.experts_of_rank[rank])
        for layer, held in ((moe, mine), (whole, list(range(EXPERTS)))):
            if how == "int8":
                layer.requires_grad_(False)
                switchgear.store(layer, "int8")
            if how == "adapters":
                for number, adapter in enumerate(add_lora(layer.experts, 3)):
                    values = torch.randn(EXPERTS, *adapter.shape[1:], generator=torch.Generator().manual_seed(number))
                    with torch.no_grad():
                        adapter.copy_(values[held] * 0.2)
        x, grad, ids, weights = everything(size)
        begin = sum(TOKENS[:rank])
        part = slice(begin, begin + TOKENS[rank])
        own = [t.clone().requires_grad_() for t in (x[part], weights[part])]
        all_of = [t.clone().requires_grad_() for t in (x, weights)]
        y, want = moe.experts(own[0], ids[part], own[1]), whole.experts(all_of[0], ids, all_of[1])
        close(y, want[part], HIDDEN + TOP_K)
        y.backward(grad[part])
        want.backward(grad)
        loose = 2**14 if how == "int8" else HIDDEN * 32
        for ours, theirs in zip(own, all_of, strict=True):
            close(ours.grad, theirs.grad[part], loose)
        scale = size if mean else 1
        for ours, theirs in zip(moe.experts.parameters(), whole.experts.parameters(), strict=True):
            if theirs.grad is not None:
                assert ours.grad is not None
                close(ours.grad, theirs.grad[mine] / scale, HIDDEN * 32)
        with torch.no_grad():
            close(moe.experts(own[0], ids[part], own[1]), want[part], HIDDEN + TOP_K)
        assert parallel.overflow.count() == 0
        away = 40 * (size - 1)
        row = HIDDEN * 4
        assert parallel.record.bytes["dispatch"] == 2 * away * (row + 8 * TOP_K)
        assert parallel.record.bytes["combine"] == 2 * away * row


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mean", [True, False])
def test_sizes(pool: Pool, size: int, mean: bool) -> None:
    pool.run(compare, size, "plain", mean, {}, None)


SCATTERED, TWO_WITHOUT = ((1, 5), (0,), (2, 3), (4,)), ((0, 1, 2), (), (3, 4, 5), ())


@pytest.mark.parametrize(
    ("ranks", "how"),
    [(SCATTERED, "plain"), (TWO_WITHOUT, "plain"), (SCATTERED, "int8"), (SCATTERED, "adapters"),
     (TWO_WITHOUT, "adapters")],
)  # fmt: skip
def test_placements_and_kinds_of_experts(pool: Pool, ranks: Any, how: str) -> None:
    pool.run(compare, 4, how, False, {}, ranks)


def test_options(pool: Pool) -> None:
    pool.run(compare, 4, "plain", True, {"transposed": True, "bias": True}, None)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_buckets() -> None:
    """Token by token: the first ones of each rank fit, and an id that no expert has counts as empty."""
    rank_of, local_of = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    ids = torch.tensor([[0, 1], [2, -1], [1, 2], [7, 2], [0, -3]], dtype=torch.int32)
    got = fill_buckets(ids, rank_of, local_of, 2, 2)
    assert got.token_of_row.tolist() == [0, 2, 1, 2]
    assert got.ids.tolist() == [[0, 1], [1, -1], [0, -1], [-1, 0]]
    assert got.row_table.tolist() == [[0, 4], [2, 4], [1, 3], [4, 4], [4, 4]]
    assert got.overflow.tolist() == [1, 1, 2]


def dropped(rank: int) -> tuple[int, int]:
    """Tokens in excess have no result from the rank that was full."""
    with ExpertParallel(timeout=20, capacity=3, overflow="drop", average_gradients=False) as parallel:
        moe, whole = layers(parallel)
        x, _, ids, weights = everything(4)
        begin = sum(TOKENS[:rank])
        part = slice(begin, begin + TOKENS[rank])
        seen = [0] * 4
        count = 0
        kept = ids[part].clone()
        for choices in kept:
            for owner in range(4):
                here = torch.isin(choices, torch.tensor(parallel.placement(EXPERTS).experts_of_rank[owner]))
                if bool(here.any()):
                    seen[owner] += 1
                    if seen[owner] > 3:
                        count += 1
                        choices[here] = -1
        y, want = moe.experts(x[part], ids[part], weights[part]), whole.experts(x[part], kept, weights[part])
        close(y, want, HIDDEN + TOP_K)
        moe.experts(x[part], ids[part], weights[part])
        return parallel.overflow.count(), 2 * count


def test_overflow_is_dropped_and_counted(pool: Pool) -> None:
    counts = pool.run(dropped)
    assert all(got == want for got, want in counts)
    assert sum(got for got, _ in counts) > 50


def call(chosen: Tensor) -> None:
    with ExpertParallel(timeout=20, capacity=4) as parallel:
        layers(parallel)[0].experts(torch.randn(len(chosen), HIDDEN), chosen, torch.rand(chosen.shape))


def raised(rank: int, ids: list[list[int]]) -> str:
    with pytest.raises((ValueError, ExpertParallelError)) as error:
        call(torch.tensor(ids if rank == 1 else [[0, 1, 2]] * 4, dtype=torch.int32))
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0, 1, -1]] * 6, "capacity: "),
     ([[0, 1, 6]], "topk_ids: ")],
)  # fmt: skip
def test_overflow_raises_on_all_ranks(pool: Pool, ids: list[list[int]], message: str) -> None:
    answers = pool.run(raised, ids)
    assert answers[1].startswith(f"ValueError: {message}")
    assert answers[0] == answers[2] == answers[3]
    assert "rank 1 raised" in answers[0]
    assert message in answers[0]


def different(rank: int) -> str:
    with pytest.raises(ExpertParallelError) as error, ExpertParallel(timeout=20, capacity=4 + (rank == 3)) as parallel:
        layers(parallel)[0](torch.randn(2, HIDDEN))
    return str(error.value)


def test_capacities_must_agree(pool: Pool) -> None:
    answers = pool.run(different)
    assert len(set(answers)) == 1
    assert "rank 3 disagrees" in answers[0]
    assert "capacity: " in answers[0]


def test_what_a_capacity_excludes() -> None:
    for options in ({"invariant": True}, {"wire": "fp8"}, {"num_chunks": 2}, {"tp_group": [0]}):
        with raises(ValueError, "capacity"):
            ExpertParallel(capacity=4, **options)
    with raises(ValueError, "capacity"):
        ExpertParallel(capacity=0)
    with raises(ValueError, "overflow"):
        ExpertParallel(capacity=4, overflow="ignore")
    with ExpertParallel(capacity=4) as parallel:
        layer = layers(parallel)[0].experts._layer
        with raises(ValueError, "capacity"):
            exchange_moe(layer, torch.zeros(1, HIDDEN), torch.zeros(1, 1), torch.zeros(1, 1), None, None)


def test_a_copy_outlives_the_original() -> None:
    with ExpertParallel(capacity=8) as parallel:
        moe, whole = layers(parallel)
        x = torch.randn(8, HIDDEN)
        with torch.no_grad():
            wanted = whole(x)
        moe = copy.deepcopy(copy.copy(moe))
        gc.collect()
        y = moe(x)
        close(y.detach(), wanted, TOP_K * 32)
        y.sum().backward()


def copies(rank: int) -> None:
    ranks = ((0, 1, 2), (3, 4, 5), (0, 1, 2), (3, 4, 5))
    with ExpertParallel(timeout=20, capacity=4, nodes=2, placement=Placement(EXPERTS, ranks)) as parallel:
        assert parallel.levels == 1
        with raises(ValueError, "placement"):
            layers(parallel)


def test_a_capacity_excludes_copies(pool: Pool) -> None:
    pool.run(copies)


def test_rows_of_any_strides() -> None:
    rows, numbers = torch.randn(HIDDEN, 5).T, torch.randn(3, 5).T
    with ExpertParallel(capacity=5) as parallel:
        experts = layers(parallel)[0].experts
        moved = exchange_rows([rows, numbers], experts._number, "combine", None)
    assert all(map(torch.equal, moved, (rows, numbers)))
    assert all(part.is_contiguous() for part in moved)


# ---- nothing is read on the host -------------------------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Raises for ops whose results the host reads, or whose shapes depend on values."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique"), name
        assert not (name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1])), name
        return function(*args, **kwargs or {})


def compiled(rank: int, how: str) -> None:
    """Forward and backward as one graph each, with the results of the layer as it is."""
    with ExpertParallel(timeout=100, capacity=40) as parallel:
        moe, _ = layers(parallel)
        x = torch.randn(TOKENS[rank], HIDDEN)
        results = []
        run = torch.compile(moe, fullgraph=True, backend=how) if how != "eager" else moe
        for function in (moe, run):
            moe.zero_grad()
            leaf = x.clone().requires_grad_()
            if how == "eager":
                with NoReads():
                    y = function(leaf)
                    y.square().sum().backward()
            else:
                y = function(leaf)
                y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in moe.parameters())])
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
@pytest.mark.some(1)
def test_nothing_is_read(pool: Pool, how: str) -> None:
    pool.run(compiled, how, timeout=150)


def test_sizes_that_depend_on_the_routing_would_be_noticed() -> None:
    with raises(AssertionError), NoReads():
        torch.ones(3).nonzero()
    with ExpertParallel() as parallel, pytest.raises(AssertionError), NoReads():
        layers(parallel)[0](torch.randn(4, HIDDEN))
