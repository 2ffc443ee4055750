# SPDX-License-Identifier: BSD-3-Clause
"""The command line. Speeds are not tested. Results must agree, files must be written, mistakes must be named."""

from __future__ import annotations

import ast
import csv
import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import switchgear
from full_disk import full_disk
from switchgear.bench.case import forward, make_case, make_inputs, make_weights, train
from switchgear.bench.markdown import case_table, fill
from switchgear.bench.markdown import write as write_markdown
from switchgear.bench.results import SCHEMA, completed, load, merge, save, undisturbed, write_csv, write_json
from switchgear.bench.shapes import SHAPES, Shape, forward_flops, train_flops
from switchgear.bench.targets import Verdict, judge
from switchgear.bench.timing import FEWEST_TURNS, Timed, interleave
from switchgear.bench.verify import expected, relative_error, tolerance
from switchgear.bench.worker import Task, run_case
from switchgear.cli import COMMANDS, info, main
from switchgear.cli.demo.agreement import check_gradients, check_logits, check_losses, equal_choices, loss_floor
from switchgear.cli.demo.corpus import batches, load_corpus
from switchgear.common import CommandError, check_file, console, machine, require
from switchgear.complaints import failed_import

SMALL = Shape(32, 48, 4, 2, "of the tests")


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_prints_valid_json() -> None:
    command = [sys.executable, "-m", "switchgear", "info", "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    info = json.loads(output)
    assert info["versions"]["torch"] == torch.__version__
    assert info["backends"]["cpu"]["isa"] in info["backends"]["cpu"]["isas_available"]
    assert info["threads"]["torch"] >= 1
    assert len(info["threads"]["openmp_runtimes"]) <= 1, info["warnings"]  # torch's and ours are the same
    assert info["backends"]["cuda"]["available"] or info["backends"]["cuda"]["reason"]


def test_info_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "machine", "backends", "threads", "native CPU", "CUDA", "huge pages", "OpenMP runtimes"):
        assert word in text


def test_a_reader_that_ends_early_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`switchgear info | head -3`: no traceback, also from the flush at exit."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info"]) == 141
        pipe.write("more")


def test_output_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 1
        full.write("more")
    assert "switchgear info: cannot write: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_that_cannot_be_written_is_named(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for buffering in (-1, 1):  # it fails when it is flushed, or when argparse writes it
        with open("/dev/full", "w", buffering) as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert main([argument]) == 1
        assert capsys.readouterr().err == "switchgear: cannot write: No space left on device\n"


def test_a_table_whose_reader_ends_early_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setattr(info, "run", lambda _: console().print("a table"))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info"]) == 141


def test_an_interrupt_while_commands_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("switchgear.cli.build_parser", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "switchgear: interrupted\n"


def test_output_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info"]) == 0


def test_errors_of_a_library_are_not_those_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any) -> int:
        raise OSError("cannot identify a picture")

    monkeypatch.setattr(info, "run", fails)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "switchgear info: cannot identify a picture\n"


def test_errors_may_be_closed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`switchgear convert 2>&-`: they go nowhere, not to the output, nor to the next file that is opened."""
    kept = os.dup(2)
    os.close(2)
    try:
        monkeypatch.setattr(sys, "stderr", None)
        assert main(["convert"]) == 2
        assert os.path.samestat(os.fstat(2), os.stat(os.devnull))
        assert os.get_inheritable(2)
        assert not capsys.readouterr().out
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_help_shows_defaults_that_are_not_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan-parallel", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "placed by load (default: 0)" in text
    assert "(default: None)" not in text
    assert "(default: --ep)" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"switchgear {switchgear.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_can_be_printed_in_any_locale(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.isascii()


def test_openmp_runtimes_are_told_apart() -> None:
    maps = """\
7f00-7f01 r-xp 00000000 08:01 11 /opt/torch/lib/libgomp.so.1
7f01-7f02 r--p 00001000 08:01 11 /opt/torch/lib/libgomp.so.1
7f03-7f04 r-xp 00000000 08:01 12 /opt/sklearn.libs/libgomp-a34b3233.so.1.0.0
7f05-7f06 r-xp 00000000 08:01 13 /opt/my folder/libiomp5.so
7f07-7f08 r-xp 00000000 08:01 14 /opt/llvm/libomp.so.5 (deleted)
7f09-7f0a r-xp 00000000 08:01 15 /opt/llvm/libomptarget.so
7f0b-7f0c rw-p 00000000 00:00 0  [heap]
7f0d-7f0e rw-p 00000000 00:00 0
"""
    names = [Path(path).name for path in machine.openmp_runtimes(maps)]
    assert sorted(names) == [
        "libgomp-a34b3233.so.1.0.0", "libgomp.so.1", "libiomp5.so", "libomp.so.5 (deleted)",
    ]  # fmt: skip


# ---- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["train"], "invalid choice"),
        (["info", "--jason"], "unrecognized arguments"),
        (["demo", "--model", "gpt5"], "invalid choice"),
        (["demo", "--steps", "0"], "--steps: expected an integer of at least 1, got '0'"),
        (["demo", "--sequence-length", "1"], "at least 2"),
        (["demo", "--learning-rate", "nan"], "--learning-rate: expected a number of at least 0, got 'nan'"),
        (["demo", "--seed", str(2**63)], "--seed: expected an integer of 64 bits, got '9223372036854775808'"),
        (["train-tiny", "--seed", str(-(2**63) - 1)], "--seed: expected an integer of 64 bits"),
        (["train-tiny", "--seed", "one"], "--seed: expected an integer of 64 bits, got 'one'"),
        (["bench", "--routing", "skewed"], "invalid choice"),
        (["bench", "--dtypes", "fp6"], "--dtypes: expected a list of bf16"),
        (["bench", "--modes", "backward"], "--modes: expected a list of forward, train"),
        (["bench", "--tokens", "1,-2"], "--tokens: expected an integer of at least 1, got '-2'"),
        (["bench", "--tokens", "many"], "--tokens: expected an integer of at least 1, got 'many'"),
        (["bench", "--budget", "nan"], "--budget: expected a number above 0, got 'nan'"),
        (["bench", "--budget", "-1"], "--budget: expected a number above 0, got '-1'"),
        (["bench", "--parallel", "2", "--bandwidth", "nan"], "--bandwidth: expected a number of at least 0, got 'nan'"),
    ],
)
def test_argparse_names_the_mistake(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--shapes", "mixtrall"], "--shapes: expected a list of tiny"),
        (["bench", "--competitors", "megablocks"], "--competitors: expected"),
        (["bench", "--json", "/nowhere/results.json"], "--json: cannot write"),
        (["bench", "--from", "/nowhere/results.json"], "--from: cannot read"),
        (["plan-parallel", "--json", "/nowhere/results.json"], "--json: cannot write"),
        (["demo", "--implementations", "eager,eager"], "--implementations: expected distinct names"),
        (["demo", "--text", "/nowhere/text"], "--text: cannot read"),
        (["demo", "--text", "/dev/zero"], "--text: expected a regular file"),
        (["demo", "--out", "/dev/null/report"], "--out: cannot write to"),
        (
            ["offload-plan", "/nowhere", "--memory", "1G", "--plot", "/nowhere/hits.pdf"],
            "--plot: expected a name that ends in .png, got /nowhere/hits.pdf",
        ),
        (
            ["offload-plan", "/nowhere", "--memory", "1G", "--plot", "/nowhere/hits"],
            "--plot: expected a name that ends in .png",
        ),
        (
            ["compress", "/nowhere", "--recipe", "r.json", "--out", "/dev/null"],
            "--out: expected a folder that does not",
        ),
        (["offload-store", "/nowhere", "--out", "/dev/null"], "--out: expected a folder that does not exist"),
        (
            ["convert", "/nowhere", "--out", "/dev/null", "--operation", "split"],
            "--out: expected a folder that does not",
        ),
    ],
)
def test_commands_name_the_mistake(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_extra_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # import raises ImportError
    assert main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"needs {package}" in error
    assert "pip install 'switchgear[" in error


def test_failed_imports_say_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    late = ModuleNotFoundError("Could not import module 'AutoConfig'. Are this object's requirements defined?")
    late.__cause__ = ModuleNotFoundError("No module named 'rich.table'", name="rich.table")
    absent = ModuleNotFoundError("No module named 'numpy'", name="numpy")
    damaged = ImportError("libfoo.so is missing")
    within = ImportError("no name", name="transformers.generation")
    other = ModuleNotFoundError("No module named 'peft'", name="peft")

    def lazy(name: str) -> Any:
        raise late

    broken = types.ModuleType("transformers")
    monkeypatch.setattr(broken, "__getattr__", lazy, raising=False)
    wanted = "needs rich (No module named 'rich.table'); pip install 'switchgear[bench]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", broken)
        with pytest.raises(CommandError, match=re.escape(wanted)):
            require("transformers")
    for error, module, words in (
        (absent, "transformers", "needs numpy (No module named 'numpy'); pip install 'switchgear[transformers]'"),
        (absent, "matplotlib.pyplot", "needs numpy (No module named 'numpy'); pip install 'switchgear[bench]'"),
        (damaged, "PIL.Image", "PIL is installed but cannot be imported: libfoo.so is missing"),
        (damaged, "", "libfoo.so is missing"),
        (within, "switchgear.integrations.transformers", "transformers is installed but cannot be imported: no name"),
        (other, "", "needs peft (No module named 'peft'); pip install peft"),
    ):
        assert failed_import(error, module) == words
    monkeypatch.setattr(info, "run", lambda _: lazy(""))
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"switchgear info: {wanted}\n"


def test_info_needs_torch_alone() -> None:
    """So do the other commands, up to the point where they need more. Nothing imports torch's compiler, and the package
    itself nothing of the commands."""
    expected = {
        "info": (0, "native CPU"), "demo": (2, "needs"), "bench": (2, "needs rich"), "train-tiny": (2, "needs transf"),
        "inspect tiny": (2, "needs transf"), "compress tiny --recipe r --out o": (2, "needs transf"),
    }  # fmt: skip
    code = f"""
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys(["numpy", "rich", "matplotlib", "transformers", "PIL"]))
import switchgear
assert "switchgear.common" not in sys.modules
from switchgear.cli import main
for command in {list(expected)}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = main(command.split())
    assert "torch._dynamo" not in sys.modules, command
    print(json.dumps([status, text.getvalue()]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for (status, words), answer in zip(expected.values(), map(json.loads, answers), strict=True):
        assert answer[0] == status, answer[1]
        assert words in answer[1]


def test_imports_go_one_way() -> None:
    """cli → bench → common."""
    package = Path(machine.__file__).parents[1]
    for folder, others in (("bench", ("cli",)), ("common", ("cli", "bench"))):
        for path in (package / folder).rglob("*.py"):
            modules = [
                node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
            ]
            assert not {part for module in modules for part in module.split(".")} & set(others), path


# ---- demo ------------------------------------------------------------------------------------------------------------


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
    from switchgear.cli.demo.worker import nudge

    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        before = layer.weight.detach().clone()
        nudge(layer, seed=0)
        bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
        moved = layer.weight.detach().view(bits) - before.view(bits)
        assert set(moved.unique().tolist()) == {-1, 1}


# ---- bench -----------------------------------------------------------------------------------------------------------


def test_bench_quick_writes_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "csv", "markdown")}
    status = main([
        "bench", "--quick", "--shapes", "tiny", "--tokens", "5", "--dtypes", "fp32", "--threads", "1",
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
    assert 0 < (tmp_path / "pictures" / "tiny.png").stat().st_size < 100_000


def test_bench_leaves_out_what_does_not_fit_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert (
        main(["bench", "--quick", "--shapes", "tiny", "--budget", "1e-3", "--threads", "1", "--json", str(path)]) == 0
    )
    results = load(str(path), "--from")
    assert results["results"] == []
    assert {entry["reason"] for entry in results["skipped"]} == {"the time of --budget is used up"}


def bench_row(competitor: str, ms: float | None, **changes: Any) -> dict[str, Any]:
    """A row whose floor is reading the weights, which takes 1 ms."""
    row = {
        "shape": "olmoe", "dtype": "bf16", "mode": "forward", "tokens": 1, "routing": "balanced", "pages": "huge",
        "allocator": "default", "touched_experts": 8.0, "multiply_rate": 1e12, "read_ms": 1.0,
        "competitor": competitor, "ms": ms, "relative_error": 1e-3, "quiet_turns": 3,
    }  # fmt: skip
    return completed(row | changes)


def bench_results_of(*rows: dict[str, Any], model: str = "a CPU") -> dict[str, Any]:
    machine = {"model": model, "threads": 2, "isa": "avx512", "torch": "2.13", "transformers": "5", "switchgear": "0.1"}
    ceilings: dict[str, Any] = {"compute": {}, "read": {"loads": 1e9}}
    return {"schema": SCHEMA, "machine": machine, "ceilings": ceilings, "results": list(rows), "skipped": []}


def test_targets_hold_or_not() -> None:
    ours = bench_row("switchgear", 1.04)
    rows = [ours, bench_row("sglang", 1.04), bench_row("zentorch", 1.0), bench_row("hf_grouped_mm", 3.0)]
    verdicts = {verdict.target: verdict for verdict in judge([rows])}
    assert verdicts["1x sglang"] == Verdict("olmoe, T=1, bf16, forward", "1x sglang", "1.00x (sglang)", True)
    assert not verdicts["1x zentorch"].holds
    assert verdicts["95% of the read of the touched weights"].holds
    assert not verdicts["3x hf_grouped_mm"].holds
    wrong = [ours, bench_row("sglang", None)]  # a wrong result is compared with none
    assert [verdict.target for verdict in judge([wrong])] == ["95% of the read of the touched weights"]


def test_a_quantised_target_wants_no_larger_error() -> None:
    ours = bench_row("switchgear_int8", 1.0, dtype="int8", relative_error=0.03)
    for error, holds in ((0.02, False), (0.03, True)):
        rows = [ours, bench_row("sglang_int8", 1.5, dtype="int8", relative_error=error)]
        assert [verdict.holds for verdict in judge([rows])] == [holds]


def test_a_file_has_medians_from_which_the_rest_follows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = [bench_row("switchgear", 2.0), bench_row("sglang", None), bench_row("switchgear", 1 / 3, tokens=16)]
    save(bench_results_of(*(row | {"turns": 3} for row in rows)), str(path))
    assert len(path.read_text().splitlines()) < 12
    again = load(str(path), "--from")["results"]
    assert again[:2] == rows[:2]
    assert again[2] == completed(rows[2] | {"ms": 0.33333333})
    assert (rows[0]["percent_of_floor"], rows[0]["bound"], rows[1]["wrong"]) == (50.0, "memory", True)


@pytest.mark.parametrize(
    "content",
    [{}, {"cases": []}, {"machine": {}, "ceilings": {}, "skipped": [], "cases": [{"shape": "tiny"}]}, {"cases": 1}],
)
def test_a_file_without_results_is_named(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": SCHEMA} | content))
    assert main(["bench", "--from", str(path)]) == 2
    assert f"--from: expected the results of a run in {path}, got " in capsys.readouterr().err


def test_results_replace_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a link names; what is no file is written to."""
    path, link = tmp_path / "results.json", tmp_path / "link.json"
    path.write_text("before")
    link.symlink_to(path)

    def fails(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(CommandError, match=r"--json: cannot write .*: No space left on device"):
            write_json({"a": 1}, str(link))
        assert path.read_text() == "before"
    write_json({"a": 1}, str(link))
    assert link.is_symlink()
    assert json.loads(path.read_text()) == {"a": 1}
    write_json({"a": 1}, os.devnull)
    assert not Path(os.devnull).is_file()


def test_results_of_runs_share_a_file() -> None:
    earlier = bench_results_of(bench_row("switchgear", 2.0), bench_row("switchgear", 9.0, tokens=16))
    later = bench_results_of(bench_row("switchgear", 1.0), bench_row("sglang", 1.5))
    rows = merge(earlier, later, "results.json")["results"]
    assert [(row["tokens"], row["competitor"], row["ms"]) for row in rows] == [
        (1, "switchgear", 1.0), (1, "sglang", 1.5), (16, "switchgear", 9.0)
    ]  # fmt: skip
    late = {"case": "olmoe, T=1, bf16, forward", "competitor": "all", "reason": "the time is used up"}
    assert merge(earlier | {"skipped": [late]}, later, "results.json")["skipped"] == []  # it is measured now
    with pytest.raises(CommandError, match=r"results\.json is of model a CPU, this run of another"):
        merge(earlier, bench_results_of(model="another"), "results.json")


def test_no_target_is_judged_by_a_case_that_others_disturbed_throughout() -> None:
    results = bench_results_of(bench_row("switchgear", 2.0), bench_row("sglang", 1.5, quiet_turns=0))
    assert undisturbed(results) == []
    assert "| forward, disturbed |" in case_table(results)
    results["results"][1]["quiet_turns"] = 1
    assert undisturbed(results) == [results["results"]]


def test_bench_makes_tables_of_a_file(tmp_path: Path) -> None:
    source, table = tmp_path / "results.json", tmp_path / "table.md"
    source.write_text("{}")
    assert main(["bench", "--from", str(source)]) == 2
    save(bench_results_of(bench_row("switchgear", 2.0), bench_row("hf_grouped_mm", 7.0)), str(source))
    assert main(["bench", "--from", str(source), "--markdown", str(table)]) == 0
    assert "| olmoe | 1 | bf16 | forward | 2.00 | 50 % | 7.00, 3.50x |  |" in table.read_text()
    assert "3x hf_grouped_mm" in table.read_text()


def test_tables_go_where_a_document_wants_them() -> None:
    results = bench_results_of(bench_row("switchgear", 2.0), bench_row("hf_grouped_mm", 7.0))
    text = "before\n<!-- bench:summary -->\nold\n<!-- /bench:summary -->\nafter\n"
    filled = fill(text, results)
    assert "old" not in filled
    assert "| olmoe | bf16 | 2.00 ms, 50 %, **3.5x** |  |  |" in filled
    assert filled.startswith("before\n<!-- bench:summary -->\n|")
    assert filled.endswith("|\n<!-- /bench:summary -->\nafter\n")
    assert fill(filled, results) == filled
    with pytest.raises(CommandError, match="the document wants 'everything'"):
        fill(text.replace("summary", "everything"), results)


@pytest.fixture
def bench_results(tmp_path: Path) -> str:
    path = tmp_path / "results.json"
    save(bench_results_of(bench_row("switchgear", 2.0), bench_row("hf_grouped_mm", 7.0)), str(path))
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Mine\n\nmuch work\n", "expected a new file, or a document with pairs of lines"),
        ("# Mine\n<!--bench:cases-->\n<!--/bench:cases-->\n", "got '<!--bench:cases-->' without the other in"),
        ("# Mine\n<!-- bench:cases -->\nmuch work\n", "got '<!-- bench:cases -->' without the other in"),
        ("<!-- bench:cases -->\n<!-- bench:summary -->\n<!-- /bench:summary -->\n<!-- /bench:cases -->\n", "without"),
        ("<!-- bench:cases -->\n<!-- /bench:cases -->\n<!-- /bench:summary -->\n", "got '<!-- /bench:summary -->'"),
        ("<!-- bench:cases -->\n<!-- /bench:cases -->\ncaf\xe9\n", "expected text in UTF-8"),
    ],
)
def test_a_document_without_places_for_tables_is_left_as_it_is(
    text: str, message: str, bench_results: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_bytes(text.encode("latin-1"))
    table = tmp_path / "table.csv"
    assert main(["bench", "--from", bench_results, "--csv", str(table), "--markdown", str(page)]) == 2
    error = capsys.readouterr().err
    assert "--markdown: expected" in error
    assert message in error
    assert page.read_bytes() == text.encode("latin-1")
    assert not table.read_bytes()  # the document is read before the work


def test_a_document_keeps_its_text_its_ends_of_lines_and_its_permissions(bench_results: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_bytes(
        "é `<!-- bench:cases -->`\r\n  <!-- bench:cases -->\r\nold\r\n  <!-- /bench:cases --> \r\nend".encode()
    )
    page.chmod(0o600)
    assert main(["bench", "--from", bench_results, "--markdown", str(page)]) == 0
    text = page.read_bytes().decode()
    assert text.startswith("é `<!-- bench:cases -->`\r\n  <!-- bench:cases -->\r\n|")
    assert text.endswith("|\r\n  <!-- /bench:cases --> \r\nend")
    assert "old" not in text
    assert text.count("\n") == text.count("\r\n")
    assert page.stat().st_mode & 0o777 == 0o600


def test_a_new_document_can_be_filled_again(bench_results: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = ["bench", "--from", bench_results, "--markdown", str(page)]
    assert main(command) == 0
    text = page.read_text()
    assert re.findall("<!-- bench:(.*) -->", text) == ["machine", "cases", "targets"]
    page.write_text(text.replace("7.00", "1.00"))
    assert main(command) == 0
    assert page.read_text() == text


def test_a_full_disk_leaves_files_as_they_were(bench_results: str, tmp_path: Path) -> None:
    page, table = tmp_path / "page.md", tmp_path / "table.csv"
    page.write_text("<!-- bench:cases -->\n<!-- /bench:cases -->\n")
    table.write_text("before")
    results = load(bench_results, "--from")
    with full_disk(), pytest.raises(CommandError, match=r"--markdown: cannot write .*page.md: File too large"):
        write_markdown(results, str(page))
    with full_disk(), pytest.raises(CommandError, match=r"--csv: cannot write .*table.csv: File too large"):
        write_csv(results["results"], str(table))
    assert page.read_text() == "<!-- bench:cases -->\n<!-- /bench:cases -->\n"
    assert table.read_text() == "before"
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_file_that_cannot_be_replaced_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder takes no other file."""

    def denied(**_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(CommandError, match=r"--csv: cannot write .*table.csv: Permission denied"):
        check_file("csv", tmp_path / "table.csv")


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
    from switchgear.bench.competitors import COMPETITORS, Skip

    monkeypatch.setenv("SWITCHGEAR_COMPETITORS", str(tmp_path))
    case = make_case("small", SMALL, "bf16", 2, "forward", "balanced", make_weights(SMALL, torch.bfloat16))
    for name in ("ggml_bf16", "ggml_q4_0", "vllm", "sglang", "zentorch"):
        if importlib.util.find_spec(
            {"sglang": "vllm", "ggml_bf16": "llama_cpp", "ggml_q4_0": "llama_cpp"}.get(name, name)
        ):
            continue  # it is installed: then the benchmark verifies it
        with pytest.raises(Skip, match=r"not installed|does not import"):
            COMPETITORS[name].make(case)


def test_bench_lists_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    for name in (*SHAPES, "hf_grouped_mm", "zentorch"):
        assert name in text


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_bench_tells_right_from_wrong(dtype: str, mode: str) -> None:
    from switchgear.bench.competitors import COMPETITORS

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
    from switchgear.bench.competitors import COMPETITORS

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
    listed = json.loads((Path(__file__).parent.parent / "bench" / "shapes.json").read_text())
    assert {row["name"]: (row["H"], row["I"], row["E"], row["K"]) for row in listed} == {
        name: shape[:4] for name, shape in SHAPES.items()
    }


def test_flops() -> None:
    assert forward_flops(SMALL, 10) == 10 * 2 * (2 * 32 * 96 + 2 * 48 * 32)
    assert train_flops(SMALL, 10) == 3 * forward_flops(SMALL, 10)


def test_interleaved_calls_stop_far_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("switchgear.bench.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("switchgear.bench.timing.wait_for_quiet", lambda longest: None)

    def slow(_: int) -> None:
        now[0] += 2.0

    assert len(interleave({"a": slow}, 0.5)["a"].seconds) == 1  # a second turn would exceed three times the budget
    assert 25 <= len(interleave({"a": slow}, 61.0)["a"].seconds) <= 30  # calls of two seconds


def test_interleaved_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0.0], list[str]()
    monkeypatch.setattr("switchgear.bench.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("switchgear.bench.timing.wait_for_quiet", lambda longest: None)

    def call(name: str) -> None:
        called.append(name)
        now[0] += 0.001

    times = interleave({"a": lambda n: call(f"a{n}"), "b": lambda n: call(f"b{n}")}, 0.0)
    turns = [name for i, name in enumerate(c[0] for c in called) if i == 0 or called[i - 1][0] != name]
    assert turns == ["a", "b"] * FEWEST_TURNS
    assert [c for c in called if c[0] == "a"] == [f"a{n}" for n in range(sum(c[0] == "a" for c in called))]
    assert times["a"].turns == FEWEST_TURNS


def test_no_competitor_pays_for_the_memory_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even for long calls, the call that frees another competitor's memory is not timed."""
    now, held = [0.0], [""]
    monkeypatch.setattr("switchgear.bench.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("switchgear.bench.timing.wait_for_quiet", lambda longest: None)

    def training(name: str) -> Callable[[int], None]:
        def call(_: int) -> None:
            now[0] += 1.0 + {"": 0.0, "kept": 0.0, "freed": 0.5}[held[0]]
            held[0] = name

        return call

    calls = {name: training(name) for name in ("kept", "freed")}
    times = interleave(calls, 20.0, leaves_memory=True)
    assert set(times["kept"].seconds) == {1.0}
    assert set(times["freed"].seconds) == {1.5}


def test_turns_that_others_disturb_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, elsewhere, calls = [0.0], [0.0], [0]
    monkeypatch.setattr("switchgear.bench.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("switchgear.bench.timing.busy_seconds_elsewhere", lambda: elsewhere[0])
    monkeypatch.setattr("switchgear.bench.timing.wait_for_quiet", lambda longest: None)

    def call(_: int) -> None:
        calls[0] += 1
        disturbed = calls[0] == 2  # the first call is not timed; this is the first turn's
        now[0] += 3.0 if disturbed else 1.0
        elsewhere[0] += 2.0 if disturbed else 0.0

    assert interleave({"a": call}, 4.5)["a"] == ([1.0, 1.0], 2, 3, [2, 3])


def test_ceilings_are_those_of_the_turns_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from switchgear.bench import worker

    rates = iter((5e12, 1e12, 2e12, 9e12))

    def third_counts(calls: dict[str, Callable[[int], object]], *_: Any, **__: Any) -> dict[str, Timed]:
        for call in calls.values():
            for number in range(4):
                call(number)
        return {name: Timed([1.0], 1, 4, [2]) for name in calls}

    monkeypatch.setattr(worker, "multiply_rate", lambda *_: next(rates))
    monkeypatch.setattr(worker, "interleave", third_counts)
    task = worker.Task("tiny", "fp32", "forward", 1, "balanced", "default", "default", ("switchgear",), False, 1.0, 1)
    (row,) = worker.measure(task, lambda text: None).rows
    assert row["multiply_rate"] == 2e12
