# SPDX-License-Identifier: BSD-3-Clause
"""A run on a card without the card: `make gpu STAGE=rehearse`. All stages, with stand-ins that work, or fail.

    rehearse.py [--scale 0.01] [--out DIR] [--fault STEP:KIND …]      KIND: see fake_device.py, or missing

Where `make gpu STAGE=prepare` has built the C++ model, it runs the step conformance, in place of the device. Limits,
and the times that steps are assumed to take, are shortened by `scale`. Without --fault each kind of failure is
rehearsed once, in a run of its own of the stages that it concerns, and checked: it has a name, and all other results
are there. Prints the wall time of each stage, and the table of assumed times.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import run, stand_ins, steps
from gpu.fake_device import KINDS
from gpu.folder import Folder, Row
from gpu.machine import ROOT, python
from gpu.report import ORDER, table
from gpu.steps import BUILD, STAGE_SECONDS, Job, Step

CASES = 3  # of a program that prints lines
VERDICT = {  # of a program with lines
    "hang": "hang", "talk": "hang", "wrong": "failed", "raise": "failed", "fault": "fault", "abrupt": "failed",
    "orphan": "passed", "import": "failed", "slow": "hang", "finding": "finding", "missing": "missing",
}  # fmt: skip
PLAIN = {"hang": "time", "talk": "time", "slow": "time", "finding": "failed"}  # of a program without lines
LEAST = 1.0  # seconds: of a limit, however small the scale, since a process of Python takes a fifth to start
PATIENCE = 20.0  # seconds of silence of a program that does not fail: a busy machine may take some to start it


@dataclass(frozen=True)
class Fault:
    step: str
    kind: str


def emulated(job: Job) -> Job | None:
    """The step conformance on the C++ model, if it has been built."""
    model = ROOT / BUILD / "model" / "tests" / "gpu" / "simt_conformance"
    if not model.exists() or not (ROOT / BUILD / "model.txt").exists():
        return None
    return replace(job, command=[str(model), *job.command[1:]], limit=60.0, silence=20.0)


def stand_in(fault: Fault | None, scale: float, jobs: dict[str, int]) -> run.Change:
    """Replaces programs. The first job of the fault's step fails."""
    seen: set[str] = set()

    def change(step: Step, job: Job) -> Job:
        is_faulty = fault is not None and step.name == fault.step
        if step.name == "conformance" and not is_faulty and (real := emulated(job)) is not None:
            return real
        seconds = step.assumed * scale / jobs[step.name] / CASES
        options = ["--cases", str(CASES), "--seconds", f"{seconds:.4f}", *([] if job.silence else ["--plain"])]
        command = python("tests/gpu/fake_device.py", *options)
        silence = max(PATIENCE, job.silence * scale) if job.silence else 0.0
        if fault is not None and is_faulty and step.name not in seen:
            seen.add(step.name)
            command = ["no-such-program"] if fault.kind == "missing" else [*command, "--fault", fault.kind]
            silence = max(LEAST, job.silence * scale) if job.silence else 0.0
        return replace(job, command=command, limit=max(15 * LEAST, job.limit * scale), silence=silence)

    return change


def rehearse(out: Path, fault: Fault | None, scale: float, options: list[str]) -> tuple[int, dict[int, float]]:
    """Runs; the exit status, and the seconds of each stage."""
    walls: dict[int, float] = {}
    original = run.Run.stage

    def timed(self: run.Run, chosen: list[Step], seconds: float) -> None:
        start = time.monotonic()
        chosen = [replace(step, limit=max(30 * LEAST, step.limit)) for step in chosen]
        original(self, chosen, max(60 * LEAST, seconds))
        walls[chosen[0].stage] = time.monotonic() - start

    run.Run.stage = timed  # type: ignore[method-assign,assignment]
    try:
        with stand_ins.hopper():
            jobs = {step.name: max(1, len(step.jobs())) for step in steps.steps(out)}
            return run.main(["--out", str(out), *options], stand_in(fault, scale, jobs), scale), walls
    finally:
        run.Run.stage = original  # type: ignore[method-assign]


def stages_of(fault: Fault | None) -> str:
    """The stages that a fault can change: a failing build changes all, other steps their own."""
    if fault is None or fault.step == "build":
        return "1,2,3"
    return next(str(step.stage) for step in steps.steps(Path()) if step.name == fault.step)


def complaints(folder: Folder, fault: Fault | None, stages: str = "1,2,3") -> list[str]:
    """What is wrong with the results of a rehearsal."""
    found = []
    rows = {step: folder.rows(step) for step in ORDER}
    names = [step.name for step in steps.steps(folder.path) if str(step.stage) in stages.split(",")]
    missing = [name for name in names if not rows.get(name)]
    found += [f"{name}: no results" for name in missing]

    def bad(row: Row) -> bool:
        return row["verdict"] not in ("passed", "skipped")

    for name in names:
        of_fault = fault is not None and fault.step == name
        strange = [row for row in rows[name] if bad(row)]
        if not of_fault:
            after_build = fault is not None and fault.step == "build"
            strange = [row for row in strange if not (after_build and row["verdict"] == "left out")]
            found += [f"{name}: {row['case']} {row['verdict']} {row['detail']}" for row in strange]
            continue
        assert fault is not None
        guided = any("number" in row for row in rows[name]) or any(row["case"].startswith("case") for row in rows[name])
        want = VERDICT[fault.kind] if guided else PLAIN.get(fault.kind, VERDICT[fault.kind])
        if want != "passed" and want not in {row["verdict"] for row in strange}:
            found.append(f"{name}: expected {want}, got {sorted({row['verdict'] for row in rows[name]})}")
        if guided and fault.kind not in ("missing", "import"):
            first = rows[name][0]["job"]
            after = [row for row in rows[name] if row["job"] == first and row["case"] == "case 2"]
            if not after or after[0]["verdict"] != "passed":
                found.append(f"{name}: the case after the one that failed was not run")
    return found


def time_table(out: Path) -> str:
    rows: list[tuple[object, ...]] = []
    for stage in (1, 2, 3):
        of_stage = [step for step in steps.steps(out) if step.stage == stage]
        rows += [(stage, step.name, step.assumed, f"{step.limit:.0f}", step.why) for step in of_stage]
        rows.append((stage, "**all**", sum(step.assumed for step in of_stage),
                     f"{sum(step.limit for step in of_stage):.0f}", f"at most {STAGE_SECONDS}"))  # fmt: skip
    return table(("stage", "step", "assumed s", "limit s", "assumption"), rows)


def default_faults() -> list[Fault | None]:
    """Each kind in a step with lines, and the plain kinds in the build and in a benchmark."""
    places = ("conformance", "smoke", "replay", "tests")
    guided = [Fault(places[i % len(places)], kind) for i, kind in enumerate((*KINDS, "missing"))]
    plain = (("build", "raise"), ("first-bench", "hang"), ("bench", "fault"), ("machine", "missing"))
    return [None, *guided, *(Fault(*one) for one in plain)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.01)
    parser.add_argument("--out", type=Path, help="keep the results here")
    parser.add_argument("--fault", action="append", metavar="STEP:KIND", help="only these")
    args = parser.parse_args(arguments)
    faults: list[Fault | None] = [Fault(*text.split(":")) for text in args.fault or []] or default_faults()
    wrong = 0
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, fault in enumerate(faults):
            name = f"{fault.step}:{fault.kind}" if fault else "no fault"
            out = (args.out or Path(scratch)) / f"{number:02}-{name.replace(':', '-').replace(' ', '-')}"
            with contextlib.redirect_stdout(io.StringIO()):
                status, walls = rehearse(out, fault, args.scale, ["--stage", stages_of(fault)])
            found = complaints(Folder(out), fault, stages_of(fault))
            wrong += bool(found)
            seconds = (f"{walls.get(stage, 0):.1f}" for stage in (1, 2, 3))
            rows.append((name, *seconds, status, "; ".join(found) or "as it should be"))
            print(f"{name}: {rows[-1][-1]}", flush=True)
        print("\n" + table(("fault", "stage 1, s", "stage 2, s", "stage 3, s", "exit status", "results"), rows))
        print(time_table(Path(scratch)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
