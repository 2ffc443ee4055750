# SPDX-License-Identifier: BSD-3-Clause
"""Adapters in GGUF files: what the files hold is what a merge adds, and llama.cpp computes the same with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import switchgear
from errors import raises
from switchgear.adapters import add_lora, merge
from switchgear.integrations.gguf_file import read_gguf

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from gguf_models import IDS, distance, logits_of, make_model  # noqa: E402

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]  # and routers
FAMILIES = ["qwen2moe", "llama", "gpt-oss", "glm4moe", "llama4"]


def wrap(model: Any, **options: Any) -> Any:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS, "target_parameters": EXPERTS, "lora_dropout": 0.0}
    return peft.get_peft_model(model, peft.LoraConfig(**fields | options))


def train(model: Any, steps: int = 4) -> None:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    ("library", "name"), [*(("peft", name) for name in FAMILIES), ("peft twice", "llama"), ("own", "gpt-oss")]
)
def test_a_file_holds_what_a_merge_adds(name: str, library: str, tmp_path: Path) -> None:
    base, merged, adapter = (tmp_path / f"{part}.gguf" for part in ("base", "merged", "adapter"))
    switchgear.save_gguf(make_model(name), base, "f32")
    model = switchgear.load_gguf(base)
    if library == "own":
        add_lora(model, 4, alpha=6)
        train(model)
        switchgear.save_gguf_adapter(model, adapter)
        merge(model, keep_adapters=False)
    else:
        wrapped = wrap(model)
        if library == "peft twice":  # of other ranks and scales
            wrapped.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=5, target_modules=LINEARS))
            wrapped.base_model.set_adapter(["default", "other"])
        train(wrapped)
        switchgear.save_gguf_adapter(wrapped, adapter)
        model = wrapped.merge_and_unload()
    switchgear.save_gguf(model, merged, "f32")
    file, (old, new) = read_gguf(adapter), (read_gguf(path).tensors for path in (base, merged))
    assert file.get("general.type") == "adapter"
    assert file.get("adapter.type") == "lora"
    changed = {each for each, tensor in old.items() if not torch.equal(tensor.data, new[each].data)}
    assert changed == {each.rpartition(".")[0] for each in file.tensors}
    for each in changed:
        a, b = (file.tensors[f"{each}.lora_{letter}"].data for letter in "ab")
        delta = file.get("adapter.lora.alpha") / a.shape[-2] * b @ a
        torch.testing.assert_close(new[each].data, old[each].data + delta, rtol=1e-5, atol=1e-6)


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with raises(ValueError, "model"):
        switchgear.save_gguf_adapter(torch.nn.Linear(2, 2), path)
    with raises(ValueError, "model"):
        switchgear.save_gguf_adapter(make_model("olmoe"), path)
    for options, named in (
        ({"use_dora": True, "target_parameters": None}, "q_proj"),
        ({"bias": "lora_only", "target_parameters": None}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ):
        with raises(ValueError, named):
            switchgear.save_gguf_adapter(wrap(make_model("olmoe"), **options), path)
    with raises(ValueError, "kv_b_proj"):
        model = wrap(make_model("deepseek2"), target_modules=["kv_b_proj"])
        switchgear.save_gguf_adapter(model, path)
    with raises(ValueError, "lm_head"):
        switchgear.save_gguf_adapter(wrap(make_model("granitemoe"), target_modules=["lm_head"]), path)
    model = wrap(make_model("olmoe"))
    model.merge_adapter()
    with raises(ValueError, "model"):
        switchgear.save_gguf_adapter(model, path)
    model.unmerge_adapter()
    with model.disable_adapter(), raises(ValueError, "model"):
        switchgear.save_gguf_adapter(model, path)
    torch.nn.init.constant_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight, torch.inf)
    with raises(ValueError, "q_proj"):
        switchgear.save_gguf_adapter(model, path)
    assert not path.exists()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("library", ["peft", "own"])
def test_llama_cpp_chooses_the_same_tokens(name: str, library: str, tmp_path: Path) -> None:
    pytest.importorskip("switchgear_bench", reason="switchgear_bench is not installed")
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    from switchgear_bench.llama import Llama

    base, adapter, ids = tmp_path / "base.gguf", tmp_path / "adapter.gguf", IDS[0].tolist()
    switchgear.save_gguf(make_model(name), base, "f32")
    model: Any = switchgear.load_gguf(base)
    before = logits_of(model)[0, -1]
    if library == "peft":
        model = wrap(model)
    else:
        add_lora(model, 4, alpha=6)
    train(model)
    switchgear.save_gguf_adapter(model, adapter)
    other = Llama(base, 96, 128, 2, adapter=adapter)
    logits = other.step(ids)
    assert distance(before, logits) > 0.1
    assert distance(logits_of(model)[0, -1], logits) < 2e-3
    wanted = []
    for _ in range(12):
        wanted.append(int(logits.argmax()))
        logits = other.step(wanted[-1:])
    got = model.generate(input_ids=IDS[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(ids) :]
    assert got.tolist() == wanted
