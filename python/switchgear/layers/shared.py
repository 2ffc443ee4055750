# SPDX-License-Identifier: BSD-3-Clause
"""Shared experts, which process all tokens, with and without a gate of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Finite, FloatDtype, Size, checked
from switchgear.functional import glu
from switchgear.functional.arguments import Limit
from switchgear.reference.activations import AnyActivation


class SharedExperts(nn.Module):
    """A dense feed-forward network that every token passes through (arXiv:2401.06066): down(act(gate(x)) ⊙ up(x)).

    Args:
        hidden_size, intermediate_size: H, I.
        activation, gated, bias, alpha, limit: as for Experts.

    Parameters: gate_proj.weight [I,H] if gated, up_proj.weight [I,H], down_proj.weight [H,I]; their biases if bias.
    """

    activation: Any  # a name or a function

    @checked
    def __init__(
        self,
        hidden_size: Size,
        intermediate_size: Size,
        *,
        activation: AnyActivation = "silu",
        gated: bool = True,
        bias: bool = False,
        alpha: Finite = 1.702,
        limit: Limit | None = None,
        device: torch.device | str | None = None,
        dtype: FloatDtype | None = None,
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


class GatedSharedExperts(nn.Module):
    """sigmoid(w · x) · SharedExperts(x): each token weights the shared experts (Qwen2-MoE, arXiv:2407.10671).

    Same arguments as SharedExperts. Parameters: gate.weight [1,H], and those of experts.
    """

    @checked
    def __init__(
        self,
        hidden_size: Size,
        intermediate_size: Size,
        *,
        device: torch.device | str | None = None,
        dtype: FloatDtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=dtype)
        self.experts = SharedExperts(hidden_size, intermediate_size, device=device, dtype=dtype, **options)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        y: Tensor = self.gate(hidden_states).sigmoid() * self.experts(hidden_states)
        return y
