# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints in nvfp4 as ModelOpt and compressed-tensors write them, made here from tiny models: load_published gives
the decoded numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from errors import raises
from switchgear.integrations.published import load_published
from switchgear.reference import minifloat
from switchgear.weights import restore, stored_of
from tiny_configs import tiny_config
from tiny_models import example_inputs

CONFIGS: dict[str, dict[str, Any]] = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
}
SIZES = {"hidden_size": 64, "moe_intermediate_size": 48, "intermediate_size": 48, "shared_intermediate_size": 48}


def as_published(key: str, weight: Tensor, layout: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layout, and the weight that they encode, in float32."""
    if weight.dim() != 2 or not any(part in key for part in ("_proj", ".w1.", ".w2.", ".w3.")):
        return {key: weight}, weight.float()
    codes, scales, whole, _ = minifloat.encode_nvfp4(weight[None])
    name, block_scales = key.removesuffix(".weight"), scales[0].view(torch.float8_e4m3fn)
    if layout == "modelopt":
        tensors = {key: codes[0], f"{key}_scale_2": whole[0, 0].clone(), f"{name}.input_scale": torch.tensor(2.0)}
    else:
        tensors = {f"{key}_packed": codes[0], f"{key}_global_scale": whole[0].reciprocal()}
        tensors[f"{name}.input_global_scale"] = torch.tensor([2.0])
        whole = whole.reciprocal().reciprocal()
    return tensors | {f"{key}_scale": block_scales}, minifloat.decode_nvfp4(codes, scales, whole)[0]


def publish(folder: Path, model_type: str, layout: str) -> nn.Module:
    """A checkpoint of a tiny random model. Returns the model with decoded weights, in float32."""
    tiny = tiny_config(CONFIG_MAPPING[model_type]).to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in tiny}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**tiny, **sizes})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "expert" in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    published: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for key, weight in load_file(file).items():
        tensors, decoded[key] = as_published(key, weight, layout)
        published |= tensors
    save_file(decoded, file, metadata={"format": "pt"})
    options: Any = {"dtype": torch.float32, "experts_implementation": "eager"}
    wanted: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    save_file({key: tensor.contiguous() for key, tensor in published.items()}, file, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": CONFIGS[layout]}))
    return wanted


@pytest.mark.parametrize("layout", CONFIGS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_weights_are_the_decoded_ones(tmp_path: Path, model_type: str, layout: str) -> None:
    wanted = publish(tmp_path, model_type, layout)
    got = load_published(tmp_path, dtype=torch.float32)
    stored = [found for module in got.modules() if (found := stored_of(module)) is not None]
    assert {found.form.name for found in stored} == {"nvfp4"}
    inputs = example_inputs(wanted)
    logits = wanted(**inputs).logits
    assert (got(**inputs).logits - logits).abs().max() <= 2e-5 * logits.abs().max()  # sums of float32 in another order
    assert restore(got) == len(stored) > 0
    for (name, ours), theirs in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
FAULTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no scales": lambda t: t.pop(f"{EXPERT}_scale"),
    "no scale of the tensor": lambda t: t.pop(f"{EXPERT}_scale_2"),
    "scales of another dtype": lambda t: t.update({f"{EXPERT}_scale": t[f"{EXPERT}_scale"].view(torch.uint8)}),
    "too few codes": lambda t: t.update({EXPERT: t[EXPERT][:, 1:].contiguous()}),
    "an infinite scale": lambda t: t.update({f"{EXPERT}_scale_2": torch.tensor(torch.inf)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    publish(tmp_path, "qwen3_moe", "modelopt")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    FAULTS[fault](tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with raises(ValueError):
        load_published(tmp_path)


@pytest.mark.parametrize("options", [{"quant_method": "modelopt", "quant_algo": "FP8"}, {"quant_method": "modelopt"}])
def test_other_quantisation(tmp_path: Path, options: dict[str, Any]) -> None:
    publish(tmp_path, "qwen3_moe", "modelopt")
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"quantization_config": options}))
    with raises(ValueError, "quant_algo"):
        load_published(tmp_path)
