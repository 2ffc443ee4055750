# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench compress` on an untrained model: it runs, tables follow from numbers, refusals are listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from switchgear.cli import main

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from switchgear_bench.tiny import model, text
    from switchgear_bench.tiny.cache import save
    from switchgear_bench.tiny.sensitivity import Sensitivity
    from switchgear_bench.tiny.train import QUICK

    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(256, (4, 2, 4096), generator=generator, dtype=torch.uint8)
    domains = [text.Domain(name, "of the test", *rows) for name, rows in zip("abcd", texts, strict=True)]
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(model, "CONFIG", model.CONFIG | sizes | {"num_key_value_heads": 2, "num_experts": 8})
    measured = Sensitivity({}, [], 0.0, 0.0, [0.0, 0.0], 0.0, 0.0)
    return save(model.build(0), QUICK, domains, measured, tmp_path / "tiny").folder


@pytest.mark.slow
def test_it_compares_all_ways(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from switchgear_bench.compress_variants import BASE, VARIANTS

    capsys.readouterr()
    results, document = tmp_path / "results.json", tmp_path / "compression.md"
    document.write_text("before\n<!-- bench:compression -->\n<!-- /bench:compression -->\nafter\n")
    command = ["bench", "compress", "--quick", "--checkpoint", str(checkpoint), "--json", str(results)]
    assert main([*command, "--markdown", str(document), "--plot", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "left out" not in printed
    found = json.loads(results.read_text())
    rows = {row["variant"]: row for row in found["results"]}
    assert list(rows) == [variant.name for variant in VARIANTS]
    assert not found["skipped"]
    assert str(tmp_path) not in results.read_text()
    base = rows[BASE]
    assert base["losses"].keys() == {"a", "b", "c", "d"}
    for row in found["results"]:
        share = row["bytes"] / base["bytes"]
        if row["group"].startswith("50 %"):
            assert share == 0.5
        elif row["group"].startswith("25 %"):
            assert share == 0.75
        assert row["decode_ms"] > 0
    width = base["bytes"] / (8 * 3 * 64 * 128)  # bytes of a weight
    for bits in (4, 3, 2):
        assert rows[f"{bits} bits, rtn"]["bytes"] / base["bytes"] == pytest.approx(
            (bits + 16 / 64) / 8 / width, rel=0.02
        )
    assert len(rows["50 % pruned, random"]["seeds"]) == 5
    text = document.read_text()
    assert text.startswith("before\n<!-- bench:compression -->\nThe model of `switchgear train-tiny`")
    assert "| 50 % pruned, reap |" in text
    assert (tmp_path / "compression.png").stat().st_size < 100_000
    assert main(["bench", "compress", "--from", str(results), "--markdown", str(document)]) == 0
    assert document.read_text() == text


def row(variant: str, group: str, method: str, seeds: list[float], **changes: Any) -> dict[str, Any]:
    mean = sum(seeds) / len(seeds)
    return {
        "variant": variant, "group": group, "method": method, "seeds": seeds, "bytes": 50, "decode_ms": 1.0,
        "prefill_ms": 2.0, "losses": {"a": mean - 0.5, "b": mean + 0.5}, **changes,
    }  # fmt: skip


def test_verdicts_follow_from_the_deviation_of_random_prunings() -> None:
    from switchgear_bench.compress_tables import table, verdicts

    rows = [row("as trained", "as trained", "", [1.0], bytes=100)]
    rows.append(row("50 % pruned, random", "50 % pruned", "random", [1.9, 2.0, 2.1]))  # deviation 0.1
    rows.append(row("50 % pruned, reap", "50 % pruned", "reap", [1.6]))
    rows.append(row("50 % pruned, reconstruction", "50 % pruned", "reconstruction", [1.8]))
    results = {"results": rows, "skipped": []}
    lines = verdicts(results)
    assert "reap is 4.0 standard deviations" in lines[0]
    assert "reconstruction is 2.0 standard deviations" in lines[1]
    assert [line.endswith(", fewer than 3") for line in lines] == [False, True]
    assert "| 50 % pruned, random | +1.000 (±0.100) | 50% |" in table(results)


def test_a_refusal_is_listed_with_its_reason(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from switchgear_bench import compress
    from switchgear_bench.compress_variants import VARIANTS, Variant, prune

    def refuse(model: Any, calibration: Any, seed: int) -> object:
        return prune(model, calibration, seed, keep=99, criterion="random")

    monkeypatch.setattr(compress, "VARIANTS", [VARIANTS[0], Variant("too many", "", refuse)])
    assert main(["bench", "compress", "--quick", "--checkpoint", str(checkpoint)]) == 0
    assert "left out: too many: keep" in capsys.readouterr().out


def test_it_needs_a_trained_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["bench", "compress"]) == 2
    assert "run `switchgear train-tiny` first" in capsys.readouterr().err
