# SPDX-License-Identifier: BSD-3-Clause
"""StratifiedMoE: a gate per stratum of experts; a token passes through as many experts in sequence as it needs."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from switchgear.checks import Size, Sizes, checked
from switchgear.experts import Experts
from switchgear.functional import gate, route
from switchgear.layers.common import WithLosses, check_rows
from switchgear.reference import wide
from switchgear.reference.activations import AnyActivation
from switchgear.routing.balance import count_tokens, switch_loss
from switchgear.routing.capacity import Capacity
from switchgear.routing.context import Context
from switchgear.routing.scores import init_uniform


class StratifiedMoE(WithLosses):
    """Strata of experts: the gate of stratum i sees the experts of strata i and above (SMoE, arXiv:2305.02176).

    A token starts at the first gate. The gate of stratum i sends it through experts, with a norm before and a residual
    around them. If the best of them is in stratum j >= i, the gate of stratum j + 1 is next. The token leaves after
    the last stratum (equations 4 to 7). Every token passes the last stratum exactly once, and each at most once.

        layer = StratifiedMoE(256, 128, strata=[2, 2, 4], top_k=2)

    Args:
        hidden_size, intermediate_size: H, I. strata: the number of experts of each stratum; E is their sum.
        top_k: experts per pass, 2 in the paper; they may be in other strata than the best one.
        normalize: divide their scores by their sum. aux_loss: coefficient of the balance loss, averaged over gates.
        capacity: of the experts in each pass, among the tokens at its gate; nothing is dropped if None. A token whose
            choices are dropped goes on to the next gate all the same.
        activation, gated, bias: options of Experts.

    Parameters: norms.{i}.weight and bias [H], gates.{i} [E_i,H], where stratum i sees E_i experts, and those of
    experts. The layer includes norm and residual: it replaces both and the MoE of a block. So under autocast the result
    has the dtype of hidden_states, as x + MoE(norm(x)) has. There is one pass per stratum, over the tokens that are at
    its gate.
    """

    not_matrices = ("gates",)  # for optim.muon_groups

    @checked
    def __init__(
        self,
        hidden_size: Size,
        intermediate_size: int,
        strata: Sizes,
        *,
        top_k: Size = 1,
        normalize: bool = False,
        aux_loss: float = 0.01,
        capacity: Capacity | None = None,
        activation: AnyActivation = "silu",
        gated: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if top_k > strata[-1]:
            raise ValueError(f"top_k: expected 1 to {strata[-1]} (experts of the last stratum), got {top_k}")
        self.strata, self.top_k, self.normalize, self.aux_loss = list(strata), top_k, normalize, aux_loss
        self.capacity = capacity
        num_experts = sum(strata)
        self.first_expert = [0, *accumulate(strata)][:-1]
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size, device=device, dtype=dtype) for _ in strata)
        self.gates = nn.ParameterList(
            nn.Parameter(torch.empty(num_experts - first, hidden_size, device=device, dtype=dtype))
            for first in self.first_expert
        )
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts,
            activation=activation, gated=gated, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises gates like torch.nn.Linear."""
        for weight in self.gates:
            init_uniform(weight, weight.shape[1])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        check_rows(hidden_states, self.experts.hidden_size, self.gates[0].dtype)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        length = hidden_states.shape[-2] if hidden_states.dim() > 2 else None
        position = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # the stratum of each token's next gate
        losses = []
        for stratum, first in enumerate(self.first_expert):
            here = position == stratum
            normed = self.norms[stratum](x)
            logits = gate(normed, self.gates[stratum])
            routing = route(logits, self.top_k, normalize=self.normalize)
            routing = routing._replace(topk_ids=torch.where(here[:, None], routing.topk_ids, -1))
            if self.aux_loss:
                losses.append(_gate_loss(logits, routing.topk_ids, here, routing.num_experts))
            best = routing.topk_ids[:, 0] + first
            after = sum((best >= first_of).long() for first_of in self.first_expert)  # the stratum of the best expert
            if self.capacity is not None:
                routing = self.capacity(routing, Context(training=self.training, sequence_length=length))
            ids = torch.where(routing.topk_ids >= 0, routing.topk_ids + first, -1)
            x = x + self.experts(normed, ids, routing.topk_weights)  # zeros for tokens at other gates
            position = torch.where(here, after, position)
        self.losses = {"stratified": self.aux_loss * torch.stack(losses).mean()} if losses else {}
        return x.view(hidden_states.shape)


def _gate_loss(logits: Tensor, ids: Tensor, here: Tensor, num_experts: int) -> Tensor:
    """E_i · Σ_e f_e · p_e over the tokens at this gate, those with ids; f counts first choices (equations 8 to 10)."""
    probabilities = wide(logits).softmax(-1) * here[:, None]
    counts = count_tokens(ids[:, :1], num_experts)
    tokens = here.sum().clamp(min=1)
    return switch_loss(probabilities, counts, tokens) * (len(here) / tokens)
