# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear convert`: what it passes to switchgear.convert.run, and how it reports errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from errors import raises
from full_disk import full_disk
from switchgear.cli import main
from switchgear.convert import ConversionError, DiskFull, run

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )).save_pretrained(tmp_path / "dense")  # fmt: skip
    return tmp_path / "dense"


@pytest.mark.parametrize("by_recipe", [True, False])
def test_upcycling_keeps_the_logits(dense: Path, by_recipe: bool, capsys: pytest.CaptureFixture[str]) -> None:
    out = dense.parent / "moe"
    recipe = dense.parent / "recipe.json"
    recipe.write_text(json.dumps({"operation": "upcycle", "num_experts": 4, "top_k": 2}))
    by_options = ["--operation", "upcycle", "--set", "num_experts=4", "--set", "top_k=2"]
    how = ["--recipe", str(recipe)] if by_recipe else by_options
    assert main(["convert", str(dense), *how, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "model.layers.1.mlp: dense -> 4 experts" in printed.out
    assert "converting: " in printed.err
    x = torch.randint(64, (1, 9))
    with torch.no_grad():
        one, other = (transformers.AutoModelForCausalLM.from_pretrained(path).eval()(x).logits for path in (dense, out))
    assert torch.allclose(one, other, atol=1e-5)


def test_it_lists_operations(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)  # import raises ImportError; a list needs none
    assert main(["convert", "--list"]) == 0
    assert "upcycle: num_experts, top_k" in capsys.readouterr().out


def test_a_missing_package_is_named(
    dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    out = dense.parent / "moe"
    assert main(["convert", str(dense), "--operation", "upcycle", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("switchgear convert: needs transformers (")
    assert error.endswith("pip install 'switchgear[transformers]'\n")
    with raises(ConversionError):
        run({"operation": "upcycle"}, dense, out)
    assert not out.exists()


def test_a_full_disk_is_named_and_leaves_nothing(
    dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    out = dense.parent / "moe"
    assert main(["convert", str(dense), "--operation", "upcycle", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("switchgear convert: no room for ")
    with full_disk(10), raises(ConversionError):
        run({"operation": "upcycle"}, dense, out)
    assert [file.name for file in dense.parent.iterdir()] == ["dense"]


def test_a_full_disk_after_a_killed_run_does_not_end_the_conversion(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = dense.parent / "moe", dense.parent / "moe.partial"

    def disk_usage(_: Path) -> SimpleNamespace:
        (partial / "model.safetensors.unfinished").touch()  # as of a shard that was being written
        return SimpleNamespace(free=1000)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", disk_usage)
        with pytest.raises(DiskFull):
            run({"operation": "upcycle"}, dense, out)
    assert not partial.exists()
    run({"operation": "upcycle"}, dense, out)


def test_mistakes_are_named(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = dense.parent / "out"

    def complaint(*arguments: str) -> str:
        assert main(["convert", str(dense), "--out", str(out), *arguments]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "expected --recipe or --operation" in complaint()
    assert "operation: expected upcycle" in complaint("--operation", "downcycle")
    assert "experts: expected an option of upcycle" in complaint("--operation", "upcycle", "--set", "experts=4")
    for wrong in ("num_experts=0", "num_experts=two", "top_k=99", "top_k=0"):
        found = complaint("--operation", "upcycle", "--set", wrong)
        assert wrong.partition("=")[0] in found, (wrong, found)
        assert "expected" in found, (wrong, found)
    assert "--set: expected NAME=VALUE" in complaint("--operation", "upcycle", "--set", "experts")
    assert "--set: expected NAME=VALUE" in complaint("--operation", "upcycle", "--set", "operation=split")
    twice = complaint("--operation", "upcycle", "--set", "num_experts=4", "--set", "num_experts=8")
    assert "--set: expected each option once, got num_experts twice" in twice
    assert "expected either --recipe" in complaint("--recipe", "r.json", "--operation", "upcycle")
    assert "recipe: expected a dict or a JSON file" in complaint("--recipe", "/nowhere/r.json")
    weights = dense / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # truncated
    assert "model.safetensors" in complaint("--operation", "upcycle")
    assert main(["convert", "--operation", "upcycle"]) == 2
    assert "expected SOURCE and --out" in capsys.readouterr().err
