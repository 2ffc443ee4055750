# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchgear.parallel import Placement, place_experts


def test_contiguous() -> None:
    assert Placement.contiguous(5, 3).experts_of_rank == ((0, 1), (2, 3), (4,))
    assert Placement.contiguous(2, 4).experts_of_rank == ((0,), (1,), (), ())


@pytest.mark.parametrize("ranks", [((0,), (2,)), ((0, 0), (1, 2)), ((1, 0), (2,)), ((0, 1, 2), (3,))])
def test_wrong_placements(ranks: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="experts_of_rank: expected"):
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


def test_place_experts_refuses_more_copies_than_ranks() -> None:
    with pytest.raises(ValueError, match="num_replicas: expected 0 to 2"):
        place_experts([1, 2], 2, num_replicas=3)
