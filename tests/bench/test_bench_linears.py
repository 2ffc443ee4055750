# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench linears` times right products, and fills in its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from switchgear.cli import main
from switchgear.cli.common import CommandError
from switchgear_bench import linears, timing

pytest.importorskip("rich", reason="rich is not installed")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(linears.SHAPES, "olmoe-router", linears.Shape(8, 64, "a small one"))
    monkeypatch.setattr(linears, "SECONDS", 0.0)
    monkeypatch.setattr(linears, "COPIES_BYTES", 0)
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-9)
    file, page = tmp_path / "linears.json", tmp_path / "linears.md"
    arguments = ["bench", "linears", "--shapes", "olmoe-router", "--threads", "1", "--json", str(file)]
    assert main([*arguments, "--tokens", "16"]) == 0
    assert main([*arguments, "--tokens", "1,16", "--markdown", str(page)]) == 0
    assert "olmoe-router" in capsys.readouterr().out
    cases = [(row["dtype"], row["tokens"]) for row in json.loads(file.read_text())["results"]]
    assert cases == [("bf16", 1), ("bf16", 16), ("fp32", 1), ("fp32", 16)]
    again = tmp_path / "again.md"
    assert main(["bench", "linears", "--from", str(file), "--markdown", str(again)]) == 0
    assert again.read_text() == page.read_text()
    assert page.read_text().count("| olmoe-router [8, 64]") == 4


def test_a_wrong_product_is_refused() -> None:
    x, weight = torch.randn(4, 64), torch.randn(16, 64)
    out = x @ weight.mT
    linears.check(x, weight, out)
    out[3, 15] += 1e-3
    with pytest.raises(CommandError, match="wrong"):
        linears.check(x, weight, out)
