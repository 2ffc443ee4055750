# SPDX-License-Identifier: BSD-3-Clause
"""The tiny model: an OLMoE whose vocabulary is the 256 bytes, with most of its parameters in the experts."""

from __future__ import annotations

from typing import Any

import torch

from switchgear.cli.common import require

# Sizes are multiples of 128, the usual group of quantised weights. With renormalised top-k weights the experts count
# from the first step on; those of a softmax over 16 experts would start at an eighth. The positions are those that it
# was trained on (train.py); beyond, its loss grows.
CONFIG: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def build(seed: int, **changes: Any) -> Any:
    """An untrained model whose experts run on switchgear; its weights depend on the seed alone."""
    transformers = require("transformers")
    require("switchgear.integrations.transformers")  # registers the name "switchgear"
    transformers.logging.set_verbosity_error()
    config = transformers.OlmoeConfig(**(CONFIG | changes))
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="switchgear"
    )


def gates_of(model: Any) -> list[torch.nn.Module]:
    """The routers, layer by layer. Each returns (router_logits, topk_weights, topk_ids)."""
    return [layer.mlp.gate for layer in model.model.layers]
