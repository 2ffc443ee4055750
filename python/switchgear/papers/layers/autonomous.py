# SPDX-License-Identifier: BSD-3-Clause
"""AutonomousMoE: experts choose their tokens by their own first activation, without a router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.checks import Size, checked
from switchgear.functional import Plan, Routing, combine, glu, grouped_gemm, plan
from switchgear.layers.common import WithLosses, check_rows
from switchgear.papers.parts.scores import ActivationNorm, norms
from switchgear.reference.activations import Activation
from switchgear.routing.context import Balance, Controller, Limit, Scope, context_of
from switchgear.routing.router import Router
from switchgear.routing.scores import init_uniform


class AutonomousMoE(WithLosses):
    """y = Σ_k w_k · W2_e (act(W_up,e c_e) ⊙ V_e x) with c_e = W_down,e x, over the experts with the largest ‖c_e‖; w is
    the softmax of these norms (Autonomy-of-Experts, arXiv:2501.13074).

    The projections c [T,E,d_low] of all experts are computed first. Their norms choose, and the chosen experts reuse c.

        layer = AutonomousMoE(256, 128, num_experts=8, top_k=2, d_low=32, balance=[SwitchLoss(1e-2)])

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K. d_low: rows of W_down.
        normalize: the softmax is over the chosen experts, as in the paper; else over all, as in its code.
        activation: act. capacity, balance, isolation: see Router.
        return_routing: forward returns (y, Routing).

    Parameters: gate.score.down [E,d_low,H], up [E,I,d_low], v [E,I,H], down_proj [E,H,I].
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: Size,
        num_experts: int,
        top_k: int,
        *,
        d_low: int,
        normalize: bool = True,
        activation: Activation = "silu",
        capacity: Limit | Callable[..., Any] | None = None,
        balance: Sequence[Balance | Controller | Callable[..., Any]] = (),
        isolation: Scope = "batch",
        return_routing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.activation, self.return_routing = num_experts, activation, return_routing
        score: Callable[..., Any] = partial(ActivationNorm, d_low=d_low)
        self.gate = Router(
            hidden_size, num_experts, top_k, normalize=normalize, score=score,
            capacity=capacity, balance=balance, isolation=isolation, device=device, dtype=dtype,
        )  # fmt: skip

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.up, self.v = parameter(intermediate_size, d_low), parameter(intermediate_size, hidden_size)
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises each projection like torch.nn.Linear."""
        for weight in (self.up, self.v, self.down_proj):
            init_uniform(weight, weight.shape[-1])

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor | tuple[Tensor, Routing]:
        """[..., H] -> [..., H], or (y, Routing); same keyword arguments as MoE."""
        check_rows(hidden_states, self.gate.hidden_size)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        score = self.gate.score
        assert isinstance(score, ActivationNorm)
        activations = score.activations(x)
        routing = self.gate.decide(norms(activations), self.gate.complete(context_of(**context), hidden_states))
        if routing.losses or self.losses:
            self.losses = routing.losses
        layout = plan(routing.topk_ids, self.num_experts)
        low = of_slots(activations, layout)
        gate = grouped_gemm(low, self.up, layout.expert_offsets)
        value = grouped_gemm(x, self.v, layout.expert_offsets, token_indices=layout.token_indices)
        a = glu(torch.cat((gate, value), -1), self.activation)
        y = combine(grouped_gemm(a, self.down_proj, layout.expert_offsets), layout, routing.topk_weights)
        y = y.view(hidden_states.shape)
        return (y, routing) if self.return_routing else y


def of_slots(values: Tensor, layout: Plan) -> Tensor:
    """values [T,E,D] -> [S,D]: the row (token, expert) of each slot; zeros past the last slot."""
    token = layout.token_indices.long()
    slots = torch.arange(len(token), dtype=layout.expert_offsets.dtype, device=token.device)
    expert = torch.bucketize(slots, layout.expert_offsets[1:], right=True).clamp(max=values.shape[1] - 1)
    rows = F.embedding((token * values.shape[1] + expert).clamp(min=0), values.flatten(0, 1))
    return rows.masked_fill(token[:, None] < 0, 0)
