# SPDX-License-Identifier: BSD-3-Clause
"""moe with experts that are loaded while it runs: in one call if all are in memory, else wave by wave.

A wave is an ascending range of experts. Each adds to float32 sums in the order of the fused kernel, so the result has
the bits of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from switchgear.autograd import needs_autograd
from switchgear.ops import GluOptions
from switchgear.reference import weight_dtype
from switchgear.weights.offloaded import OffloadedWeight, Source, Wave
from switchgear.weights.weight import AdaptedWeight

MoeOfWeights = Callable[..., Tensor]


def source_of(weight: Any) -> Source | None:
    """Where the experts of a projection come from; None if they are in memory."""
    inner: Any = weight.weight if type(weight) is AdaptedWeight else weight
    return inner.source if type(inner) is OffloadedWeight else None


def _in_memory(weight: Any) -> Any:
    if type(weight) is OffloadedWeight:
        return weight.weight
    if type(weight) is AdaptedWeight:
        return weight._replace(weight=_in_memory(weight.weight))
    return weight


# A graph cannot hold what is loaded from call to call.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def moe_of_offloaded(
    source: Source,
    moe_of_weights: MoeOfWeights,
    accumulate: Callable[..., None],
    x: Tensor,
    weights: tuple[Any, Any],
    biases: tuple[Tensor | None, Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
) -> Tensor:
    """moe of x [T,H] without autocast. moe_of_weights and accumulate compute with weights in memory."""
    first, second = _in_memory(weights[0]), _in_memory(weights[1])
    for weight in (first, second):
        base: Any = weight.weight if type(weight) is AdaptedWeight else weight
        if not base.multiplies(x.dtype):  # all experts would be expanded, with those that are not in memory
            if x.dtype is base.dtype:
                raise ValueError(f"x: expected {base.format} of the instruction set in use, got those of another")
            raise TypeError(f"x: expected {base.dtype} like the offloaded weights, got {x.dtype}")
    topk_ids = topk_ids.clone()  # read for each wave, and another thread may change the caller's
    if len(topk_ids) != len(x):
        raise ValueError(f"topk_ids: expected {len(x)} rows like x, got shape {list(topk_ids.shape)}")
    if needs_autograd(x, *biases, topk_weights, *_adapters_of(first), *_adapters_of(second)):

        def compute_together(_: Any) -> Tensor:
            others = (biases, topk_ids, topk_weights, options)
            return moe_of_weights(x, (first, second), *others, source=source)

        return source.run(x, topk_ids, compute_together, together=True)

    def compute(waves: Iterator[Wave] | None) -> Tensor:
        sums: Tensor | None = None
        for wave in waves or ():
            if wave.is_whole:
                break
            if sums is None:
                sums = torch.zeros(x.shape, dtype=weight_dtype(x.dtype))
            ids = torch.where((topk_ids >= wave.low) & (topk_ids <= wave.high), topk_ids, -1)
            accumulate(sums, x, (first, second), biases, ids, topk_weights, options)
        if sums is None:
            return moe_of_weights(x, (first, second), biases, topk_ids, topk_weights, options)
        return sums.to(x.dtype)

    # The masks of dropout are those of one call.
    return source.run(x, topk_ids, compute, together=_drops(first) or _drops(second))


def _adapters_of(weight: Any) -> tuple[Tensor, ...]:
    return (weight.a, weight.b) if type(weight) is AdaptedWeight else ()


def _drops(weight: Any) -> bool:
    return type(weight) is AdaptedWeight and weight.dropout > 0
