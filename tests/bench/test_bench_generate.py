# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench generate`: decoders of a model and of a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import switchgear
from errors import raises
from switchgear.integrations.gguf import save_gguf
from switchgear_bench import generate, llama
from switchgear_bench.competitors import Skip

pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = generate.Model(
    "", layers=2, hidden_size=64, intermediate_size=32, num_experts=4, top_k=2, heads=2, vocabulary=96
)


@pytest.mark.parametrize("kind", ["shape", "file"])
def test_decoders_agree(kind: str, tmp_path: Path) -> None:
    model: Any = SMALL
    if kind == "file":
        built, model = generate.build(SMALL), tmp_path / "small.gguf"
        switchgear.accelerate(built)
        save_gguf(built, model, "q8_0")
    makers = generate.makers_of(model)
    expected = makers[generate.BASE](model, "").logits([5, 6, 7])
    for name in makers:
        if not name.startswith("switchgear"):
            continue
        decoder = makers[name](model, "")
        error = float((decoder.logits([5, 6, 7]) - expected).norm() / expected.norm())
        assert error <= (1.0 if name in generate.LOSSY else generate.TOLERANCE), name
        assert len(decoder.decode(1, 3)) == len(decoder.decode(1, 3, 2)) == 3


def test_implementations_of_one_model() -> None:
    decoders = generate.build_in_turns(SMALL)
    logits = {}
    for name in [*decoders, *decoders]:
        decoders[name].begin()
        found = decoders[name].logits([5, 6, 7])
        assert torch.equal(logits.setdefault(name, found), found), name
    base = logits.pop(generate.BASE)
    for found in logits.values():
        assert 0 < float((found - base).norm() / base.norm()) <= generate.TOLERANCE


class Stand:
    """Stands in for the process of a decoder: an untimed turn, three disturbed and slow ones, two quiet ones."""

    def __init__(self, name: str, *_: Any) -> None:
        turns = [(9.0, 9.0, 5.0, [7])] * 4 + [(1.0, 1.0, 0.0, [7])] * 2
        self.answers: list[Any] = [{name: torch.ones(4)}]
        for turn in turns:
            self.answers += [None, *(turn for _ in generate.WORK)]
        self.connection = SimpleNamespace(send=lambda request: None)

    def receive(self) -> Any:
        return self.answers.pop(0)

    def close(self) -> None:
        pass


def test_turns_that_others_disturb_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "Child", Stand)
    monkeypatch.setattr(generate, "wait_for_quiet", lambda longest: None)
    monkeypatch.setattr(generate, "read_bandwidth", lambda num_threads: 1e9)
    for row in generate.measure(SMALL, "tiny", 1, 5, 1)["results"]:
        assert set(row["tokens_per_second"].values()) == {1.0}
        assert row["quiet_turns"] == 2 * len(generate.WORK)


def test_without_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(llama.importlib, "import_module", missing)
    with raises(Skip):
        generate.MAKERS["llama.cpp"](SMALL, str(tmp_path))


def test_the_table() -> None:
    row = {"error": 0.01, "of_read": 0.6, "same_tokens": 8, "quiet_turns": 3}
    results = [row | {"implementation": name, "tokens_per_second": dict.fromkeys(generate.WORK, 10.0 * (i + 1))}
               for i, name in enumerate([generate.BASE, "switchgear"])]  # fmt: skip
    about = {"model": "a processor", "threads": 2, "isa": "avx2", "torch": "2.13"}
    text = generate.markdown({"machine": about, "cases": [{"model": "tiny", "tokens": 8, "results": results}]})
    assert "| tiny | switchgear | 20.0 | 20.0 (60%) | 20.0 | 2.00 | 1.0% | 8 of 8 |" in text
