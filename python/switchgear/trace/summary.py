# SPDX-License-Identifier: BSD-3-Clause
"""LayerSummary: the trace of a layer in a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear.trace.layer import LayerTrace


@dataclass(frozen=True)
class LayerSummary:
    """Summary statistics of a layer."""

    name: str
    num_experts: int
    num_tokens: int
    experts_per_token: float  # counts served choices
    mean_weight: float  # per choice; NaN if weights are not recorded
    busiest: int  # the expert with the largest load
    max_violation: float  # over all calls: max load / mean load - 1
    mean_max_violation: float  # the mean over calls
    never_used: int  # experts without a token
    load_entropy: float  # of the load shares, divided by log E: 1 is balanced
    router_entropy: float  # mean over tokens, divided by log E; NaN if it is not recorded, or without logits
    dropped: float  # fraction of the choices


def summary_of(name: str, layer: LayerTrace) -> LayerSummary:
    counts = layer.tokens_per_expert.cpu().double()
    total, tokens = float(counts.sum()), max(layer.num_tokens, 1)
    log_experts = math.log(max(layer.num_experts, 2))
    dropped = int(layer.num_dropped)
    return LayerSummary(
        name=name,
        num_experts=layer.num_experts,
        num_tokens=layer.num_tokens,
        experts_per_token=total / tokens,
        mean_weight=_sum(layer.weight_per_expert) / max(total, 1.0),
        busiest=int(counts.argmax()),
        max_violation=float(counts.max() / counts.mean() - 1) if total else 0.0,
        mean_max_violation=float(layer.max_violation) / max(layer.num_calls, 1),
        never_used=int((counts == 0).sum()),
        load_entropy=float(torch.special.entr(counts / max(total, 1.0)).sum()) / log_experts,
        router_entropy=_sum(layer.entropy) / tokens / log_experts,
        dropped=dropped / max(total + dropped, 1.0),
    )


def _sum(values: Tensor | None) -> float:
    return math.nan if values is None else float(values.sum())
