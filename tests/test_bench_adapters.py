# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench --adapters` compares layers that compute the same, and finds those that do not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from switchgear.bench import adapters, timing
from switchgear.bench.adapted_layers import BASE, LAYERS, AdaptedCase
from switchgear.bench.adapters import Task, expected, make, relative_error, tolerance
from switchgear.bench.competitors import Skip
from switchgear.bench.shapes import SHAPES, Shape
from switchgear.cli import main

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
    assert main(["bench", "--adapters", "--from", str(path)]) == 0
    assert "| tiny | bf16 | 8 | 24 (disturbed) |" in capsys.readouterr().out


def test_unknown_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--adapters", "--dtypes", "int8"]) == 2
    assert "--dtypes: expected some of bf16, fp32, int4, mxfp4 with --adapters, got int8" in capsys.readouterr().err
