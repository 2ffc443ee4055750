# SPDX-License-Identifier: BSD-3-Clause
"""How the waves of a layer add up to the bits of one call.

The kernels of the host add a token's experts in ascending order, so a wave adds to float32 sums where the last one
ended. Those of a GPU round the row of each choice and add the rows in the order of choices. So waves keep the rows, and
all are added at the end.

On a GPU, kernels take no slots of plain weights. There the rows of memory are the experts: ids become numbers of rows,
and biases and adapters follow them. The order of the sums does not depend on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchgear import ops
from switchgear.reference import weight_dtype
from switchgear.weights.weight import AdaptedWeight

Biases = tuple[Tensor | None, Tensor | None]


def adds_in_order_of_experts(x: Tensor) -> bool:
    """Whether the kernels for x do; else they add in the order of a token's choices."""
    return x.is_cpu


class Sums:
    """add: adds a call with some ids to float32 sums [T,H]."""

    def __init__(self, x: Tensor, add: Callable[[Tensor, Tensor], None]) -> None:
        self._dtype, self._add = x.dtype, add
        self._sums = torch.zeros(x.shape, dtype=weight_dtype(x.dtype), device=x.device)

    def add(self, topk_ids: Tensor) -> None:
        self._add(self._sums, topk_ids)

    def total(self) -> Tensor:
        return self._sums.to(self._dtype)


class Rows:
    """The row of each choice, T·K·H elements. multiply: y of x, ids and weights."""

    def __init__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        tokens, choices = topk_ids.shape
        self._ids, self._weights, self._multiply = topk_ids, topk_weights, multiply
        self._x = x.repeat_interleave(choices, dim=0)  # a token of its own for each choice
        self._ones = topk_weights.new_ones(tokens * choices, 1)
        self._rows = torch.zeros_like(self._x)

    def add(self, topk_ids: Tensor) -> None:
        self._rows += self._multiply(self._x, topk_ids.reshape(-1, 1), self._ones)  # zeros for other waves' choices

    def total(self) -> Tensor:
        """Adds the rows as a call does."""
        tokens, choices = self._ids.shape
        slots = torch.arange(tokens * choices, dtype=torch.int32, device=self._x.device)
        ends = torch.arange(2, dtype=torch.int32, device=self._x.device) * (tokens * choices)
        tokens_of = (slots // max(choices, 1)).int()
        mine = torch.where(self._ids >= 0, slots.view(tokens, choices), -1)
        total: Tensor = ops.combine(self._rows, ends, tokens_of, mine, self._weights)
        return total


def base_of(weight: Any) -> Any:
    """A weight without its adapter."""
    return weight.weight if type(weight) is AdaptedWeight else weight


def renumbered(weights: tuple[Any, Any], biases: Biases, topk_ids: Tensor) -> tuple[tuple[Any, Any], Biases, Tensor]:
    """The weights, which are in memory, the biases and ids [T,K], where plain weights have slots: with a row's number
    in place of an expert's. Experts that no id names may have the slot of another one."""
    bases = [base_of(weight) for weight in weights]
    if not all(base.format == "plain" for base in bases):
        if any(base.format == "plain" for base in bases):
            raise ValueError("weights: expected both projections plain on a GPU, or neither, got one")
        return weights, biases, topk_ids
    slots, num_rows = bases[0].slots, len(bases[0].data)
    ids = torch.where(topk_ids < 0, -1, slots[topk_ids.clamp(min=0).long()])
    adapted = any(type(weight) is AdaptedWeight for weight in weights)
    if not adapted and biases == (None, None):
        return _without_slots(weights, None), biases, ids
    experts = torch.zeros(num_rows + 1, dtype=torch.int64, device=slots.device)  # of each row; the last: no expert
    at = torch.where(topk_ids < 0, num_rows, ids).flatten().long()
    experts = experts.scatter(0, at, topk_ids.clamp(min=0).flatten().long())[:num_rows]
    first, second = (None if bias is None else bias[experts] for bias in biases)
    return _without_slots(weights, experts), (first, second), ids


def _without_slots(weights: tuple[Any, Any], experts: Tensor | None) -> tuple[Any, Any]:
    found = []
    for weight in weights:
        base = base_of(weight).with_slots(None)
        if type(weight) is not AdaptedWeight:
            found.append(base)
            continue
        a, b = weight.a[experts], weight.b[experts]
        scale = weight.scale[experts] if isinstance(weight.scale, Tensor) else weight.scale
        ranks = None if weight.ranks is None else weight.ranks[experts]
        found.append(AdaptedWeight(base, a, b, scale, ranks, weight.dropout))
    return found[0], found[1]
