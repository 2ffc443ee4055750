# SPDX-License-Identifier: BSD-3-Clause
"""Virtual experts, which do nothing, return their input, or return a constant, at almost no cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.checks import Count, checked
from switchgear.layers.common import refuse_unknown_experts


class VirtualExperts(nn.Module):
    """E real experts, then `null` that add nothing, `copy` that return x, and `constant` that return a learned vector.

    The ids of a router over E + null + copy + constant experts are in this order. Null experts: AdaMoE,
    arXiv:2406.13233; zero, copy and constant experts: MoE++, arXiv:2410.07348. AdaMoE's authors, who add null experts
    to a trained model, start the router's row of null expert j as a copy of that of expert j mod E.

        experts = VirtualExperts(switchgear.Experts(256, 128, 16), null=16)
        router = switchgear.Router(256, experts.num_experts, top_k=4)

    Args:
        experts: a module with the interface of Experts: hidden_size, num_experts, forward(x, topk_ids, topk_weights).
        renormalize: divide the weights by the sum over experts that are not null (AdaMoE). A token with only null
            choices gets exact zeros.
        mix_constants: constant expert c returns α_1 x + α_2 v_c with (α_1, α_2) = softmax(W_c x), as in MoE++.

    Parameters: constants [constant,H], initially zero; mixing [constant,2,H], initially zero, with mix_constants; and
    those of experts. Virtual experts take no slots in the plan.
    """

    not_matrices = ("constants", "mixing")  # for optim.muon_groups

    @checked
    def __init__(
        self,
        experts: nn.Module,
        *,
        null: Count = 0,
        copy: Count = 0,
        constant: Count = 0,
        renormalize: bool = True,
        mix_constants: bool = False,
    ) -> None:
        super().__init__()
        self.experts, self.renormalize = experts, renormalize
        self.null, self.copy, self.constant = null, copy, constant
        self.hidden_size, self.num_real = int(experts.hidden_size), int(experts.num_experts)  # type: ignore[arg-type]
        self.num_experts = self.num_real + null + copy + constant
        like = next(experts.parameters())
        vectors = torch.empty(constant, self.hidden_size, dtype=like.dtype, device=like.device)
        self.constants = nn.Parameter(vectors) if constant else None
        mixing = vectors.new_empty(constant, 2, self.hidden_size)
        self.mixing = nn.Parameter(mixing) if constant and mix_constants else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeroes the constants and what mixes them. (The experts initialise themselves.)"""
        for parameter in (self.constants, self.mixing):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [..., H], topk_ids and topk_weights [..., K] -> [..., H]."""
        refuse_unknown_experts(topk_ids, self.num_experts)
        first_copy = self.num_real + self.null
        first_constant = first_copy + self.copy
        is_real = topk_ids < self.num_real  # also true for holes
        if self.renormalize and self.null:
            counted = (topk_ids >= 0) & (is_real | (topk_ids >= first_copy))
            topk_weights = topk_weights.masked_fill(~counted, 0)
            total = topk_weights.sum(-1, keepdim=True)
            topk_weights = topk_weights / torch.where(total == 0, torch.ones_like(total), total)
        y: Tensor = self.experts(hidden_states, topk_ids.masked_fill(~is_real, -1), topk_weights)
        rows = hidden_states.to(y.dtype)  # autocast's, if it is on
        if self.copy:
            copied = (topk_ids >= first_copy) & (topk_ids < first_constant)
            y = y + rows * topk_weights.masked_fill(~copied, 0).sum(-1, keepdim=True).to(y.dtype)
        if self.constants is not None:
            which = (topk_ids - first_constant).clamp(min=-1).long() + 1
            weight = topk_weights.new_zeros(*topk_ids.shape[:-1], self.constant + 1)
            weight = weight.scatter_add(-1, which, topk_weights)[..., 1:]
            if self.mixing is not None:
                logits = F.linear(hidden_states, self.mixing.flatten(0, 1))
                logits = logits.to(weight.dtype).view(*weight.shape, 2)
                of_x, of_v = logits.softmax(-1).unbind(-1)
                y = y + rows * (weight * of_x).sum(-1, keepdim=True).to(y.dtype)
                weight = weight * of_v
            y = y + weight.to(y.dtype) @ self.constants.to(y.dtype)
        return y

    def extra_repr(self) -> str:
        return f"null={self.null}, copy={self.copy}, constant={self.constant}, num_experts={self.num_experts}"


def with_virtual(experts: nn.Module, **options: Any) -> VirtualExperts:
    """VirtualExperts: the experts, followed by virtual ones."""
    return VirtualExperts(experts, **options)
