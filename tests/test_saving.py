# SPDX-License-Identifier: BSD-3-Clause
"""Models of transformers with stored experts: save_pretrained, from_pretrained and Trainer."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.quantizers import auto

import switchgear
from errors import raises
from switchgear import backends
from switchgear.adapters import add_lora
from switchgear.integrations.packed import SwitchgearConfig
from switchgear.weights import Groups, stored_of
from tiny_models import build, example_inputs

FORMS = ["int8", "int4", "fp8", "mxfp4", "nf4", "groups"]  # test_forms.py saves the lossless ones


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    backends._warned_about.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def stored_model(model_type: str, form: str) -> Any:
    model = build(model_type)
    switchgear.accelerate(model)
    switchgear.store(model, form)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**example_inputs(model)).logits
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "olmoe"])
def test_a_stored_model_is_saved_as_a_plain_one(model_type: str, form: str, tmp_path: Path) -> None:
    model = stored_model(model_type, form)
    model.save_pretrained(tmp_path, plain=True)
    assert switchgear.restore(model) > 0  # save_pretrained did not change it
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="switchgear")
    want = model.state_dict()
    got = loaded.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert torch.equal(logits(loaded), logits(model))


def test_conversions_that_ask_for_shapes(tmp_path: Path) -> None:
    """transformers transposes the experts of Qwen3-VL-MoE only if their shapes differ from the model's."""
    model = stored_model("qwen3_vl_moe", "int8")
    model.save_pretrained(tmp_path, plain=True)
    assert "get_parameter" not in vars(model)
    switchgear.restore(model)
    want, got = model.state_dict(), type(model).from_pretrained(tmp_path).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("arguments", [{}, {"state_dict": "own"}])
def test_a_warning_says_that_weights_are_plain(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = stored_model("gpt_oss", "int8")
    before = logits(model)
    if arguments:
        arguments = {"state_dict": model.state_dict()}
        keys = list(arguments["state_dict"])
    with pytest.warns(UserWarning, match=r"int8.*switchgear.store"):
        model.save_pretrained(tmp_path, plain=True, **arguments)
    if arguments:
        assert list(arguments["state_dict"]) == keys  # the caller's
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="switchgear")
    switchgear.store(loaded, "int8")
    assert (logits(loaded) - before).abs().max() < 1e-3 * before.abs().max()
    with raises(ValueError, "distributed_checkpoint"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)


@pytest.mark.parametrize("form", [None, "int8"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])  # of mixtral, checkpoints have other names of modules
def test_adapters_are_saved_under_the_names_of_the_model(model_type: str, form: str | None, tmp_path: Path) -> None:
    """A Trainer that resumes, or loads its best model, passes the file to load_state_dict."""
    model = build(model_type)
    switchgear.accelerate(model)
    adapters = add_lora(model, 2)
    if form is not None:
        switchgear.store(model, form)
    for parameter in adapters:
        torch.nn.init.normal_(parameter)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.save_pretrained(tmp_path, plain=True) if form else model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], model.get_parameter(name)) for name in names)
    others = {name for name in saved if not name.endswith(("_lora_A", "_lora_B"))}
    build(model_type).save_pretrained(tmp_path)
    assert others == load_file(tmp_path / "model.safetensors").keys()


# ---- packed checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, "nvfp4", Groups(bits=3, group_size=32, symmetric=False)], ids=str)
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "olmoe", "qwen3_vl_moe"])
@pytest.mark.some(10)
def test_packed_checkpoints(model_type: str, form: Any, tmp_path: Path) -> None:
    """The same tensors come back; the model is one that store has stored."""
    model = build(model_type)
    switchgear.accelerate(model)
    switchgear.store(model, form, linears="int8")
    want, state = logits(model), model.state_dict()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not hasattr(model.config, "quantization_config")
    loaded: Any = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), want)
    assert {name: stored.form for name, m in loaded.named_modules() if (stored := stored_of(m)) is not None} == {
        name: stored.form for name, m in model.named_modules() if (stored := stored_of(m)) is not None
    }
    got = loaded.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], state[key]) for key in state)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), want)
    switchgear.restore(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize("processor", [0, -1], ids=["the same", "another"])
def test_packed_checkpoints_of_panels(tmp_path: Path, processor: int) -> None:
    isas = switchgear.available_cpu_isas()
    before = switchgear.cpu_isa()
    try:
        switchgear.set_cpu_isa(isas[0])
        model = build("qwen3_vl_moe")
        switchgear.accelerate(model)
        switchgear.store(model, "panels")
        model.save_pretrained(tmp_path)
        switchgear.set_cpu_isa(isas[processor])
        loaded = type(model).from_pretrained(tmp_path)
        if processor == 0:
            assert torch.equal(logits(loaded), logits(model))
    finally:
        switchgear.set_cpu_isa(before)
    switchgear.restore(model)
    switchgear.restore(loaded)
    assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in model.state_dict().items())


def test_packed_checkpoints_load_into_stored_models_and_parts(tmp_path: Path) -> None:
    model = stored_model("olmoe", "int4")
    switchgear.store(model, None, linears="fp8")
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    twin = copy.deepcopy(model)
    switchgear.restore(twin)
    twin.model.layers[0].self_attn.q_proj.weight.data.zero_()
    switchgear.store(twin, "int4", linears="fp8")
    assert not torch.equal(logits(twin), logits(model))
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(twin), logits(model))
    base: Any = AutoModel.from_pretrained(tmp_path)  # without the head, and without its prefix
    inputs = example_inputs(model)
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_a_plain_checkpoint_is_stored_while_loading(tmp_path: Path) -> None:
    model = build("olmoe")
    model.save_pretrained(tmp_path)
    config = SwitchgearConfig("int4", linears="int8")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    switchgear.accelerate(model)
    switchgear.store(model, "int4", linears="int8")
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_alone_refuses_a_packed_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns that it does not know the method, and would make random weights if shapes did not differ."""
    stored_model("olmoe", "int8").save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "switchgear")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "switchgear")
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def damage_kind(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["stored"][0]["weights"][0] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [{"rows": 32}, {"format": "int9"}, {"group_size": 7}, {"fields": ["data"]}, {"dtype": "Tensor"}, {"more": 1}],
)
def test_damaged_packed_checkpoints(changes: dict[str, Any], tmp_path: Path) -> None:
    stored_model("olmoe", "int8").save_pretrained(tmp_path)
    damage_kind(tmp_path, **changes)
    with pytest.raises((ValueError, TypeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_models_are_saved_as_before(tmp_path: Path) -> None:
    model = build("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in model.state_dict().items())


def test_trainer(tmp_path: Path) -> None:
    """The rest of the model trains; checkpoints load by from_pretrained, and by the Trainer that resumes from one."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = stored_model("gpt_oss", "int8")
    ids = torch.randint(3, 200, (8, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    start = copy.deepcopy(model)

    def trainer(model: Any, **options: Any) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, save_steps=2, logging_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, seed=0, **options,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]

    trainer(model, max_steps=4).train()
    want = logits(model)
    assert not torch.equal(want, logits(start))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", experts_implementation="switchgear")
    assert torch.equal(logits(loaded), want)
    trainer(start, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (logits(start) - want).abs().max() < 1e-3 * want.abs().max()
