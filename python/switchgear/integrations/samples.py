# SPDX-License-Identifier: BSD-3-Clause
"""Random arguments for the forward of each class in `undecorated.PATCHES`: eight tokens, in the weights' dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 8


def _like(module: Any) -> dict[str, Any]:
    parameter = next(module.parameters())
    return {"dtype": parameter.dtype, "device": parameter.device}


def _x(module: Any, generator: torch.Generator, width: int) -> Tensor:
    return torch.randn(TOKENS, width, generator=generator).to(**_like(module))


def _choices(module: Any, generator: torch.Generator, num_experts: int) -> tuple[Tensor, Tensor]:
    """Two distinct experts per token (one if there is one), with weights in (0, 1)."""
    scores = torch.rand(TOKENS, num_experts, generator=generator)
    topk_weights, topk_ids = scores.topk(min(2, num_experts), dim=-1)
    return topk_ids.to(_like(module)["device"]), topk_weights.to(**_like(module))


def topk(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _x(module, generator, module.gate_up_proj.shape[-1])
    return x, *_choices(module, generator, module.num_experts)


def longcat(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _x(module, generator, module.hidden_size)
    return x, *_choices(module, generator, module.total_experts)


def dbrx(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _x(module, generator, module.hidden_size)
    return x[None], *_choices(module, generator, module.num_experts)


def llama4(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    return (_x(module, generator, module.hidden_dim),)


def jetmoe(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    return (_x(module, generator, module.input_size)[None],)


def jetmoe_linear(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    ids = torch.randint(module.num_experts, (TOKENS,), generator=generator)
    expert_size = torch.bincount(ids, minlength=module.num_experts).tolist()
    return _x(module, generator, module.input_size), expert_size


def switch(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _x(module, generator, module["expert_0"].wi.in_features)
    ids, topk_weights = _choices(module, generator, module.num_experts)
    selected = F.one_hot(ids[:, :1], module.num_experts)
    selected[0] = 0  # a token past capacity
    return x, selected, topk_weights[:, :1]


def nllb(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _x(module, generator, module["expert_0"].fc1.in_features)
    ids, topk_weights = _choices(module, generator, module.num_experts)
    router_probs = topk_weights.new_zeros(TOKENS, module.num_experts).scatter(1, ids, topk_weights)
    return x, F.one_hot(ids[:, 0], module.num_experts), router_probs


def vitpose(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _x(module, generator, module[0].in_features)
    indices = torch.randint(module.num_experts, (2, 1, 1), generator=generator)
    return x.view(2, TOKENS // 2, -1), indices.to(x.device)
