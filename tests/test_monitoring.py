# SPDX-License-Identifier: BSD-3-Clause
"""Expert load in TensorBoard, wandb and transformers' Trainer, by writers that only remember."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import switchgear
from errors import raises
from switchgear import MoE, RoutingTrace
from switchgear.monitoring import LoadMeter, log_to
from switchgear.trace.load import STATISTICS


class Layers(nn.Module):
    def __init__(self, count: int, num_experts: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoE(16, 8, num_experts, top_k=2) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class FakeTensorBoard:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int | None]] = []

    def add_scalar(self, tag: str, value: float, step: int | None = None) -> None:
        self.scalars.append((tag, value, step))


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int | None]] = []

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        self.rows.append((data, step))


def test_a_reading_is_of_the_steps_since_the_last_one() -> None:
    model = Layers(1)
    first, second = torch.randn(20, 16), torch.randn(30, 16)
    with RoutingTrace(model) as alone:
        model(second)
    want = LoadMeter(alone).read()
    with RoutingTrace(model) as trace:
        meter = LoadMeter(trace)
        model(first)
        meter.read()
        model(second)
    got = meter.read()
    assert got == pytest.approx(want)
    assert meter.read() == {}


@pytest.mark.parametrize("num_experts", [2, 4])
def test_statistics_are_those_of_a_loop(num_experts: int) -> None:
    model, x = Layers(1, num_experts), torch.randn(40, 16)
    with RoutingTrace(model) as trace:
        model(x)
    counts = next(iter(trace.layers.values())).tokens_per_expert.tolist()
    read = LoadMeter(trace, max_layers=0).read()
    shares = [count / sum(counts) for count in counts]
    most = math.log(num_experts)
    assert read["moe/max_violation/worst"] == pytest.approx(max(counts) / (sum(counts) / num_experts) - 1)
    assert read["moe/load_entropy/mean"] == pytest.approx(-sum(s * math.log(s) for s in shares if s) / most)
    assert read["moe/unused/worst"] == counts.count(0) / num_experts
    rows = model.layers[0].gate.logits(x).softmax(-1).tolist()
    entropies = [-sum(p * math.log(p) for p in row) for row in rows]
    assert read["moe/router_entropy/mean"] == pytest.approx(sum(entropies) / 40 / most, rel=1e-5)


def test_the_worst_layer_is_the_one_that_it_says() -> None:
    model = Layers(3)
    with RoutingTrace(model) as trace:
        model(torch.randn(40, 16))
    read = LoadMeter(trace).read()
    for statistic, worst in STATISTICS.items():
        values = [read[f"moe/{statistic}/{name}"] for name in trace.layers]
        assert read[f"moe/{statistic}/worst"] == worst(values)
        assert read[f"moe/{statistic}/mean"] == pytest.approx(sum(values) / 3)


@pytest.mark.parametrize("max_layers", [0, 1, 3, 100])
def test_the_number_of_keys_is_bounded_and_they_stay(max_layers: int) -> None:
    model = Layers(12)
    with RoutingTrace(model) as trace:
        meter = LoadMeter(trace, max_layers=max_layers)
        model(torch.randn(9, 16))
        keys = set(meter.read())
        model(torch.randn(9, 16))
        assert set(meter.read()) == keys
        model.layers[3](torch.randn(9, 16))  # alone
        assert set(meter.read()) <= keys
    assert len(keys) == 5 * (2 + min(max_layers, 12))
    if max_layers == 3:
        assert {key.split("/")[2] for key in keys} >= {"layers.0.gate", "layers.11.gate"}


def test_a_reset_trace_starts_again() -> None:
    model = Layers(1)
    x = torch.randn(25, 16)
    with RoutingTrace(model) as trace:
        meter = LoadMeter(trace)
        model(x)
        want = meter.read()
        trace.reset()
        model(x)
        assert meter.read() == want


def test_every_kind_of_writer_gets_the_same() -> None:
    model = Layers(2)
    board, run, called = FakeTensorBoard(), FakeRun(), []
    with RoutingTrace(model) as trace:
        writers = (board, run, lambda metrics, step: called.append((metrics, step)))
        logs = [trace.log_to(writer, prefix="load") for writer in writers]
        model(torch.randn(9, 16))
        got = [log(7) for log in logs]
        assert [log(8) for log in logs] == [{}] * 3  # nothing new, so nothing is written
    assert got[0] == got[1] == got[2]
    assert {tag.partition("/")[0] for tag in got[0]} == {"load"}
    assert {tag: value for tag, value, _ in board.scalars} == got[0]
    assert {step for _, _, step in board.scalars} == {7}
    assert run.rows == [(got[0], 7)]
    assert called == [(got[0], 7)]


def test_what_is_not_recorded_has_no_key() -> None:
    model = Layers(1)
    with RoutingTrace(model, record=("counts",)) as trace:
        model(torch.randn(9, 16))
    read = LoadMeter(trace).read()
    assert "moe/max_violation/mean" in read
    assert not [key for key in read if "router_entropy" in key]


def test_it_writes_every_nth_step() -> None:
    model, run = Layers(1), FakeRun()
    with RoutingTrace(model) as trace:
        log = log_to(trace, run, every=2)
        for step in range(7):
            model(torch.randn(5, 16))
            log(step)
    assert [step for _, step in run.rows] == [1, 3, 5]


def test_what_could_not_be_written_is_in_the_next_reading() -> None:
    class Failing(FakeTensorBoard):
        def add_scalar(self, tag: str, value: float, step: int | None = None) -> None:
            super().add_scalar(tag, value, step)
            if len(self.scalars) == 3:
                raise OSError("no space")

    model, board = Layers(1), Failing()
    with RoutingTrace(model) as trace:
        meter, log = LoadMeter(trace), log_to(trace, board)
        model(torch.randn(5, 16))
        with raises(OSError):
            log(0)
        model(torch.randn(5, 16))
        assert log(1) == meter.read()
        assert log(2) == {}


def test_mistakes_are_named() -> None:
    with RoutingTrace(Layers(1)) as trace:
        with raises(TypeError, "writer"):
            log_to(trace, 3)
        with raises(ValueError, "every"):
            log_to(trace, print, every=0)
        with raises(ValueError, "max_layers"):
            log_to(trace, print, max_layers=-1)
        with raises(TypeError, "every"):
            log_to(trace, print, every=1.5)
        with raises(TypeError, "max_layers"):
            LoadMeter(trace, max_layers="8")
    with raises(TypeError, "trace"):
        LoadMeter(None)


def test_the_trainer_reports_it_to_all_its_reporters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from switchgear.monitoring import ExpertLoadCallback

    seen: list[dict[str, Any]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    config = transformers.OlmoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4,
        num_experts_per_tok=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    switchgear.accelerate(model)
    ids = [{"input_ids": row, "labels": row} for row in torch.randint(50, (12, 8))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, eval_steps=1, eval_strategy="steps", report_to=[], use_cpu=True,
        per_device_train_batch_size=3, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=ids, eval_dataset=ids, callbacks=[Reporter()])
    own = FakeRun()
    with raises(ValueError, "max_layers"):
        ExpertLoadCallback(max_layers=-1)
    callback = ExpertLoadCallback(own).attach(trainer)
    trainer.train()
    with_load = [logs for logs in seen if "moe/max_violation/mean" in logs]
    assert len(with_load) == len(own.rows) == 2  # one per log of the training loss, none of evaluations
    assert all("loss" in logs for logs in with_load)
    assert [step for _, step in own.rows] == [2, 4]
    history = [entry for entry in trainer.state.log_history if "moe/max_violation/mean" in entry]
    assert [entry["step"] for entry in history] == [2, 4]
    assert callback.trace is not None
    for layer in callback.trace.layers.values():
        assert layer.num_tokens == 4 * 3 * 8  # the training steps' tokens alone
