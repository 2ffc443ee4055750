# SPDX-License-Identifier: BSD-3-Clause
"""Initial values of papers, for the option `initialize` of MoE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def sigma_moe_values(moe: Any, scale: float = 1.0) -> None:
    """Those of σ-MoE (arXiv:2310.10837) for an MoE of plain experts: standard deviation 1/√H for the router and the
    first projection (keys), 1/√(E·I) for the second one (values), all times `scale`. The rows of the router keep their
    directions and all get their root mean square norm. Biases start at zero. The scale of the paper's models is
    √(2 / layers)."""
    experts = moe.experts
    hidden_size, values = experts.hidden_size, experts.num_experts * experts.intermediate_size
    router: Tensor = moe.gate.weight if moe.gate.score is None else moe.gate.score.weight
    for name, parameter in experts.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=scale * (values if name == "down_proj" else hidden_size) ** -0.5)
    nn.init.normal_(router, std=scale * hidden_size**-0.5)
    norms = router.norm(dim=1, keepdim=True)
    router.mul_(norms.square().mean().sqrt() / norms.clamp(min=torch.finfo(norms.dtype).tiny))
