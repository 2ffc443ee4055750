# SPDX-License-Identifier: BSD-3-Clause
"""Predictors: which experts the next layers will need, so that they are read before their layer runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from switchgear.complaints import integer

Expert = tuple[int, int]  # layer, expert


class Predictor(Protocol):
    """Layers are counted in the order of `moe_blocks(model)`, which is the order in which they run."""

    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Iterable[Expert]:
        """Experts of later layers, the most likely first. Called when `layer` has routed and its experts have not run.

        hidden_states [T,H] is the input of its experts, topk_ids [T,K] its choice, -1 for none. So may be an expert
        that is predicted. Virtual experts that are predicted are not read.
        """

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        """The choice [T,K] that a layer made, for predictors that remember. Called once per layer and step, before or
        after `predict` of this layer."""


def check_predictor(name: str, predictor: Any) -> None:
    """Raises TypeError for what cannot predict, such as a class."""
    if isinstance(predictor, type) or not hasattr(predictor, "predict") or not hasattr(predictor, "observe"):
        shown = predictor.__name__ if isinstance(predictor, type) else repr(predictor)
        raise TypeError(f"{name}: expected a predictor such as NextGate(model), got {shown}")


def checked(name: str, predicted: Iterable[Expert], num_experts: Sequence[int]) -> list[Expert]:
    """What a predictor says as pairs of int, without those of expert -1. num_experts: of each layer. Raises TypeError
    and ValueError for experts that do not exist."""
    pairs = [(integer(name, layer), integer(name, expert)) for layer, expert in predicted]
    for layer, expert in pairs:
        if not 0 <= layer < len(num_experts):
            raise ValueError(f"{name}: expected experts of layers 0 to {len(num_experts) - 1}, got layer {layer}")
        if not -1 <= expert < num_experts[layer]:
            raise ValueError(f"{name}: expected experts 0 to {num_experts[layer] - 1} of layer {layer}, got {expert}")
    return [pair for pair in pairs if pair[1] != -1]


def ranked(ids: Tensor, weights: Tensor, num_experts: int) -> list[int]:
    """The experts among ids [T,k], by descending sum of their weights [T,k]; ties go to the lowest id. Ids outside
    [0, num_experts) are none."""
    real = (ids >= 0) & (ids < num_experts)
    index = torch.where(real, ids, num_experts).long().flatten()
    zeros = torch.zeros(num_experts + 1, dtype=torch.float32, device=ids.device)
    sums = zeros.scatter_add(0, index, weights.float().flatten())
    chosen = zeros.scatter_add(0, index, torch.ones_like(index, dtype=torch.float32)) > 0
    chosen[-1] = False
    order = sums.masked_fill(~chosen, -torch.inf).sort(descending=True, stable=True).indices
    result: list[int] = order[: int(chosen.sum())].tolist()
    return result
