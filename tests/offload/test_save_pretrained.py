# SPDX-License-Identifier: BSD-3-Clause
"""Saving an offloaded model: adapters and the rest as before, and the whole model from its store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import raises

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoModelForCausalLM

import switchgear
from switchgear import offload
from switchgear.adapters import add_lora, load_peft, merge, save_peft
from switchgear.integrations import saving
from switchgear.integrations.transformers import accelerate
from switchgear.offload import StoreError
from tiny_models import build


def model_of(model_type: str) -> Any:
    torch.manual_seed(0)
    model: Any = build(model_type).eval()
    accelerate(model)
    return model


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def check_saved(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
    assert sorted(loaded) == sorted(wanted)
    for name, tensor in wanted.items():
        assert loaded[name].dtype is tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(("model_type", "form"), [("mixtral", "plain"), ("qwen3_moe", "int8"), ("gpt_oss", "plain")])
def test_a_checkpoint_from_the_store(tmp_path: Path, model_type: str, form: str) -> None:
    model = model_of(model_type)
    store = offload.write_store(model, tmp_path / "s", form)
    cache = offload.offload(model, store, slots=1)
    with raises(ValueError):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.model.norm.weight.data += 1  # what is not offloaded is saved as it is now
    offload.save_pretrained(model, tmp_path / "out", max_shard_size=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    cache.close(restore=False)
    offload.save_pretrained(model, tmp_path / "closed")
    assert [file.name for file in (tmp_path / "closed").glob("*.safetensors")] == ["model.safetensors"]
    again = offload.offload(model, store, slots=1)
    again.close(restore=True)
    wanted = copied(model.state_dict())
    for name in ("out", "closed"):
        check_saved(tmp_path / name, wanted)
    with raises(ValueError):
        offload.save_pretrained(model, tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["closed", "out", "s"]


def test_stored_linears_beside_offloaded_experts(tmp_path: Path) -> None:
    """They are saved as plain weights, as the experts are."""
    model = model_of("qwen3_moe")
    switchgear.store(model, None, linears="int8")
    store = offload.write_store(model, tmp_path / "s", "int8")
    cache = offload.offload(model, store, slots=1)
    offload.save_pretrained(model, tmp_path / "out")
    cache.close(restore=True)
    with pytest.warns(RuntimeWarning, match="int8"):
        switchgear.restore(model)
    check_saved(tmp_path / "out", copied(model.state_dict()))


def test_a_model_that_was_never_whole(tmp_path: Path) -> None:
    """Loaded without experts: saved and loaded again, it is the checkpoint."""
    whole = model_of("mixtral")
    whole.save_pretrained(tmp_path / "c")
    store = offload.write_store(tmp_path / "c", tmp_path / "s")
    model = offload.load_model(tmp_path / "c", store)
    cache = offload.offload(model, store, slots=1)
    offload.save_pretrained(model, tmp_path / "out")
    check_saved(tmp_path / "out", whole.state_dict())
    cache.close()


def test_a_store_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    model = model_of("mixtral")
    store = offload.write_store(model, tmp_path / "s")
    cache = offload.offload(model, store, slots=1)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        with raises(ValueError, "path"):
            offload.save_pretrained(model, tmp_path / name)
    with raises(ValueError, "max_shard_size"):
        offload.save_pretrained(model, tmp_path / "out", max_shard_size="5GB")  # type: ignore[arg-type]
    with raises(ValueError, "model"):
        offload.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "out")
    file = tmp_path / "s" / next(iter(store.layers.values())).file
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with raises(StoreError):
        offload.save_pretrained(model, tmp_path / "out")
    cache.close(restore=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "s", "there"]


def test_the_store_is_that_of_the_running_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found from another folder, refused if it has other numbers, taken again if it has the same."""
    model = model_of("mixtral")
    monkeypatch.chdir(tmp_path)
    cache = offload.offload(model, offload.write_store(model, "s"), slots=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    offload.save_pretrained(model, "out")
    (tmp_path / "s").rename(tmp_path / "first")
    other = model_of("mixtral")
    other.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] += 1
    offload.write_store(other, tmp_path / "s")
    with raises(StoreError):
        offload.save_pretrained(model, "changed")
    shutil.rmtree(tmp_path / "s")
    shutil.copytree(tmp_path / "first", tmp_path / "s")
    offload.save_pretrained(model, "again")
    cache.close()
    check_saved(tmp_path / "elsewhere" / "out", model.state_dict())
    check_saved(tmp_path / "elsewhere" / "again", model.state_dict())
    assert sorted(file.name for file in (tmp_path / "elsewhere").iterdir()) == ["again", "out"]


def test_adapters_of_experts_are_saved_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model = model_of("mixtral")
    again = model_of("mixtral")
    cache = offload.offload(model, offload.write_store(model, tmp_path / "s"), slots=7)
    add_lora(model, rank=2)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    with raises(ValueError):
        merge(model)
    save_peft(model, tmp_path / "a")
    load_peft(again, tmp_path / "a")
    prompt = torch.arange(1, 9)[None]
    assert torch.equal(model(prompt).logits, again(prompt).logits)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if "lora" in name}
    assert wanted
    found = again.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    cache.close()
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" not in name)


def test_peft_saves_its_adapters_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from safetensors.torch import load_file

    base = model_of("mixtral")
    cache = offload.offload(base, offload.write_store(base, tmp_path / "s"), slots=7)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    prompt = torch.arange(1, 4)[None]  # of at most six experts
    wanted = model(prompt).logits
    wanted.sum().backward()
    model.save_pretrained(tmp_path / "a")
    assert all("lora" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    again = peft.PeftModel.from_pretrained(model_of("mixtral"), tmp_path / "a")
    assert torch.equal(again(prompt).logits, wanted)
    with raises(ValueError):
        torch.save(model.state_dict(), tmp_path / "state.pt")
    cache.close()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_trainer_resumes_with_the_bits_of_the_resident_model(tmp_path: Path) -> None:
    """Steps need more experts than there are slots. The first run is interrupted between two checkpoints."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    def adapted(base: Any) -> Any:
        torch.manual_seed(5)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets))

    def trainer(model: Any, folder: str, callbacks: tuple[TrainerCallback, ...] = ()) -> Any:
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        tokens = torch.randint(64, (8, 12), generator=torch.Generator().manual_seed(0))
        pieces = [{"input_ids": row, "labels": row} for row in tokens]
        return Trainer(model, arguments, train_dataset=pieces, callbacks=list(callbacks))

    def trained(model: Any) -> dict[str, torch.Tensor]:
        return copied({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})

    model = adapted(model_of("mixtral"))
    first = trained(model)
    trainer(model, "resident").train()
    wanted = trained(model)
    assert all(not torch.equal(first[name], tensor) for name, tensor in wanted.items())

    base = model_of("mixtral")
    store = offload.write_store(base, tmp_path / "s")
    with offload.offload(base, store, slots=2), pytest.raises(KeyboardInterrupt):
        trainer(adapted(base), "offloaded", (Interrupt(),)).train()
    base = model_of("mixtral")
    with offload.offload(base, store, slots=2):
        model = adapted(base)
        trainer(model, "offloaded").train(resume_from_checkpoint=True)
        found = trained(model)
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_transformers_saves_its_adapters_alone(tmp_path: Path) -> None:
    """save_pretrained of a model that has loaded adapters: it takes them from the state dict, and writes no others."""
    seen: dict[str, Any] = {}

    def original(self: Any, save_directory: Any, state_dict: Any = None) -> None:
        seen.update(state_dict)

    model, save = model_of("mixtral"), saving._extend_save(original)
    cache = offload.offload(model, offload.write_store(model, tmp_path / "s"), slots=1)
    with raises(ValueError):
        save(model, tmp_path)
    model._hf_peft_config_loaded = True
    save(model, tmp_path)
    assert sorted(seen) == sorted(model.state_dict())
    cache.close()


def test_all_in_memory_is_saved_as_before(tmp_path: Path) -> None:
    model = model_of("mixtral")
    wanted = copied(model.state_dict())
    cache = offload.offload(model, offload.write_store(model, tmp_path / "s"), slots=1000)
    assert cache.is_inert
    model.save_pretrained(tmp_path / "out")
    check_saved(tmp_path / "out", wanted)
    cache.close()
