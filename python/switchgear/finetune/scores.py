# SPDX-License-Identifier: BSD-3-Clause
"""The experts that a task uses most, from a trace of a sample of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        mass: the sum of scores to reach, in (0, 1]; by default the paper's: 0.1 by gate, 0.2 by token.
        by: the score of an expert. "token": the fraction of the choices that it serves. "gate": its mean weight over
            all tokens, 0 for those that do not choose it. Unless the router normalises, these add up to less than 1;
            a routed_scaling_factor multiplies them.

    Returns ids in ascending order, by layer; the lowest ids win ties. Where all scores add up to less than `mass`,
    these are all experts with a score.

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
    return {name: _smallest(name, _scores(layer, by), mass) for name, layer in trace.layers.items()}


def _scores(layer: LayerTrace, by: str) -> Tensor:
    """Each expert's share of the layer's choices, or its mean weight, [E] float64."""
    if by == "gate":
        return recorded(layer, "weight_per_expert").cpu().double() / max(layer.num_tokens, 1)
    counts = recorded(layer, "tokens_per_expert").cpu().double()
    return counts / counts.sum().clamp(min=1)


def _smallest(name: str, scores: Tensor, mass: float) -> list[int]:
    if not scores.any():
        raise ValueError(f"trace: expected choices in every layer, got none in {name}")
    order = scores.argsort(descending=True, stable=True)
    reached = scores[order].cumsum(0) >= mass * (1 - 1e-12)  # the sum of all shares is 1 up to rounding
    count = int(reached.long().argmax()) + 1 if reached.any() else int((scores > 0).sum())
    return sorted(order[:count].tolist())
