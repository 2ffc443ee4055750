# SPDX-License-Identifier: BSD-3-Clause
"""allocate_bits: against all allocations, against scipy, and EdgeMoE's rule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear.compress import ExpertErrors, allocate_bits, packed_bytes

BITS = (1, 2, 3)


def made_errors(seed: int, num_experts: int = 8) -> ExpertErrors:
    generator = torch.Generator().manual_seed(seed)
    random = [torch.rand(num_experts, generator=generator, dtype=torch.float64) for _ in range(3)]
    error = random[0][:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    error = error * (1 + torch.rand(num_experts, 3, generator=generator, dtype=torch.float64))
    return ExpertErrors(BITS, {"layer": error}, {"layer": random[1]}, {"layer": random[2]})


def cost_of(errors: ExpertErrors, alpha: float = 1.0, beta: float = 1.5, gamma: float = 2.0) -> Tensor:
    phi, w, epsilon = errors.frequencies["layer"], errors.weights["layer"], errors.errors["layer"]
    return (phi**alpha * w**beta)[:, None] * epsilon**gamma


def brute_force(cost: Tensor, average: float) -> tuple[float, tuple[int, ...]]:
    """The least cost of all 3^8 allocations within the budget, with a 3 and a 2 in each."""
    best, found = math.inf, ()
    for choice in itertools.product(range(len(BITS)), repeat=len(cost)):
        widths = [BITS[column] for column in choice]
        if sum(widths) <= average * len(cost) and 3 in widths and 2 in widths:
            total = math.fsum(float(cost[expert, column]) for expert, column in enumerate(choice))
            if total < best:
                best, found = total, tuple(widths)
    return best, found


@pytest.mark.parametrize("average", [1.4, 1.625, 2.0, 2.5, 2.9, 3.0])
def test_row48_equals_brute_force(average: float) -> None:
    errors = made_errors(0)
    least, widths = brute_force(cost_of(errors), average)
    found = allocate_bits(errors, average=average)
    assert tuple(found["layer"]) == widths
    assert found.costs["layer"] == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_row48_equals_an_integer_programme(seed: int) -> None:
    """scipy.optimize.milp with the paper's constraints."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    import numpy as np

    errors = made_errors(seed, 12)
    cost = cost_of(errors).numpy()
    count = len(cost)
    one_each = np.kron(np.eye(count), np.ones(3))
    budget = np.tile(np.array(BITS), count)
    some_3, some_2 = np.tile([0, 0, 1], count), np.tile([0, 1, 0], count)
    solved = optimize.milp(
        cost.reshape(-1),
        integrality=np.ones(3 * count),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(budget, 0, 2.25 * count),
            optimize.LinearConstraint(np.stack([some_3, some_2]), 1, np.inf),
        ],
        options={"mip_rel_gap": 0},
    )
    found = allocate_bits(errors, average=2.25)
    assert found.costs["layer"] == pytest.approx(solved.fun, rel=1e-9)


def test_row48_at_least_one_of_three_and_of_two_bits() -> None:
    """Costs that favour ones and threes alone still give one two; other demands are met, too."""
    cost = {"layer": torch.tensor([[0.0, 9.0, 8.0]] * 4)}
    assert sorted(allocate_bits(cost, BITS, 3.0)["layer"]) == [1, 1, 2, 3]
    assert allocate_bits(cost, BITS, 3.0, at_least={})["layer"] == [1, 1, 1, 1]
    assert sorted(allocate_bits(cost, BITS, 3.0, at_least={2: 3})["layer"]) == [1, 2, 2, 2]


def test_row48_exponents() -> None:
    """alpha is that of the frequency, beta of the weight, gamma of the error."""
    errors = made_errors(3)
    for powers in ({"alpha": 3.0}, {"beta": 0.0}, {"gamma": 0.5}):
        least, widths = brute_force(cost_of(errors, **powers), 2.0)
        found = allocate_bits(errors, average=2.0, **powers)
        assert tuple(found["layer"]) == widths, powers
        assert found.costs["layer"] == pytest.approx(least, rel=1e-12)


def test_many_experts() -> None:
    """512 experts: as good as Lagrange's bound, within the cost of one expert."""
    errors = made_errors(1, 512)
    cost = cost_of(errors)
    found = allocate_bits(errors, average=2.0)
    assert found.average <= 2.0
    bound = max(
        float((cost + price * torch.tensor(BITS, dtype=torch.float64)).amin(1).sum()) - price * 2.0 * len(cost)
        for price in torch.logspace(-8, 0, 400, dtype=torch.float64).tolist()
    )
    assert bound <= found.costs["layer"] + 1e-12
    assert found.costs["layer"] <= bound + float(cost.amax())


def test_row42_tolerance() -> None:
    """EdgeMoE: experts go to the lower width in order of their error while the sum is tolerated."""
    error = {"layer": torch.tensor([[5.0, 2.0, 0.1], [1.0, 0.5, 0.1], [3.0, 1.0, 0.1]])}
    bits = (2, 4, 8)
    assert allocate_bits(error, bits, tolerance=0.2)["layer"] == [8, 8, 8]  # even the widest exceeds it
    assert allocate_bits(error, bits, tolerance=0.75)["layer"] == [8, 4, 8]  # 0.1 + 0.5 + 0.1
    assert allocate_bits(error, bits, tolerance=1.65)["layer"] == [8, 4, 4]
    assert allocate_bits(error, bits, tolerance=3.5)["layer"] == [4, 4, 4]
    assert allocate_bits(error, bits, tolerance=4.0)["layer"] == [4, 2, 4]
    assert allocate_bits(error, bits, tolerance=9.0)["layer"] == [2, 2, 2]
    nothing = {"layer": torch.zeros(3)}  # what no token chooses counts, too: errors are neither weighted nor squared
    assert allocate_bits(ExpertErrors(bits, error, nothing, nothing), tolerance=3.5)["layer"] == [4, 4, 4]


def test_row42_bytes_are_bits_times_parameters() -> None:
    widths = [2, 4, 8, 2]
    total = sum(packed_bytes(64, 256, bits, 128) for bits in widths)
    scales = len(widths) * 64 * 2 * 2
    assert total == sum(widths) * 64 * 256 // 8 + scales
    assert packed_bytes(64, 256, 2, 0) == packed_bytes(64, 256, 2, 256)


def test_a_budget_above_all_widths_gives_the_widest() -> None:
    cost = {"layer": torch.tensor([[2.0, 1.0], [4.0, 3.0]])}
    assert allocate_bits(cost, (4, 8), average=math.inf)["layer"] == [8, 8]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"bits": (3, 2)}, "bits"),
        ({"bits": (2, 4)}, "bits"),
        ({"bits": 3}, "bits"),
        ({"average": 0.5}, "average"),
        ({"average": math.nan}, "average"),
        ({"average": 1.0, "at_least": {3: 1}}, "average"),
        ({"at_least": {4: 1}}, "at_least"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"alpha": math.nan}, "alpha"),
    ],
)
def test_wrong_options(options: dict[str, object], name: str) -> None:
    with raises((TypeError, ValueError), name):
        allocate_bits(made_errors(0), **options)  # type: ignore[arg-type]


def test_costs_of_another_kind() -> None:
    costs = torch.ones(3, 2)
    with raises(ValueError, "errors"):
        allocate_bits({"a": costs[:, 0]}, (1, 2))
    with raises(ValueError, "bits"):
        allocate_bits({"a": costs})
    with raises(TypeError, "errors"):
        allocate_bits([costs], (1, 2))  # type: ignore[arg-type]
    with raises(TypeError, "at_least"):
        allocate_bits({"a": costs}, (1, 2), at_least=[2, 3])  # type: ignore[arg-type]
