# SPDX-License-Identifier: BSD-3-Clause
"""The choice of store(model, "auto"), and the reason that it reports."""

from __future__ import annotations

import pytest
import torch

import switchgear
from errors import raises
from switchgear.weights import Groups, Int4, stored_of
from switchgear.weights.store import candidates, rows_per_expert


def moe_of(hidden_size: int = 512, intermediate_size: int = 256, **options: object) -> switchgear.MoE:
    return switchgear.MoE(hidden_size, intermediate_size, 8, 2, **{"dtype": torch.bfloat16} | options)  # type: ignore[arg-type]


def picked(model: torch.nn.Module, **options: object) -> tuple[str, str]:
    report = switchgear.store(model, "auto", **options)
    return report.form.name, report.reason


@pytest.fixture(autouse=True)
def _a_wide_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchgear.ops.cpu_isa", lambda: "avx512bf16")


def test_rows_per_expert() -> None:
    """2 of 8 experts: one token gives each selected expert one row; 1024 tokens give 256."""
    assert rows_per_expert(moe_of(), 1) == 1
    assert rows_per_expert(moe_of(), 1024) == pytest.approx(256)
    assert 1 < rows_per_expert(moe_of(), 4) < 2


@pytest.mark.parametrize(
    ("tokens", "lossless", "form"),
    [(1, True, "compact"), (8, True, "compact"), (64, True, "panels"), (1024, True, "panels"), (1, False, "int4"),
     (1024, False, "int8")],
)  # fmt: skip
def test_by_use(tokens: int, lossless: bool, form: str) -> None:
    model = moe_of()
    name, reason = picked(model, tokens_per_step=tokens, lossless=lossless)
    assert name == form
    assert "tokens for an expert on avx512bf16" in reason
    assert (stored_of(model.experts) is None) == (form == "plain")
    if form == "int4":
        assert stored_of(model.experts).form == Int4(symmetric=False)  # type: ignore[union-attr]
    assert switchgear.restore(model) == 1


def test_bits_are_asked_for() -> None:
    model = moe_of()
    name, reason = picked(model, lossless=False, bits=3)
    assert name == "groups"
    assert "requested number of bits" in reason
    assert stored_of(model.experts).form == Groups(bits=3, symmetric=False)  # type: ignore[union-attr]
    with raises(ValueError, "bits"):
        switchgear.store(moe_of(), "auto", bits=3)


def test_what_does_not_fit_is_said() -> None:
    name, reason = picked(moe_of(64, 64))
    assert name == "panels"
    assert "not compact: model.experts.gate_up_proj would" in reason
    name, reason = picked(moe_of(40, 24))
    assert name == "plain"
    assert "not panels: " in reason
    model = moe_of()
    switchgear.store(model, "int8")
    with raises(ValueError):
        switchgear.store(model, "auto")


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchgear.ops.cpu_isa", lambda: "avx2")
    assert [c.form for c in candidates(moe_of(), 1, True)] == ["plain"]
    assert [c.form for c in candidates(moe_of(), 64, True)] == ["panels", "plain"]
    with switchgear.use_backend("reference"):
        assert [c.form for c in candidates(moe_of(), 1, False)] == ["plain"]
    with raises(ValueError, "tokens_per_step"):
        switchgear.store(moe_of(), "auto", tokens_per_step=0)
    with raises(ValueError, "tokens"):
        switchgear.store(moe_of(), "auto", tokens=3)
