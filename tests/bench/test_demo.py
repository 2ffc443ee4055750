# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear demo`: what it trains on, and how it tells results that agree from others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from switchgear.cli import main
from switchgear_bench.demo.agreement import check_gradients, check_logits, check_losses, equal_choices, loss_floor
from switchgear_bench.demo.corpus import batches, load_corpus


@pytest.mark.slow
def test_demo_trains_and_agrees(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    status = main([
        "demo", "--model", "mixtral", "--steps", "3", "--batch-size", "1", "--sequence-length", "32",
        "--new-tokens", "3", "--dtype", "float32", "--threads", "1", "--out", str(out),
    ])  # fmt: skip
    printed = capfd.readouterr().out
    assert status == 0, printed
    assert "AGREE" in printed
    names = {path.name for path in out.iterdir()}
    assert names == {"report.md", "results.json", "sample.txt", "losses.png", "speed.png", "expert_load.png"}
    results = json.loads((out / "results.json").read_text())
    assert set(results["implementations"]) == {"eager", "grouped_mm", "switchgear"}
    for run in results["implementations"].values():
        assert len(run["losses"]) == 3
        assert np.sum(run["steps"][0]["load"], axis=1) == pytest.approx(1.0)  # every choice has an expert
        for step in run["steps"]:
            assert 0 < step["experts_forward"] + step["experts_backward"] < step["seconds"]
        assert run["peak_memory"] > run["memory_before_training"] > 2**26
    report = (out / "report.md").read_text()
    for name in names - {"report.md", "results.json"}:
        assert f"]({name})" in report
    assert str(tmp_path) not in report


def test_demo_refuses_an_unknown_implementation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--implementations", "fastest", "--threads", "1", "--out", str(tmp_path / "report")]) == 2
    assert "fastest" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_corpus_is_the_same_every_time_and_keeps_text_apart(tmp_path: Path) -> None:
    first, again = load_corpus(), load_corpus()
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.held_out, again.held_out)
    assert 0.01 < first.held_out.numel() / first.train.numel() < 0.2
    file = tmp_path / "text"
    file.write_bytes(bytes(range(256)) * 100)
    own = load_corpus(str(file))
    assert own.train.numel() + own.held_out.numel() == 25600
    assert own.held_out.numel() == pytest.approx(25600 / 20, rel=0.1)
    taken = batches(own.train, 2, 3, 5, seed=1)
    assert taken.shape == (2, 3, 5)
    assert torch.equal(taken, batches(own.train, 2, 3, 5, seed=1))
    assert not torch.equal(taken, batches(own.train, 2, 3, 5, seed=2))


class TestAgreement:
    reference = np.linspace(5.0, 3.0, 20)
    twin = reference + 1e-6 * 2.0 ** np.arange(20)  # the growth of rounding errors
    floor = loss_floor(5.0, dtype="float32", layers=4, tokens=1000)

    def agrees(self, losses: np.ndarray, equal: int = 20) -> bool:
        checks = check_losses(losses, self.reference, self.twin, equal=equal, floor=self.floor, tokens=1000)
        return all(check.agrees for check in checks)

    def test_as_far_as_the_twin_agrees(self) -> None:
        assert self.agrees(self.reference - 3 * (self.twin - self.reference))

    def test_an_early_difference_does_not(self) -> None:
        wrong = self.reference.copy()
        wrong[2] += 1e-4
        assert not self.agrees(wrong)

    @pytest.mark.parametrize("equal", [0, 5, 20])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_does_not(self, value: float, equal: int) -> None:
        wrong = self.reference.copy()
        wrong[7] = value
        assert not self.agrees(wrong, equal)

    def test_runs_part_after_a_choice_that_differs(self) -> None:
        apart = self.reference.copy()
        apart[5:] += 0.05 * (-1.0) ** np.arange(15)  # far beyond the twin, on both sides
        assert self.agrees(apart, equal=5)
        assert not self.agrees(apart, equal=6)
        assert not self.agrees(np.where(np.arange(20) < 5, self.reference, 4.6), equal=5)  # no longer learns

    def test_one_step(self) -> None:
        for equal, difference in ((1, self.floor), (0, 1e-3)):
            for agrees, factor in ((True, 0.9), (False, 1.1)):
                (check,) = check_losses(
                    [5.0 + factor * difference], [5.0], [5.0], equal=equal, floor=self.floor, tokens=1000
                )
                assert check.agrees == agrees

    def test_equal_choices(self) -> None:
        loads = [[[0.5, 0.5]], [[0.25, 0.75]], [[0.5, 0.5]]]
        assert equal_choices(loads, loads) == 3
        assert equal_choices(loads, [loads[0], [[0.75, 0.25]], loads[2]]) == 1

    def test_gradients(self) -> None:
        gradients = np.array([[1.0, 0.3], [2.0, 1e-9], [3.0, -4.0]])  # norm and projection of three tensors
        twin = gradients * (1 + 1e-6)
        assert check_gradients(gradients * (1 - 5e-6), gradients, twin, dtype="float32").agrees
        for place in np.ndindex(gradients.shape):
            wrong = gradients.copy()
            wrong[place] += 0.01
            assert not check_gradients(wrong, gradients, twin, dtype="float32").agrees

    def test_logits(self) -> None:
        logits = np.random.default_rng(0).standard_normal((8, 16))
        twin = logits * (1 + 1e-6)
        assert check_logits(logits * (1 + 3e-6), logits, twin, dtype="float32", layers=4).agrees
        assert not check_logits(logits * 1.01, logits, twin, dtype="float32", layers=4).agrees


def test_nudge_moves_every_weight_to_a_neighbour() -> None:
    from switchgear_bench.demo.worker import nudge

    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        before = layer.weight.detach().clone()
        nudge(layer, seed=0)
        bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
        moved = layer.weight.detach().view(bits) - before.view(bits)
        assert set(moved[before != 0].tolist()) == {-1, 1}
        assert not moved[before == 0].any()
