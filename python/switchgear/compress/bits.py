# SPDX-License-Identifier: BSD-3-Clause
"""allocate_bits: how many bits each expert gets under an average budget, or under a tolerated error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from switchgear.checks import Count, Finite, Range, Sizes, checked

AtLeastOne = Annotated[float, Range(1, math.inf)]
FromZero = Annotated[float, Range(0, math.inf)]


@dataclass(frozen=True, eq=False)
class ExpertErrors:
    """What a layer loses if one expert is quantized alone; see `expert_errors`."""

    bits: tuple[int, ...]  # ascending
    errors: dict[str, Tensor]  # [E,B] float64 by layer: the Frobenius norm of the change of the layer's output
    frequencies: dict[str, Tensor]  # [E] float64: tokens of the expert / tokens
    weights: dict[str, Tensor]  # [E] float64: sum of its weights / tokens


@dataclass(frozen=True)
class BitAllocation(Mapping[str, "list[int]"]):
    """Bits by layer and expert: a mapping that `quantize(model, bits=…)` takes."""

    layers: dict[str, list[int]]
    costs: dict[str, float] = field(default_factory=dict)  # the minimised sum by layer

    def __getitem__(self, name: str) -> list[int]:
        return self.layers[name]

    def __iter__(self) -> Any:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def average(self) -> float:
        """Bits per weight over all experts, if they have the same size; NaN without any."""
        widths = [bits for layer in self.layers.values() for bits in layer]
        return sum(widths) / len(widths) if widths else math.nan

    def __str__(self) -> str:
        widths = [bits for layer in self.layers.values() for bits in layer]
        if not widths:
            return "no experts"
        counts = ", ".join(f"{widths.count(bits)} at {bits}" for bits in sorted(set(widths)))
        return f"{len(widths)} experts at {self.average:.3f} bits on average ({counts})"


@checked
def allocate_bits(
    errors: ExpertErrors | Mapping[str, Tensor],
    bits: Sizes | None = None,
    average: AtLeastOne = 2.5,
    *,
    alpha: Finite = 1.0,
    beta: Finite = 1.5,
    gamma: Finite = 2.0,
    at_least: Mapping[int, Count] | None = None,
    tolerance: FromZero | None = None,
) -> BitAllocation:
    """Gives each expert of each layer one of `bits`, such that their mean is at most `average` and the sum of costs is
    minimal (MC-MoE, arXiv:2410.06270, eq. 4-5):

        min Σ_i φ_i^alpha · w_i^beta · ε_i,bits(i)^gamma        φ: frequency, w: mean weight, ε: error

    w is the mean of the weights that the layer uses; the paper's code takes the softmax before the weights of the
    chosen experts are made to sum to 1. The minimum is exact: a dynamic programme over the budget of a layer, not an
    integer programming solver.

    Args:
        errors: of `expert_errors`; or costs by layer, [E,B] with a column per entry of `bits`, which are summed as they
            are.
        bits: the widths, ascending; by default the ones that `errors` has.
        average: bits per expert of a layer.
        at_least: for a width, the number of experts that must have it. By default one at 3 and one at 2 bits, where
            `bits` has them and the budget and number of experts permit it, as in the paper.
        tolerance: the tolerated sum of errors of a layer, instead of an average (EdgeMoE, arXiv:2308.14352): experts
            take the lowest width in order of ascending error while the sum stays within it. Errors of experts are
            assumed to add up.

    Raises ValueError for an option out of range, or a budget below the smallest allocation.
    """
    widths, costs = _read_costs(errors, bits, alpha, beta, gamma, plain=tolerance is not None)
    if tolerance is not None:
        found = {name: lower_within(cost, widths, tolerance) for name, cost in costs.items()}
    else:
        if not widths[0] <= average:
            raise ValueError(f"average: expected at least {widths[0]}, the smallest of bits, got {average}")
        found = {}
        for name, cost in costs.items():
            budget = math.floor(min(average, widths[-1]) * len(cost) + 1e-9)
            needed = _count_needed(widths, len(cost), budget, at_least)
            found[name] = find_cheapest(cost, widths, budget, needed)
    layers = {name: [widths[column] for column in columns] for name, columns in found.items()}
    totals = {name: _sum_cost(costs[name], columns) for name, columns in found.items()}
    return BitAllocation(layers, totals)


def _read_costs(
    errors: ExpertErrors | Mapping[str, Tensor],
    bits: Sequence[int] | None,
    alpha: float,
    beta: float,
    gamma: float,
    plain: bool,
) -> tuple[list[int], dict[str, Tensor]]:
    given = bits if bits is not None else errors.bits if isinstance(errors, ExpertErrors) else None
    if given is None:
        raise ValueError("bits: expected the widths of the columns of errors, got none")
    widths = list(given)
    if widths != sorted(set(widths)):
        raise ValueError(f"bits: expected different widths in ascending order, got {widths}")
    if not isinstance(errors, ExpertErrors):
        costs = {name: torch.as_tensor(cost).double() for name, cost in errors.items()}
    else:
        if missing := sorted(set(widths) - set(errors.bits)):
            raise ValueError(f"bits: expected widths of errors ({list(errors.bits)}), got {missing[0]}")
        columns = [errors.bits.index(width) for width in widths]
        costs = {}
        for name, error in errors.errors.items():
            cost = error.double()[:, columns]
            if not plain:
                significance = errors.frequencies[name].double() ** alpha * errors.weights[name].double() ** beta
                cost = significance[:, None] * cost**gamma
            costs[name] = cost
    for name, cost in costs.items():
        if cost.dim() != 2 or cost.shape[1] != len(widths) or not len(cost):
            raise ValueError(f"errors: expected [E, {len(widths)}] for {name}, got {list(cost.shape)}")
        if not bool(cost.isfinite().all()):
            raise ValueError(f"errors: expected finite numbers for {name}, got others")
    return widths, costs


def _count_needed(widths: Sequence[int], count: int, budget: int, at_least: Mapping[int, int] | None) -> list[int]:
    if at_least is None:
        needed = [int(width in (2, 3)) for width in widths]
        rest = (count - sum(needed)) * widths[0] + sum(n * w for n, w in zip(needed, widths, strict=True))
        return needed if sum(needed) <= count and rest <= budget else [0] * len(widths)
    if unknown := sorted(set(at_least) - set(widths)):
        raise ValueError(f"at_least: expected widths of {list(widths)}, got {unknown[0]}")
    return [at_least.get(width, 0) for width in widths]


def find_cheapest(cost: Tensor, widths: Sequence[int], budget: int, needed: Sequence[int]) -> list[int]:
    """The columns of cost [E,B] with the least sum, one per row, if the widths add up to at most `budget` and column b
    is used at least needed[b] times. Raises ValueError if there are none.

    best[n_1, …, n_B, s] is the least cost of the first experts if their widths add up to s, and column b is used n_b
    times; n_b = needed[b] stands for more, too.
    """
    start = torch.full((*(n + 1 for n in needed), budget + 1), torch.inf, dtype=torch.float64)
    start[(0,) * start.dim()] = 0
    steps = [start]
    for row in cost.tolist():
        best = torch.full_like(start, torch.inf)
        for column, (width, price) in enumerate(zip(widths, row, strict=True)):
            if width <= budget:
                moved = torch.full_like(start, torch.inf)
                moved[..., width:] = steps[-1][..., : budget + 1 - width] + price
                best = torch.minimum(best, _count_use(moved, column))
        steps.append(best)
    final = steps[-1][tuple(needed)]
    if not bool(final.isfinite().any()):
        least = ", ".join(f"{n} at {width}" for width, n in zip(widths, needed, strict=True) if n) or "none more"
        raise ValueError(f"average: expected bits for {len(cost)} experts (at least {least}), got {budget} in all")
    state = (*needed, int(final.argmin()))
    columns: list[int] = []
    for step in range(len(cost), 0, -1):
        column, state = _step_back(steps[step - 1], float(steps[step][state]), state, cost[step - 1], widths, needed)
        columns.append(column)
    return columns[::-1]


def _count_use(moved: Tensor, column: int) -> Tensor:
    """Counts one more use of a column: moves the states along its dimension. The last one stands for more, too."""
    last = moved.shape[column] - 1
    if not last:
        return moved
    result = torch.full_like(moved, torch.inf)
    result.narrow(column, 1, last).copy_(moved.narrow(column, 0, last))
    end = result.narrow(column, last, 1)
    end.copy_(torch.minimum(end, moved.narrow(column, last, 1)))
    return result


def _step_back(
    best: Tensor, value: float, state: tuple[int, ...], row: Tensor, widths: Sequence[int], needed: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """The column of an expert on the way to a state of cost `value`, and the state before it. Sums are repeated as they
    were made, so they are equal."""
    for column, (width, price) in enumerate(zip(widths, row.tolist(), strict=True)):
        if width > state[-1]:
            continue
        counts = {max(state[column] - 1, 0), state[column]} if state[column] == needed[column] else {state[column] - 1}
        for count in sorted(counts):
            if count >= 0:
                earlier = (*state[:column], count, *state[column + 1 : -1], state[-1] - width)
                if float(best[earlier]) + price == value:
                    return column, earlier
    raise AssertionError("every state has one before it")


def lower_within(error: Tensor, widths: Sequence[int], tolerance: float) -> list[int]:
    """EdgeMoE's rule for errors [E,B]: the widest uniform width is lowered, expert by expert in order of the error at
    the next width, while the sum of errors stays within the tolerance; then from that width to the next one. If even
    the widest width exceeds it, all experts get that."""
    columns = [len(widths) - 1] * len(error)
    for lower in range(len(widths) - 2, -1, -1):
        for expert in error[:, lower].argsort(stable=True).tolist():
            trial = [*columns[:expert], lower, *columns[expert + 1 :]]
            if _sum_cost(error, trial) > tolerance:
                return columns
            columns = trial
    return columns


def _sum_cost(cost: Tensor, columns: Sequence[int]) -> float:
    return float(cost.gather(1, torch.tensor(columns)[:, None]).sum())


# ---- sizes -----------------------------------------------------------------------------------------------------------


def packed_bytes(rows: int, columns: int, bits: int, group_size: int = 128, zeros: bool = False) -> int:
    """Bytes of a matrix [rows, columns] in groups: bits · rows · columns / 8, and a float16 scale per group, with a
    zero point of a byte if asked. group_size 0: a row is a group. 16 bits: a plain matrix, without scales."""
    if bits == 16:
        return 2 * rows * columns
    groups = rows * -(-columns // (group_size or columns))
    return -(-bits * rows * columns // 8) + (3 if zeros else 2) * groups
