# SPDX-License-Identifier: BSD-3-Clause
"""Shared experts behind a gate of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from switchgear.modules import SharedExperts


class GatedSharedExperts(nn.Module):
    """sigmoid(w · x) · SharedExperts(x): what all tokens pass through, weighed by each (Qwen2-MoE, arXiv:2407.10671).

    Arguments as SharedExperts'. Parameters: gate.weight [1,H], and those of experts.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=dtype)
        self.experts = SharedExperts(
            hidden_size, intermediate_size, activation=activation, gated=gated, bias=bias, device=device, dtype=dtype
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        y: Tensor = self.gate(hidden_states).sigmoid() * self.experts(hidden_states)
        return y
