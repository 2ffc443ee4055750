# SPDX-License-Identifier: BSD-3-Clause
"""Predicted keys and values of every MoE type of transformers are those that its cache holds after a forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from switchgear.analysis import attention_layers

pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_configs
from tiny_configs import MODEL_TYPES
from tiny_models import build

USUAL = (  # windows of the module, the config, and the kind of a layer; the slow run has all
    "exaone_moe", "gemma4_text", "gpt_oss", "inkling_text", "lara_mini", "llama4_text", "mimo_v2_flash", "mixtral",
    "phimoe",
)  # fmt: skip
NO_CACHE = ("openai_privacy_filter", "qwen3_omni_moe_talker_text", "switch_transformers", "vitpose_backbone")
NOT_KNOWN = ("deepseek_v4", "inkling2_loop_text", "inkling2_text", "jetmoe", "zaya")
OF_ANOTHER_FORM = ("unlimited_ocr",)  # all of the prompt, and a window of what follows

TOKENS, WINDOW = 24, 8


def types() -> list[Any]:
    found = [t for t in MODEL_TYPES if t not in (*NO_CACHE, *NOT_KNOWN, *OF_ANOTHER_FORM)]
    return [t if t in USUAL else pytest.param(t, marks=pytest.mark.slow) for t in found]


@pytest.mark.parametrize("model_type", types())
def test_keys_and_values_are_those_of_the_cache(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), WINDOW)
    monkeypatch.setattr(tiny_configs, "SIZES", tiny_configs.SIZES | windows)
    model: Any = build(model_type)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is None:
        config.sliding_window = WINDOW  # no module repeats it
    ids = torch.randint(3, 250, (1, TOKENS))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        cache = model(input_ids=ids, **more, use_cache=True).past_key_values
    layers = [layer for layer in getattr(cache, "self_attention_cache", cache).layers if is_filled(layer)]
    for own, layer in zip(attention_layers(model), layers, strict=True):
        tokens = TOKENS if own.window is None else own.window - 1  # a window's last token is the next one
        assert own.kept * tokens == layer.keys.numel() + layer.values.numel(), own.name


def is_filled(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None and layer.keys.dim() == 4
