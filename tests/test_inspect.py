# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear inspect`: its numbers against plain loops, its files, and its complaints."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from switchgear.cli import main

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

NAMES = {"report.md", "results.json", "load.png", "entropy.png", "domains.png", "similarity.png", "coactivation.png",
         "cacheability.png"}  # fmt: skip


def olmoe(vocab_size: int = 256) -> Any:
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_experts=6, num_experts_per_tok=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )).eval()  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    olmoe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    files = [tmp_path / "letters.txt", tmp_path / "digits.txt"]
    for file, alphabet in zip(files, (b"abcdefgh", b"0123456789"), strict=True):
        file.write_bytes(alphabet * 40)
    return list(map(str, files))


def test_it_writes_a_report(
    checkpoint: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert main(["inspect", str(checkpoint), "--text", *texts, "--out", str(out), "--length", "32"]) == 0
    assert "2 MoE layers" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == NAMES
    report = (out / "report.md").read_text()
    for name in NAMES - {"report.md", "results.json"}:
        assert f"]({name})" in report
        assert (out / name).stat().st_size < 100_000
    assert str(tmp_path) not in report
    results = json.loads((out / "results.json").read_text())
    assert results["domains"] == {"letters": 320, "digits": 384}  # whole windows of 32
    for layer in results["layers"]:
        assert len(layer["load"]["letters"]) == 6
        assert 0 < layer["router_entropy"] <= 1
        assert layer["hits"]["2"] <= layer["hits"]["4"] <= layer["hits"]["6"] == 1


def test_one_text_is_not_compared(checkpoint: Path, texts: list[str], tmp_path: Path) -> None:
    """A picture of domains would be empty."""
    out = tmp_path / "report"
    assert main(["inspect", str(checkpoint), "--text", texts[0], "--out", str(out), "--length", "32"]) == 0
    assert {path.name for path in out.iterdir()} == NAMES - {"domains.png"}
    report = (out / "report.md").read_text()
    assert "omain" not in report.replace("each domain counted alike", "")
    for name in NAMES - {"report.md", "results.json", "domains.png"}:
        assert f"]({name})" in report


def test_its_numbers_are_those_of_a_loop() -> None:
    from switchgear.cli.inspect.measure import inspect

    model = olmoe()
    batches = {name: [torch.randint(256, (2, 16))] for name in ("a", "b")}
    found = inspect(model, batches, 16)
    for domain, (ids,) in batches.items():
        with torch.no_grad():
            out = model(input_ids=ids, labels=ids, output_router_logits=True)
        assert found.losses[domain] == pytest.approx(float(out.loss - 0.01 * out.aux_loss), rel=1e-5)
        for layer, logits in zip(found.layers, out.router_logits, strict=True):
            chosen = logits.topk(2).indices
            counts = [int((chosen == e).sum()) / chosen.numel() for e in range(6)]
            assert layer.load[domain] == pytest.approx(counts)
    for i, layer in enumerate(found.layers):
        assert layer.name == f"model.layers.{i}.mlp"
        experts = model.model.layers[i].mlp.experts
        flat = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], 1).detach().double()
        want = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
        assert layer.similarity is not None
        assert torch.allclose(layer.similarity, want)
        others = [float(want[a, b]) for a in range(6) for b in range(a)]
        assert layer.mean_similarity == pytest.approx(sum(others) / len(others))
        assert layer.alike(1)[0][2] == pytest.approx(max(others))


def test_short_sequences_are_one_segment(checkpoint: Path, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert main(["inspect", str(checkpoint), "--text", *texts, "--out", str(out), "--length", "5"]) == 0
    report = (out / "report.md").read_text()
    assert "experts in 5" in report
    assert "filled for each 5 consecutive tokens" in report
    assert json.loads((out / "results.json").read_text())["segment"] == 5


def test_a_domain_has_experts_of_its_own() -> None:
    from switchgear.cli.inspect.measure import Layer
    from switchgear.cli.inspect.report import favourites

    load = {"a": [0.5, 0.3, 0.2, 0.0], "b": [0.1, 0.3, 0.2, 0.4]}
    layer = Layer("mlp", 4, 1, load, 0.5, torch.eye(4), None, {1: 0.5}, 0.5, 2.0)
    assert favourites(layer, "a") == [0]  # 0.5 of a mean of 0.3
    assert favourites(layer, "b") == [3]
    assert layer.max_violation == pytest.approx(4 * 0.3 - 1)
    assert layer.unused == 0


def test_mistakes_are_named(
    checkpoint: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    def complaint(*arguments: str) -> str:
        assert main(["inspect", *arguments, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    model = str(checkpoint)
    assert "expected a folder with a checkpoint" in complaint(str(tmp_path / "nowhere"), "--text", *texts)
    assert "expected files, since" in complaint(model)
    assert "cannot read" in complaint(model, "--text", "/nowhere/text")
    assert "expected files of different names, got letters twice" in complaint(model, "--text", texts[0], texts[0])
    assert "letters is too short: 320 tokens, a window has 400" in complaint(
        model, "--text", texts[0], "--length", "400"
    )
    assert "tokens: expected at least a window of 400, got 100" in complaint(
        model, "--text", texts[0], "--length", "400", "--tokens", "100"
    )
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    assert "expected all tensors of OlmoeForCausalLM, 1 missing, such as model.norm.weight" in complaint(
        model, "--text", *texts
    )
    weights.write_bytes(weights.read_bytes()[:1000])  # a truncated shard
    assert "cannot load" in complaint(model, "--text", *texts)
    dense = tmp_path / "dense"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )).save_pretrained(dense)  # fmt: skip
    assert "expected" in complaint(str(dense), "--text", *texts)
    other = tmp_path / "other"
    olmoe(300).save_pretrained(other)
    assert "has no tokenizer" in complaint(str(other), "--text", *texts)


def test_a_type_without_a_causal_language_model_of_its_own(tmp_path: Path, texts: list[str]) -> None:
    from tiny_models import build

    build("qwen3_vl_moe").save_pretrained(tmp_path / "model")
    out = tmp_path / "report"
    assert main(["inspect", str(tmp_path / "model"), "--text", *texts, "--out", str(out), "--length", "32"]) == 0
    layers = json.loads((out / "results.json").read_text())["layers"]
    assert {layer["name"].rpartition(".layers.")[0] for layer in layers} == {"model.language_model"}


def test_a_layer_of_one_expert_is_drawn_without_warnings(tmp_path: Path) -> None:
    from switchgear.cli.inspect.measure import Inspection, Layer
    from switchgear.cli.inspect.report import PLOTS, report

    one = torch.ones(1, 1, dtype=torch.float64)
    layer = Layer("mlp", 1, 1, {"a": [1.0]}, 0.0, one, one, {1: 1.0}, 1.0, 1.0)
    found = Inspection([layer], {"a": 10}, {"a": 1.0}, 16, {"class": "Model", "parameters": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, draw in PLOTS.items():
            draw(found, tmp_path / name)
    assert "| mlp | 1 | 1 |" in report(found)


def test_losses_and_similarities_that_are_not_finite_are_json() -> None:
    from switchgear.cli.inspect.measure import inspect

    model = olmoe()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] = torch.nan
    batches = {"a": [torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(0))]}
    found = inspect(model, batches, 16).as_dict()
    assert found["losses"] == {"a": None}
    json.dumps(found, allow_nan=False)


def test_zero_experts_have_no_similarity() -> None:
    """The first projection of LongCat has rows of them."""
    from switchgear.cli.inspect.measure import measure_similarity
    from switchgear.integrations.blocks import expert_layer
    from switchgear.integrations.moe_blocks import moe_blocks
    from tiny_models import build

    block = next(iter(moe_blocks(build("longcat_flash")).values()))
    found = measure_similarity(block)
    assert found is not None
    weights = [parameter.tensor for parameter in expert_layer(block).parameters]
    rows = [torch.cat([w[e].flatten() for w in weights]).double() for e in range(block.num_experts)]
    want = torch.stack([torch.stack([torch.cosine_similarity(a, b, 0) for b in rows]) for a in rows])
    torch.testing.assert_close(found, want)
