# SPDX-License-Identifier: BSD-3-Clause
"""Predictors from the gates of the model itself: applied early, or pre-gates, which are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from switchgear.complaints import check_module
from switchgear.integrations.hook_points import read_logits
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.integrations.routers import call_gate, find_routing_method, is_looked_up
from switchgear.offload.predictors import Expert, ranked
from switchgear.reference import check_size
from switchgear.routing.context import Context
from switchgear.routing.router import Router

_Gate = Callable[[Tensor], tuple[Tensor, Tensor]]  # x [T,H] -> ids and weights [T,K]


class NextGate:
    """The gate of a later layer, applied to the hidden states of the running one (arXiv:2312.17238). They change little
    from layer to layer, since each adds to a residual.

    Args:
        model: with switchgear's MoE layers, or a Hugging Face model.
        layers_ahead: how far the later layer is; the paper has 1, 2 and 10. The last layers predict nothing.
        top_k: experts of each token, its best; at most as many as the gate chooses. The paper has 1 to 2.

    Raises:
        ValueError: a model without such layers, or a gate that is no function of hidden states alone.
    """

    def __init__(self, model: nn.Module, layers_ahead: int = 1, top_k: int | None = 2) -> None:
        check_module("model", model)
        check_size("layers_ahead", layers_ahead)
        if top_k is not None:
            check_size("top_k", top_k)
        blocks = list(moe_blocks(model).values())
        if not blocks:
            raise ValueError("model: expected one with MoE layers, got none")
        self.layers_ahead, self.top_k = layers_ahead, top_k
        self.num_experts = [block.num_real for block in blocks]
        self._gates = [_gate_of(block) if i >= layers_ahead else None for i, block in enumerate(blocks)]

    @torch.no_grad()
    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Iterable[Expert]:
        ahead = layer + self.layers_ahead
        gate = self._gates[ahead] if ahead < len(self._gates) else None
        if gate is None:
            return []
        ids, weights = gate(hidden_states)
        if self.top_k is not None and self.top_k < ids.shape[1]:
            weights, best = weights.masked_fill(ids < 0, -torch.inf).topk(self.top_k, dim=1)
            ids = ids.gather(1, best)
        return [(ahead, expert) for expert in ranked(ids, weights, self.num_experts[ahead])]

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        """Does nothing: predictions depend on hidden states alone."""


class FromPreGate(NextGate):
    """The choice of a model with pre-gates (`routing.pregate`): the next layer chooses by the hidden states of this
    one, so it is known here, all of it (arXiv:2308.12066)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, layers_ahead=1, top_k=None)
        for name, block in list(moe_blocks(model).items())[1:]:
            if getattr(block.gate, "reads_from", None) is None:
                raise ValueError(f"model: expected pre-gates (routing.pregate), got a gate of its own in {name}")


def _gate_of(block: MoeBlock) -> _Gate:
    """The gate's choice, without hooks: those are of the model's own calls."""
    if isinstance(block.gate, Router):
        return _ours(block.gate)
    return _hugging_face(block)


def _ours(router: Router) -> _Gate:
    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = router.selection()(router.logits(x), Context(), router.e_score_correction_bias)
        return routing.topk_ids, routing.topk_weights

    return choose


def _hugging_face(block: MoeBlock) -> _Gate:
    if is_looked_up(block):
        raise ValueError(f"{block.name}: expected a gate of hidden states, got one that looks up token ids")
    method = find_routing_method(block)  # raises ValueError for a gate that cannot be probed
    assert block.top_k is not None
    top_k = block.top_k

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = read_logits(block, call_gate(block, x))
        assert logits is not None
        ids = method.rank(logits, None).topk(top_k, dim=-1).indices
        return ids, method.weigh(logits, ids)

    return choose
