# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import raises
from switchgear.parallel import Placement, place_experts
from switchgear.routing import Router


def test_contiguous() -> None:
    assert Placement.contiguous(5, 3).experts_of_rank == ((0, 1), (2, 3), (4,))
    assert Placement.contiguous(2, 4).experts_of_rank == ((0,), (1,), (), ())


@pytest.mark.parametrize("ranks", [((0,), (2,)), ((0, 0), (1, 2)), ((1, 0), (2,)), ((0, 1, 2), (3,))])
def test_wrong_placements(ranks: tuple[tuple[int, ...], ...]) -> None:
    with raises(ValueError, "experts_of_rank"):
        Placement(3, ranks)


def test_copies_are_reached_near_and_spread() -> None:
    placement = Placement(3, ((0, 1), (0, 2), (1, 2), (2,)))
    assert placement.replicated == (0, 1, 2)
    assert placement.routes(0)[0].tolist() == [0, 0, 1]
    assert placement.routes(2)[0].tolist() == [0, 2, 2]
    assert placement.routes(3)[0].tolist() == [1, 2, 3]
    assert placement.routes(3)[1].tolist() == [0, 0, 0]


def test_repeated_experts_stay_together() -> None:
    placement = Placement(3, ((0, 2), (1, 2), ())).repeat([2, 1, 3])
    assert placement == Placement(6, ((0, 1, 3, 4, 5), (2, 3, 4, 5), ()))


@given(
    load=st.lists(st.integers(0, 1000), min_size=1, max_size=24),
    num_ranks=st.integers(1, 6),
    share=st.floats(0, 1),
)
def test_place_experts_balances(load: list[int], num_ranks: int, share: float) -> None:
    """No rank exceeds its capacity, and copies are on different ranks (Placement checks that)."""
    replicas = int(share * len(load) * (num_ranks - 1))
    placement = place_experts(load, num_ranks, num_replicas=replicas)
    assert sum(map(len, placement.experts_of_rank)) == len(load) + replicas
    assert max(map(len, placement.experts_of_rank)) <= -(-(len(load) + replicas) // num_ranks)


def test_a_trace_is_balanced_better_than_by_number() -> None:
    torch.manual_seed(0)
    weights = 1 / torch.arange(1, 65).float()
    trace = torch.multinomial(weights.expand(4096, -1), 4)
    load = torch.bincount(trace.flatten(), minlength=64)

    def worst(placement: Placement) -> float:
        return max(placement.load_of_rank(load)) * 8 / float(load.sum())

    assert worst(Placement.contiguous(64, 8)) > 2.0
    # One expert alone has 1.27 times the mean, and its rank must hold seven more; replicas help.
    assert worst(place_experts(trace, 8)) < 1.5
    assert worst(place_experts(trace, 8, num_replicas=8)) < 1.02


def test_an_expert_moves_where_a_copy_has_no_other_place() -> None:
    """2 and 0 fill rank 0, as they are never busy together. Expert 1 has two copies: 0, lighter than 2, moves."""
    correlation = torch.eye(3)
    correlation[0, 2] = correlation[2, 0] = -0.9
    found = place_experts([5, 7, 7], 2, num_replicas=1, correlation=correlation, method="anticorrelation")
    assert found.experts_of_rank == ((1, 2), (0, 1))
    assert place_experts([], 2) == Placement(0, ((), ()))


def test_place_experts_refuses_more_copies_than_ranks() -> None:
    with raises(ValueError, "num_replicas"):
        place_experts([1, 2], 2, num_replicas=3)


def loads_by_batch(num_experts: int = 8, seed: int = 0) -> torch.Tensor:
    """[E, batches]: experts of two kinds, busy in turns, with skewed sizes; of each size there is one of each kind."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 100.0 / torch.arange(1, num_experts // 2 + 1).repeat_interleave(2)
    kind = torch.arange(num_experts) % 2
    busy = torch.rand(200, generator=generator) < 0.5
    noise = torch.rand(num_experts, 200, generator=generator)
    return sizes[:, None] * torch.where(kind[:, None] == busy, 1.0, 0.05) * (1 + 0.1 * noise)


def test_row38_anticorrelated_experts_are_together() -> None:
    """The busiest rank of each batch, averaged. Experts of equal loads, busy in turns: by loads alone, those that are
    busy together share a rank; apart, they share the work."""
    for seed in range(5):
        batches = loads_by_batch(seed=seed)
        batches = batches / batches.mean(1, keepdim=True)

        def busiest(placement: Placement, batches: torch.Tensor = batches) -> float:
            ranks = torch.stack([batches[list(experts)].sum(0) for experts in placement.experts_of_rank])
            return float(ranks.amax(0).mean() / ranks.mean(0).mean())

        load, options = [1] * 8, {"correlation": torch.corrcoef(batches), "method": "anticorrelation"}
        assert busiest(place_experts(load, 2, **options)) < 1.1  # type: ignore[arg-type]
        assert busiest(place_experts(load, 2)) > 1.8


def test_row38_the_factor_by_hand() -> None:
    """Shares 6/12, 3/12, 2/12, 1/12 on two ranks: 0 and 1 are apart. Greedy gives 2 the rank of 1. Beside 1, with which
    it goes, 2 sees 3/12 + 0.6/2 there, and 6/12 beside 0."""
    load, correlation = [6, 3, 2, 1], torch.eye(4)
    correlation[1, 2] = correlation[2, 1] = 0.6
    assert place_experts(load, 2).experts_of_rank == ((0, 3), (1, 2))
    apart = place_experts(load, 2, correlation=correlation, method="anticorrelation")
    assert apart.experts_of_rank == ((0, 2), (1, 3))
    none = place_experts(load, 2, correlation=torch.zeros(4, 4), method="anticorrelation")
    assert none == place_experts(load, 2)
    idle = place_experts([0, 0, 0, 0], 2, correlation=correlation, method="anticorrelation")
    assert idle == place_experts([0, 0, 0, 0], 2)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_row38_experts_go_where_the_formula_of_the_paper_is_least(num_ranks: int) -> None:
    """Σ_m P_mn (A_m + S_am / 2) for expert a on rank n: A the mean share of a batch's tokens, S its correlation."""
    for seed in range(10):
        shares = torch.rand(8, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        shares = shares / shares.sum(0)
        mean, together = shares.mean(1), torch.corrcoef(shares)
        ranks: list[list[int]] = [[] for _ in range(num_ranks)]
        for a in sorted(range(8), key=lambda e: -float(mean[e])):
            free = [n for n in range(num_ranks) if len(ranks[n]) < 8 // num_ranks]
            ranks[min(free, key=lambda n: sum(float(mean[m] + together[a, m] / 2) for m in ranks[n]))].append(a)
        found = place_experts(1000 * mean, num_ranks, correlation=together, method="anticorrelation")
        assert [list(experts) for experts in found.experts_of_rank] == [sorted(rank) for rank in ranks]


def test_row38_no_rank_has_more_than_round_robin() -> None:
    """On recorded traces: tokens of a router whose experts are unequally popular."""
    for seed in range(10):
        torch.manual_seed(seed)
        gate = Router(16, 16, 2, bias=True)
        with torch.no_grad():
            gate.bias.copy_(torch.randn(16).mul(0.3).sort().values)
            ids = gate(torch.randn(512, 16)).topk_ids
        load = torch.bincount(ids.flatten(), minlength=16)
        for num_ranks in (2, 4):
            turns = Placement(16, tuple(tuple(range(rank, 16, num_ranks)) for rank in range(num_ranks)))
            found = place_experts(load, num_ranks)
            assert max(found.load_of_rank(load)) <= max(turns.load_of_rank(load))


def test_row38_a_method_without_what_it_needs() -> None:
    for words, options in [
        ("correlation", {"method": "anticorrelation"}),
        ("correlation", {"correlation": torch.eye(2)}),
        ("correlation", {"correlation": torch.eye(3), "method": "anticorrelation"}),
        ("correlation", {"correlation": 2 * torch.eye(2), "method": "anticorrelation"}),
        ("method", {"method": "best"}),
    ]:
        with raises(ValueError, words):
            place_experts([1, 2], 2, **options)  # type: ignore[arg-type]
