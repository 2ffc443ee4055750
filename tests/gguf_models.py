# SPDX-License-Identifier: BSD-3-Clause
"""Small models of the architectures of GGUF files."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import switchgear
from switchgear.integrations.gguf import ARCHITECTURES

SIZES = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "initializer_range": 0.05,
}  # fmt: skip
DENSE = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = DENSE | {
    "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_group": 2, "q_lora_rank": 64,
}  # fmt: skip
OWN = {
    "olmoe": {"num_experts": 4, "num_key_value_heads": 4},  # llama.cpp knows no other
    "qwen3moe": {"head_dim": 32, "num_experts": 4, "norm_topk_prob": True},
    "llama": {"num_local_experts": 4},
    "gpt-oss": {"num_local_experts": 4, "head_dim": 32, "sliding_window": 8},
    "deepseek2": {**LATENT, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "topk_group": 1},
    "deepseek2:softmax": {**LATENT, "routed_scaling_factor": 1.5},
    "glm4moe": {**DENSE, "head_dim": 64, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.5},
    "minimax-m2": {
        "num_local_experts": 4, "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "llama4": {
        "num_hidden_layers": 4, "num_local_experts": 4, "head_dim": 32, "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 512, "num_experts_per_tok": 1,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "granitemoe": {
        "num_local_experts": 4, "embedding_multiplier": 2.0, "attention_multiplier": 0.1, "logits_scaling": 0.5,
        "residual_multiplier": 0.25, "tie_word_embeddings": True,
    },
}  # fmt: skip
IDS = torch.arange(24).view(2, 12) * 7 % 96


def make_model(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    fields = {**SIZES, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    fields |= OWN.get(name, {"num_experts": 4}) | options
    config = transformers.AutoConfig.for_model(ARCHITECTURES[name].model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    switchgear.accelerate(model)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())
