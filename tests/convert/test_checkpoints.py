# SPDX-License-Identifier: BSD-3-Clause
"""Conversions of checkpoint directories: the same as in memory, in bounded memory, resumable, and never half done."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import raises

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from safetensors.torch import load_file, save_file  # noqa: E402

from switchgear import convert  # noqa: E402
from switchgear.convert import checkpoints  # noqa: E402

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
IDS = torch.arange(3, 27).view(2, 12)
UPCYCLE = {"operation": "upcycle", "num_experts": 4, "top_k": 2, "noise": 0.01, "max_shard_size": "40KB"}


def saved(path: Path, model_type: str = "llama", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path, max_shard_size="100KB")
    (path / "tokenizer.json").write_text("{}")
    return model


def loaded(path: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def tensors(path: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(IDS).logits
        return y


# ---- the same as in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_row53_sharded_is_unsharded(model_type: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", model_type)
    seen: list[tuple[int, int, str]] = []
    report = convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe", lambda *args: seen.append(args))
    found = loaded(tmp_path / "moe")
    expected = convert.upcycle(model, 4, 2, noise=0.01)
    assert same(dict(found.state_dict()), dict(expected.model.state_dict()))
    unlike = {"dtype": None, "_name_or_path": None}
    assert found.config.to_dict() | unlike == expected.model.config.to_dict() | unlike
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 3
    assert seen[-1][0] == seen[-1][1] == report.num_bytes
    assert [layer[0] for layer in report.layers] == [layer.name for layer in expected.layers]
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "moe" / "conversion.json").read_text())["recipe"]["num_experts"] == 4
    assert not (tmp_path / "moe.partial").exists()


def test_row53_upcycled_checkpoint_has_the_logits(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", tie_word_embeddings=True)
    convert.run({"operation": "upcycle", "layers": [0, 2], "router_init": 1.0}, tmp_path / "dense", tmp_path / "moe")
    found = loaded(tmp_path / "moe")
    assert found.config.mlp_only_layers == [1]
    assert logits(found).sub(logits(model)).abs().max() < 1e-5


def test_row53_a_config_as_older_versions_wrote_it(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", rope_parameters={"rope_type": "default", "rope_theta": 7e3})
    file = tmp_path / "dense" / "config.json"
    config = json.loads(file.read_text())
    config |= {"rope_theta": 7e3, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    del config["rope_parameters"], config["attention_bias"], config["mlp_bias"], config["hidden_act"]
    file.write_text(json.dumps(config))
    convert.run({"operation": "upcycle"}, tmp_path / "dense", tmp_path / "moe")
    assert logits(loaded(tmp_path / "moe")).sub(logits(model)).abs().max() < 1e-5


def test_row54_split_checkpoint(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense")
    importance = {layer: torch.rand(48) for layer in range(3)}
    save_file({str(layer): rows for layer, rows in importance.items()}, tmp_path / "importance.safetensors")
    recipe = {"operation": "split", "num_experts": 4, "top_k": 4, "method": "gradient", "shared": 2, "router_init": 0.0,
              "importance": str(tmp_path / "importance.safetensors")}  # fmt: skip
    convert.run(recipe, tmp_path / "dense", tmp_path / "moe")
    found = loaded(tmp_path / "moe")
    expected = convert.split_dense(model, 4, method="gradient", shared=2, router_init=0.0, importance=importance)
    assert same(dict(found.state_dict()), dict(expected.model.state_dict()))
    assert logits(found).sub(logits(model)).abs().max() < 1e-5


def test_rows58_and_61_experts_and_merging_of_checkpoints(tmp_path: Path) -> None:
    models = [saved(tmp_path / f"{i}", seed=i) for i in range(3)]
    base = saved(tmp_path / "base", seed=9)
    paths = [tmp_path / f"{i}" for i in range(3)]
    recipe = {
        "operation": "merge",
        "method": "ties",
        "density": 0.5,
        "base": str(tmp_path / "base"),
        "weights": [1, 2, 1],
    }
    convert.run(recipe, paths, tmp_path / "merged")
    expected = convert.merge_models(models, "ties", base=base, density=0.5, weights=[1, 2, 1])
    assert same(dict(loaded(tmp_path / "merged").state_dict()), dict(expected.state_dict()))
    recipe = {"operation": "experts", "top_k": 1, "merge": "dare", "base": str(tmp_path / "base"), "seed": 3}
    convert.run(recipe, paths, tmp_path / "moe")
    made = convert.from_dense_experts(models, 1, merge="dare", base=base, seed=3)
    assert same(dict(loaded(tmp_path / "moe").state_dict()), dict(made.model.state_dict()))


def test_row50_dense_checkpoint(tmp_path: Path) -> None:
    model = saved(tmp_path / "moe", "mixtral", num_local_experts=4)
    convert.run({"operation": "dense", "method": "topk"}, tmp_path / "moe", tmp_path / "dense")
    expected = convert.to_dense(model, "topk").model
    assert same(dict(loaded(tmp_path / "dense").state_dict()), dict(expected.state_dict()))


# ---- layouts ---------------------------------------------------------------------------------------------------------

FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = [("mixtral", {"num_local_experts": 4}), ("qwen3_moe", {**FOUR, "moe_intermediate_size": 24}),
       ("olmoe", FOUR)]  # fmt: skip


@pytest.mark.parametrize(("model_type", "options"), MOE)
@pytest.mark.parametrize("layout", ["fused", "megatron", "megatron_te", "megatron_grouped"])
def test_layouts_and_back(layout: str, model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path / "a", model_type, **options)
    convert.run({"operation": "layout", "to": layout, "max_shard_size": "50KB"}, tmp_path / "a", tmp_path / "b")
    convert.run({"operation": "layout", "to": "per_expert"}, tmp_path / "b", tmp_path / "c")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "c"))
    experts = model.model.layers[1].mlp.experts
    found, count = tensors(tmp_path / "b"), 4
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    prefix = "decoder.layers.1.mlp."
    if layout == "fused":
        assert logits(loaded(tmp_path / "b")).equal(logits(model))
        assert torch.equal(found["model.layers.1.mlp.experts.gate_up_proj"], gate_up)
        return
    assert torch.equal(found[prefix + "router.weight"], model.model.layers[1].mlp.gate.weight)
    for expert in range(count):
        if layout == "megatron_grouped":  # GroupedMLP: weight1.view(E, H, 2I), weight2.view(E, I, H), used as x @ w
            first = found[prefix + "experts.weight1"].view(count, 32, -1)[expert].T
            second = found[prefix + "experts.weight2"].view(count, -1, 32)[expert].T
        elif layout == "megatron_te":
            first, second = (found[f"{prefix}experts.linear_fc{i}.weight{expert}"] for i in (1, 2))
        else:
            first, second = (found[f"{prefix}experts.local_experts.{expert}.linear_fc{i}.weight"] for i in (1, 2))
        assert torch.equal(first, gate_up[expert])
        assert torch.equal(second, down[expert])


def changed(path: Path, **options: Tensor) -> None:
    """Puts tensors into a checkpoint, by key."""
    found = tensors(path) | options
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})


def test_selection_biases_in_layouts(tmp_path: Path) -> None:
    saved(tmp_path / "a", "mixtral", num_local_experts=4)
    bias = torch.rand(4)
    changed(tmp_path / "a", **{"model.layers.0.block_sparse_moe.gate.e_score_correction_bias": bias})
    convert.run({"operation": "layout", "to": "megatron"}, tmp_path / "a", tmp_path / "b")
    assert torch.equal(tensors(tmp_path / "b")["decoder.layers.0.mlp.router.expert_bias"], bias)
    convert.run({"operation": "layout", "to": "per_expert"}, tmp_path / "b", tmp_path / "c")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "c"))


def refused(recipe: dict[str, Any], source: Path, message: str) -> None:
    with raises(convert.RecipeError, message):
        convert.run(recipe, source, source.parent / "refused")
    assert not list(source.parent.glob("refused*"))


@pytest.mark.parametrize("layout", ["per_expert", "fused", "megatron", "megatron_te", "megatron_grouped"])
def test_experts_that_no_layout_holds_are_refused(layout: str, tmp_path: Path) -> None:
    recipe = {"operation": "layout", "to": layout}
    saved(tmp_path / "oss", "gpt_oss", num_local_experts=4, num_hidden_layers=1)
    refused(recipe, tmp_path / "oss", "source")
    saved(tmp_path / "moe", "mixtral", num_local_experts=4, num_hidden_layers=1)
    key = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    plain = tensors(tmp_path / "moe")[key]
    changed(tmp_path / "moe", **{key: plain.bfloat16()})
    refused(recipe, tmp_path / "moe", key)
    changed(tmp_path / "moe", **{key: plain.T.contiguous()})
    refused(recipe, tmp_path / "moe", key)
    changed(tmp_path / "moe", **{key: plain, key + "_scale_inv": torch.ones(1)})
    refused(recipe, tmp_path / "moe", f"{key}_scale_inv")


def test_fused_experts_of_another_orientation_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "moe", "mixtral", num_local_experts=4, num_hidden_layers=1)
    convert.run({"operation": "layout", "to": "fused"}, tmp_path / "moe", tmp_path / "fused")
    fused = {key: tensor for key, tensor in tensors(tmp_path / "fused").items() if ".experts." in key}
    changed(tmp_path / "fused", **{key: tensor.mT.contiguous() for key, tensor in fused.items()})
    refused({"operation": "layout", "to": "megatron"}, tmp_path / "fused", "source")


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "moe", "mixtral", num_local_experts=4, num_hidden_layers=1)
    config = tmp_path / "moe" / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps(json.loads(plain) | {"quantization_config": {"quant_method": "fp8"}}))
    merge = {"operation": "merge"}
    for recipe in (merge, {"operation": "layout", "to": "fused"}):
        refused(recipe, tmp_path / "moe", "model")
    base = saved(tmp_path / "base", "mixtral", num_local_experts=4, num_hidden_layers=1)
    refused({**merge, "method": "ties", "base": str(tmp_path / "moe")}, tmp_path / "base", "model")
    config.write_text(plain)
    key = "model.layers.0.self_attn.q_proj.weight"
    changed(tmp_path / "moe", **{key: torch.ones(32, 32).to(torch.float8_e4m3fn)})
    refused(merge, tmp_path / "moe", key)
    state = dict(base.state_dict()) | {key: torch.ones(32, 32).to(torch.float8_e4m3fn)}
    with raises(TypeError):
        convert.merge_models([state, state])


# ---- interruptions and errors ----------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def interrupted(recipe: dict[str, Any], source: Path | list[Path], target: Path, share: float) -> None:
    def progress(done: int, total: int, _: str) -> None:
        if done > share * total:
            raise Stopped

    with pytest.raises(Stopped):
        convert.run(recipe, source, target, progress)


def test_an_interrupted_conversion_resumes(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "whole")
    interrupted(UPCYCLE, tmp_path / "dense", tmp_path / "moe", 0.5)
    assert not (tmp_path / "moe").exists()
    assert not (tmp_path / "moe.partial" / "config.json").exists()  # no half checkpoint that could be loaded
    finished = sorted(tmp_path.glob("moe.partial/*.safetensors"))
    assert len(finished) >= 3
    journal = json.loads((tmp_path / "moe.partial" / "journal.json").read_text())  # other versions read it, too
    assert list(journal) == ["identity", "shards"]
    assert journal["shards"].keys() == {file.name for file in finished}
    assert journal["shards"][finished[0].name].keys() == {"sha256", "bytes"}
    finished[1].write_bytes(finished[1].read_bytes()[:-1] + b"?")  # damaged meanwhile
    times = {file.name: file.stat().st_mtime_ns for file in finished}
    report = convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    assert set(report.resumed) == {file.name for file in finished} - {finished[1].name}
    assert all((tmp_path / "moe" / name).stat().st_mtime_ns == times[name] for name in report.resumed)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "moe" / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in (tmp_path / "moe").iterdir()} == {
        file.name for file in (tmp_path / "whole").iterdir()
    }


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    interrupted(UPCYCLE, tmp_path / "dense", tmp_path / "moe", 0.5)
    other = {**UPCYCLE, "seed": 1}
    with raises(convert.ConversionError):
        convert.run(other, tmp_path / "dense", tmp_path / "moe")
    saved(tmp_path / "dense", seed=5)  # another source
    with raises(convert.ConversionError):
        convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    assert not convert.run(other, tmp_path / "dense", tmp_path / "moe", resume=False).resumed
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("moe", "link"):
        with raises(convert.ConversionError):
            convert.run(other, tmp_path / "dense", tmp_path / name)


@pytest.mark.parametrize("option", ["importance", "router", "base"])
def test_a_changed_input_does_not_resume(option: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two", "base")):
        saved(tmp_path / name, seed=seed)
    sources, file = [tmp_path / "one", tmp_path / "two"], tmp_path / "rows.safetensors"
    recipe = {"operation": "experts", "top_k": 1, "router": str(file), "base": str(tmp_path / "base")}
    rows = (2, 32)
    if option == "importance":
        sources, rows = sources[:1], (1, 48)
        recipe = {"operation": "split", "num_experts": 4, "top_k": 2, "method": "gradient", "importance": str(file)}
    recipe["max_shard_size"] = "20KB"
    save_file({str(layer): torch.rand(rows) for layer in range(3)}, file)
    interrupted(recipe, sources, tmp_path / "moe", 0.5)
    if option == "base":
        saved(tmp_path / "base", seed=7)
    else:
        save_file({str(layer): torch.rand(rows) for layer in range(3)}, file)
    with raises(convert.ConversionError):
        convert.run(recipe, sources, tmp_path / "moe")


def test_only_a_conversion_is_discarded(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    other = tmp_path / "moe.partial" / "thesis.txt"
    other.parent.mkdir()
    other.write_text("all of it")
    for resume in (True, False):
        with raises(convert.ConversionError):
            convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe", resume=resume)
    assert other.read_text() == "all of it"
    with raises(convert.ConversionError):
        convert.run(UPCYCLE, tmp_path / "dense", other / "moe")  # its parent is a file


def test_one_process_at_a_time(tmp_path: Path) -> None:
    saved(tmp_path / "dense")

    def progress(done: int, total: int, _: str) -> None:
        if done == total:
            for resume in (True, False):
                with raises(convert.ConversionError):
                    convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe", resume=resume)

    convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe", progress)
    assert not (tmp_path / "moe" / "lock").exists()


def test_a_full_disk_is_named_and_the_conversion_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "dense")
    written: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(convert.DiskFull):
            convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    assert not list(tmp_path.glob("moe.partial/*.unfinished"))
    assert convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe").resumed
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with raises(convert.DiskFull):
            convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_files_beside_weights_are_copied_by_a_conversion_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "dense")
    (tmp_path / "dense" / "additional_chat_templates").mkdir()
    beside = ("video_preprocessor_config.json", "additional_chat_templates/tools.jinja", "tokenizer.json")
    for name in beside:
        (tmp_path / "dense" / name).write_text(f"the text of {name}")

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_text", stop)  # after the copies
        with pytest.raises(Stopped):
            convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    (tmp_path / "moe.partial" / "additional_chat_templates" / "old.jinja").write_text("gone since")
    convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    assert all((tmp_path / "moe" / name).read_text() == f"the text of {name}" for name in beside)
    assert not (tmp_path / "moe" / "additional_chat_templates" / "old.jinja").exists()


def test_a_truncated_or_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    files = sorted((tmp_path / "dense").glob("*.safetensors"))
    whole = files[1].read_bytes()
    for data in (whole[:-10], whole[:20], b""):
        files[1].write_bytes(data)
        with raises(convert.DamagedCheckpoint, files[1].name):
            convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    files[1].unlink()
    with raises(convert.DamagedCheckpoint, files[1].name):
        convert.run(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    with raises(convert.DamagedCheckpoint):
        convert.run(UPCYCLE, tmp_path / "nothing", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    assert not (tmp_path / "moe.partial").exists()


WRONG: list[tuple[Any, str]] = [
    ({}, "operation"),
    ({"operation": "quantize"}, "operation"),
    ({"operation": "upcycle", "experts": 3}, "experts"),
    ({"operation": "upcycle", "num_experts": 0}, "num_experts"),
    ({"operation": "upcycle", "num_experts": 2, "top_k": 3}, "top_k"),
    ({"operation": "upcycle", "layers": [7]}, "layers"),
    ({"operation": "upcycle", "layers": [0], "family": "mixtral"}, "all of its layers"),
    ({"operation": "upcycle", "max_shard_size": "big"}, "max_shard_size"),
    ({"operation": "upcycle", "num_experts": "many"}, "num_experts"),
    ({"operation": "split", "num_experts": 4}, "top_k"),
    ({"operation": "split", "num_experts": 7, "top_k": 1}, "num_experts"),
    ({"operation": "split", "num_experts": 4, "top_k": 1, "method": "gradient"}, "importance"),
    ({"operation": "split", "num_experts": 4, "top_k": 1, "importance": "nowhere.safetensors"}, "importance"),
    ({"operation": "merge", "method": "ties"}, "base"),
    ({"operation": "dense"}, "MoE model"),
    ({"operation": "layout", "to": "fused"}, "one layout"),
    ({"operation": "layout", "to": "gguf"}, "to"),
    ("recipe.json", "recipe"),
    ({"operation": "upcycle", "noise": "big"}, "noise"),
    ({"operation": "upcycle", "noise": -1}, "noise"),
    ({"operation": "upcycle", "router_init": math.nan}, "router_init"),
    ({"operation": "upcycle", "seed": "x"}, "seed"),
    ({"operation": "upcycle", "layers": 3}, "layers"),
    ({"operation": "split", "num_experts": 4, "top_k": 2, "seed": 1.5}, "seed"),
    (
        {"operation": "split", "num_experts": 4, "top_k": 2, "importance": [1]},
        "importance",
    ),
    ({"operation": "merge", "weights": ["a"]}, "weights"),
    ({"operation": "merge", "weights": 3}, "weights"),
    ({"operation": "merge", "scale": "x"}, "scale"),
    ({"operation": "merge", "method": "ties", "base": 3}, "base"),
    ({"operation": "experts", "top_k": 1, "noise": "x"}, "noise"),
    ({"operation": ["upcycle"]}, "operation"),
    ({"operation": "upcycle", "max_shard_size": "inf"}, "max_shard_size"),
    ({"operation": "upcycle", "max_shard_size": 1e400}, "max_shard_size"),
    ({"operation": "upcycle", "family": ["mixtral"]}, "family"),
    ({"operation": "split", "num_experts": 4, "top_k": 2, "seed": 10**30}, "seed"),
    ({"operation": "split", "num_experts": 4, "top_k": 2, "rescale": "no"}, "rescale"),
]
WRONG_DENSE = [
    ({"method": "best"}, "method"),
    ({"method": "svd", "rank": 1.5}, "rank"),
    ({"method": "svd", "rank": 0}, "rank"),
    ({"rank": 2}, "rank"),
    ({"weights": [1]}, "weights"),
    ({"weights": [0] * 4}, "weights"),
    ({"method": "topk", "weights": [1] * 4}, "weights"),
]


@pytest.mark.parametrize(("recipe", "name"), WRONG)
def test_a_wrong_recipe_is_named_and_nothing_is_written(recipe: Any, name: str, tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    before = sorted(tmp_path.rglob("*"))
    with raises(convert.RecipeError, name):
        convert.run(recipe, tmp_path / "dense", tmp_path / "moe")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_with_numbers_that_are_not_finite_is_not_merged(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", torch.nan)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"w": torch.full((2,), value)}, tmp_path / name / "model.safetensors")
    recipe = {"operation": "merge", "method": "ties", "base": str(tmp_path / "one")}
    with raises(convert.ConversionError, "models"):
        convert.run(recipe, [tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_wrong_rows_of_a_router_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        saved(tmp_path / name, seed=seed)
    file = tmp_path / "router.safetensors"
    right = {str(layer): torch.rand(2, 32) for layer in range(3)}
    for rows in (
        {"0": right["0"], "1": right["1"]},
        right | {"1": torch.rand(3, 32)},
        right | {"2": right["2"] / 0},
    ):
        save_file(rows, file)
        with raises(convert.RecipeError, "router"):
            convert.run(
                {"operation": "experts", "router": str(file)}, [tmp_path / "one", tmp_path / "two"], tmp_path / "moe"
            )
        assert not list(tmp_path.glob("moe*"))
    save_file(right, file)
    convert.run({"operation": "experts", "router": str(file)}, [tmp_path / "one", tmp_path / "two"], tmp_path / "moe")
    assert torch.equal(tensors(tmp_path / "moe")["model.layers.1.block_sparse_moe.gate.weight"], right["1"])


def test_wrong_options_of_dense_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    saved(tmp_path / "moe", "mixtral", num_local_experts=4)
    before = sorted(tmp_path.rglob("*"))
    for options, message in WRONG_DENSE:
        with raises(convert.RecipeError, message):
            convert.run({"operation": "dense", **options}, tmp_path / "moe", tmp_path / "dense")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    (tmp_path / "recipe.json").write_text(json.dumps(UPCYCLE))
    convert.run(tmp_path / "recipe.json", tmp_path / "dense", tmp_path / "moe")
    assert loaded(tmp_path / "moe").config.num_local_experts == 4


MEMORY = """
import sys
from pathlib import Path
from switchgear import convert
from switchgear.convert import checkpoints
import transformers
transformers.CONFIG_MAPPING["llama"], transformers.CONFIG_MAPPING["mixtral"]  # imported before it is measured
def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
convert.run({"operation": "upcycle", "num_experts": 1, "top_k": 1, "layers": [0]}, sys.argv[1], sys.argv[2] + "-first")
Path("/proc/self/clear_refs").write_text("5")
start = peak()
report = convert.run({"operation": "upcycle", "num_experts": 6, "noise": 0.01}, sys.argv[1], sys.argv[2])
print(peak() - start, report.num_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what the peak was")
def test_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    """The source of 31 MB is mapped, and counts where it is read; the result has 190 MB. Beside it there are the tensor
    that is made (3.5 MB), its noise, and their sum."""
    config = {**SIZES, "hidden_size": 256, "intermediate_size": 3400, "head_dim": 64}
    saved(tmp_path / "dense", **config)
    source = sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "dense"), str(tmp_path / "moe")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    grown, total = map(int, output.split()[-2:])
    assert total > 5 * source
    assert grown < source + 8 * 4 * 256 * 3400
