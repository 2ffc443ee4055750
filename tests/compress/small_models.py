# SPDX-License-Identifier: BSD-3-Clause
"""Small models for tests of compression, and what one expert of theirs computes, in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import switchgear
import tiny_models
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


class OurModel(nn.Module):
    """Two MoE layers between residuals."""

    def __init__(self, num_experts: int = 8, top_k: int = 2, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(switchgear.MoE(16, 12, num_experts, top_k, **options) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def our_model(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> OurModel:
    torch.manual_seed(seed)
    return OurModel(**options).to(dtype).eval()


def tied_model() -> OurModel:
    """The second layer has the first one's down_proj, and its gate_up_proj is in the same memory."""
    model = our_model()
    first, second = (layer.experts for layer in model.layers)
    second.down_proj = first.down_proj
    second.gate_up_proj.data = first.gate_up_proj.data
    return model


def in_a_step(model: OurModel) -> OurModel:
    """The model after a forward in training, so that routers have counts."""
    model.train()(torch.randn(9, 16))
    return model


def random_gates(model: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Routers that choose clearly, with correction biases where they have them."""
    generator = torch.Generator().manual_seed(seed)
    for block in moe_blocks(model).values():
        weight, bias = block.gate_weight(), block.selection_bias()
        assert weight is not None
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale * weight.shape[1] ** -0.5)
            if bias is not None:
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.05)
            own = getattr(block.gate, "bias", None)
            if isinstance(own, Tensor):
                own.copy_(torch.randn(own.shape, generator=generator) * 0.1)
    return model


def hugging_face(model_type: str, seed: int = 0) -> Any:
    model = tiny_models.build(model_type, seed)
    return random_gates(model, seed, 4.0)


def token_batches(count: int = 3, seed: int = 0, length: int = 12) -> list[dict[str, Any]]:
    """Batches of two domains; the second sequence of each ends with padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length - 3 :] = 0
        ids = torch.randint(3, 250, (2, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "domain": "ab"[index % 2]})
    return batches


def row_batches(count: int = 3, seed: int = 0, rows: int = 40, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(rows, 16, generator=generator, dtype=torch.float64).to(dtype), "domain": "ab"[index % 2]}
        for index in range(count)
    ]


def expert(block: MoeBlock, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, output) of expert `index` for rows x, in float64: silu-gated, or gpt-oss's gate."""
    experts: Any = block.experts
    first, second = experts.gate_up_proj[index].detach().double(), experts.down_proj[index].detach().double()
    x = x.double()
    if "GptOss" in type(experts).__name__:
        h = x @ first + experts.gate_up_proj_bias[index].detach().double()
        gate, up = h[:, ::2].clamp(max=experts.limit), h[:, 1::2].clamp(-experts.limit, experts.limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        return hidden, hidden @ second + experts.down_proj_bias[index].detach().double()
    h = x @ first.mT
    gate, up = h.chunk(2, -1)
    hidden = gate * torch.sigmoid(gate) * up
    return hidden, hidden @ second.mT


def clone(model: Any) -> Any:
    return copy.deepcopy(model)
