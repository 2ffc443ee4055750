# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of bitsandbytes in nf4, made here from tiny models: load_published gives the decoded numbers."""

from __future__ import annotations

import json
import re
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
from switchgear.reference import nf4
from switchgear.weights import restore, stored_of
from tiny_configs import tiny_config
from tiny_models import example_inputs

CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64, "shared_intermediate_size": 64}
STATE = ".quant_state.bitsandbytes__nf4"


def tensor_of(state: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def as_published(key: str, weight: Tensor, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of bitsandbytes, and the weight that they encode, in float32."""
    if weight.dim() != 2 or not any(part in key for part in ("_proj", ".w1.", ".w2.", ".w3.")):
        return {key: weight}, weight.float()
    codes, absmax, _ = nf4.encode_nf4(weight[None])
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    tensors = {key: codes.view(-1, 1), f"{key}.quant_map": torch.tensor(nf4.VALUES)}
    if nested:
        offset, table = float(absmax.mean()), torch.linspace(-1, 1, 256)
        rest = absmax.flatten() - offset
        scales = torch.stack([some.abs().max() for some in rest.split(256)])
        ratios = rest / scales.repeat_interleave(256)[: len(rest)]
        indices = ((ratios + 1) * 127.5).round().to(torch.uint8)
        tensors |= {f"{key}.absmax": indices, f"{key}.nested_absmax": scales, f"{key}.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        steps = [table[index] * scales[i // 256] + offset for i, index in enumerate(indices.int())]
        absmax = torch.stack(steps).view(absmax.shape)
    else:
        tensors[f"{key}.absmax"] = absmax.flatten()
    tensors[key + STATE] = tensor_of(state)
    return tensors, nf4.decode_nf4(codes, absmax)[0]


def publish(folder: Path, model_type: str, nested: bool) -> nn.Module:
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
        tensors, decoded[key] = as_published(key, weight, nested)
        published |= tensors
    save_file(decoded, file, metadata={"format": "pt"})
    options: Any = {"dtype": torch.float32, "experts_implementation": "eager"}
    wanted: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    save_file(published, file, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": CONFIG}))
    return wanted


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "olmoe"])
@pytest.mark.some(3)
def test_weights_are_the_decoded_ones(tmp_path: Path, model_type: str, nested: bool) -> None:
    wanted = publish(tmp_path, model_type, nested)
    got = load_published(tmp_path, dtype=torch.float32)
    stored = [found for module in got.modules() if (found := stored_of(module)) is not None]
    assert {found.form.name for found in stored} == {"nf4"}
    inputs = example_inputs(wanted)
    logits = wanted(**inputs).logits
    assert (got(**inputs).logits - logits).abs().max() <= 2e-5 * logits.abs().max()  # sums of float32 in another order
    state = got.state_dict()
    files = load_file(tmp_path / "model.safetensors")
    third = next(key for key in sorted(files) if re.search(r"experts\.3\.(down_proj|w2)\.weight$", key))
    down = next(key for key in state if key.endswith("down_proj_codes"))
    assert torch.equal(state[down][3].flatten(), files[third].flatten())
    assert restore(got) == len(stored) > 0
    in_bfloat16 = load_published(tmp_path)
    restore(in_bfloat16)
    models = got.named_parameters(), wanted.parameters(), in_bfloat16.parameters()
    for (name, ours), theirs, rounded in zip(*models, strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(rounded, theirs.bfloat16()), name


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def _restate(**changes: Any) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[EXPERT + STATE].tolist())) | changes
        tensors[EXPERT + STATE] = tensor_of(state)

    return change


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no state": (lambda t: t.pop(EXPERT + STATE), "expert 5"),
    "no absmax": (lambda t: t.pop(f"{EXPERT}.absmax"), "expert 5"),
    "no codes": (lambda t: t.pop(EXPERT), "expert 5"),
    "shape": (lambda t: t.update({EXPERT: t[EXPERT][:-1].clone()}), "path"),
    "dtype": (lambda t: t.update({f"{EXPERT}.absmax": t[f"{EXPERT}.absmax"].float()}), "path"),
    "another expert": (
        lambda t: t.update({EXPERT.replace(".5.", ".8."): t[EXPERT].clone()}), r"unexpected .*experts\.8\.up_proj"),
    "long state": (lambda t: t.update({EXPERT + STATE: torch.zeros(9999).byte()}), r"expected shape \[4096"),
    "no JSON": (lambda t: t[EXPERT + STATE].fill_(91), "gate_up_proj, expert 5"),
    "block": (_restate(blocksize=128), "expert 5"),
    "other shape": (_restate(shape=[128, 64]), "expert 5"),
    "type": (_restate(quant_type="fp4"), r"expected quant_type nf4, got fp4"),
    "offset": (_restate(nested_offset=float("nan")), r"expected nested_offset to be a finite number, got nan"),
    "map": (lambda t: t[f"{EXPERT}.quant_map"].mul_(2), "expert 5: .quant_map"),
    "NaN": (lambda t: t[f"{EXPERT}.nested_absmax"].fill_(torch.nan), "expert 5: scales"),
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    publish(folder, "qwen3_moe", nested=True)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.some(7)
def test_faults_are_named(path: Path, tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with raises(ValueError, message):
        load_published(tmp_path)


def test_other_types_of_bitsandbytes_are_refused(path: Path, tmp_path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = CONFIG | {"bnb_4bit_quant_type": "fp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(path / "model.safetensors"), tmp_path / "model.safetensors")
    with raises(ValueError, "path"):
        load_published(tmp_path)
