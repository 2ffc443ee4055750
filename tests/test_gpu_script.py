# SPDX-License-Identifier: BSD-3-Clause
"""tools/gpu: as much of the scripts for GPU machines as runs without a GPU. Stand-ins work, hang, or crash."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fake_machine
from errors import raises
from gpu import conformance, machine, report, run, smoke, watch
from gpu import sweep as sweeping
from gpu.machine import ROOT
from gpu.report import Results

FOLDER = ROOT / "tools" / "gpu"
FAKE = [sys.executable, str(ROOT / "tests" / "fake_device.py")]


@pytest.fixture
def hopper() -> Iterator[None]:
    with fake_machine.hopper():
        yield


@pytest.fixture
def bare() -> Iterator[None]:
    with fake_machine.bare():
        yield


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.2)


# ---- the table of steps ----------------------------------------------------------------------------------------------


def test_dry_run_on_a_bare_machine(bare: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("====") == len(run.STEPS)
    for words in ("torch", "nvidia-cuda-nvcc", "nvidia-cuda-sanitizer-api", "CMAKE_CUDA_ARCHITECTURES", "WERROR=OFF"):
        assert words in text


def test_dry_run_on_a_machine_that_has_everything(hopper: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "nvidia-cuda" not in text
    assert "CMAKE_CUDA_ARCHITECTURES=90a-real" in text
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert f"--tool {tool}" in text
    for words in ("--kernel-name kernel_substring=switchgear", "--clock-control none", "sonic-120b-n1024.json"):
        assert words in text
    for group in conformance.groups("9.0"):
        assert f"--group {group}" in text


def test_each_stage_fits_into_nine_minutes(hopper: None, tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        of_stage = [step for step in run.STEPS if step.stage == stage]
        assert 0 < sum(step.limit for step in of_stage) <= run.STAGE_SECONDS
        for step in of_stage:
            jobs = step.jobs(tmp_path)
            assert len({job.name for job in jobs}) == len(jobs) > 0
            assert all(0 < job.limit <= step.limit for job in jobs)
            for word in (word for job in jobs for word in job.command if word.startswith(("tests/", "tools/"))):
                assert (ROOT / word).exists(), word
    assert [step.stage for step in run.STEPS] == sorted(step.stage for step in run.STEPS)


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [("8.0", "80-real"), ("8.9", "89-real"), ("9.0", "90a-real"), ("10.0", "100a-real"), ("12.0", "120-real")],
)
def test_the_build_is_for_the_card(capability: str, architectures: str) -> None:
    assert machine.architectures(capability) == architectures


@pytest.mark.parametrize(
    ("driver", "compiler", "runs"), [("12.8", "13.0", False), ("13.1", "13.0", True), ("13.0", "12.9", True)]
)
def test_the_driver_runs_what_is_built(monkeypatch: pytest.MonkeyPatch, driver: str, compiler: str, runs: bool) -> None:
    said = {
        "nvidia-smi": f"Driver Version: 570.86   CUDA Version: {driver} ",
        "nvcc": f"release {compiler}, V{compiler}.1",
    }
    monkeypatch.setattr(machine, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(machine, "answers", lambda *command: said[command[0]])
    assert (machine.old_driver() is None) == runs


def test_only_our_kernels_are_sanitized() -> None:
    """Versions of compute-sanitizer name the option differently."""
    assert run.filter_kernels("  --kernel-name arg  Filter") == ["--kernel-name", "kernel_substring=switchgear"]
    assert run.filter_kernels("  --kernel-regex arg") == ["--kernel-regex", "kernel_substring=switchgear"]
    assert run.filter_kernels("") == []


def test_steps_are_named(capsys: pytest.CaptureFixture[str], bare: None) -> None:
    assert run.main(["--dry-run", "--only", "bench,tests"]) == 0
    assert capsys.readouterr().out.count("====") == 2
    assert run.main(["--dry-run", "--skip", "bench", "--stage", "3"]) == 0
    assert capsys.readouterr().out.split("==== ")[1].startswith("sanitizer")
    with raises(SystemExit):
        run.main(["--only", "benches"])
    with raises(SystemExit):
        run.main(["--stage", "4"])


# ---- programs that fail ----------------------------------------------------------------------------------------------


def guided(tmp_path: Path, *options: str, silence: float = 10.0) -> list[watch.Row]:
    job = watch.Job("fake", [*FAKE, *options], 120.0, silence)
    noted: list[watch.Row] = []
    rows = watch.Watch(job, tmp_path / "log", ROOT, noted.append).run()
    started = [row["case"] for row in noted if row["verdict"] == "running"]
    assert started == [row["case"] for row in rows if row["verdict"] != "left out" and row["case"] != "fake"]
    return rows


def watched(
    tmp_path: Path, command: list[str], limit: float = 120.0, silence: float = 0.0, cwd: Path = ROOT / "tools"
) -> list[watch.Row]:
    return watch.Watch(watch.Job("job", command, limit, silence), tmp_path / "log", cwd, lambda row: None).run()


def verdicts(rows: list[watch.Row]) -> list[str]:
    return [row["verdict"] for row in rows]


@pytest.mark.parametrize("kind", ["hang", "talk", "slow"])
def test_a_case_that_does_not_end_is_named_and_the_next_one_runs(tmp_path: Path, kind: str) -> None:
    rows = guided(tmp_path, "--fault", kind, silence=2)
    assert verdicts(rows) == ["passed", "hang", "passed"]
    assert rows[1]["case"] == "case 1"
    assert rows[1]["detail"].startswith("silent for 2 s")


@pytest.mark.parametrize(
    ("kind", "verdict", "words"),
    [
        ("wrong", "failed", "relative error 2.0e+00"),
        ("raise", "failed", "RuntimeError: CUDA error: an illegal memory access"),
        ("fault", "fault", "killed by SIGSEGV"),
        ("abrupt", "failed", "exit status 3"),
        ("finding", "finding", "other bits"),
        ("orphan", "passed", ""),
    ],
)
def test_a_case_that_fails_is_named_and_the_next_one_runs(tmp_path: Path, kind: str, verdict: str, words: str) -> None:
    rows = guided(tmp_path, "--fault", kind)
    assert verdicts(rows) == ["passed", verdict, "passed"]
    assert words in rows[1]["detail"]


def test_a_case_that_fails_in_the_last_place(tmp_path: Path) -> None:
    assert verdicts(guided(tmp_path, "--fault", "hang", "--at", "2", silence=2)) == ["passed", "passed", "hang"]
    assert verdicts(guided(tmp_path, "--fault", "fault", "--at", "0")) == ["fault", "passed", "passed"]


def test_a_program_that_fails_before_its_first_case(tmp_path: Path) -> None:
    rows = guided(tmp_path, "--fault", "import")
    assert verdicts(rows) == ["failed"]
    assert "libcudart.so.13" in rows[0]["detail"]


def test_a_program_that_fails_after_its_last_case(tmp_path: Path) -> None:
    """compute-sanitizer's exit status says that it has found something."""
    code = "import sys; from gpu.lines import say; say(cases=['a']); say(starts=0); say(ends=0); sys.exit(99)"
    rows = watched(tmp_path, [sys.executable, "-c", code], silence=60)
    assert [(row["case"], row["verdict"]) for row in rows] == [("job", "failed"), ("a", "passed")]
    assert rows[0]["detail"].startswith("exit status 99")


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    assert verdicts(watched(tmp_path, ["no-such-program"], silence=1)) == ["missing"]
    assert verdicts(watched(tmp_path, ["no-such-program"])) == ["missing"]


def test_time_that_is_used_up(tmp_path: Path) -> None:
    def note(row: watch.Row) -> None:
        if row["verdict"] == "passed":  # however long the program took to start
            fake.end = time.monotonic() + 0.2

    job = watch.Job("fake", [*FAKE, "--fault", "slow"], limit=120, silence=60)
    fake = watch.Watch(job, tmp_path / "log", ROOT, note)
    rows = fake.run()
    assert verdicts(rows) == ["passed", "time", "left out"]
    assert rows[-1]["detail"] == "no time was left"


def test_a_device_that_always_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_RESTARTS", 1)
    code = (
        "import sys, time; from gpu.lines import say; n = int(sys.argv[-1]) if '--from' in sys.argv else 0;"
        "say(cases=list('abcd')); say(starts=n); time.sleep(60)"
    )
    rows = watched(tmp_path, [sys.executable, "-c", code], silence=0.3)
    assert verdicts(rows) == ["hang", "hang", "left out", "left out"]


@pytest.mark.parametrize(
    ("kind", "verdict"), [("hang", "time"), ("fault", "fault"), ("raise", "failed"), (None, "passed")]
)
def test_a_plain_program(tmp_path: Path, kind: str | None, verdict: str) -> None:
    options = ["--plain", *(["--fault", kind] if kind else [])]
    (row,) = watched(tmp_path, [*FAKE, *options], limit=2.0 if kind == "hang" else 120.0)
    assert row["verdict"] == verdict
    if kind == "raise":
        assert "illegal memory access" in row["detail"]  # the last line of its log


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


@pytest.mark.parametrize("waits", [True, False])
def test_children_of_a_program_end_with_it(tmp_path: Path, waits: bool) -> None:
    """A child that ignores SIGTERM, of a program that hangs or has ended."""
    code = "(trap '' TERM; exec sleep 600) & echo $! > pid;" + ("wait" if waits else "")
    (row,) = watched(tmp_path, ["sh", "-c", code], limit=2.0 if waits else 120.0, cwd=tmp_path)
    assert row["verdict"] == ("time" if waits else "passed")
    process = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 30
    while is_running(process) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(process)


def test_output_that_is_no_text_is_no_obstacle(tmp_path: Path) -> None:
    code = (
        "import os; from gpu.lines import say; os.write(1, b'\\xff\\xfe' * 70000); os.write(1, b'\\n@gpu {no\\n');"
        "os.write(1, b'@gpu [1]\\n'); say(cases=['a']); say(starts=0); say(ends=0, verdict='passed', value=3)"
    )
    rows = watched(tmp_path, [sys.executable, "-c", code], silence=60)
    assert [(row["case"], row["verdict"], row["value"]) for row in rows] == [("a", "passed", 3)]


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rehearse(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, str], tuple[int, Results]]:
    """Runs steps in which all programs are stand-ins; the first of `step` fails."""

    def rehearse(step: str, kind: str, only: str) -> tuple[int, Results]:
        seen: set[str] = set()

        def stand_in(of: run.Step, out: Path) -> list[watch.Job]:
            jobs = []
            for job in of.jobs(out):
                command, silence = [*FAKE, *([] if job.silence else ["--plain"])], 60.0 if job.silence else 0.0
                if of.name == step and not seen:
                    seen.add(step)
                    command, silence = [*command, "--fault", kind], min(silence, 2.0)
                jobs.append(replace(job, command=command, limit=120.0, silence=silence))
            return jobs

        steps = tuple(of._replace(jobs=partial(stand_in, of)) for of in run.STEPS)
        monkeypatch.setattr(run, "STEPS", steps)
        monkeypatch.setattr(run, "install", lambda: None)
        monkeypatch.setattr(machine, "old_driver", lambda: None)
        return run.main(["--out", str(tmp_path), "--only", only]), Results(tmp_path)

    return rehearse


Rehearse = Callable[[str, str, str], tuple[int, Results]]


def test_a_run_in_which_all_is_well(tmp_path: Path, rehearse: Rehearse) -> None:
    status, results = rehearse("", "", "machine,build,conformance,ncu")
    assert status == 0
    steps = results.steps()
    assert list(steps) == ["machine", "build", "conformance", "ncu"]
    assert {row["verdict"] for step in steps for row in results.rows(step)} == {"passed"}
    text = (tmp_path / "report.md").read_text()
    assert "| conformance |" in text
    assert "## Failures" not in text


def test_a_build_that_fails_leaves_out_what_needs_it(tmp_path: Path, rehearse: Rehearse) -> None:
    status, results = rehearse("build", "raise", "build,conformance,smoke")
    assert status == 1
    assert {row["verdict"] for row in results.rows("conformance")} == {"passed"}  # the program of its own was built
    assert {(row["verdict"], row["detail"]) for row in results.rows("smoke")} == {("left out", "build/module: failed")}
    assert "illegal memory access" in (tmp_path / "report.md").read_text()


def test_findings_of_sanitizers_are_not_fatal(tmp_path: Path, rehearse: Rehearse) -> None:
    status, results = rehearse("sanitizer", "wrong", "sanitizer,machine")
    assert status == 0
    assert "failed" in {row["verdict"] for row in results.rows("sanitizer")}
    assert "## Failures" in (tmp_path / "report.md").read_text()


def test_after_a_hang_of_wgmma_the_rest_runs_on_the_kernels_of_sm80(rehearse: Rehearse) -> None:
    status, results = rehearse("smoke", "hang", "smoke")
    assert status == 1
    assert run.choose_kernels(results) == "sm_80"
    assert run.environment("sm_80")["SWITCHGEAR_CUDA_KERNELS"] == "sm_80"
    assert "SWITCHGEAR_CUDA_KERNELS" not in run.environment("auto")
    for row in results.rows("smoke"):
        if row["job"] == "sm_80":
            results.write(**row | {"verdict": "hang"})
    assert run.choose_kernels(results) == "auto"  # the older kernels are no better


def test_a_run_that_is_killed_leaves_a_readable_report(tmp_path: Path) -> None:
    """make gpu STAGE=report names the case that ran. An earlier run of a step does not count."""
    results = Results(tmp_path)
    results.write(begins="smoke", harmless=False)
    results.write(step="smoke", job="auto-0", case="of an earlier run", verdict="failed", detail="")
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('\n{"step": "smo')
    results.write(begins="smoke", harmless=False)
    results.write(step="smoke", job="auto-0", case="layer", verdict="passed", detail="")
    results.write(step="smoke", job="auto-0", case="policies", verdict="running", detail="")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "decode.md").write_text("| s | 1 | forward |\n")
    command = [sys.executable, str(FOLDER / "report.py"), str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = (tmp_path / "report.md").read_text()
    assert printed == f"{text}\n"
    assert "| smoke | cut off | 1 passed, 1 running |" in text
    assert "| smoke | auto-0 | policies | running |  |" in text
    assert "| s | 1 | forward |" in text


# ---- the programs ----------------------------------------------------------------------------------------------------


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("@gpu ")) for line in text.splitlines() if line.startswith("@gpu ")]


def test_smoke_on_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--device", "cpu", "--shapes", "0,3"]) == 0
    said = lines(capfd.readouterr().out)
    assert len(said[0]["cases"]) == 2 * 3 * 3
    assert [line["verdict"] for line in said if "ends" in line] == ["passed"] * 18
    assert smoke.main(["--device", "cpu", "--shapes", "3", "--from", "7"]) == 0
    assert [line["starts"] for line in lines(capfd.readouterr().out) if "starts" in line] == [7, 8]


def test_tests_print_lines(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('here')\n"
        "def test_a_token_does_not_depend_on_its_batch(): assert 3 == 4\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.one_by_one", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}

    def said(*options: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        return lines(done.stdout)

    first = said()
    assert len(first[0]["cases"]) == 4
    ends = [line for line in first if "ends" in line]
    assert [line["verdict"] for line in ends] == ["passed", "failed", "skipped", "finding"]
    assert "assert 1 == 2" in ends[1]["detail"]
    assert [line["starts"] for line in said("--from", "2") if "starts" in line] == [2, 3]


# ---- tunables --------------------------------------------------------------------------------------------------------


def test_variants_follow_the_sources() -> None:
    """Stages of every row of the table, limits of tiles of few rows, and bands."""
    found = sweeping.variants()
    assert found[0] == sweeping.Variant("as-is")
    assert len({variant.name for variant in found}) == len(found) >= 10
    for word in ("stages", "most8", "cooperative", "pairs", "band"):
        assert any(word in variant.name for variant in found), word
    for variant in found[1:]:
        source = (sweeping.SOURCES / variant.file).read_text()
        assert variant.text() != source
        assert len(variant.text()) - len(source) == len(variant.after) - len(variant.before)
    with raises(ValueError, "gone"):
        sweeping.Variant("gone", sweeping.TILES, "no such text", "").text()


def test_a_variant_is_compiled_from_its_copy_and_linked_before_the_library(tmp_path: Path) -> None:
    variant = sweeping.variants()[1]
    command = sweeping.compile_command(variant, tmp_path)
    assert command.index(f"-I{tmp_path / 'csrc' / 'cuda'}") < command.index(f"-I{sweeping.SOURCES}")
    assert command[command.index("-c") + 1] == str(tmp_path / "csrc" / "cuda" / "gemm_sm90.cu")
    link = sweeping.link_command(tmp_path, tmp_path / "sweep.o", tmp_path, tmp_path / "program")
    library = next(i for i, word in enumerate(link) if word.endswith("libswitchgear_cuda.a"))
    assert link.index(str(tmp_path / "gemm_sm90.o")) < library


def test_the_report_names_the_best_variants(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.write(begins="sweep", harmless=True)
    for job, times in {"as-is": (1.0, 2.0), "band-4": (0.9, 1.8), "band-16": (0.5, 3.0), "stages": (0.99, 2.0)}.items():
        for case, ms in zip(("a forward", "a backward"), times, strict=True):
            row = {"case": case, "verdict": "passed", "seconds": 0.1, "detail": "", "ms": ms, "tflops": 100.0}
            results.write(step="sweep", job=job, **row, sum="1" if job != "stages" else "2")
    new = "`kBand = 4;` for `kBand = 8;`: 1.111x over 2 cases"
    assert report.find_gains(results) == [new]  # band-16 is slower in one case
    text = report.describe(results)
    assert "| a forward | 1.000 | 100 | band-16: 0.500 (2.00x) | stages |" in text
    assert f"- new row: {new}" in text


# ---- conformance -----------------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_source() -> None:
    source = (FOLDER / "conformance.cu").read_text()
    assert re.findall(r'end_group\(cases, "(\w+)"\)', source) == list(conformance.groups("9.0"))
    assert conformance.groups("8.0") == conformance.EVERYWHERE


def test_the_device_program_is_for_the_card(tmp_path: Path) -> None:
    hopper = [str(part) for part in conformance.device_command(tmp_path, "9.0")]
    assert {"arch=compute_90a,code=sm_90a", "-DHOPPER"} <= set(hopper)
    ampere = [str(part) for part in conformance.device_command(tmp_path, "8.6")]
    assert "arch=compute_86,code=sm_86" in ampere
    assert "-DHOPPER" not in ampere


def test_conformance_has_a_case_for_every_wrapper() -> None:
    """Wrappers are the PTX functions of ptx.cuh and hopper.cuh that contain asm."""
    folder = ROOT / "csrc" / "cuda"
    source = "".join(path.read_text() for path in sorted(FOLDER.glob("conformance*.cu*")))
    names = set()
    for file in ("ptx.cuh", "hopper.cuh"):
        text = (folder / file).read_text()
        names |= set(re.findall(r"^PTX [\w ]*?\**(\w+)\(", text, re.MULTILINE))
        names |= set(re.findall(r"^PTX_(?:LOAD|STORE|ADD)\((\w+),", text, re.MULTILINE))
    only_compiler = {"opaque", "move"}  # only a hint to the compiler
    by_tests_of_the_kernels = {"fence_proxy_async_global", "wait_for_kernel_before", "start_kernel_after"}
    assert len(names) > 50
    missing = {name for name in names if f"ptx::{name}" not in source and not re.search(rf"\b\w+\({name}\b", source)}
    assert missing <= only_compiler | by_tests_of_the_kernels
