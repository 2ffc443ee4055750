# SPDX-License-Identifier: BSD-3-Clause
"""Models of transformers with stored experts: save_pretrained, from_pretrained and Trainer."""

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import switchgear
from errors import raises
from switchgear import backends
from switchgear.adapters import add_lora
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
def test_a_stored_model_is_saved_and_loaded(model_type: str, form: str, tmp_path: Path) -> None:
    model = stored_model(model_type, form)
    model.save_pretrained(tmp_path)
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
    model.save_pretrained(tmp_path)
    assert "get_parameter" not in vars(model)
    switchgear.restore(model)
    want, got = model.state_dict(), type(model).from_pretrained(tmp_path).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("arguments", [{}, {"state_dict": "own"}])
def test_a_warning_says_how_to_store_it_again(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = stored_model("gpt_oss", "int8")
    before = logits(model)
    if arguments:
        arguments = {"state_dict": model.state_dict()}
        keys = list(arguments["state_dict"])
    with pytest.warns(UserWarning, match=r"stored as int8 as plain weights.*switchgear.store\(model, 'int8'\)"):
        model.save_pretrained(tmp_path, **arguments)
    if arguments:
        assert list(arguments["state_dict"]) == keys  # the caller's
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="switchgear")
    switchgear.store(loaded, "int8")
    assert (logits(loaded) - before).abs().max() < 1e-3 * before.abs().max()
    with raises(ValueError, "distributed_checkpoint"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)


def test_the_warning_has_the_options_of_the_form(tmp_path: Path) -> None:
    model = build("mixtral")
    switchgear.accelerate(model)
    switchgear.store(model, "groups", bits=3, group_size=32, symmetric=False)
    call = "switchgear.store(model, 'groups', bits=3, group_size=32, symmetric=False)"
    with pytest.warns(UserWarning, match=re.escape(call)):
        model.save_pretrained(tmp_path)


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
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], model.get_parameter(name)) for name in names)
    others = {name for name in saved if not name.endswith(("_lora_A", "_lora_B"))}
    build(model_type).save_pretrained(tmp_path)
    assert others == load_file(tmp_path / "model.safetensors").keys()


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
    decoded = copy.deepcopy(model)
    switchgear.restore(decoded)
    assert torch.equal(logits(loaded), logits(decoded))
    trainer(start, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (logits(start) - want).abs().max() < 1e-3 * want.abs().max()
