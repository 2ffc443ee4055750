# SPDX-License-Identifier: BSD-3-Clause
"""Pruning on every MoE type of the installed transformers: the checkpoint loads with the same logits, or a ValueError
says why not, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models
from errors import raises
from switchgear.compress import calibrate, prune_experts
from tiny_configs import MODEL_TYPES

REFUSED = {
    "dbrx": "encoder.block.0.layer.1.mlp",
    "deepseek_v4": "a router without tables",
    "diffusion_gemma": "parameters of one block",
    "inkling_text": "a router of 8 classes",
    "jetmoe": "model",
    "longcat_flash": "a router of 8 classes",
    "nllb-moe": "encoder.block.0.layer.1.mlp",
    "qwen3_omni_moe_talker_text": "model.layers.0.mlp",
    "switch_transformers": "encoder.block.0.layer.1.mlp",
    "vitpose_backbone": "MoE layers of switchgear or Hugging Face",
    "zaya": "model.layers.0.mlp",
}
UNREADABLE = ("inkling2_text", "inkling2_loop_text")  # transformers cannot load its own checkpoints of this size
USUAL = ("afmoe", "ernie4_5_moe", "granitemoe", "llama4_text", "minimax_m2", "jetmoe", "zaya", "switch_transformers")


def parameters() -> list[Any]:
    return [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_TYPES]


def output_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    found = getattr(output, "logits", None)
    if found is None:
        found = getattr(output, "last_hidden_state", None)
    return output[0] if found is None else found


@pytest.mark.parametrize("model_type", parameters())
def test_row45_pruned_checkpoints(model_type: str, tmp_path: Path) -> None:
    model = tiny_models.build(model_type)
    inputs = tiny_models.example_inputs(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if model_type in REFUSED:
        with raises(ValueError, REFUSED[model_type]):
            prune_experts(model, 4, "reap", calibration=calibrate(model, [inputs], samples=0))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    criterion = "random" if model_type == "ernie4_5_vl_moe" else "reap"  # its experts of images get no tokens
    result = prune_experts(model, 4, criterion, calibration=calibrate(model, [inputs], samples=0))
    assert result.parameters_after < result.parameters_before
    if model_type in UNREADABLE:
        assert output_of(model, inputs).isfinite().all()
        return
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    want = output_of(model, inputs)
    torch.testing.assert_close(output_of(loaded.eval(), inputs), want, rtol=0, atol=1e-5)
