# SPDX-License-Identifier: BSD-3-Clause
"""Tiny random models of every MoE type of the installed transformers, and inputs for them. Nothing is downloaded."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from switchgear.integrations.undecorated import sample_topk
from tiny_configs import tiny_config


class Bare(nn.Module):
    """An experts module by itself, for a class that no auto class reaches."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y: Tensor = self.experts(hidden_states, top_k_index, top_k_weights)
        return y


BARE = {"qwen3_omni_moe_talker_text": ("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextExperts")}


def build(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny model of the type in float32 and eval mode, by the first auto class that supports it. All weights are
    random, since some types start them at zero; those of experts have variance 1 / their last dimension."""
    config = tiny_config(CONFIG_MAPPING[model_type])
    torch.manual_seed(seed)
    if model_type in BARE:
        folder, class_name = BARE[model_type]
        source = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        model = Bare(getattr(source, class_name)(config))
    else:
        model = _auto_class(config).from_config(config)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("experts.", "input_linear.", "output_linear.")):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def _auto_class(config: PretrainedConfig) -> Any:
    tasks = ("ForCausalLM", "ForImageTextToText", "ForTokenClassification", "ForSeq2SeqLM", "")
    for name in (*(f"AutoModel{task}" for task in tasks), "AutoBackbone"):
        auto_class = getattr(transformers, name)
        if type(config) in auto_class._model_mapping:
            return auto_class
    raise ValueError(f"model_type: no auto class has a model for {type(config).__name__}")


def example_inputs(model: Any, seed: int = 0) -> dict[str, Any]:
    """Arguments for the model's forward: two sequences of twelve tokens, or two images for a vision backbone."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Bare):
        x, topk_ids, topk_weights = sample_topk(model.experts, generator)
        return {"hidden_states": x, "top_k_index": topk_ids, "top_k_weights": topk_weights}
    if model.config.model_type == "vitpose_backbone":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, *size, generator=generator), "dataset_index": torch.tensor([0, 3])}
    ids = torch.randint(3, 250, (2, 12), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
