# SPDX-License-Identifier: BSD-3-Clause
"""Router: logits → scores → selection, with the policies of the literature as options."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.backends import without_autocast
from switchgear.functional import Routing, route


class Router(nn.Module):
    """Linear router: router_logits = x · weightᵀ, then `route`. Returns the Routing: a hook sees all of it.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        score_function: "softmax" or "sigmoid".
        normalize: divide the chosen scores by their sum (norm_topk_prob).
        scale: multiplies the weights last (routed_scaling_factor).
        selection_bias: add the buffer `e_score_correction_bias` [E] float32 to the scores for the choice alone
            (arXiv:2408.15664); it starts at zero and belongs to the state dict.
        num_groups, topk_groups, group_score: device-limited routing; see `route`.
        jitter: in training, multiply the router's input by uniform noise in [1 - jitter, 1 + jitter] (Switch
            Transformer, arXiv:2101.03961).
        float32: compute the logits in float32, whatever the dtype of the model and of autocast.
        bias: a learned bias [E] of the logits (gpt-oss).

    Parameters: weight [E,H], bias [E]. Errors: ValueError for an option out of range.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str = "softmax",
        normalize: bool = False,
        scale: float = 1.0,
        selection_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "max",
        jitter: float = 0.0,
        float32: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: expected 1 to {num_experts} (num_experts), got {top_k}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: expected a number in [0, 1), got {jitter}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.score_function, self.normalize, self.scale = score_function, normalize, scale
        self.num_groups, self.topk_groups, self.group_score = num_groups, topk_groups, group_score
        self.jitter, self.float32 = jitter, float32
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        correction = torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as torch.nn.Linear does; the correction bias becomes zero."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """router_logits [T,E] of hidden_states [T,H]."""
        if self.jitter and self.training:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter, 1 + self.jitter)
            hidden_states = hidden_states * noise
        if not self.float32:
            return F.linear(hidden_states, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        with without_autocast(hidden_states.device.type):
            return F.linear(hidden_states.float(), self.weight.float(), bias)

    def forward(self, hidden_states: Tensor) -> Routing:
        """Routing of hidden_states [..., H], leading dimensions flattened to T."""
        return route(
            self.logits(hidden_states.reshape(-1, self.hidden_size)),
            self.top_k,
            score_function=self.score_function,
            normalize=self.normalize,
            scale=self.scale,
            selection_bias=self.e_score_correction_bias,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}", self.score_function]
        if self.num_groups > 1:
            parts.append(f"groups={self.topk_groups}/{self.num_groups}")
        parts += [name for name in ("normalize", "float32") if getattr(self, name)]
        return ", ".join(parts)
