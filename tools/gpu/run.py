#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Everything that needs a GPU: `make gpu`, or python tools/gpu/run.py. Three stages of at most nine minutes on an H100:

    1  build; conformance; smoke; graphs; first benchmarks      2  tests; profiles      3  other benchmarks; sanitizers

    --stage 1,2,3   these stages (default: all)
    --out DIR       where results go, a file per case as it ends (default: build/gpu-results)
    --dry-run       print the steps and their commands, and stop
    --only, --skip  steps by name, separated by commas
    --seconds N     for a stage (default: 540); steps that do not fit are left out

Nothing that a case does ends the run: it may fail, hang, crash or be missing (watch.py). Written for a bare machine:
needs python3 (3.10 or newer), GCC 11 or newer, a checkout and a driver. What is missing is installed first, outside
the clock; `make gpu STAGE=prepare` does that beforehand. Uses only Python's standard library.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import machine, report, watch
from gpu.folder import Folder, Row, write
from gpu.machine import ROOT
from gpu.steps import KERNELS, STAGE_SECONDS, Job, Step, steps

Change = Callable[[Step, Job], Job]  # for tests


def environment(kernels: str) -> dict[str, str]:
    """Of all commands: this Python's programs and nvcc on PATH, and the CUDA module required."""
    compiler = machine.nvcc()
    path = [str(Path(sys.executable).parent), *([str(Path(compiler).parent)] if compiler else []), os.environ["PATH"]]
    modules = [str(ROOT / "tools"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = {KERNELS: kernels} if kernels != "auto" else {}
    return {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(modules), "SWITCHGEAR_CUDA": "ON",
            "SWITCHGEAR_STRICT": "1", **chosen}  # fmt: skip


def install() -> None:
    for command in machine.missing():
        print(f"$ {shlex.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            print("that failed; what needs it will be missing", flush=True)


def kernels_in_use(folder: Folder) -> str:
    """ "sm_80" once smoke has shown that a case hangs or crashes on the card's own kernels, but not on those."""
    rows = folder.rows("smoke")
    own = [row for row in rows if row["job"] != "sm_80"]
    old = [row for row in rows if row["job"] == "sm_80"]
    broken = any(row["verdict"] in ("hang", "fault") for row in own)
    return "sm_80" if broken and old and all(row["verdict"] in watch.GOOD for row in old) else "auto"


class Run:
    def __init__(self, folder: Folder, change: Change = lambda step, job: job) -> None:
        self.folder, self.change = folder, change

    def job(self, step: Step, job: Job, seconds: float) -> list[Row]:
        program = watch.Program(job.command, self.folder.log(step.name, job.name), ROOT,
                                {**environment(kernels_in_use(self.folder)), **job.environment})  # fmt: skip

        def note(row: Row) -> None:
            self.folder.note(step.name, job.name, row)
            if row["verdict"] not in ("running", "passed"):
                print(f"  {row['verdict']}: {job.name} {row['case']}: {row['detail'][:160]}", flush=True)

        if job.silence:
            return watch.Guide(job.name, program, note, limit=seconds, silence=job.silence).run()
        note({"case": job.name, "verdict": "running", "seconds": 0.0, "detail": ""})
        row = watch.run(job.name, program, seconds)
        note(row)
        return [row]

    def _missing(self, step: Step) -> str:
        """Why the step is pointless, or ''. A job that never ran, as after a restart with --only, is no reason."""
        name, _, job = step.requires.partition("/")
        rows = [row for row in self.folder.rows(name) if row["job"] == job] if name else []
        return next((f"{step.requires}: {row['verdict']}" for row in rows if row["verdict"] not in watch.GOOD), "")

    def step(self, step: Step, end: float) -> None:
        self.folder.begin(step.name)
        reason = self._missing(step)
        end = min(end, time.monotonic() + step.limit)
        try:
            jobs = [self.change(step, job) for job in step.jobs()]
        except Exception as error:  # a step that cannot even say what it would do
            row = {"case": step.name, "verdict": "failed", "seconds": 0.0, "detail": f"{type(error).__name__}: {error}"}
            self.folder.note(step.name, step.name, row)
            return
        if not jobs:
            row = {"case": step.name, "verdict": "skipped", "seconds": 0.0, "detail": "its program is not installed"}
            self.folder.note(step.name, step.name, row)
        for job in jobs:
            left = end - time.monotonic()
            if reason or left < 1.0:
                row = {"case": job.name, "verdict": "left out", "seconds": 0.0, "detail": reason or "no time was left"}
                self.folder.note(step.name, job.name, row)
                continue
            print(f"$ {shlex.join(job.command)}", flush=True)
            self.job(step, job, min(job.limit, left))

    def stage(self, chosen: Sequence[Step], seconds: float) -> None:
        end = time.monotonic() + seconds
        for step in chosen:
            print(f"\n==== {step.name} (at most {step.limit} s): {step.about}", flush=True)
            start = time.monotonic()
            self.step(step, end)
            write(self.folder.path / "steps" / f"{step.name}.json",
                  {"step": step.name, "stage": step.stage, "seconds": round(time.monotonic() - start, 1),
                   "harmless": step.harmless})  # fmt: skip
            report.write(self.folder)


def select(all_steps: list[Step], only: str | None, skip: str | None, stages: str) -> list[Step]:
    names = [step.name for step in all_steps]
    chosen = []
    for option, text in (("--only", only), ("--skip", skip)):
        unknown = [name for name in (text or "").split(",") if name and name not in names]
        if unknown:
            raise SystemExit(f"{option}: expected some of {', '.join(names)}; got {', '.join(unknown)}")
        chosen.append((text or "").split(","))
    if unknown := [stage for stage in stages.split(",") if stage not in ("1", "2", "3")]:
        raise SystemExit(f"--stage: expected some of 1,2,3; got {', '.join(unknown)}")
    return [step for step in all_steps if (only is None or step.name in chosen[0]) and step.name not in chosen[1]
            and (only is not None or str(step.stage) in stages.split(","))]  # fmt: skip


def main(arguments: list[str] | None = None, change: Change | None = None) -> int:
    """`change` replaces programs, for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="1,2,3", metavar="LIST", help="these stages")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "build" / "gpu-results", help="for results")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their commands, and stop")
    parser.add_argument("--only", metavar="LIST", help="these steps, of whatever stage")
    parser.add_argument("--skip", metavar="LIST", help="all but these steps")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, metavar="N", help="for a stage")
    args = parser.parse_args(arguments)
    folder = Folder(args.out.resolve())
    chosen = select(steps(folder.path), args.only, args.skip, args.stage)
    if args.dry_run:
        for command in machine.missing():
            print(f"$ {shlex.join(command)}")
        for step in chosen:
            print(f"\n==== {step.name} (stage {step.stage}, at most {step.limit} s): {step.about}")
            for job in step.jobs():
                print(f"$ {shlex.join(job.command)}")
        return 0
    for place in (folder.path, folder.path / "bench", folder.path / "ncu"):
        place.mkdir(parents=True, exist_ok=True)
    if change is None:
        install()
        if reason := machine.old_driver():
            print(reason)
            return 1
    run = Run(folder, change or (lambda step, job: job))
    try:
        for stage in sorted({step.stage for step in chosen}):
            run.stage([step for step in chosen if step.stage == stage], args.seconds)
    finally:
        report.write(folder)
    print(f"\n{report.summary(folder)}\n{folder.path / 'report.md'}")
    return 1 if report.failures(folder) else 0


if __name__ == "__main__":
    sys.exit(main())
