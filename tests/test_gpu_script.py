# SPDX-License-Identifier: BSD-3-Clause
"""tests/gpu: as much of the script for GPU machines as runs without a GPU. Commands are recorded, not run."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple resolves its annotations there
    spec.loader.exec_module(module)
    return module


run = load("run")
conformance = load("conformance")
STAGES = ["machine", "install", "build", "conformance", "tests", "sanitizer", "bench"]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed, and there is no card."""
    monkeypatch.setattr(run, "answers", lambda *command: None)
    for name in ("nvcc", "compute_sanitizer"):
        monkeypatch.setattr(run, name, lambda: None)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is installed, on an H100."""
    replies = {"compute_cap": "9.0", "name": "NVIDIA H100 80GB HBM3", "import ": ""}
    monkeypatch.setattr(
        run, "answers",
        lambda *command: next((reply for word, reply in replies.items() if word in " ".join(command)), None),
    )  # fmt: skip
    monkeypatch.setattr(run, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(run, "compute_sanitizer", lambda: "/usr/local/cuda/bin/compute-sanitizer")


def test_dry_run_on_a_bare_machine(bare: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[1] for line in text.splitlines() if line.startswith("====")] == STAGES
    for words in (
        "torch",
        "nvidia-cuda-nvcc",
        "nvidia-cuda-sanitizer-api",
        "conformance.py",
        "CMAKE_CUDA_ARCHITECTURES",
    ):
        assert words in text


def test_dry_run_on_a_machine_that_has_everything(hopper: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "nvidia-cuda" not in text
    assert "CMAKE_CUDA_ARCHITECTURES=90a-real" in text
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert f"--tool {tool}" in text
    assert "gpu-nvidia-h100-80gb-hbm3.json" in text


def test_the_stages_fit_into_ten_minutes_without_downloads(tmp_path: Path) -> None:
    usual = {"machine": 2, "build": 60, "conformance": 40, "tests": 120, "sanitizer": 90, "bench": 215}
    assert sum(usual.values()) < 600
    for stage in run.stages(tmp_path):
        assert stage.limit >= usual.get(stage.name, 0)


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [("8.0", "80-real"), ("8.9", "89-real"), ("9.0", "90a-real"), ("10.0", "100a-real"), ("12.0", "120-real")],
)
def test_the_build_is_for_the_card(capability: str, architectures: str) -> None:
    assert run.architectures(capability) == architectures


def commands_that(status: dict[str, int], seen: list[str]) -> Any:
    def fake(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        text = " ".join(command)
        seen.append(text)
        return subprocess.CompletedProcess(command, next((code for word, code in status.items() if word in text), 0))

    return fake


@pytest.mark.parametrize(("options", "ran"), [([], STAGES[:4]), (["--keep-going"], STAGES)])
def test_the_first_failure_ends_the_run(
    hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: list[str], ran: list[str],
) -> None:  # fmt: skip
    seen: list[str] = []
    monkeypatch.setattr(run.subprocess, "run", commands_that({"conformance.py": 1}, seen))
    assert run.main(["--out", str(tmp_path), *options]) == 1
    summary = json.loads((tmp_path / "gpu-run.json").read_text())
    assert [row["stage"] for row in summary["stages"]] == ran
    assert summary["stages"][3]["verdict"] == "FAILED: exit status 1"
    text = capsys.readouterr().out
    assert ("not run: tests, sanitizer, bench" in text) == (not options)


def test_everything_passes(hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []
    monkeypatch.setattr(run.subprocess, "run", commands_that({"gpu and not slow": 5}, seen))  # 5: no test was selected
    assert run.main(["--out", str(tmp_path)]) == 0
    assert any("bench --device cuda" in command for command in seen)


def test_a_machine_without_compute_sanitizer(bare: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run.subprocess, "run", commands_that({}, []))
    assert run.main(["--out", str(tmp_path), "--only", "sanitizer"]) == 0
    assert "nothing to do here" in (tmp_path / "gpu-run.json").read_text()


def test_a_stage_that_hangs_and_a_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = run.Stage("slow", "", 1, lambda: [[sys.executable, "-c", "import time; time.sleep(60)"]])
    assert run.run_stage(slow) == "FAILED: not done within 1 s"
    missing = run.Stage("missing", "", 5, lambda: [["no-such-program"]])
    assert run.run_stage(missing).startswith("FAILED: ")


def test_stages_are_named(capsys: pytest.CaptureFixture[str], bare: None) -> None:
    assert run.main(["--dry-run", "--only", "bench,tests"]) == 0
    assert capsys.readouterr().out.count("====") == 2
    assert run.main(["--dry-run", "--skip", "bench"]) == 0
    assert capsys.readouterr().out.count("====") == len(STAGES) - 1
    with pytest.raises(SystemExit, match="--only: expected some of machine, install"):
        run.main(["--only", "benches"])


def test_files_that_the_script_names_exist() -> None:
    for name in (*run.CORE_TESTS, "tests/gpu/conformance.py", "tests/gpu/conformance.cu", "tests/gpu/nvcc_links.py"):
        assert (run.ROOT / name).exists()


def test_few_calls_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    few_calls = load("few_calls")
    assert few_calls.main(["--device", "cpu"]) == 0
    assert "all agree with the reference" in capsys.readouterr().out


# ---- conformance -----------------------------------------------------------------------------------------------------


def test_differences_between_device_and_model() -> None:
    model = conformance.parse("a\t1 2 3\nb\t4\nc\t5 6\nhopper\t7\n")
    assert model == {"a": ["1", "2", "3"], "b": ["4"], "c": ["5", "6"], "hopper": ["7"]}
    assert conformance.differences(model, {"a": ["1", "2", "3"], "b": ["4"]}) == []
    wrong = conformance.differences(model, {"a": ["1", "9", "8"], "c": ["5"], "d": ["1"]})
    assert wrong == [
        "a: 2 of 3 words differ, first word 1: 0x9, the model has 0x2",
        "c: 1 words, the model writes 2",
        "d: the model has no such case",
    ]


def test_conformance_has_a_case_for_every_wrapper() -> None:
    """Wrappers are the PTX functions of ptx.cuh and hopper.cuh that contain asm."""
    folder = FOLDER.parents[1] / "csrc" / "cuda"
    source = (FOLDER / "conformance.cu").read_text()
    names = set()
    for file in ("ptx.cuh", "hopper.cuh"):
        text = (folder / file).read_text()
        names |= set(re.findall(r"^PTX [\w ]*?\**(\w+)\(", text, re.MULTILINE))
        names |= set(re.findall(r"^PTX_(?:LOAD|STORE|ADD)\((\w+),", text, re.MULTILINE))
    only_compiler = {"opaque", "move"}  # only a hint to the compiler
    by_tests_of_the_kernels = {"setmaxnreg_dec", "setmaxnreg_inc", "fence_proxy_async_global"}
    assert len(names) > 50
    missing = {name for name in names if f"ptx::{name}" not in source and not re.search(rf"\b\w+\({name}\b", source)}
    assert missing <= only_compiler | by_tests_of_the_kernels
