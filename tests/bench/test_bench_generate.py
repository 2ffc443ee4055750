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
from gguf_models import logits_of, make_model
from switchgear.integrations.gguf import load_gguf, save_gguf
from switchgear.integrations.gguf_file import read_gguf
from switchgear.reference import gguf
from switchgear_bench import generate, generate_files, llama
from switchgear_bench.competitors import Skip

pytest.importorskip("transformers", reason="transformers is not installed")

WORKS = generate.list_works([generate.LONG_PROMPT], [64])
OF_FILE = generate.list_works([generate.LONG_PROMPT])
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
    groups = generate.plan(model, 1, 1).groups
    expected: Any = None
    for names in groups:
        decoders = generate.open_decoders(names, model, str(tmp_path), 64) if "llama.cpp" not in names[0] else {}
        logits: dict[str, Any] = {}
        for name, decoder in [*decoders.items()] * 2:
            decoder.begin()
            found = decoder.logits([5, 6, 7])
            expected = found if expected is None else expected
            error = float((found - expected).norm() / expected.norm())
            assert error <= (1.0 if name in generate.LOSSY else generate.TOLERANCE), name
            assert error > 0 or name == generate.BASE, name
            assert torch.equal(logits.setdefault(name, found), found), name
            assert len(decoder.decode(1, 3)) == len(decoder.decode(1, 3, 2)) == 3
            if name == "switchgear":
                parts = decoder.time_parts(2)
                assert min(parts.values()) > 0
                assert parts["layers"] + parts["head"] < parts["all"]


class Stand:
    """Stands in for the process of a decoder: an untimed turn, three disturbed and slow ones, two quiet ones."""

    def __init__(self, _: str, __: object, names: tuple[str, ...], *___: Any) -> None:
        turns = [(9.0, 9.0, 5.0)] * 4 + [(1.0, 1.0, 0.0)] * 2
        self._turns = {name: iter(turns) for name in names}
        self._answer: Any = dict.fromkeys(names, torch.ones(4))
        self.connection = SimpleNamespace(send=self._send)

    def _send(self, request: tuple[str, Any, int]) -> None:
        if request[1] == generate.BEGIN:
            self._turn = next(self._turns[request[0]])
        self._answer = {"layers": 0.5, "head": 0.25, "all": 1.0} if request[1] == generate.PARTS else self._turn

    def receive(self) -> Any:
        return self._answer

    def close(self) -> None:
        pass


def test_turns_that_others_disturb_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "Child", Stand)
    monkeypatch.setattr(generate, "wait_for_quiet", lambda longest: None)
    monkeypatch.setattr(generate, "read_bandwidth", lambda num_threads: 1e9)
    for row in generate.measure(SMALL, "tiny", 1, 5, 1, WORKS)["results"]:
        assert set(row["tokens_per_second"].values()) == {1.0}
        assert row["quiet_turns"] == 2 * (len(WORKS) - (row["implementation"] not in generate.IN_TURNS))
        assert ("parts" in row) == (row["implementation"] == "switchgear")


def test_processes_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "drawn.gguf", []

    class Watched(Stand):
        def __init__(self, name: str, *rest: Any) -> None:
            super().__init__(name, *rest)
            opened.append(name)

    monkeypatch.setattr(generate_files, "BLOCKS", 97)
    generate_files.write_drawn(make_model("qwen3moe").config, "q8_0", path)
    monkeypatch.setattr(generate, "Child", Watched)
    monkeypatch.setattr(generate, "wait_for_quiet", lambda longest: None)
    monkeypatch.setattr(generate, "read_bandwidth", lambda num_threads: 1e9)
    for free, turns, expected in [
        (1 << 40, 3, [*generate.OF_FILES]),
        (1, generate.ALONE_TURNS, ["switchgear", "llama.cpp"] * generate.ALONE_TURNS),
    ]:
        opened.clear()
        monkeypatch.setattr(generate, "free_memory_bytes", lambda free=free: free)
        case = generate.measure(path, "drawn", 1, 3, 1, OF_FILE)
        assert opened == expected
        assert [row["implementation"] for row in case["results"]] == ["switchgear", "llama.cpp"]
        assert case["turns"] == turns


@pytest.mark.parametrize(
    ("name", "kind", "head", "experts"),
    [("qwen3moe", "q4_k_m", "q6_k", "q4_k"), ("gpt-oss", "mxfp4_gguf", "q8_0", "mxfp4_gguf")],
)
def test_drawn_weights(
    name: str, kind: str, head: str, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_files, "BLOCKS", 4099)
    generate_files._encode_pool.cache_clear()
    path = tmp_path / "drawn.gguf"
    generate_files.write_drawn(make_model(name).config, kind, path)
    tensors = read_gguf(path).tensors
    assert (tensors["output.weight"].type, tensors["blk.0.ffn_gate_exps.weight"].type) == (head, experts)
    for tensor in tensors.values():
        if len(tensor.shape) > 1 and tensor.type in gguf.TYPES:
            rows = gguf.decode(tensor.type, tensor.data).flatten(0, -2)
            assert len(rows.unique(dim=0)) == len(rows)
            assert 0.95 < rows.std() / generate_files.STD < 1.05
    assert logits_of(load_gguf(path)).std() > 0.1
    sizes, all_experts = (
        generate_files.measure_sizes(path),
        sum(tensor.data.nbytes for each, tensor in tensors.items() if "_exps." in each),
    )
    assert sizes.whole - sizes.read == tensors["token_embd.weight"].data.nbytes + all_experts // 2


def test_without_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(llama.importlib, "import_module", missing)
    with raises(Skip):
        generate.MAKERS["llama.cpp"](SMALL, str(tmp_path), 64)


def test_the_table() -> None:
    row = {"error": 0.01, "of_read": 0.6, "quiet_turns": 3}
    results = [row | {"implementation": name, "tokens_per_second": dict.fromkeys(OF_FILE, 10.0 * (i + 1))}
               for i, name in enumerate([generate.BASE, "switchgear"])]  # fmt: skip
    about = {"model": "a processor", "threads": 2, "isa": "avx2", "torch": "2.13"}
    text = generate.markdown({"machine": about, "cases": [{"model": "tiny", "tokens": 8, "results": results}]})
    assert "| tiny | switchgear | 20.0 | 20.0 (60%) | 20.0 | 1.0% |" in text
