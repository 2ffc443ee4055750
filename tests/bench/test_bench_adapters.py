# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench adapters` compares layers that compute the same, and finds those that do not."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from switchgear.cli import main
from switchgear_bench import adapters, timing
from switchgear_bench.adapted_layers import BASE, LAYERS, OURS, AdaptedCase
from switchgear_bench.adapter_floors import floor
from switchgear_bench.adapters import Task, expected, make, relative_error, tolerance
from switchgear_bench.competitors import Skip
from switchgear_bench.shapes import SHAPES, Shape

pytest.importorskip("rich", reason="rich is not installed")

SMALL = Shape(64, 32, 4, 2, "a small one")


@pytest.fixture(autouse=True)
def _small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)


def case_of(dtype: str, tokens: int) -> AdaptedCase:
    return make(Task("small", dtype, tokens, 8, 1, 0.0))


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("dtype", adapters.DTYPES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != BASE])
def test_layers_are_those_of_float64(name: str, dtype: str, tokens: int) -> None:
    case = case_of(dtype, tokens)
    try:
        layer = LAYERS[name](case)
    except Skip as reason:
        pytest.skip(str(reason))
    assert relative_error(case, layer, expected(case)) <= tolerance(case)


@pytest.mark.parametrize("tokens", [1, 24])
def test_a_wrong_layer_is_found(tokens: int) -> None:
    case = case_of("fp32", tokens)
    want = expected(case)
    for wrong in case.adapters.parameters:
        with torch.no_grad():
            wrong.mul_(1.01)
        assert relative_error(case, LAYERS["switchgear"](case), want) > tolerance(case)
        with torch.no_grad():
            wrong.div_(1.01)


def test_a_wrong_gradient_is_found() -> None:
    case = case_of("fp32", 24)
    right = LAYERS["switchgear"](case)
    wrong = dataclasses.replace(right, gradients=lambda: [1.01 * gradient for gradient in right.gradients()])
    assert relative_error(case, wrong, expected(case)) > tolerance(case)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-9)
    measured = adapters.measure(Task("small", "bf16", 24, 8, 1, 0.01))
    adapters.show(measured)
    assert "switchgear" in capsys.readouterr().out
    results = {"schema": adapters.SCHEMA, "machine": {"model": "m", "threads": 1, "isa": "i", "torch": "t"}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results | {"cases": [measured | {"shape": "tiny"}]}))
    assert main(["bench", "adapters", "--from", str(path)]) == 0
    assert "| tiny | bf16 | 8 | 24" in capsys.readouterr().out


def test_floors() -> None:
    """OLMoE at rank 64: 458,752 elements beside 6,291,456 weights of an expert."""
    ratio = 458752 / 6291456
    assert floor(SHAPES["olmoe"], "bf16", 64, 512) == pytest.approx(1 + 1.5 * ratio)
    assert floor(SHAPES["olmoe"], "mxfp4", 64, 1) == pytest.approx(1 + ratio * 2 / (17 / 32))
    touched = 64 * (1 - (1 - 1 / 8) ** 16)  # 16 tokens; gradients of 64 experts
    assert floor(SHAPES["olmoe"], "fp32", 64, 16) == pytest.approx(1 + ratio * (2 * touched + 64) / (2 * touched))


def test_others_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-9)
    measured = adapters.measure(Task("small", "bf16", 24, 8, 1, 0.01, ("materialised",)))
    assert [row["layer"] for row in measured["results"]] == [BASE, OURS, "switchgear on W + B·A"]
    assert main(["bench", "adapters", "--competitors", "unknown"]) == 2


def test_a_case_measured_again_keeps_the_others() -> None:
    """Beside the time that ours took in their process."""

    def case(**ms: float) -> dict[str, Any]:
        rows = [{"layer": name, "ms": value, "peak_bytes": 0, "quiet_turns": 9} for name, value in ms.items()]
        return {"shape": "tiny", "dtype": "bf16", "tokens": 16, "rank": 8, "results": rows}

    cases = [case(**{BASE: 2.0, OURS: 4.0, "split, torch": 12.0})]
    for _ in range(2):
        adapters.replace(cases, case(**{BASE: 2.0, OURS: 3.0}))
    about = {"model": "m", "threads": 1, "isa": "i", "torch": "t"}
    table = adapters.markdown({"schema": adapters.SCHEMA, "machine": about, "cases": cases})
    assert len(cases) == 1
    assert "| 1.50 |" in table
    assert "split, torch 3.0 |" in table


def test_unknown_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "adapters", "--dtypes", "int8"])
    assert "--dtypes: expected a list of bf16, fp32, int4, mxfp4; got 'int8'" in capsys.readouterr().err


def test_the_folder_of_competitors_is_that_of_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHGEAR_COMPETITORS", "elsewhere")
    monkeypatch.setattr(adapters, "_measure_all", lambda args, about: {"cases": []})
    assert main(["bench", "adapters", "--competitors-folder", str(tmp_path)]) == 0
    assert os.environ["SWITCHGEAR_COMPETITORS"] == str(tmp_path)
