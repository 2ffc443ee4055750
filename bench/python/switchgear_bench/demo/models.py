# SPDX-License-Identifier: BSD-3-Clause
"""Small Hugging Face MoE models, one per family: a vocabulary of bytes, random weights, most work in the experts."""

from __future__ import annotations

from typing import Any

import torch

from switchgear.cli.common import CommandError, require

VOCABULARY = 256
# Common to all families. Heads of 64 are as in the large models; two key/value heads keep attention cheap.
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 896, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 4},
    "qwen3_moe": {
        "moe_intermediate_size": 256, "intermediate_size": 512, "head_dim": 64, "num_experts": 32,
        "num_experts_per_tok": 4, "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 256, "intermediate_size": 512, "n_routed_experts": 32, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 96,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4,
    },
    "gpt_oss": {
        "intermediate_size": 256, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "sliding_window": 128,
    },
}  # fmt: skip

# transformers marks every experts class that its interface can redirect with these attributes.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


def check_implementation(name: str) -> None:
    """CommandError for an experts implementation that transformers does not know."""
    moe = require("transformers.integrations.moe")
    require("switchgear.integrations.transformers")  # registers its name
    known = ["eager", *moe.ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if name not in known:
        raise CommandError(f"--implementations: expected names of {', '.join(known)}; got {name!r}")


def build_model(family: str, implementation: str, dtype: torch.dtype, seed: int) -> Any:
    """The model of `family` with experts run by `implementation`; its random weights depend only on the seed."""
    check_implementation(implementation)
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(family, **(COMMON | FAMILIES[family]))
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=implementation)


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose forward goes through transformers' experts interface, in the order of the layers."""
    return [module for module in model.modules() if all(hasattr(module, mark) for mark in _MARKS)]


def describe(model: Any) -> dict[str, Any]:
    """Sizes for the report."""
    experts = experts_modules(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    in_experts = sum(parameter.numel() for module in experts for parameter in module.parameters())
    config = model.config
    return {
        "family": config.model_type,
        "parameters": count,
        "parameters_in_experts": in_experts,
        "layers": config.num_hidden_layers,
        "moe_layers": len(experts),
        "hidden_size": config.hidden_size,
        "intermediate_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "num_experts": experts[0].num_experts,
        "top_k": config.num_experts_per_tok,
    }
