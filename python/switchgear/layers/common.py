# SPDX-License-Identifier: BSD-3-Clause
"""Shared by layers: the losses of the last forward, checks of inputs, and the class of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from switchgear.backends import in_autocast
from switchgear.checks import convert
from switchgear.experts import Experts
from switchgear.reference import check_range
from switchgear.routing.context import can_be_read

if TYPE_CHECKING:
    from switchgear.parallel import ExpertParallel


class WithLosses(nn.Module):
    """A layer that keeps the balance losses of its last forward, by name. They are part of a graph, so they are neither
    copied nor saved with the layer."""

    losses: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.losses = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "losses": {}}


def check_rows(rows: Any, hidden_size: int, dtype: torch.dtype | None = None, *, of_sequences: bool = False) -> None:
    """Raises for hidden_states that are no tensor [..., H], or [..., T, H] of_sequences; outside of autocast also for
    another dtype than that of the layer's weights, if given and not compressed."""
    convert("hidden_states", rows, Tensor)
    if rows.dim() < 1 + of_sequences or rows.shape[-1] != hidden_size:
        shape = f"[...,{' T,' * of_sequences} H={hidden_size}]"
        raise ValueError(f"hidden_states: expected shape {shape}, got {list(rows.shape)}")
    is_plain = dtype is not None and dtype.is_floating_point
    if is_plain and rows.dtype is not dtype and not in_autocast(rows.device.type):
        raise TypeError(f"hidden_states: expected {dtype} like the weights, got {rows.dtype}")


def refuse_unknown_experts(topk_ids: Tensor, num_experts: int) -> None:
    """Raises ValueError for ids out of range, where they can be read."""
    if can_be_read(topk_ids):
        check_range("topk_ids", topk_ids, -1, num_experts)


def scaled_input(experts: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Σ_k expert_k(w_k · x) [T,H], for x [T,H]: the weights scale the input of the experts, not their output."""
    top_k = topk_ids.shape[1]
    rows = (x[:, None] * topk_weights[..., None].to(x.dtype)).flatten(0, 1)
    y: Tensor = experts(rows, topk_ids.reshape(-1, 1), torch.ones_like(topk_weights).reshape(-1, 1))
    return y.view(len(x), top_k, y.shape[1]).sum(1) if top_k > 1 else y


def experts_class(parallel: ExpertParallel | None) -> Callable[..., Experts]:
    """Experts, or ParallelExperts if `parallel` distributes them over ranks."""
    if parallel is None:
        return Experts
    distributed = getattr(parallel, "experts_class", None)
    if distributed is None:
        raise TypeError(f"parallel: expected ExpertParallel, got {type(parallel).__name__}")
    return functools.partial(distributed, parallel=parallel)
