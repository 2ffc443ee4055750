# SPDX-License-Identifier: BSD-3-Clause
"""The experts that a task uses most, from a trace of a sample of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from switchgear.functional import as_number
from switchgear.reference import check_choice
from switchgear.trace import LayerTrace, RoutingTrace
from switchgear.trace.layer import recorded

Selected = Mapping[str, Sequence[int]]
"""Experts by layer: the layer's name in a trace, or that of its experts module."""

MASS = {"gate": 0.1, "token": 0.2}  # of the paper


def select_experts(trace: RoutingTrace, mass: float | None = None, by: str = "token") -> dict[str, list[int]]:
    """For each layer the smallest set of experts whose scores add up to `mass` (ESFT, arXiv:2407.01906).

    Args:
        trace: a recording of a sample of the task; the paper uses 32 sequences of 4096 tokens.
        mass: the share of the scores to reach, in (0, 1]; by default the paper's: 0.1 by gate, 0.2 by token.
        by: the score of an expert. "token": the fraction of the choices that it serves. "gate": its fraction of the sum
            of topk_weights; that is the paper's mean gate weight if the weights of a token add up to 1.

    Returns ids in ascending order, by layer; the lowest ids win ties.

    Raises:
        ValueError: an option out of range, an empty trace, or a layer without scores.
    """
    check_choice("by", by, tuple(MASS))
    mass = MASS[by] if mass is None else as_number("mass", mass)
    if not 0 < mass <= 1:
        raise ValueError(f"mass: expected a number in (0, 1], got {mass}")
    if not isinstance(trace, RoutingTrace):
        raise TypeError(f"trace: expected RoutingTrace, got {type(trace).__name__}")
    if not trace.layers:
        raise ValueError("trace: expected one that has recorded something, got an empty one")
    return {name: _smallest(name, shares(layer, by), mass) for name, layer in trace.layers.items()}


def shares(layer: LayerTrace, by: str) -> Tensor:
    """Each expert's share of the layer's choices or weights, [E] float64."""
    scores = recorded(layer, "tokens_per_expert" if by == "token" else "weight_per_expert").cpu().double()
    total: Tensor = scores.sum()
    return scores / total if total > 0 else torch.zeros_like(scores)


def _smallest(name: str, scores: Tensor, mass: float) -> list[int]:
    if not scores.any():
        raise ValueError(f"trace: expected choices in every layer, got none in {name}")
    order = scores.argsort(descending=True, stable=True)
    reached = scores[order].cumsum(0) >= mass * (1 - 1e-12)  # the sum of all shares is 1 up to rounding
    count = int(reached.long().argmax()) + 1 if reached.any() else len(order)
    return sorted(order[:count].tolist())
