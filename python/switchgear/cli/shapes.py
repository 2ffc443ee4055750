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


SHAPES = {
    "tiny": Shape(256, 512, 8, 2, "fits in the last-level cache"),
    "mixtral-half": Shape(2048, 3584, 8, 2, "Mixtral-8x7B, hidden size halved, width a quarter"),
    "olmoe": Shape(2048, 1024, 64, 8, "OLMoE-1B-7B"),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8, "Qwen3-30B-A3B"),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6, "DeepSeek-V2-Lite, without its shared experts"),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, "gpt-oss-20b, with plain SwiGLU and without biases"),
}


def forward_flops(shape: Shape, tokens: int) -> int:
    """Three products of 2·H·I flop (gate, up, down) for each of the T·K slots."""
    return 6 * tokens * shape.top_k * shape.hidden_size * shape.intermediate_size


def train_flops(shape: Shape, tokens: int) -> int:
    """The forward, and for each product the gradients of its input and of its weight."""
    return 3 * forward_flops(shape, tokens)
