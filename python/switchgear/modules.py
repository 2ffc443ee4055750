# SPDX-License-Identifier: BSD-3-Clause
"""MoE: a router, experts and shared experts as one torch.nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.experts import Experts
from switchgear.functional import Routing, glu
from switchgear.routing.context import Balance, Context, Limit, Score, Select
from switchgear.routing.router import Router


class SharedExperts(nn.Module):
    """A dense feed-forward network that every token passes through (arXiv:2401.06066): down(act(gate(x)) ⊙ up(x)).

    Parameters: gate_proj.weight [I,H] if gated, up_proj.weight [I,H], down_proj.weight [H,I]; their biases if bias.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        alpha: float = 1.702,
        limit: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.gated, self.alpha, self.limit = activation, gated, alpha, limit

        def linear(size_in: int, size_out: int) -> nn.Linear:
            return nn.Linear(size_in, size_out, bias=bias, device=device, dtype=dtype)

        self.gate_proj = linear(hidden_size, intermediate_size) if gated else None
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        h: Tensor = self.up_proj(hidden_states)
        if self.gate_proj is not None:
            h = torch.cat((self.gate_proj(hidden_states), h), -1)
        y: Tensor = self.down_proj(glu(h, self.activation, gated=self.gated, alpha=self.alpha, limit=self.limit))
        return y


class MoE(nn.Module):
    """A Mixture-of-Experts layer: y = Σ_k w_k · expert_k(x) + shared_experts(x).

        moe = MoE(hidden_size=2048, intermediate_size=1024, num_experts=64, top_k=8)
        y = moe(x)                                       # x [..., H]
        moe = MoE(2048, 1024, 64, **switchgear.presets.expert_choice())

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K.
        score_function, normalize, scale, selection_bias, num_groups, topk_groups, group_score, jitter, float32_router,
            router_bias: options of Router (the last two are its `float32` and `bias`).
        score, select, capacity, balance, isolation: parts of Router, for other policies than the best k experts.
        activation, gated, bias, interleaved, transposed, alpha, limit: options of Experts.
        shared_intermediate_size: width of the shared experts; 0 for none. They have the activation of the experts.
        return_routing: forward returns (y, Routing), for losses such as load_balancing_loss(routing.router_logits,
            routing.topk_ids).

    Attribute `losses`: those of the router's balance, by name, of the last forward in training; see balance_loss.

    Submodules and keys of the state dict: gate (Router: gate.weight, gate.e_score_correction_bias), experts (Experts:
    experts.gate_up_proj, experts.down_proj), shared_experts (shared_experts.gate_proj.weight, …).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        score_function: str = "softmax",
        normalize: bool = False,
        scale: float = 1.0,
        selection_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "max",
        jitter: float = 0.0,
        float32_router: bool = False,
        router_bias: bool = False,
        score: Score | Callable[..., Any] | None = None,
        select: Select | Callable[..., Any] | None = None,
        capacity: Limit | None = None,
        balance: Sequence[Balance | Callable[..., Any]] = (),
        isolation: str = "batch",
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        alpha: float = 1.702,
        limit: float | None = None,
        shared_intermediate_size: int = 0,
        return_routing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.return_routing = return_routing
        self.losses: dict[str, Tensor] = {}
        self.gate = Router(
            hidden_size,
            num_experts,
            top_k,
            score_function=score_function,
            normalize=normalize,
            scale=scale,
            selection_bias=selection_bias,
            num_groups=num_groups,
            topk_groups=topk_groups,
            group_score=group_score,
            jitter=jitter,
            float32=float32_router,
            bias=router_bias,
            score=score,
            select=select,
            capacity=capacity,
            balance=balance,
            isolation=isolation,
            device=device,
            dtype=dtype,
        )
        self.experts = Experts(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=activation,
            gated=gated,
            bias=bias,
            interleaved=interleaved,
            transposed=transposed,
            alpha=alpha,
            limit=limit,
            device=device,
            dtype=dtype,
        )
        if hasattr(self.gate.score, "bind"):  # a score of the experts' own weights
            self.gate.score.bind(self.experts)
        self.shared_experts = None
        if shared_intermediate_size:
            self.shared_experts = SharedExperts(
                hidden_size,
                shared_intermediate_size,
                activation=activation,
                gated=gated,
                bias=bias,
                alpha=alpha,
                limit=limit,
                device=device,
                dtype=dtype,
            )

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor | tuple[Tensor, Routing]:
        """hidden_states [..., H] -> y [..., H], or (y, Routing) with return_routing.

        Keyword arguments are attributes of Context: token_ids and sequence_ids [...], embedding [..., D], generator, ….
        """
        if context:
            routing: Routing = self.gate(hidden_states, _context(**context))
        else:
            routing = self.gate(hidden_states)
        if routing.losses or self.losses:
            self.losses = routing.losses
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        y = self.experts(rows, routing.topk_ids, routing.topk_weights).reshape(hidden_states.shape)
        if self.shared_experts is not None:
            y = y + self.shared_experts(hidden_states)
        return (y, routing) if self.return_routing else y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "losses": {}}  # they belong to a graph, which is neither copied nor saved


def _context(**values: Any) -> Context:
    """A Context, whose tensors may have the leading dimensions of hidden_states."""
    for name in ("token_ids", "sequence_ids", "importance"):
        if isinstance(values.get(name), Tensor):
            values[name] = values[name].reshape(-1)
    embedding = values.get("embedding")
    if isinstance(embedding, Tensor) and embedding.dim() > 2:
        values["embedding"] = embedding.reshape(-1, embedding.shape[-1])
    return Context(**values)


def balance_loss(model: nn.Module) -> Tensor | float:
    """The sum of the balance losses of the last forward of all layers in the model, to be added to its loss; 0.0 if
    there are none."""
    total: Tensor | float = 0.0
    for module in model.modules():
        for loss in getattr(module, "losses", {}).values() if isinstance(module, MoE) else ():
            total = total + loss
    return total


def after_step(model: nn.Module) -> None:
    """Router.after_step of all routers in the model: once per optimizer step, if any has controllers."""
    for module in model.modules():
        if isinstance(module, Router):
            module.after_step()
