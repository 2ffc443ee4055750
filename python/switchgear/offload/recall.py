# SPDX-License-Identifier: BSD-3-Clause
"""Recall and precision of a predictor, by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from switchgear.checks import check_module
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.offload.accesses import Accesses
from switchgear.offload.predictors import Expert, Predictor, check_predictions, check_predictor
from switchgear.reference.checks import MAX_EXPERTS
from switchgear.trace import Observation, observe


@dataclass(frozen=True)
class LayerRecall:
    """Experts of a layer, summed over steps.

    Attributes:
        used: that ran.
        predicted: before the layer ran.
        right: both.
    """

    name: str
    used: int
    predicted: int
    right: int

    @property
    def recall(self) -> float:
        """Of the experts that ran, the share that was predicted; 0 if none ran."""
        return self.right / max(self.used, 1)

    @property
    def precision(self) -> float:
        """Of the predicted experts, the share that ran: what is read in vain is the rest."""
        return self.right / max(self.predicted, 1)


class Recall:
    """Counts predictions. `predicted` may be called several times before the layer runs; `used` closes its step.

    num_experts: of each layer, to check predictions; None: not known.
    """

    def __init__(self, names: Sequence[str], num_experts: Sequence[int] | None = None) -> None:
        self.names = tuple(names)
        self.num_experts = (MAX_EXPERTS,) * len(self.names) if num_experts is None else tuple(num_experts)
        self._pending: list[set[int]] = [set() for _ in self.names]
        self._counts = [[0, 0, 0] for _ in self.names]

    def predicted(self, experts: Iterable[Expert]) -> None:
        """Counts a prediction."""
        for layer, expert in check_predictions("experts", experts, self.num_experts):
            self._pending[layer].add(expert)

    def used(self, layer: int, topk_ids: Tensor) -> None:
        """Counts what layer `layer` chose, against what was predicted for it. Other ids than experts' are none."""
        used = {expert for row in topk_ids.tolist() for expert in row if 0 <= expert < self.num_experts[layer]}
        counts, pending = self._counts[layer], self._pending[layer]
        for i, number in enumerate((len(used), len(pending), len(used & pending))):
            counts[i] += number
        pending.clear()

    @property
    def layers(self) -> tuple[LayerRecall, ...]:
        """The counts of each layer."""
        return tuple(LayerRecall(name, *counts) for name, counts in zip(self.names, self._counts, strict=True))


def recall(predictor: Predictor, accesses: Accesses) -> tuple[LayerRecall, ...]:
    """Replays a recorded run through a predictor that needs no hidden states, such as `Follows`; it gets the experts of
    a step as those of one token. `watch` counts any predictor while a model runs."""
    check_predictor("predictor", predictor)
    if not isinstance(accesses, Accesses):
        raise TypeError(f"accesses: expected Accesses, got {type(accesses).__name__}")
    found = Recall(accesses.layers, accesses.num_experts)
    nothing = torch.empty(1, 0)
    for step in accesses.steps:
        for layer, experts in enumerate(step):
            ids = torch.tensor([experts], dtype=torch.int32)
            found.used(layer, ids)
            found.predicted(predictor.predict(layer, nothing, ids))
            predictor.observe(layer, ids)
    return found.layers


@contextmanager
def watch(model: nn.Module, predictor: Predictor) -> Iterator[Recall]:
    """Inside the block, the predictor predicts while the model runs, and nothing is fetched. Each call of the model is
    a step, so let it decode: a whole text in one call uses nearly all experts.

        with offload.watch(model, offload.NextGate(model)) as found:
            model.generate(prompt, max_new_tokens=100)
        print([layer.recall for layer in found.layers])
    """
    check_module("model", model)
    check_predictor("predictor", predictor)
    blocks = moe_blocks(model)
    layers = {name: layer for layer, name in enumerate(blocks)}
    num_real, num_all = ([getattr(b, name) for b in blocks.values()] for name in ("num_real", "num_experts"))
    found = Recall(tuple(blocks), num_real)

    def see(name: str, seen: Observation) -> None:
        layer = layers[name]
        found.used(layer, seen.topk_ids)
        predicted = check_predictions(
            "experts", predictor.predict(layer, seen.x.detach(), seen.topk_ids.detach()), num_all
        )
        found.predicted((ahead, expert) for ahead, expert in predicted if expert < num_real[ahead])
        predictor.observe(layer, seen.topk_ids.detach())

    with observe(model, see):
        yield found
