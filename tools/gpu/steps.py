# SPDX-License-Identifier: BSD-3-Clause
"""What runs on a card, in which order, and for how long: one table. run.py runs it.

A stage is at most nine minutes on an H100: the limits of its steps add up to no more. `assumed` is what a step is
expected to take, with the assumption beside it. Steps of a stage come in the order of what a lost card would cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gpu import machine
from gpu.machine import python

STAGE_SECONDS = 540
BUILD = "build/gpu"  # relative to ROOT, like all paths in commands
SONIC = ("sonic-7b-n256", "sonic-120b-n1024")  # the shapes with a stated target
OTHER_SHAPES = ("qwen3-30b-a3b", "sonic-30b-n256", "sonic-120b-n2048", "e512-k10", "mixtral-8x7b", "ops")
OPS = ("route", "policy_ops", "plan", "permute", "grouped_gemm", "glu", "moe", "adapters")
CORE_TESTS = [f"tests/test_{op}.py" for op in OPS]
MORE_TESTS = ["tests/test_cuda.py", "tests/contracts/test_determinism.py", "tests/contracts/test_routing_total.py"]
KERNELS = "SWITCHGEAR_CUDA_KERNELS"
SILENCE_OF_SMOKE, SILENCE_OF_CONFORMANCE, SILENCE_OF_TESTS = 10, 5, 20  # seconds after which a case counts as hung


@dataclass(frozen=True)
class Job:
    """A program. With `silence` it prints lines.py's lines, and a case silent for so many seconds has hung."""

    name: str
    command: list[str]
    limit: float
    silence: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    name: str
    stage: int
    about: str
    limit: float  # seconds for all of its jobs
    assumed: int  # seconds on an H100 with 16 cores
    why: str  # the assumption
    jobs: Callable[[], list[Job]]
    requires: str = ""  # a job without which this step is pointless
    harmless: bool = False  # its failures are findings: they do not make the run fail


def python_job(name: str, limit: float, *arguments: str, silence: float = 0.0, **environment: str) -> Job:
    return Job(name, python(*arguments), limit, silence, environment)


# ---- stage 1: does it work, and how fast are the two shapes with a target --------------------------------------------


def look() -> list[Job]:
    return [
        Job("nvidia-smi", ["nvidia-smi"], 10),
        Job("nvidia-smi-clocks", ["nvidia-smi", "--query", "--display=CLOCK,POWER"], 10),
        python_job("python", 5, "--version"),
    ]


def build() -> list[Job]:
    define = f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={machine.architectures(machine.capability())}"
    # A compiler that was not tested may warn of more.
    flags = ["--no-build-isolation", "--no-deps", "-Cbuild-dir=build/gpu-module", define]
    module = [*machine.pip(*flags, "-Ccmake.define.SWITCHGEAR_WERROR=OFF", "--editable", ".")]
    return [
        Job("module", module, 200),
        python_job("info", 15, "-m", "switchgear", "info"),
        python_job("conformance", 120, "tools/gpu/conformance.py", "--build", BUILD),
    ]


def conformance() -> list[Job]:
    from gpu.conformance import groups

    return [
        Job(group, [f"{BUILD}/conformance", "--expected", f"{BUILD}/model.txt", "--group", group], 20,
            SILENCE_OF_CONFORMANCE)
        for group in groups(machine.capability())
    ]  # fmt: skip


def smoke() -> list[Job]:
    hopper = machine.capability() == "9.0"
    jobs = [
        python_job(f"auto-{shape}", 25, "tools/gpu/smoke.py", "--shapes", str(shape), silence=SILENCE_OF_SMOKE)
        for shape in range(4)
    ]
    if hopper:
        old = {KERNELS: "sm_80"}
        jobs.append(python_job("sm_80", 40, "tools/gpu/smoke.py", silence=SILENCE_OF_SMOKE, **old))
    return jobs


def replay() -> list[Job]:
    return [python_job("replay", 45, "tools/gpu/replay.py", silence=15)]


def bench_job(out: Path, name: str, shape: str, limit: float, *options: str) -> Job:
    files = [part for kind, end in (("json", "json"), ("csv", "csv"), ("markdown", "md"))
             for part in (f"--{kind}", str(out / "bench" / f"{name}.{end}"))]  # fmt: skip
    budget = str(max(5, int(limit) - 20))  # of measuring; the rest is for the process and its ceilings
    command = ["-m", "switchgear", "bench", "cuda", "--shapes", shape, "--budget", budget, *options, *files]
    return python_job(name, limit, *command, PYTHONPATH="bench/python")


def first_bench(out: Path) -> list[Job]:
    jobs = [bench_job(out, shape, shape, 50) for shape in SONIC]
    few = ("--modes", "forward", "--tokens", "1,16,256", "--competitors", "switchgear,torch_grouped_mm")
    return [*jobs, bench_job(out, "decode", "qwen3-30b-a3b", 40, *few)]


# ---- stage 2: everything that is tested, and what the tunables should be ---------------------------------------------


def tests() -> list[Job]:
    plugin = ("-m", "pytest", "-p", "gpu.one_by_one", "-q", "-m", "not slow")
    return [
        python_job("shared", 200, *plugin, "-k", "cuda", *CORE_TESTS, *MORE_TESTS, silence=SILENCE_OF_TESTS),
        python_job("gpu", 100, "-m", "pytest", "-p", "gpu.one_by_one", "-q", "-m", "gpu", "tests",
                   silence=SILENCE_OF_TESTS),
    ]  # fmt: skip


def sweep() -> list[Job]:
    """The variants of the tunables, a program each; only Hopper's kernels have any."""
    if machine.capability() != "9.0":
        return []
    from gpu.sweep import variants

    programs = [Job(variant.name, [f"{BUILD}/sweep/{variant.name}"], 15, silence=8) for variant in variants()]
    return [python_job("variants", 130, "tools/gpu/sweep.py", "--build", f"{BUILD}/sweep"), *programs]


def ncu(out: Path) -> list[Job]:
    program = machine.ncu()
    if program is None:
        return []
    kernels = {  # name of the report: (kernel, earlier launches of it, arguments of one_layer.py)
        "gate_up": ("gemm", "0"), "down": ("gemm", "1"), "grad_h": ("gemm", "2", "--train"),
        "wgrad": ("wgrad", "0", "--train"), "decode": ("gemm|decode", "0", "--tokens", "1"),
    }  # fmt: skip
    jobs = []
    for name, (pattern, skip, *options) in kernels.items():
        report = str(out / "ncu" / name)
        command = [program, "--clock-control", "none", "--set", "full", "--force-overwrite", "--export", report,
                   "--kernel-name", f"regex:{pattern}", "--launch-skip", skip, "--launch-count", "1",
                   *python("tools/gpu/one_layer.py", *options)]  # fmt: skip
        jobs.append(Job(name, command, 40))
    return jobs


# ---- stage 3: the rest -----------------------------------------------------------------------------------------------


def rest_of_bench(out: Path) -> list[Job]:
    return [bench_job(out, shape, shape, 45) for shape in OTHER_SHAPES]


def filter_of(help_text: str) -> list[str]:
    """The option by which this version of compute-sanitizer looks only at our kernels: cuBLAS's have findings too."""
    for option in ("--kernel-name", "--kernel-regex"):
        if option in help_text:
            return [option, "kernel_substring=switchgear"]
    return []


def sanitizer() -> list[Job]:
    program = machine.compute_sanitizer()
    if program is None:
        return []
    options = filter_of(machine.answers(program, "--help") or "")
    # Out-of-bounds accesses are invisible inside the large blocks of torch's caching allocator.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Job(tool, [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "5", *options, *more,
                   *python("tools/gpu/smoke.py", "--shapes", shapes)], limit, silence=60, environment=uncached)
        for tool, limit, shapes, more in (
            ("memcheck", 90, "0,1,2,3", ["--leak-check", "no"]), ("racecheck", 90, "1,2", []),
            ("synccheck", 40, "1,2", []), ("initcheck", 40, "1,3", []),
        )
    ]  # fmt: skip


# ---- the table -------------------------------------------------------------------------------------------------------


def steps(out: Path) -> list[Step]:
    module = "build/module"
    return [
        Step("machine", 1, "the card, its driver and clocks, Python", 20, 3, "nvidia-smi answers in a second", look),
        Step("build", 1, "the CUDA module and the conformance program, for this card", 215, 150,
             "nvcc: 400 core seconds for one architecture, 60 of them in one file, on 16 cores; the model: 40", build),
        Step("conformance", 1, "instructions and memory model: the device and the C++ model, bit for bit", 40, 15,
             "8 processes of 1 to 2 s", conformance, "build/conformance"),
        Step("smoke", 1, "every op, forward and backward, a process per shape", 80, 55,
             "5 processes: 8 s to import torch and start the device, 3 s of calls", smoke, module),
        Step("replay", 1, "CUDA graphs, replayed with 1000 routings; other streams", 45, 25,
             "a process, and 4 layers captured", replay, module),
        Step("first-bench", 1, "the two shapes with a target, and decoding", 140, 110,
             "3 processes: 15 s each to start and for the limits, 10 s a case", lambda: first_bench(out), module),
        Step("tests", 2, "the shared tests on the device, and those marked gpu", 220, 190,
             "3500 small tests, 20 a second; 20 GPU tests", tests, module),
        Step("sweep", 2, "tiles, stages and bands of the Hopper GEMM over six shapes, without Python", 200, 170,
             "16 variants: a minute of nvcc on a core each, unless prepared; 5 s to run", sweep, module, harmless=True),
        Step("ncu", 2, "Nsight Compute on five kernels, with the clocks as they are", 120, 100,
             "5 processes of 10 s and 40 passes over a kernel", lambda: ncu(out), module, harmless=True),
        Step("bench", 3, "all other shapes, and single ops", 280, 230,
             "6 processes: 15 s each to start and for the limits, 10 s a case", lambda: rest_of_bench(out), module),
        Step("sanitizer", 3, "memcheck, racecheck, synccheck and initcheck on our kernels", 260, 230,
             "kernels 10 to 100 times slower on small shapes", sanitizer, module, harmless=True),
    ]  # fmt: skip


def time_table(out: Path) -> list[tuple[int, str, int, int, str]]:
    """(stage, step, assumed seconds, limit, assumption) of all steps."""
    return [(step.stage, step.name, step.assumed, step.limit, step.why) for step in steps(out)]
