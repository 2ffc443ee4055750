# SPDX-License-Identifier: BSD-3-Clause
"""How many rows of memory a cache takes, from slots or from bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from switchgear.complaints import integer


@dataclass(frozen=True)
class Group:
    """Layers whose records have one size, and so one arena.

    layers: their indices. num_experts: of each.
    """

    record_bytes: int
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]


@dataclass(frozen=True)
class CachePlan:
    """Of a group. capacities: slots of each layer, or one number for all of them.

    rows: of the arena: the slots, those that the experts of a step pass through if they are more than the slots, and
    guess_rows, which predictions may fill.
    """

    group: Group
    capacities: tuple[int, ...]
    rows: int
    guess_rows: int

    @property
    def fits(self) -> bool:
        """Whether all experts do."""
        if len(self.capacities) == len(self.group.layers):
            return all(c >= e for c, e in zip(self.capacities, self.group.num_experts, strict=True))
        return self.capacities[0] >= sum(self.group.num_experts)

    @property
    def nbytes(self) -> int:
        return self.rows * self.group.record_bytes


def groups_of(record_bytes: Sequence[int], num_experts: Sequence[int]) -> list[Group]:
    sizes = sorted(set(record_bytes))
    result = []
    for size in sizes:
        layers = tuple(layer for layer, own in enumerate(record_bytes) if own == size)
        result.append(Group(size, layers, tuple(num_experts[layer] for layer in layers)))
    return result


def plans_of(
    groups: Sequence[Group], slots: int | None, size: int | None, shared: bool, guess_rows: int
) -> list[CachePlan]:
    """For `slots` per layer, or as many as fit in `size` bytes."""
    slots = None if slots is None else integer("slots", slots)
    size = None if size is None else integer("bytes", size)
    if (slots is None) == (size is None):
        raise ValueError(f"slots: expected slots or bytes, got {'neither' if slots is None else 'both'}")
    if slots is not None:
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        return [_plan(group, [slots] * len(group.layers), shared, guess_rows) for group in groups]
    assert size is not None
    # The most slots that fit: of a layer, or shared ones, of which a layer's are as many as there are layers.
    most = max(count for group in groups for count in group.num_experts)
    steps = max(len(group.layers) for group in groups) if shared else 1

    def plans(count: int) -> list[CachePlan]:
        found = []
        for group in groups:
            each = [count * len(group.layers) // steps] if shared else [count] * len(group.layers)
            found.append(_plan(group, each, shared, guess_rows))
        return found

    if _nbytes(whole := plans(most * steps)) <= size:  # no other rows: fewer slots may take more memory
        return whole
    low, high = 0, most * steps  # plans(low) fits
    while low < high:
        middle = (low + high + 1) // 2
        made = plans(middle)
        is_within = _nbytes(made) <= size and all(min(plan.capacities) > 0 for plan in made)
        low, high = (middle, high) if is_within else (low, middle - 1)
    if low == 0:
        least = min(_nbytes(plans(steps)), _nbytes(whole))
        raise ValueError(f"bytes: expected at least {least} for one slot in each layer, got {size}")
    return plans(low)


def _nbytes(plans: Sequence[CachePlan]) -> int:
    return sum(plan.nbytes for plan in plans)


def _plan(group: Group, each: Sequence[int], shared: bool, guess_rows: int) -> CachePlan:
    total, most = sum(group.num_experts), max(group.num_experts)
    if shared:
        capacity = min(sum(each), total)
        # Experts that are resident and leave can have higher numbers than those that take their slots. Then both are
        # in memory, at most half of a layer's; and one more passes through.
        extra = 0 if capacity >= most else min(capacity, most // 2) + 1
        capacities: tuple[int, ...] = (capacity,)
    else:
        pairs = [(min(own, experts), experts) for own, experts in zip(each, group.num_experts, strict=True)]
        extra = max((min(own, experts - own) + 1 for own, experts in pairs if own < experts), default=0)
        capacities = tuple(own for own, _ in pairs)
    plan = CachePlan(group, capacities, sum(capacities) + extra + guess_rows, guess_rows)
    return replace(plan, rows=total, guess_rows=0) if plan.fits else plan
