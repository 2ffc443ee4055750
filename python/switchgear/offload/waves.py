# SPDX-License-Identifier: BSD-3-Clause
"""moe with experts that are loaded while it runs: in one call if all are in memory, else wave by wave. A wave is an
ascending range of experts; waves add up to the bits of one call.

The kernels of the host add a token's experts in ascending order, so a wave adds to float32 sums where the last one
ended. Those of a GPU round the row of each choice and add the rows in the order of choices. So waves keep the rows, and
all are added at the end.

On a GPU, kernels take no slots of plain weights. There the rows of memory are the experts: ids become numbers of rows,
and biases and adapters follow them. The order of the sums does not depend on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from switchgear import ops
from switchgear.functional.gradients import needs_autograd
from switchgear.functional.layer import Biases, accumulate, apply_layer
from switchgear.offload.projections import Wave
from switchgear.reference import weight_dtype
from switchgear.utils.modules import not_compiled
from switchgear.weights.weight import AdaptedWeight, OffloadedWeight, Weight


class LoadsExperts:
    """Loads the experts of a layer, and computes `moe` with them."""

    def run(
        self,
        x: Tensor,
        topk_ids: Tensor,
        compute: Callable[[Iterator[Wave] | None], Any],
        *,
        together: bool = False,
    ) -> Any:
        """compute(waves), while the experts of topk_ids [T,K] int32 are loaded: None if all are in memory, else
        ascending ranges of experts, each resident until the next one is requested. together: all experts at once,
        or a ValueError."""
        raise NotImplementedError

    @not_compiled  # a graph cannot hold what is loaded from call to call
    def moe(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        weights: tuple[Any, Any],
        biases: Biases,
        options: tuple[Any, ...],
        autocast: str | None,
    ) -> Tensor:
        """functional.layer.apply_layer, with weights whose experts this loads."""
        first, second = _in_memory(weights[0]), _in_memory(weights[1])
        by_row = not adds_in_order_of_experts(x)  # experts of plain weights: the kernels there take no slots
        casts = [_must_cast(base_of(weight), x, by_row, autocast) for weight in (first, second)]  # checks both
        is_cast = any(casts)

        def in_dtype_of_x(topk_ids: Tensor) -> tuple[Any, Any]:
            return _cast((first, second), topk_ids, x.dtype) if is_cast else (first, second)

        topk_ids = topk_ids.clone()  # read for each wave, and another thread may change the caller's
        if len(topk_ids) != len(x):
            raise ValueError(f"topk_ids: expected {len(x)} rows like x, got shape {list(topk_ids.shape)}")
        adapters = [weight for weight in (first, second) if type(weight) is AdaptedWeight]
        if needs_autograd(x, *biases, topk_weights, *(side for each in adapters for side in (each.a, each.b))):
            if by_row and any(base_of(weight).format == "plain" for weight in (first, second)):
                raise ValueError("x: expected no gradients through plain experts that are offloaded to a GPU, got some")

            def compute_together(_: Any) -> Tensor:
                source, others = None if is_cast else self, (biases, options, autocast)
                return apply_layer(x, topk_ids, topk_weights, in_dtype_of_x(topk_ids), *others, source)

            together: Tensor = self.run(x, topk_ids, compute_together, together=True)
            return together

        def multiply(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            weights, numbered = in_dtype_of_x(topk_ids), biases
            if by_row:
                weights, numbered, topk_ids = renumbered(weights, biases, topk_ids)
            return apply_layer(x, topk_ids, topk_weights, weights, numbered, options, autocast)

        def add(sums: Tensor, topk_ids: Tensor) -> None:
            accumulate(sums, x, topk_ids, topk_weights, in_dtype_of_x(topk_ids), biases, options, autocast)

        def compute(waves: Iterator[Wave] | None) -> Tensor:
            sums: Rows | Sums | None = None
            for wave in waves or ():
                if wave.is_whole:
                    break
                if sums is None:
                    sums = Rows(x, topk_ids, topk_weights, multiply) if by_row else Sums(x, add)
                sums.add(torch.where((topk_ids >= wave.low) & (topk_ids <= wave.high), topk_ids, -1))
            return multiply(x, topk_ids, topk_weights) if sums is None else sums.total()

        # The masks of dropout are those of one call.
        y: Tensor = self.run(x, topk_ids, compute, together=any(each.dropout > 0 for each in adapters))
        return y


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


def _in_memory(weight: Any) -> Any:
    if type(weight) is OffloadedWeight:
        return weight.weight
    if type(weight) is AdaptedWeight:
        return weight._replace(weight=_in_memory(weight.weight))
    return weight


def _must_cast(weight: Any, x: Tensor, by_row: bool, autocast: str | None) -> bool:
    """Whether a weight is multiplied in the dtype of x, which torch.autocast gave it, instead of its own. Raises
    TypeError or ValueError for an x that it cannot be multiplied by."""
    if weight.device != x.device:
        raise ValueError(
            f"x: expected one on {weight.device}, where the offloaded experts run, got {x.device}; pass device= to "
            "offload"
        )
    if by_row and weight.format == "plain":
        weight = weight.with_slots(None)
    if weight.multiplies(x.dtype):
        return False
    if x.dtype is weight.dtype:  # all experts would be expanded, with those that are not in memory
        raise ValueError(f"x: expected {weight.format} of the instruction set in use, got those of another")
    if autocast is None:
        raise TypeError(f"x: expected {weight.dtype} like the offloaded weights, got {x.dtype}")
    return True


def _cast(weights: tuple[Any, Any], topk_ids: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """The weights with copies in `dtype` of the experts that ids name, which are in memory, where theirs is another."""
    chosen: Tensor = torch.unique(topk_ids[topk_ids >= 0]).long()
    experts = chosen if len(chosen) else chosen.new_zeros(1)  # slots need a row

    def cast(weight: Any) -> Any:
        if type(weight) is AdaptedWeight:
            return weight._replace(weight=cast(weight.weight))
        if not weight.is_lossless or weight.dtype is dtype:
            return weight
        copies = weight.with_slots(weight.slots[experts]).plain().to(dtype)
        slots = torch.zeros_like(weight.slots)
        slots[experts] = torch.arange(len(experts), dtype=slots.dtype, device=slots.device)
        return Weight("plain", copies, weight.rows, weight.cols, dtype, slots=slots)

    return cast(weights[0]), cast(weights[1])
