# SPDX-License-Identifier: BSD-3-Clause
"""MoE layers of real models."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    model: str

    @property
    def sizes(self) -> str:
        return f"H {self.hidden_size}, I {self.intermediate_size}, E {self.num_experts}, K {self.top_k}"


SHAPES = {
    "tiny": Shape(256, 512, 8, 2, "fits in the last-level cache"),
    "mixtral-half": Shape(2048, 3584, 8, 2, "Mixtral-8x7B, hidden size halved, width a quarter"),
    "olmoe": Shape(2048, 1024, 64, 8, "OLMoE-1B-7B"),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8, "Qwen3-30B-A3B"),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6, "DeepSeek-V2-Lite, without its shared experts"),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, "gpt-oss-20b, with plain SwiGLU and without biases"),
    "dbrx-sixth": Shape(1024, 1792, 16, 4, "DBRX, at a sixth of its sizes"),
}

# Layers whose routers `bench --routers` times.
ROUTER_SHAPES = {
    "olmoe": SHAPES["olmoe"],
    "deepseek-v3": Shape(7168, 2048, 256, 8, "DeepSeek-V3, without its shared expert"),
}

# Layers with published figures on GPUs, and the tokens of those figures (published.py).
GPU_SHAPES = {
    "sonic-7b-n256": Shape(1536, 256, 128, 8, "SonicMoE's 7B model, finest experts"),
    "sonic-30b-n256": Shape(4096, 256, 256, 16, "SonicMoE's 30B model, finest experts"),
    "sonic-120b-n1024": Shape(4096, 1024, 128, 8, "SonicMoE's 120B model"),
    "sonic-120b-n2048": Shape(4096, 2048, 64, 4, "SonicMoE's 120B model, coarsest experts"),
    "qwen3-30b-a3b": SHAPES["qwen3-30b-a3b"],
    "e512-k10": Shape(2048, 512, 512, 10, "512 narrow experts, as in Qwen3-Next"),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2, "Mixtral-8x7B"),
}
GPU_TOKENS = {
    "sonic-7b-n256": 24576, "sonic-30b-n256": 32768, "sonic-120b-n1024": 32768, "sonic-120b-n2048": 32768,
    "qwen3-30b-a3b": 32768, "e512-k10": 32768, "mixtral-8x7b": 8192,
}  # fmt: skip


def forward_flops(shape: Shape, tokens: int) -> int:
    """Three products of 2·H·I flop (gate, up, down) for each of the T·K slots."""
    return 6 * tokens * shape.top_k * shape.hidden_size * shape.intermediate_size


def train_flops(shape: Shape, tokens: int) -> int:
    """The forward, and for each product the gradients of its input and of its weight."""
    return 3 * forward_flops(shape, tokens)
