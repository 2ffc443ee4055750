# SPDX-License-Identifier: BSD-3-Clause
"""Predictors: which experts the next layers will need, so that they are read before their layer runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

Expert = tuple[int, int]  # layer, expert


class Predictor(Protocol):
    """Layers are counted in the order of `moe_blocks(model)`, which is the order in which they run."""

    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Iterable[Expert]:
        """Experts of later layers, the most likely first. Called when `layer` has routed and its experts have not run.

        hidden_states [T,H] is the input of its experts, topk_ids [T,K] its choice, -1 for none.
        """

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        """The choice [T,K] that a layer made, for predictors that remember. Called once per layer and step, before or
        after `predict` of this layer."""


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
