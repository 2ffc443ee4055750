# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear offload-plan`: bytes from the config, hits from the text, and its complaints."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from replayed import Replay, as_sets

from errors import raises
from pages.models import write_page
from switchgear import _C, analysis, diagnostics, offload
from switchgear.analysis.models import MODELS
from switchgear.cli import main, offload_plan, plan
from switchgear.cli.common import colors

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

EXPERT = 3 * 32 * 16 * 4  # bytes: gate, up and down in float32
ACTIVE_EXPERTS = 48 * 8 * 3 * 2048 * 768  # parameters of Qwen3-30B-A3B


def olmoe() -> Any:
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_experts=6, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )).eval()  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    olmoe().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "letters.txt"
    file.write_bytes(bytes(range(40, 104)) * 2)
    return file


def dense_bytes() -> int:
    return sum(p.numel() * 4 for name, p in olmoe().named_parameters() if ".experts." not in name)


def test_policies_have_colours_of_their_own() -> None:
    names = [policy.name for policy in offload.POLICIES] + [offload.StaticFrequency.name]
    palette = colors(names)
    assert len(set(palette.values())) == len(names)


def test_it_predicts_and_recommends(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    cached = 64 * 2 * 2 * 32 * 4  # tokens, layers, keys and values: float32 like the weights
    memory = dense_bytes() + cached + 3 * 2 * EXPERT + 100  # room for 3 experts per layer
    file = tmp_path / "hits.png"
    arguments = ["offload-plan", str(checkpoint), "--memory", str(memory), "--text", str(text), "--length", "32"]
    assert main([*arguments, "--bandwidth", "1M", "--plot", str(file)]) == 0
    out = capsys.readouterr().out
    assert "3 of 6 per layer" in out
    assert "6.0 KiB each" in out
    assert "64 tokens decoded one by one, 4.0 experts each" in out
    assert file.stat().st_size > 1000

    ids = torch.tensor(list(text.read_bytes())).view(4, 32)
    model = olmoe()
    with torch.no_grad(), diagnostics.collect(model) as choices:
        model(input_ids=ids, use_cache=False)
    steps = as_sets(offload.Accesses.of(choices).split(64)[1])
    plain = Replay("lru", steps, 3, shared=False)
    row = next(line.split() for line in out.splitlines() if re.match(r"\s*lru +\d", line))
    assert f"{sum(plain.hits) / (sum(plain.hits) + sum(plain.misses)):.1%}" == row[2]  # after the name and 2 slots
    rate = float(re.search(r"([\d.]+) KiB loaded per token, ([\d.]+) tokens/s", out)[2])  # type: ignore[index]
    loaded = float(re.search(r"([\d.]+) KiB loaded per token", out)[1])  # type: ignore[index]
    assert rate == pytest.approx(1024 / loaded, rel=0.03)


def test_a_model_that_fits_needs_no_cache(checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["offload-plan", str(checkpoint), "--text", str(text), "--length", "32", "--tokens", "64"]
    assert main([*arguments, "--memory", "1G"]) == 0
    assert "recommended: no cache, since all experts fit\n" in capsys.readouterr().out
    assert main([*arguments, "--memory", "1G", "--bandwidth", "1M"]) == 0
    rate = re.search(r"all experts fit; ([\d.]+) tokens/s if each is loaded once", capsys.readouterr().out)
    assert rate is not None
    tokens = 64 // 2  # the first half of a text calibrates
    assert float(rate[1]) >= tokens * 2**20 / (2 * 6 * EXPERT) - 0.05  # two layers of six experts


def test_mistakes_are_named(checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: str) -> str:
        assert main(["offload-plan", str(checkpoint), "--text", str(text), *arguments]) == 2
        return capsys.readouterr().err

    assert "--memory: expected at least" in complaint("--memory", "20K")
    assert "--plot: cannot write /nowhere/a.png" in complaint("--memory", "1G", "--plot", "/nowhere/a.png")
    assert "is too short" in complaint("--memory", "1G", "--length", "1000")


def test_sizes() -> None:
    assert [offload_plan.size(text) for text in ("8G", "1.5M", "3KiB", "7", "1TB")] == [
        8 << 30, 3 << 19, 3072, 7, 1 << 40,
    ]  # fmt: skip
    for text in ("", "8X", "-1G", "0", "G"):
        with raises(argparse.ArgumentTypeError):
            offload_plan.size(text)


def test_a_plan_without_a_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Embeddings and the head keep their bits, and two draws of experts through an LRU give hits and bytes."""
    cached = 64 * 2 * 2 * 32 * 4  # tokens, keys and values, layers, numbers of float32
    kept = 2 * 256 * 32
    dense = (dense_bytes() // 4 - kept) // 2 + kept * 4
    memory = dense + cached + 2 * 3 * EXPERT // 8 + 200  # three of the six experts in each layer
    rates = ["--disk-rate", "1M", "--memory-rate", "10M"]
    assert main(["plan", str(checkpoint), "--memory", str(memory), *rates, "--bits", "4", "--expert-bits", "4"]) == 0
    out = capsys.readouterr().out
    assert "3 of 6 per layer" in out
    hits, _, most, least = re.findall(r"[\d.]+", next(line for line in out.splitlines() if "uniform" in line))
    assert float(hits) == pytest.approx(50, abs=3)
    assert float(least) <= float(most)
    assert float(hits) <= float(re.findall(r"[\d.]+", next(line for line in out.splitlines() if " Zipf " in line))[0])


@pytest.mark.parametrize(
    ("memory", "options", "share"),
    [("24G", [], plan.WHOLE_LAYERS), ("24G", ["--own-layers"], plan.OWN_LAYERS), ("8G", [], plan.FROM_DISK)],
)
def test_a_plan_reads_memory_at_a_share_of_a_plain_read(
    memory: str, options: list[str], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is measured here unless it is given."""
    monkeypatch.setattr(_C, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(plan, "hit_rate", lambda *_: 0.5)
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    config = plan.config_of("qwen3-30b-a3b")
    given = ["", "--memory", memory, "--disk-rate", "2G", *options]
    for arguments, plain in ((given, 1e9), ([*given, "--memory-rate", "1G"], 2**30)):
        cost, _, rate, (uniform, _) = plan.predict(config, parser.parse_args(arguments))
        head = 2048 * 151936
        read = ((cost.active - cost.embedding - head - ACTIVE_EXPERTS) * 4.5 + ACTIVE_EXPERTS * 4.25 + head * 16) / 8
        assert rate == (plain, share)
        assert uniform.computing == pytest.approx(read / (plain * share))


BILLIONS = {
    "granite-3.1-3b-a800m": 3.3, "olmoe": 6.9, "qwen1.5-moe-a2.7b": 14.3, "deepseek-v2-lite": 15.7, "gpt-oss-20b": 20.9,
    "gemma-4-26b-a4b": 25.2, "qwen3-30b-a3b": 30.5, "nemotron-3-nano-30b-a3b": 31.6, "qwen3.5-35b-a3b": 35,
    "phi-3.5-moe": 41.9, "mixtral-8x7b": 46.7, "qwen3-next-80b-a3b": 80, "glm-4.5-air": 106, "llama-4-scout": 109,
    "gpt-oss-120b": 116.8, "mixtral-8x22b": 141, "minimax-m2": 230, "qwen3-235b-a22b": 235, "glm-4.5": 355,
    "deepseek-v3": 671,
}  # fmt: skip  # as published: some round, or count vision and layers that predict further tokens


@pytest.mark.some(5)
@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_published_models_are_theirs(name: str) -> None:
    assert analysis.cost(MODELS[name]).parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)


@pytest.mark.slow
def test_page_of_published_models_is_current() -> None:
    """python tools/pages/models.py docs/models.md"""
    assert (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8") == write_page()
