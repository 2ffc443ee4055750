# SPDX-License-Identifier: BSD-3-Clause
"""FromPreRouter: the predictions of a router outside the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from switchgear.offload.predictors import Expert, ranked
from switchgear.reference import check_size
from switchgear.trace.decouple import Listener
from switchgear.trace.pre_router import PreRouter


class FromPreRouter:
    """The experts of the next layers, from a PreRouter that reads the model's embeddings (Read-ME, arXiv:2410.19123).

    Args:
        pre_router: trained on the model's choices.
        embedding: the module whose output [B,S,H] it gets, such as model.get_input_embeddings().
        top_k: experts per token and layer.
        layers_ahead: layers that each prediction covers, the next one first.
    """

    def __init__(self, pre_router: PreRouter, embedding: nn.Module, top_k: int, layers_ahead: int = 1) -> None:
        check_size("layers_ahead", layers_ahead)
        self.layers_ahead = layers_ahead
        self._listener = Listener(pre_router, embedding, top_k)

    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Iterable[Expert]:
        """Layer -1 stands for the embedding: the first layer follows it."""
        chosen = self._listener.topk_ids
        if chosen is None:
            return []
        num_experts = self._listener.pre_router.num_experts
        result: list[Expert] = []
        for ahead in range(layer + 1, min(layer + 1 + self.layers_ahead, len(chosen))):
            ids = chosen[ahead]
            worth = torch.arange(ids.shape[1], 0, -1, device=ids.device)  # earlier choices are likelier
            result += [(ahead, expert) for expert in ranked(ids, worth.expand_as(ids), num_experts[ahead])]
        return result

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        """Does nothing: predictions depend on embeddings alone."""

    def close(self) -> None:
        """Stops reading the embedding."""
        self._listener.close()
