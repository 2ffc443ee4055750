# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench threads`: recorded tasks are those of a call, and schedules obey their bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import switchgear
from errors import raises
from switchgear import _C
from switchgear.cli import main
from switchgear.weights import encode
from switchgear_bench import threads as threads_tables
from switchgear_bench.shapes import Shape
from switchgear_bench.threads import Task, evaluate, make_calls
from switchgear_bench.threads_model import (
    PLACEMENTS,
    Cores,
    Loop,
    Machine,
    Recording,
    Work,
    as_row,
    cut_for,
    machine,
    predict,
    record,
)

SMALL = Shape(128, 192, 4, 2, "a small one")


@pytest.fixture(autouse=True)
def _small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(threads_tables.MODEL_SHAPES, "small", SMALL)


def recorded(tokens: int, mode: str, threads: int, dtype: str = "fp32") -> Recording:
    return record(make_calls(Task("small", dtype, tokens, mode, "balanced"))[0], threads, 1)


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_tasks_read_each_weight_of_a_touched_expert(tokens: int, threads: int) -> None:
    """Once in the first projection; in the second once per chunk of tokens, since a task owns columns of a chunk."""
    loops = {loop.name: loop for loop in recorded(tokens, "forward", threads).loops}
    touched = min(SMALL.num_experts, SMALL.top_k * tokens) if tokens in (1, 300) else None
    gate_up = 2 * SMALL.intermediate_size * SMALL.hidden_size * 4
    first, second = loops["first projection"], loops["second projection"]
    experts = {task.expert for task in first.tasks}
    assert touched is None or len(experts) == touched
    assert first.bytes == len(experts) * gate_up
    assert second.bytes % (len(experts) * gate_up // 2) == 0 or threads == 64
    assert second.bytes >= len(experts) * gate_up // 2
    slots = tokens * SMALL.top_k
    assert sum(task.rows for task in first.tasks) % slots == 0
    assert sum(task.rows for task in second.tasks) % slots == 0


def test_a_step_records_its_gradients() -> None:
    loops = recorded(40, "train", 2).loops
    names = [loop.name for loop in loops if loop.name]
    assert names == [
        "first projection", "second projection", "gradient of h", "gradient of x", "weight gradient", "weight gradient"
    ]  # fmt: skip
    of_weights = SMALL.num_experts * 3 * SMALL.hidden_size * SMALL.intermediate_size * 4
    assert sum(loop.bytes for loop in loops if loop.name == "weight gradient") == of_weights
    assert sum(loop.bytes for loop in loops if loop.name.endswith(("projection", "of h", "of x"))) == 2 * of_weights


def test_results_have_the_same_bits_while_recording() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(30, 64), torch.randn(4, 128, 64), torch.randn(4, 64, 64)
    ids, weights = torch.arange(60, dtype=torch.int32).view(30, 2) % 4, torch.rand(30, 2)
    seen = []
    want = switchgear.moe(x, gate_up, down, ids, weights)
    for threads in (1, 2, 100):
        with cut_for(threads):
            loops, seconds = _C.record_loops(lambda: seen.append(switchgear.moe(x, gate_up, down, ids, weights)))
        assert loops
        assert seconds >= loops[-1][4]
        assert torch.equal(seen.pop(), want)
    with pytest.raises(ZeroDivisionError):
        _C.record_loops(lambda: 1 // 0)
    assert _C.record_loops(lambda: None)[0] == []  # a failed recording has ended


FORMS = ("plain", "compact", "panels", "int8", "int4", "fp8", "mxfp4", "nf4")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.some(4)
def test_few_tokens_have_the_same_bits_in_narrow_tasks(form: str, tokens: int, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(4, 1024, 512, generator=generator) / 16).bfloat16()
    down = (torch.randn(4, 512, 512, generator=generator) / 16).bfloat16()
    biases = {"gate_up_bias": torch.randn(4, 1024).bfloat16(), "down_bias": torch.randn(4, 512).bfloat16()}
    weights: tuple[Any, Any] = (gate_up, down)
    if form != "plain":
        weights = (encode(gate_up, form, parts=1 if interleaved else 2), encode(down, form))
    x = torch.randn(tokens, 512, generator=generator).bfloat16()
    ids = torch.arange(2 * tokens, dtype=torch.int32).view(tokens, 2) % 4
    options: dict[str, Any] = {"interleaved": interleaved, **biases}
    results: list[torch.Tensor] = []

    def call() -> None:
        with torch.inference_mode():
            results.append(switchgear.moe(x, *weights, ids, torch.ones(tokens, 2), **options))

    tasks = []
    for threads in (1, 2, 16, 64, 1000):
        with cut_for(threads):
            loops = _C.record_loops(call)[0]
        tasks.append([len(loop[-1]) for loop in loops if loop[0]])
    assert all(torch.equal(one, results[0]) for one in results)
    if form in ("plain", "compact", "fp8"):
        assert tasks[0][1] == 512 // 128 or _C.cpu_isa() in ("avx2", "generic")
        assert tasks[-1][1] == 512 // 16
    if form == "plain" and _C.cpu_isa() != "amx":
        assert tasks[-1][0] == len(ids.unique()) * 512 // 16


def made(*tasks: tuple[float, int], in_shares: bool = True, threads: int = 64) -> Recording:
    loop = Loop("a loop", in_shares, min(threads, len(tasks)), tuple(Work(s, 0, 1, b) for s, b in tasks))
    return Recording(threads, (loop,), serial=0.5)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("nodes", "sockets"), [(1, 1), (4, 1), (2, 2), (8, 2)])
def test_predictions_keep_their_bounds(nodes: int, sockets: int, placement: str) -> None:
    tasks = [(0.1 + i % 7 / 10, i % 3 * 10_000_000_000) for i in range(200)]
    recording = made(*tasks)
    on = machine(64, nodes, sockets, placement)
    found = predict(recording, on, Cores(0.001, 40e9))
    fork = 0.001 + 62 * 1e-7
    busy = sum(seconds for seconds, _ in tasks)
    moved = sum(moved for _, moved in tasks)
    assert found.seconds >= 0.5 + fork + max(max(s for s, _ in tasks), busy / 64, moved / on.bandwidth) - 1e-9
    row = as_row(found, recording.seconds)
    assert 0 < row["of_bandwidth"] <= 1
    assert 0 <= row["remote"] <= 1
    # All time of all threads is work on one core or lost in one of four ways.
    whole = sum(row[name] for name in ("serial", "fork", "idle", "waiting")) + row["efficiency"]
    assert whole == pytest.approx(1, abs=1e-6)


def test_memory_binds_the_nodes_it_is_on() -> None:
    """64 tasks that read 38 GB in 1 s each ask for 2432 GB/s of a socket's 380. One of four nodes has a quarter."""
    recording = made(*[(1.0, 38_000_000_000)] * 64)
    seconds = {p: predict(recording, machine(64, 4, 1, p), Cores(0.0, 38e9)).seconds - 0.5 - 62e-7 for p in PLACEMENTS}
    assert seconds["interleaved"] == seconds["local"] == pytest.approx(6.4)
    assert seconds["first node"] == pytest.approx(4 * 6.4)


@pytest.mark.parametrize(("name", "value"), [
    ("num_threads", 0), ("num_nodes", 0), ("num_nodes", 2**31 - 1), ("num_sockets", 3), ("core_bandwidth", 0.0),
    ("core_bandwidth", float("inf")), ("node_bandwidth", 0.0), ("link_bandwidth", float("nan")),
    ("placement", "elsewhere"),
])  # fmt: skip
def test_arguments_are_checked(name: str, value: object) -> None:
    machine: dict[str, Any] = {
        "num_threads": 2, "num_nodes": 2, "num_sockets": 1,
        "core_bandwidth": 1.0, "node_bandwidth": 1.0, "link_bandwidth": 1.0, "placement": "local",
    }  # fmt: skip
    with raises(ValueError, name):
        _C.simulate_loop([(1.0, 1)], True, tuple((machine | {name: value}).values()))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setattr(threads_tables, "MOST_BYTES", 3 * 128 * 192 * 2 * 2)  # of two experts: four share them
    case = evaluate(Task("small", "bf16", 4, "forward", "balanced"), (machine(2), machine(64), machine(64, 4)))
    threads_tables.show(case)
    assert "64 threads, 4 nodes" in capsys.readouterr().out
    about = {"model": "m", "threads": 2, "isa": "i", "torch": "t", "transformers": "f"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": threads_tables.SCHEMA, "machine": about, "cases": [case]}))
    assert main(["bench", "threads", "--from", str(path)]) == 0
    assert "| small | 4 | forward |" in capsys.readouterr().out


def test_a_machine_has_the_bandwidth_of_its_sockets() -> None:
    assert machine(64).bandwidth == machine(64, 4).bandwidth == machine(128, 8, 2).bandwidth / 2
    assert isinstance(machine(2), Machine)
