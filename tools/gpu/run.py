#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Everything that needs a GPU: `make gpu`, or python tools/gpu/run.py. Three stages of at most nine minutes on an H100:

    1  build; conformance; smoke; graphs; first benchmarks      2  tests; profiles      3  other benchmarks; sanitizers

Nothing that a case does ends the run: it may fail, hang, crash or be missing (watch.py). Written for a bare machine:
needs python3 (3.10 or newer), GCC 11 or newer, a checkout and a driver. What is missing is installed first, outside
the clock; --prepare does what needs no card beforehand. Uses only Python's standard library.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import conformance, machine, sweep, watch
from gpu.machine import ROOT, python
from gpu.report import Results, summarize, write_report
from gpu.watch import Job, Row

STAGE_SECONDS = 540
BUILD = "build/gpu"  # relative to ROOT, like all paths in commands
OPS = ("route", "policy_ops", "plan", "permute", "grouped_gemm", "glu", "moe", "adapters")
SHARED_TESTS = (*(f"tests/test_{op}.py" for op in OPS), "tests/test_cuda.py", "tests/contracts/test_determinism.py",
                "tests/contracts/test_routing_total.py")  # fmt: skip
PYTEST = ("-m", "pytest", "-p", "gpu.one_by_one", "-q")
KERNELS = "SWITCHGEAR_CUDA_KERNELS"


class Step(NamedTuple):
    name: str
    stage: int
    limit: float  # seconds for all of its jobs
    about: str
    jobs: Callable[[Path], list[Job]]  # of the folder for results
    requires: str = ""  # a job without which this step is pointless
    harmless: bool = False  # its failures are findings: they do not make the run fail


# ---- stage 1: does it work, and how fast are the two shapes with a target --------------------------------------------


def look(out: Path) -> list[Job]:
    return [
        Job("nvidia-smi", ["nvidia-smi"], 10),
        Job("nvidia-smi-clocks", ["nvidia-smi", "--query", "--display=CLOCK,POWER"], 10),
        Job("python", python("--version"), 5),
    ]


def build(out: Path) -> list[Job]:
    flags = ["--no-build-isolation", "--no-deps", "-Cbuild-dir=build/gpu-module", "--editable", "."]
    architectures = f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={machine.architectures(machine.capability())}"
    # A compiler that was not tested may warn of more.
    module = machine.pip(architectures, "-Ccmake.define.SWITCHGEAR_WERROR=OFF", *flags)
    return [
        Job("module", module, 200),
        Job("info", python("-m", "switchgear", "info"), 15),
        Job("conformance", python("tools/gpu/conformance.py", "--build", BUILD), 120),
    ]


def run_conformance(out: Path) -> list[Job]:
    command = [f"{BUILD}/conformance", "--expected", f"{BUILD}/model.txt", "--group"]
    return [Job(group, [*command, group], 20, silence=5) for group in conformance.groups(machine.capability())]


def smoke(out: Path) -> list[Job]:
    command = python("tools/gpu/smoke.py")
    jobs = [Job(f"auto-{shape}", [*command, "--shapes", str(shape)], 25, silence=10) for shape in range(4)]
    if machine.capability() == "9.0":
        jobs.append(Job("sm_80", command, 40, silence=10, environment={KERNELS: "sm_80"}))
    return jobs


def replay(out: Path) -> list[Job]:
    command = python(*PYTEST, "-k", "graph or stream", "tests/test_on_gpu.py")
    return [Job("replay", command, 45, silence=15, environment={"SWITCHGEAR_ROUTINGS": "1000"})]


def bench(out: Path, name: str, shape: str, limit: float, *options: str) -> Job:
    files = [word for kind, end in (("json", "json"), ("csv", "csv"), ("markdown", "md"))
             for word in (f"--{kind}", str(out / "bench" / f"{name}.{end}"))]  # fmt: skip
    budget = str(max(5, int(limit) - 20))  # of measuring; the rest is for the process and its ceilings
    command = python("-m", "switchgear", "bench", "cuda", "--shapes", shape, "--budget", budget, *options, *files)
    return Job(name, command, limit, environment={"PYTHONPATH": "bench/python"})


def first_benches(out: Path) -> list[Job]:
    few = ("--modes", "forward", "--tokens", "1,16,256", "--competitors", "switchgear,torch_grouped_mm")
    jobs = [bench(out, shape, shape, 50) for shape in ("sonic-7b-n256", "sonic-120b-n1024")]
    return [*jobs, bench(out, "decode", "qwen3-30b-a3b", 40, *few)]


# ---- stage 2: everything that is tested, and what the tunables should be ---------------------------------------------


def tests(out: Path) -> list[Job]:
    shared = python(*PYTEST, "-m", "not slow", "-k", "cuda", *SHARED_TESTS)
    return [
        Job("shared", shared, 200, silence=20),
        Job("gpu", python(*PYTEST, "-m", "gpu", "tests"), 100, silence=20),
    ]


def time_variants(out: Path) -> list[Job]:
    """The variants of the tunables, a program each; only Hopper's kernels have any."""
    if machine.capability() != "9.0":
        return []
    folder = f"{BUILD}/sweep"
    programs = [Job(variant.name, [f"{folder}/{variant.name}"], 15, silence=8) for variant in sweep.variants()]
    return [Job("variants", python("tools/gpu/sweep.py", "--build", folder), 130), *programs]


def profile(out: Path) -> list[Job]:
    program = machine.ncu()
    if program is None:
        return []
    command = [program, "--clock-control", "none", "--set", "full", "--force-overwrite", "--launch-count", "1"]
    layer = python("tools/gpu/smoke.py", "--profile")
    many = "24576"  # tokens
    return [
        Job(name, [*command, "--export", str(out / "ncu" / name), "--kernel-name", f"regex:{kernel}",
                   "--launch-skip", skip, *layer, *options], 40)
        for name, kernel, skip, *options in (
            ("gate_up", "gemm", "0", many), ("down", "gemm", "1", many), ("grad_h", "gemm", "2", many, "--train"),
            ("wgrad", "wgrad", "0", many, "--train"), ("decode", "gemm|decode", "0", "1"),
        )
    ]  # fmt: skip


# ---- stage 3: the rest -----------------------------------------------------------------------------------------------


def other_benches(out: Path) -> list[Job]:
    shapes = ("qwen3-30b-a3b", "sonic-30b-n256", "sonic-120b-n2048", "e512-k10", "mixtral-8x7b", "ops")
    return [bench(out, shape, shape, 45) for shape in shapes]


def filter_kernels(help_text: str) -> list[str]:
    """The option by which this version of compute-sanitizer looks only at our kernels: cuBLAS's have findings too."""
    for option in ("--kernel-name", "--kernel-regex"):
        if option in help_text:
            return [option, "kernel_substring=switchgear"]
    return []


def sanitize(out: Path) -> list[Job]:
    program = machine.compute_sanitizer()
    if program is None:
        return []
    options = [
        "--error-exitcode",
        "99",
        "--print-limit",
        "5",
        *filter_kernels(machine.answers(program, "--help") or ""),
    ]
    # Out-of-bounds accesses are invisible inside the large blocks of torch's caching allocator.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Job(tool, [program, "--tool", tool, *options, *more, *python("tools/gpu/smoke.py", "--shapes", shapes)], limit,
            silence=60, environment=uncached)
        for tool, limit, shapes, more in (
            ("memcheck", 90, "0,1,2,3", ["--leak-check", "no"]), ("racecheck", 90, "1,2", []),
            ("synccheck", 40, "1,2", []), ("initcheck", 40, "1,3", []),
        )
    ]  # fmt: skip


# ---- the table, in the order of what a lost card would cost ----------------------------------------------------------

MODULE = "build/module"
STEPS = (
    Step("machine", 1, 20, "the card, its driver and clocks, Python", look),
    Step("build", 1, 215, "the CUDA module and the conformance program, for this card", build),
    Step("conformance", 1, 40, "instructions and memory model: the device and the C++ model, bit for bit",
         run_conformance, "build/conformance"),
    Step("smoke", 1, 80, "every op, forward and backward, a process per shape", smoke, MODULE),
    Step("replay", 1, 45, "CUDA graphs, replayed with 1000 routings; other streams", replay, MODULE),
    Step("first-bench", 1, 140, "the two shapes with a target, and decoding", first_benches, MODULE),
    Step("tests", 2, 220, "the shared tests on the device, and those marked gpu", tests, MODULE),
    Step("sweep", 2, 200, "tiles, stages and bands of the Hopper GEMM over six shapes, without Python", time_variants,
         MODULE, harmless=True),
    Step("ncu", 2, 120, "Nsight Compute on five kernels, with the clocks as they are", profile, MODULE, harmless=True),
    Step("bench", 3, 280, "all other shapes, and single ops", other_benches, MODULE),
    Step("sanitizer", 3, 260, "memcheck, racecheck, synccheck and initcheck on our kernels", sanitize, MODULE,
         harmless=True),
)  # fmt: skip


# ---- a run -----------------------------------------------------------------------------------------------------------


def environment(kernels: str) -> dict[str, str]:
    """Of all commands: this Python's programs and nvcc on PATH, and the CUDA module required."""
    compiler = machine.nvcc()
    path = [str(Path(sys.executable).parent), *([str(Path(compiler).parent)] if compiler else []), os.environ["PATH"]]
    modules = [str(ROOT / "tools"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = {KERNELS: kernels} if kernels != "auto" else {}
    return {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(modules), "SWITCHGEAR_CUDA": "ON",
            "SWITCHGEAR_STRICT": "1", **chosen}  # fmt: skip


def choose_kernels(results: Results) -> str:
    """ "sm_80" once smoke has shown that a case hangs or crashes on the card's own kernels, but not on those."""
    rows = results.rows("smoke")
    old = [row["verdict"] in watch.GOOD for row in rows if row["job"] == "sm_80"]
    is_broken = any(row["verdict"] in ("hang", "fault") for row in rows if row["job"] != "sm_80")
    return "sm_80" if is_broken and old and all(old) else "auto"


def find_obstacle(results: Results, step: Step) -> str:
    """Why the step is pointless, or ''. A job that never ran, as after a restart with --only, is no reason."""
    name, _, job = step.requires.partition("/")
    bad = [row["verdict"] for row in results.rows(name) if row["job"] == job and row["verdict"] not in watch.GOOD]
    return f"{step.requires}: {bad[0]}" if bad else ""


def run_step(results: Results, step: Step, jobs: list[Job], end: float) -> None:
    def note(job: str, row: Row) -> None:
        results.write(step=step.name, job=job, **row)
        if row["verdict"] not in ("running", "passed", "left out"):
            print(f"  {row['verdict']}: {job} {row['case']}: {row['detail'][:160]}", flush=True)

    def skip(job: str, verdict: str, detail: str) -> None:
        note(job, {"case": job, "verdict": verdict, "seconds": 0.0, "detail": detail})

    obstacle = find_obstacle(results, step)
    if not jobs:
        skip(step.name, "skipped", "its program is not installed")
    for job in jobs:
        left = end - time.monotonic()
        if obstacle or left < 1.0:
            skip(job.name, "left out", obstacle or "no time was left")
            continue
        print(f"$ {shlex.join(job.command)}", flush=True)
        variables = {**environment(choose_kernels(results)), **job.environment}
        job = replace(job, limit=min(job.limit, left), environment=variables)
        log = results.path / "logs" / f"{step.name}.{job.name}.log"
        watch.Watch(job, log, ROOT, lambda row, name=job.name: note(name, row)).run()  # type: ignore[misc]


def run_steps(results: Results, steps: Sequence[Step], seconds: float) -> None:
    ends: dict[int, float] = {}
    for step in steps:
        print(f"\n==== {step.name} (at most {step.limit} s): {step.about}", flush=True)
        start = time.monotonic()
        end = min(ends.setdefault(step.stage, start + seconds), start + step.limit)
        results.write(begins=step.name, harmless=step.harmless)
        try:
            run_step(results, step, step.jobs(results.path), end)
        except Exception as error:  # a step that cannot even say what it would do
            detail = f"{type(error).__name__}: {error}"
            results.write(step=step.name, job=step.name, case=step.name, verdict="failed", seconds=0.0, detail=detail)
        results.write(ends=step.name, seconds=round(time.monotonic() - start, 1))
        write_report(results)


def install() -> None:
    for command in machine.missing():
        print(f"$ {shlex.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            print("that failed; what needs it will be missing", flush=True)


def prepare(wheels: Path | None, variants: bool) -> int:
    """What needs no card: what is missing here, the C++ model of conformance; also wheels, and variants' objects."""
    print("\n".join(map(shlex.join, machine.missing())) or "nothing is missing here")
    status = 0
    if wheels is not None:
        command = python("-m", "pip", "download", "--dest", str(wheels), *machine.list_packages())
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if variants:
        status = sweep.main(["--objects-only"]) or status
    return conformance.main(["--model-only"]) or status


def choose(names: list[str] | None, skipped: list[str], stages: list[int]) -> list[Step]:
    return [step for step in STEPS if step.name not in skipped
            and (step.name in names if names is not None else step.stage in stages)]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    def list_of(*known: str) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(known):
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; got {', '.join(unknown)}")
            return text.split(",")

        return parse

    names, stages = list_of(*(step.name for step in STEPS)), list_of("1", "2", "3")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=stages, default="1,2,3", metavar="LIST", help="these stages")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "build" / "gpu-results", help="for results")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their commands, and stop")
    parser.add_argument("--only", type=names, metavar="LIST", help="these steps, of whatever stage")
    parser.add_argument("--skip", type=names, default=[], metavar="LIST", help="all but these steps")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, metavar="N", help="for a stage")
    parser.add_argument("--prepare", action="store_true", help="do what needs no card, and stop")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="with --prepare: also download all packages")
    parser.add_argument("--sweep", action="store_true", help="with --prepare: also compile the variants of tunables")
    args = parser.parse_args(arguments)
    if args.prepare:
        return prepare(args.wheels, args.sweep)
    results = Results(args.out.resolve())
    steps = choose(args.only, args.skip, list(map(int, args.stage)))
    if args.dry_run:
        print("".join(f"$ {shlex.join(command)}\n" for command in machine.missing()))
        for step in steps:
            print(f"==== {step.name} (stage {step.stage}, at most {step.limit} s): {step.about}")
            print("".join(f"$ {shlex.join(job.command)}\n" for job in step.jobs(results.path)))
        return 0
    for place in ("bench", "ncu"):
        (results.path / place).mkdir(parents=True, exist_ok=True)
    install()
    if reason := machine.old_driver():
        print(reason)
        return 1
    run_steps(results, steps, args.seconds)
    print(f"\n{summarize(results)}\n{results.path / 'report.md'}")
    return 1 if results.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
