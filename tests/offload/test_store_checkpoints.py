# SPDX-License-Identifier: BSD-3-Clause
"""Stores of checkpoints of transformers, and models that are loaded without their experts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import raises

pytest.importorskip("transformers", reason="transformers is not installed")

from test_store import Stopped, arena_of, peak_of, stopping, written_layers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import switchgear
from switchgear import offload
from switchgear.cli import main
from switchgear.integrations.published import load_published
from switchgear.offload import Store, StoreError, write_store
from switchgear.weights import stored_of
from switchgear.weights.form import layout_of
from tiny_configs import tiny_config

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_published_groups
import test_published_nf4
from test_published import MODELS, OPTIONS, publish


def saved(folder: Path, model_type: str, **sizes: Any) -> Path:
    config = CONFIG_MAPPING[model_type](**{**tiny_config(CONFIG_MAPPING[model_type]).to_dict(), **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    return folder


def read_weights(store: Store, name: str) -> tuple[Any, Any]:
    records = store.layers[name]
    return records.weights(arena_of(store, records, list(range(records.num_experts))))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
def test_plain_checkpoints(tmp_path: Path, model_type: str) -> None:
    """Keys of each expert, or of all in one tensor, transposed or not: the weights of from_pretrained."""
    path = saved(tmp_path / "c", model_type)
    store = write_store(path, tmp_path / "s")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    switchgear.accelerate(model)
    expected = {name: module for name, module in model.named_modules() if layout_of(module) is not None}
    assert list(store.layers) == list(expected)
    for name, module in expected.items():
        layout = layout_of(module)
        assert layout is not None
        for projection, got in zip(layout.names, read_weights(store, name), strict=True):
            parameter = getattr(module, projection)
            assert torch.equal(got.plain(), parameter.mT if layout.transposed else parameter)
    of_model = write_store(model, tmp_path / "m")
    assert of_model.config_hash == store.config_hash
    assert [r.checksums for r in of_model.layers.values()] == [r.checksums for r in store.layers.values()]
    loaded = offload.load_model(path, store)
    assert not loaded.training
    held = {f"{name}.{key}" for name, module in expected.items() for key in layout_of(module).names}
    wanted = dict(model.named_parameters())
    assert sorted(wanted) == sorted(dict(loaded.named_parameters()))
    for name, parameter in loaded.named_parameters():
        assert parameter.is_meta == (name in held), name
        if not parameter.is_meta:
            assert torch.equal(parameter, wanted[name]), name
    for (name, buffer), (_, want) in zip(loaded.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(buffer, want), name


def test_an_interrupted_store_goes_on_in_its_dtype_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "c", "mixtral")
    with pytest.raises(Stopped):
        write_store(path, tmp_path / "s", progress=stopping(1))
    written = written_layers(monkeypatch)
    with raises(StoreError, "path"):
        write_store(path, tmp_path / "s", dtype=torch.float32)
    assert written == []
    store = write_store(path, tmp_path / "s", dtype=torch.bfloat16)  # that of the config
    assert written == list(store.layers)[1:]


@pytest.mark.parametrize("model_type", MODELS)
def test_published_experts_keep_their_bits(tmp_path: Path, model_type: str) -> None:
    publish(tmp_path / "c", model_type)
    store = write_store(tmp_path / "c", tmp_path / "s", "as published")
    same = write_store(tmp_path / "c", tmp_path / "t", MODELS[model_type], **OPTIONS.get(model_type, {}))
    assert ("layer as published, " if len(store.layers) == 1 else "layers as published, ") in str(store)
    assert f" as {MODELS[model_type]}" in str(same)
    plain = write_store(tmp_path / "c", tmp_path / "p")
    model = load_published(tmp_path / "c")
    for name, records in store.layers.items():
        module = model.get_submodule(name)
        stored = stored_of(module)
        assert stored is not None
        for got, want, decoded in zip(
            read_weights(store, name), stored.weights(module), read_weights(plain, name), strict=True
        ):
            assert got.format == MODELS[model_type]
            assert got.is_exact
            for one, other in zip(got.tensors, want.tensors, strict=True):
                assert torch.equal(one, other)
            assert torch.equal(decoded.plain(), want.plain())
        assert same.layers[name].checksums == records.checksums
    loaded = offload.load_model(tmp_path / "c", store)
    assert any(parameter.is_meta for parameter in loaded.parameters())


PUBLISHED = {f"{kind.method} {kind.bits} {kind.version}": kind for kind in test_published_groups.KINDS}


@torch.no_grad()
@pytest.mark.parametrize("name", [*PUBLISHED, "nf4", "nf4 nested"])
@pytest.mark.some(3)
def test_row38_published_integers_in_a_cache(tmp_path: Path, name: str) -> None:
    """GPTQ, AWQ, compressed-tensors and nf4, experts of which most are on disk: the bits of the resident model."""
    if name in PUBLISHED:
        test_published_groups.publish(tmp_path / "c", "qwen3_moe", PUBLISHED[name])
    else:
        test_published_nf4.publish(tmp_path / "c", "qwen3_moe", nested="nested" in name)
    store = write_store(tmp_path / "c", tmp_path / "s", "as published")
    store.verify()
    resident = load_published(tmp_path / "c", linears=False)
    model = offload.load_model(tmp_path / "c", store)
    assert {kind.format for r in store.layers.values() for kind in r.kinds} == {name[:3] if "nf4" in name else "groups"}
    prompt = torch.arange(1, 9)[None]
    with offload.offload(model, store, slots=2, policy=offload.LIFO()) as cache:
        assert torch.equal(model(prompt).logits, resident(prompt).logits)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
        assert torch.equal(model.generate(prompt, **options), resident.generate(prompt, **options))
        found = cache.statistics
        assert found.hits > 0
        assert found.misses > 0
        assert cache.nbytes < store.nbytes


def test_a_store_of_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "c", "mixtral")
    store = write_store(path, tmp_path / "s")
    wide = saved(tmp_path / "w", "mixtral", intermediate_size=96)
    deep = saved(tmp_path / "d", "mixtral", num_hidden_layers=5)
    with raises(ValueError):
        offload.load_model(wide, store)
    with raises(ValueError):
        offload.load_model(deep, store)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "other"}}))
    with raises(ValueError, "quant_method"):
        offload.load_model(path, store)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("form", ["plain", "int8"])
def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, form: str) -> None:
    """A model of eight layers: the peak is a fraction of its experts, and does not grow with their number."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_local_experts": 8,
        "num_attention_heads": 8,
        "head_dim": 64,
    }
    small = saved(tmp_path / "warm", "mixtral")
    peaks = []
    for layers in (4, 12):
        path = saved(tmp_path / f"c{layers}", "mixtral", num_hidden_layers=layers, **sizes)
        peaks.append(peak_of(path, small, tmp_path / f"s{layers}", form))
    layer = 8 * 3 * 512 * 1024 * 2
    print(peaks, layer)
    assert peaks[1] < peaks[0] + layer
    assert peaks[1] < 4 * layer + (
        64 << 20
    )  # the plain layer, its encoding and temporaries, and 64 MiB of mapped files


def test_the_command_writes_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = saved(tmp_path / "c", "mixtral"), str(tmp_path / "s")
    assert main(["offload-store", str(path), "--out", out, "--form", "int4", "--set", "group_size=16", "--verify"]) == 0
    store = Store.open(out)
    assert store.form == "int4(group_size=16)"
    assert f"{out}: 32 experts of 4 layers as int4(group_size=16), " in capsys.readouterr().out
    for arguments, message in (
        ([str(path), "--out", out], "--out: expected a folder that does not exist"),
        ([str(path), "--out", out + "2", "--form", "zip"], "form: expected"),
        ([str(path), "--out", out + "2", "--set", "form=int4"], "--set: expected"),
        ([str(path), "--out", out + "2", "--set", "bits=3"], "bits"),
        ([str(path), "--out", out + "2", "--set", "seed=1", "--set", "seed=2"], "--set: expected each option once"),
        ([str(tmp_path), "--out", out + "2"], "config.json"),
    ):
        assert main(["offload-store", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "s"]


def test_an_unfinished_store_of_another_form_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--fresh in the command, resume=False in Python."""
    path, out = saved(tmp_path / "c", "mixtral"), tmp_path / "s"
    with pytest.raises(Stopped):
        write_store(path, out, "int8", progress=stopping(1))
    with raises(StoreError, "path") as caught:
        write_store(path, out)
    assert "resume=False" in str(caught.value)
    assert "--fresh" not in str(caught.value)
    assert main(["offload-store", str(path), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "--fresh" in message
    assert "resume" not in message
    assert main(["offload-store", str(path), "--out", str(out), "--fresh"]) == 0


def test_the_command_says_that_published_experts_become_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path / "c", "gpt_oss")
    saved(tmp_path / "p", "gpt_oss")
    hint = "the checkpoint is mxfp4: its experts become plain and larger; --form 'as published' keeps them\n"
    for number, (source, form, is_said) in enumerate(
        (("c", [], True), ("c", ["--form", "as published"], False), ("p", [], False))
    ):
        assert main(["offload-store", str(tmp_path / source), "--out", str(tmp_path / str(number)), *form]) == 0
        assert capsys.readouterr().out.startswith(hint if is_said else f"{tmp_path}/{number}: ")
