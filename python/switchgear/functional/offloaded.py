# SPDX-License-Identifier: BSD-3-Clause
"""moe with experts that are loaded while it runs: in one call if all are in memory, else wave by wave.

A wave is an ascending range of experts; waves.py adds them up so that the result has the bits of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from switchgear.autograd import needs_autograd
from switchgear.backends import in_autocast
from switchgear.functional.waves import Biases, Rows, Sums, adds_in_order_of_experts, base_of, renumbered
from switchgear.ops import GluOptions
from switchgear.utils.functions import not_compiled
from switchgear.weights.offloaded import OffloadedWeight, Source, Wave
from switchgear.weights.weight import AdaptedWeight, Weight

MoeOfWeights = Callable[..., Tensor]


def source_of(weight: Any) -> Source | None:
    """Where the experts of a projection come from; None if they are in memory."""
    inner = base_of(weight)
    return inner.source if type(inner) is OffloadedWeight else None


def _in_memory(weight: Any) -> Any:
    if type(weight) is OffloadedWeight:
        return weight.weight
    if type(weight) is AdaptedWeight:
        return weight._replace(weight=_in_memory(weight.weight))
    return weight


# A graph cannot hold what is loaded from call to call.
@not_compiled
def moe_of_offloaded(
    source: Source,
    moe_of_weights: MoeOfWeights,
    accumulate: Callable[..., None],
    x: Tensor,
    weights: tuple[Any, Any],
    biases: Biases,
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
) -> Tensor:
    """moe of x [T,H], in autocast's dtype inside torch.autocast. moe_of_weights and accumulate compute with weights in
    memory."""
    first, second = _in_memory(weights[0]), _in_memory(weights[1])
    by_row = not adds_in_order_of_experts(x)  # experts of plain weights: the kernels there take no slots
    casts = [_must_cast(base_of(weight), x, by_row) for weight in (first, second)]  # checks both
    is_cast = any(casts)

    def in_dtype_of_x(topk_ids: Tensor) -> tuple[Any, Any]:
        return _cast((first, second), topk_ids, x.dtype) if is_cast else (first, second)

    topk_ids = topk_ids.clone()  # read for each wave, and another thread may change the caller's
    if len(topk_ids) != len(x):
        raise ValueError(f"topk_ids: expected {len(x)} rows like x, got shape {list(topk_ids.shape)}")
    if needs_autograd(x, *biases, topk_weights, *_adapters_of(first), *_adapters_of(second)):
        if by_row and any(base_of(weight).format == "plain" for weight in (first, second)):
            raise ValueError("x: expected no gradients through plain experts that are offloaded to a GPU, got some")

        def compute_together(_: Any) -> Tensor:
            others = (biases, topk_ids, topk_weights, options)
            return moe_of_weights(x, in_dtype_of_x(topk_ids), *others, source=None if is_cast else source)

        return source.run(x, topk_ids, compute_together, together=True)

    def multiply(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        layer = (in_dtype_of_x(topk_ids), biases, topk_ids)
        return moe_of_weights(x, *(renumbered(*layer) if by_row else layer), topk_weights, options)

    def add(sums: Tensor, topk_ids: Tensor) -> None:
        accumulate(sums, x, in_dtype_of_x(topk_ids), biases, topk_ids, topk_weights, options)

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
    return source.run(x, topk_ids, compute, together=_drops(first) or _drops(second))


def _must_cast(weight: Any, x: Tensor, by_row: bool) -> bool:
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
    if not in_autocast(x.device.type):
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


def _adapters_of(weight: Any) -> tuple[Tensor, ...]:
    return (weight.a, weight.b) if type(weight) is AdaptedWeight else ()


def _drops(weight: Any) -> bool:
    return type(weight) is AdaptedWeight and weight.dropout > 0
