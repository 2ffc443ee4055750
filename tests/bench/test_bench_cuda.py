# SPDX-License-Identifier: BSD-3-Clause
"""The parts of `switchgear bench cuda` that need no GPU: arguments, cases, and processing of results."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from switchgear.cli import main
from switchgear.cli.common import console
from switchgear_bench import cuda, cuda_ops, cuda_tables
from switchgear_bench.case import make_case, make_weights
from switchgear_bench.competitors import COMPETITORS
from switchgear_bench.published import FIGURES, OP_FIGURES
from switchgear_bench.shapes import GPU_SHAPES, GPU_TOKENS, Shape

SMALL = Shape(32, 48, 4, 2, "of the tests")


def row(name: str, times: list[float], error: float = 1e-3, shape: str = "small", tokens: int = 64) -> dict[str, Any]:
    case = make_case(shape, SMALL, "bf16", tokens, "forward", "balanced", make_weights(SMALL, torch.bfloat16))
    return cuda_tables.row_of(case, name, error, 1e-2, times, 3 << 20)


@pytest.fixture
def results() -> dict[str, Any]:
    case = cuda_ops.router(8, 16, 2, "softmax", "cpu")
    return {
        "schema": cuda_tables.SCHEMA,
        "machine": {"gpu": "a card", "torch": "2.13.0", "cuda": "13.0"},
        "ceilings": {"compute": 500e12, "memory": 3e12},
        "routing": "balanced",
        "ops": [cuda_ops.result(case, "switchgear", [0.5, 0.1, 0.2])],
        "results": [row("switchgear", [0.2, 0.1, 0.3]), row("hf_eager", [], error=0.5)],
        "skipped": [
            {"case": "small, T=64, bf16, forward", "competitor": "hf_sonicmoe", "reason": "it is not installed"}
        ],
    }


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_cases_are_those_of_published_figures_and_of_decoding() -> None:
    plan = cuda.cases(list(GPU_SHAPES), ["forward", "train"], None)
    assert {(shape, tokens) for shape, tokens, mode in plan if mode == "train"} == set(GPU_TOKENS.items())
    assert ("qwen3-30b-a3b", 1, "forward") in plan
    for figure in FIGURES:
        mode = "train" if figure.mode == "backward" else figure.mode
        assert (figure.shape, GPU_TOKENS[figure.shape], mode) in plan
    assert cuda.cases(["e512-k10"], ["train"], (3, 4)) == [("e512-k10", 3, "train"), ("e512-k10", 4, "train")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "tiny"], "--shapes: expected a list of sonic-7b-n256, .*, ops; got 'tiny'"),
        (["--competitors", "ggml"], "--competitors: expected a list of switchgear"),
        (["--json", "/nowhere/results.json"], "--json: cannot write /nowhere/results.json"),
    ],
)
def test_mistakes_are_named_before_the_device_is_looked_for(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "cuda", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


# ---- results ---------------------------------------------------------------------------------------------------------


def test_a_row_says_what_was_measured() -> None:
    one = row("switchgear", [0.2, 0.1, 0.3])
    assert (one["ms"], one["best_ms"], one["repetitions"], one["wrong"]) == (0.2, 0.1, 3, False)
    assert one["flops"] == 6 * 64 * 2 * 32 * 48
    assert one["tflops"] == pytest.approx(one["flops"] / 0.2e-3 / 1e12)
    assert one["peak_MiB"] == 3
    wrong = row("hf_eager", [], error=float("nan"))
    assert wrong["wrong"]
    assert wrong["ms"] is wrong["tflops"] is None


@pytest.mark.parametrize(("compute", "memory", "bound"), [(1e12, 1e15, "compute"), (1e18, 1e9, "memory")])
def test_percent_of_the_ceiling_that_binds(compute: float, memory: float, bound: str) -> None:
    one = cuda_tables.against_ceilings({"compute": compute, "memory": memory}, row("switchgear", [0.2]))
    seconds = one["flops"] / compute if bound == "compute" else one["weight_bytes"] / memory
    assert one["bound"] == bound
    assert one["percent_of_ceiling"] == pytest.approx(100 * seconds / 0.2e-3)
    assert cuda_tables.against_ceilings({"compute": 1e12, "memory": 1e12}, row("x", []))["percent_of_ceiling"] is None


def test_files(results: dict[str, Any], tmp_path: Path) -> None:
    files = {kind: str(tmp_path / f"gpu.{kind}") for kind in ("json", "csv", "markdown")}
    cuda_tables.write(results, files)
    written = json.loads(Path(files["json"]).read_text())
    assert written["schema"] == "switchgear-bench-cuda/4"
    assert [entry["percent_of_ceiling"] is None for entry in written["results"]] == [False, True]
    with open(files["csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [entry["competitor"] for entry in rows] == ["switchgear", "hf_eager"]
    text = Path(files["markdown"]).read_text()
    assert "a card" in text
    assert "500 TFLOP/s (dense bfloat16 product, 8192³), 3000 GB/s" in text
    assert "| small | 64 | forward | switchgear | 0.200 |" in text
    assert "| hf_eager | wrong: error 5e-01 |" in text
    assert "| route | softmax T=8 E=16 K=2 | switchgear | 200.0 |" in text
    assert "hf_sonicmoe: it is not installed" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables[:4]} == {10}  # every row has every cell
    assert {line.count("|") for line in tables[4:]} == {7}


def test_terminal(results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    out = console()
    cuda_tables.print_machine(out, results)
    cuda_tables.print_ops(out, results)
    cuda_tables.print_case(out, results, results["results"], results["skipped"])
    text = capsys.readouterr().out
    for words in ("a card", "not timed", "left out (it is not installed)", "FreeToken 12.4 us", "% (memory)"):
        assert words in text


def test_published_figures_stand_beside_their_row() -> None:
    shape = "sonic-7b-n256"
    beside = cuda_tables.figures_beside({"shape": shape, "mode": "forward", "tokens": GPU_TOKENS[shape]})
    assert any("SonicMoE 366 TFLOP/s" in line for line in beside)
    assert cuda_tables.figures_beside({"shape": shape, "mode": "forward", "tokens": 7}) == []


GRAPHS: dict[str, Any] = {
    "writes something else": lambda call: lambda: 1.1 * call(),
    "writes nothing": lambda call: itertools.repeat(call()).__next__,
}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_graph_is_verified_too(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "in_turns", lambda calls: {name: [0.5] for name in calls})
    monkeypatch.setattr(cuda, "captured", graph)
    monkeypatch.setattr(cuda, "peak_memory", lambda call: 1 << 20)
    case = make_case("small", SMALL, "bf16", 16, "forward", "balanced", make_weights(SMALL, torch.bfloat16))
    ((one,), _) = cuda.measure_case(case, ["torch_loop"])
    assert one["wrong"]
    assert one["ms"] is None


def test_a_case_is_verified_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case runs through cuda.py on the CPU, with a stand-in for the clock."""
    called: list[str] = []
    monkeypatch.setattr(cuda, "in_turns", lambda calls: {name: [0.5] for name in calls})
    monkeypatch.setattr(cuda, "captured", lambda call: call)
    monkeypatch.setattr(cuda, "peak_memory", lambda call: called.append(str(call().shape)) or 1 << 20)
    case = make_case("small", SMALL, "bf16", 16, "forward", "balanced", make_weights(SMALL, torch.bfloat16))
    right = COMPETITORS["torch_loop"]
    monkeypatch.setitem(COMPETITORS, "wrong", right._replace(make=lambda case: lambda inputs: inputs.x))
    monkeypatch.setitem(COMPETITORS, "broken", right._replace(make=lambda case: undefined))  # noqa: F821
    monkeypatch.setitem(COMPETITORS, "trains", right._replace(modes=("train",)))
    rows, skipped = cuda.measure_case(case, ["switchgear", "torch_loop", "wrong", "broken", "trains"])
    assert {row["competitor"]: row["ms"] for row in rows} == {"switchgear": 0.5, "torch_loop": 0.5, "wrong": None}
    assert [entry["competitor"] for entry in skipped] == ["broken", "trains"]
    assert "NameError" in skipped[0]["reason"]
    assert called == ["torch.Size([16, 32])"] * 2
    monkeypatch.setitem(COMPETITORS, "switchgear", right._replace(make=lambda case: undefined))  # noqa: F821
    with pytest.raises(NameError):
        cuda.measure_case(case, ["switchgear"])


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """measure_all on the CPU, with stand-ins for the device; the results that were noted so far."""
    monkeypatch.setattr(cuda, "describe", lambda: {"gpu": "a card"})
    monkeypatch.setattr(cuda, "ceilings", lambda: {"compute": 500e12, "memory": 3e12})
    monkeypatch.setattr(cuda, "make_case", lambda name, shape, tokens, mode, routing: (name, mode))
    return []


def test_an_exception_ends_its_case_alone(no_device: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_case(case: tuple[str, str], names: list[str]) -> Any:
        if case[1] == "forward":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [row("switchgear", [0.5])], []

    monkeypatch.setattr(cuda, "measure_case", measure_case)
    note = lambda results: no_device.append(json.loads(json.dumps(results)))  # noqa: E731
    plan = [("sonic-7b-n256", 8, "forward"), ("sonic-7b-n256", 8, "train")]
    results = cuda.measure_all(plan, ["switchgear"], False, "balanced", 60.0, note)
    assert results["failed"] == ["sonic-7b-n256, T=8, forward"]
    assert "illegal memory access" in results["skipped"][0]["reason"]
    assert [one["competitor"] for one in results["results"]] == ["switchgear"]
    assert [len(noted["results"]) for noted in no_device] == [0, 0, 1]  # before, and after each case


def test_an_op_that_is_wrong_ends_its_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda_ops.router(8, 16, 2, "softmax", "cpu")
    wrong = right._replace(case="wrong", calls={"switchgear": lambda: torch.ones(2), "torch": lambda: torch.zeros(2)})

    def broken() -> cuda_ops.OpCase:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cuda_ops, "CASES", (lambda: wrong, broken, lambda: right))
    monkeypatch.setattr(cuda_ops, "in_turns", lambda calls, seconds: {name: [0.5] for name in calls})
    results: dict[str, Any] = {"ops": [], "skipped": [], "failed": []}
    noted: list[int] = []
    cuda_ops.measure(float("inf"), results, lambda results: noted.append(len(results["ops"])))
    assert results["failed"] == ["route wrong", "op 1"]
    assert [entry["competitor"] for entry in results["ops"]] == ["switchgear", "torch"]
    assert noted == [0, 0, 2]


# ---- ops -------------------------------------------------------------------------------------------------------------

OPS = [
    cuda_ops.router(40, 16, 4, "softmax", "cpu"),
    cuda_ops.router(40, 16, 4, "sigmoid", "cpu"),
    cuda_ops.grouped(32, 24, 40, 4, "cpu"),
    cuda_ops.permutation(20, 32, 8, 4, "cpu"),
    cuda_ops.combination(20, 32, 8, 4, "cpu"),
]


@pytest.mark.parametrize("case", OPS, ids=lambda case: f"{case.op} {case.case}")
def test_ops_agree_with_torch(case: cuda_ops.OpCase) -> None:
    if case.op == "grouped_gemm" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    results = {competitor: call() for competitor, call in case.calls.items()}
    assert len(results) == 2
    assert cuda_ops.disagreement(results) <= case.tolerance
    wrong = results | {"torch": results["torch"].roll(1, 0)}
    assert cuda_ops.disagreement(wrong) > case.tolerance


def test_published_figures_of_ops_name_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(cuda_ops, "OpCase", lambda op, case, *rest: made.append(f"{op} {case}"))
    for name in ("randn", "rand", "arange"):  # only sizes matter here, so no memory is allocated
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _real=real, **k: _real(*a, **k | {"device": "meta"}))
    for case in cuda_ops.CASES:
        case()
    assert {f"{figure.op} {figure.case}" for figure in OP_FIGURES} <= set(made)
