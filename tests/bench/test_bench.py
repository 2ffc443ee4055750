# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench`: its cases and their verification. Speeds are not tested."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from errors import raises
from switchgear.cli import main
from switchgear_bench.case import forward, make_case, make_inputs, make_weights, train
from switchgear_bench.results import load
from switchgear_bench.shapes import SHAPES, Shape, forward_flops, train_flops
from switchgear_bench.verify import expected, relative_error, tolerance
from switchgear_bench.worker import Task, run_case

SMALL = Shape(32, 48, 4, 2, "of the tests")


@pytest.mark.slow
def test_bench_quick_writes_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "csv", "markdown")}
    status = main([
        "bench", "layers", "--quick", "--shapes", "tiny", "--tokens", "5", "--dtypes", "fp32", "--threads", "1",
        "--json", str(files["json"]), "--csv", str(files["csv"]), "--markdown", str(files["markdown"]),
        "--plot", str(tmp_path / "pictures"), "--budget", "600",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "tiny, T=5, fp32, train" in printed
    results = load(str(files["json"]), "--from")
    assert max(results["ceilings"]["read"].values()) > 1e8
    rows = results["results"]
    assert {row["competitor"] for row in rows} >= {"switchgear", "hf_eager", "hf_grouped_mm", "hf_batched_mm"}
    for row in rows:
        assert not row["wrong"], row
        assert row["floor_ms"] / row["ms"] == pytest.approx(row["percent_of_floor"] / 100)
        assert row["floor_ms"] >= row["read_ms"] > 0
        assert row["floor_ms"] >= 1e3 * row["flops"] / row["multiply_rate"]
    with files["csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["competitor"] for row in table] == [row["competitor"] for row in rows]
    assert all(int(row["repetitions"]) >= 1 for row in table)
    assert files["markdown"].read_text().count("| tiny |") == 2  # forward and train
    assert 0 < (tmp_path / "pictures" / "relative.png").stat().st_size < 100_000


def test_bench_leaves_out_what_does_not_fit_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert (
        main(
            [
                "bench",
                "layers",
                "--quick",
                "--shapes",
                "tiny",
                "--budget",
                "1e-3",
                "--threads",
                "1",
                "--json",
                str(path),
            ]
        )
        == 0
    )
    results = load(str(path), "--from")
    assert results["results"] == []
    assert {entry["reason"] for entry in results["skipped"]} == {"the time of --budget is used up"}


def test_a_case_runs_in_the_environment_of_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    task = Task("tiny", "fp32", "forward", 1, "balanced", "default", "tuned", ("switchgear",), True, 0.0, 1)
    rows, skipped, _ = run_case(task, print)
    assert [row["allocator"] for row in rows] == ["tuned"]
    assert not skipped
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


def test_competitors_that_are_not_installed_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from switchgear_bench.competitors import COMPETITORS, Skip

    monkeypatch.setenv("SWITCHGEAR_COMPETITORS", str(tmp_path))
    case = make_case("small", SMALL, "bf16", 2, "forward", "balanced", make_weights(SMALL, torch.bfloat16))
    for name in ("ggml_bf16", "ggml_q4_0", "vllm", "sglang", "zentorch"):
        if importlib.util.find_spec(
            {"sglang": "vllm", "ggml_bf16": "llama_cpp", "ggml_q4_0": "llama_cpp"}.get(name, name)
        ):
            continue  # it is installed: then the benchmark verifies it
        with raises(Skip):
            COMPETITORS[name].make(case)


def test_bench_lists_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "layers", "--list"]) == 0
    text = capsys.readouterr().out
    for name in (*SHAPES, "hf_grouped_mm", "zentorch"):
        assert name in text


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_bench_tells_right_from_wrong(dtype: str, mode: str) -> None:
    from switchgear_bench.competitors import COMPETITORS

    case = make_case(
        "small",
        SMALL,
        dtype,
        24,
        mode,
        "balanced",
        make_weights(SMALL, torch.bfloat16 if dtype == "bf16" else torch.float32),
    )
    want, limit = expected(case), tolerance(case)
    for name in ("switchgear", "hf_eager", "hf_grouped_mm", "hf_batched_mm", "torch_loop", "hf_switchgear"):
        assert relative_error(case, COMPETITORS[name].make(case), want) < limit, name
    right = COMPETITORS["torch_loop"].make(case)
    assert relative_error(case, lambda inputs: right(inputs) * 1.1, want) > limit
    swapped = case.inputs[0].topk_ids_int64.flip(1)
    assert relative_error(case, lambda inputs: right(inputs._replace(topk_ids_int64=swapped)), want) > limit


def test_bench_drops_gradients_before_each_step() -> None:
    case = make_case("small", SMALL, "fp32", 8, "train", "balanced", make_weights(SMALL, torch.float32))
    from switchgear_bench.competitors import COMPETITORS

    layer = COMPETITORS["switchgear"].make(case)
    first = train(layer, case, case.inputs[0])
    kept = first.gate_up_proj.clone()
    again = train(layer, case, case.inputs[0])
    assert torch.equal(kept, again.gate_up_proj)  # not accumulated
    assert not forward(layer, case.inputs[0]).requires_grad


def test_zipf_routing_prefers_the_first_experts() -> None:
    uniform, zipf = (make_inputs(SHAPES["olmoe"], torch.float32, 512, routing, 0) for routing in ("balanced", "zipf"))
    for inputs in (uniform, zipf):
        assert all(len(set(row)) == 8 for row in inputs.topk_ids.tolist())  # distinct experts
    loads = [torch.bincount(inputs.topk_ids_int64.flatten(), minlength=64) for inputs in (uniform, zipf)]
    assert loads[0].max() < 2 * loads[0].float().mean()
    assert loads[1][0] > 4 * loads[1].float().mean()


def test_shapes_are_those_of_the_native_benches() -> None:
    listed = json.loads((Path(__file__).parents[2] / "bench" / "shapes.json").read_text())
    assert {row["name"]: (row["H"], row["I"], row["E"], row["K"]) for row in listed} == {
        name: shape[:4] for name, shape in SHAPES.items()
    }


def test_flops() -> None:
    assert forward_flops(SMALL, 10) == 10 * 2 * (2 * 32 * 96 + 2 * 48 * 32)
    assert train_flops(SMALL, 10) == 3 * forward_flops(SMALL, 10)
