#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Everything that needs a GPU, in one run of at most ten minutes on an H100: `make gpu`, or python tests/gpu/run.py.

    --dry-run       print the stages and their commands, and stop
    --keep-going    go on after a stage that fails
    --only, --skip  stages by name, separated by commas
    --out DIR       where results go (default: bench/results)

Stages, in order: describe the machine; install what is missing; build the module for this card; compare each PTX
wrapper with its C++ model; run the shared tests on the device; run compute-sanitizer on a few calls; run the benchmark.
The first failing stage ends the run. Written for a bare machine: needs python3 (3.10 or newer), a C++20 compiler, a
checkout and a driver. Uses only Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BUILD = "build/gpu"  # of conformance; relative to ROOT, like all paths in commands
OPS = ("route", "policy_ops", "plan", "permute", "grouped_gemm", "glu", "moe")
CORE_TESTS = [f"tests/test_{op}.py" for op in OPS]
# compute-sanitizer makes kernels up to 100× slower, so it runs only a few calls of every op.
TOOLS = {"memcheck": ["--leak-check", "no"], "racecheck": [], "synccheck": [], "initcheck": []}
NVCC_WHEELS = ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]


class Stage(NamedTuple):
    name: str
    about: str
    limit: int  # seconds; less than ten minutes in total, downloads excluded
    commands: Callable[[], list[list[str]]]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def pip(*arguments: str) -> list[str]:
    constraints = ["--constraint", "constraints.txt"] if (ROOT / "constraints.txt").exists() else []
    return python("-m", "pip", "install", "--disable-pip-version-check", *constraints, *arguments)


def answers(*command: str) -> str | None:
    """The output of a command, or None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def torch_with_cuda() -> bool:
    return answers(sys.executable, "-c", "import torch; assert torch.version.cuda") is not None


def installed(module: str) -> bool:
    return answers(sys.executable, "-c", f"import {module}") is not None or (
        module in ("cmake", "ninja") and shutil.which(module) is not None
    )


def nvcc() -> str | None:
    """The compiler on PATH or in the usual place, or from the wheels once they are installed."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    found = shutil.which("nvcc") or (str(usual) if usual.exists() else None)
    return found or next((str(path) for path in wheel_files("bin/nvcc")), None)


def wheel_files(name: str) -> list[Path]:
    """All copies of a file in this environment's NVIDIA wheels."""
    folders = answers(sys.executable, "-c", "import nvidia; print(*nvidia.__path__, sep='\\n')") or ""
    return sorted(file for folder in folders.splitlines() for file in Path(folder).glob(f"cu*/{name}"))


def compute_sanitizer() -> str | None:
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    found = shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)
    return found or next((str(path) for path in wheel_files("compute-sanitizer/compute-sanitizer")), None)


def capability() -> str | None:
    """Compute capability of the first device, e.g. 9.0."""
    answer = answers("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0")
    return answer.splitlines()[0].strip() if answer else None


def architectures(of: str | None) -> str:
    """For CMAKE_CUDA_ARCHITECTURES: machine code for only this card, which makes the build 4× faster."""
    if of is None:
        return "80;90a-real;100-real;120-real"
    major, minor = of.split(".")
    return f"{major}{minor}a-real" if major in ("9", "10") else f"{major}{minor}-real"


# ---- stages ----------------------------------------------------------------------------------------------------------


def machine() -> list[list[str]]:
    return [["nvidia-smi"], python("--version")]


PACKAGES = {  # imported name: package to install if it is missing
    "pytest": "pytest", "hypothesis": "hypothesis", "numpy": "numpy>=2.1", "rich": "rich",
    "transformers": "transformers>=5.0", "scikit_build_core": "scikit-build-core>=0.11", "pybind11": "pybind11>=3.0",
    "cmake": "cmake>=3.26", "ninja": "ninja",
}  # fmt: skip


def install() -> list[list[str]]:
    commands = []
    if not torch_with_cuda():
        commands.append(pip("--force-reinstall", "torch"))  # on Linux, PyPI's torch has CUDA
    missing = [package for name, package in PACKAGES.items() if not installed(name)]
    if missing:
        commands.append(pip(*missing))
    if nvcc() is None:
        commands.append(pip(*NVCC_WHEELS))
        commands.append(python("tests/gpu/nvcc_links.py"))
    if compute_sanitizer() is None:
        commands.append(pip("nvidia-cuda-sanitizer-api"))
    return commands


def build() -> list[list[str]]:
    define = f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={architectures(capability())}"
    flags = ["--no-build-isolation", "--no-deps", "-Cbuild-dir=build/gpu-module", define]
    return [pip(*flags, "--editable", "."), python("-m", "switchgear", "info")]


def conformance() -> list[list[str]]:
    return [python("tests/gpu/conformance.py", "--build", BUILD)]


def tests() -> list[list[str]]:
    shared = python("-m", "pytest", "-q", "-k", "cuda", "-m", "not slow", *CORE_TESTS, "tests/test_cuda.py")
    return [shared, python("-m", "pytest", "-q", "-m", "gpu and not slow", "tests")]


def sanitizer() -> list[list[str]]:
    program = compute_sanitizer()
    if program is None:
        return []
    return [[program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "5", *options,
             *python("tests/gpu/few_calls.py")] for tool, options in TOOLS.items()]  # fmt: skip


def bench(out: Path) -> list[list[str]]:
    name = "gpu-" + (answers("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0") or "unknown")
    stem = out / name.splitlines()[0].strip().lower().replace(" ", "-")
    files = [part for kind, end in (("json", "json"), ("csv", "csv"), ("markdown", "md"))
             for part in (f"--{kind}", f"{stem}.{end}")]  # fmt: skip
    return [python("-m", "switchgear", "bench", "--device", "cuda", "--budget", "200", *files)]


def stages(out: Path) -> list[Stage]:
    return [
        Stage("machine", "the card, its driver, and Python", 20, machine),
        Stage("install", "torch with CUDA and what else is missing (downloads do not count)", 400, install),
        Stage("build", "the CUDA module, for this card", 150, build),
        Stage("conformance", "each PTX wrapper: the device's result and the C++ model's", 60, conformance),
        Stage("tests", "the shared tests on backend cuda, and those marked gpu", 150, tests),
        Stage("sanitizer", "memcheck, racecheck, synccheck and initcheck on a few calls of every op", 120, sanitizer),
        Stage("bench", "layers and ops against torch and all that is installed", 260, lambda: bench(out)),
    ]


# ---- running ---------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Environment of the commands: this Python's programs and nvcc on PATH, and the CUDA module required."""
    compiler = nvcc()
    path = [str(Path(sys.executable).parent), *([str(Path(compiler).parent)] if compiler else []), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(path), "SWITCHGEAR_CUDA": "ON", "SWITCHGEAR_STRICT": "1"}


def run_stage(stage: Stage) -> str:
    """Runs the commands of a stage; returns "passed", "nothing to do", or the failure."""
    end = time.monotonic() + stage.limit
    commands = stage.commands()
    for command in commands:
        print(f"$ {shlex.join(command)}", flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, check=False,
                                  timeout=max(1.0, end - time.monotonic()))  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"FAILED: not done within {stage.limit} s"
        except OSError as error:
            return f"FAILED: {error}"
        # pytest's exit status 5: no test was selected, for example if none is marked
        if done.returncode not in ((0, 5) if "pytest" in command else (0,)):
            return f"FAILED: exit status {done.returncode}"
    return "passed" if commands else "nothing to do here"


def select(all_stages: list[Stage], only: str | None, skip: str | None) -> list[Stage]:
    names = [stage.name for stage in all_stages]
    chosen = []
    for option, text in (("--only", only), ("--skip", skip)):
        unknown = [name for name in (text or "").split(",") if name and name not in names]
        if unknown:
            raise SystemExit(f"{option}: expected some of {', '.join(names)}; got {', '.join(unknown)}")
        chosen.append((text or "").split(","))
    return [stage for stage in all_stages if (only is None or stage.name in chosen[0]) and stage.name not in chosen[1]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the stages and their commands, and stop")
    parser.add_argument("--keep-going", action="store_true", help="go on after a stage that fails")
    parser.add_argument("--only", metavar="LIST", help="these stages")
    parser.add_argument("--skip", metavar="LIST", help="all but these stages")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "bench" / "results", help="for results")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    chosen = select(stages(out), args.only, args.skip)
    if args.dry_run:
        for stage in chosen:
            print(f"\n==== {stage.name} (at most {stage.limit} s): {stage.about}")
            for command in stage.commands():
                print(f"$ {shlex.join(command)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for stage in chosen:
        print(f"\n==== {stage.name}: {stage.about}", flush=True)
        start = time.monotonic()
        verdict = run_stage(stage)
        rows.append({"stage": stage.name, "seconds": round(time.monotonic() - start, 1), "verdict": verdict})
        if verdict.startswith("FAILED") and not args.keep_going:
            break
    summary = {"seconds": round(sum(float(str(row["seconds"])) for row in rows), 1), "stages": rows}
    (out / "gpu-run.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("\n==== summary")
    for row in rows:
        print(f"{row['stage']:<12} {row['seconds']:>6} s  {row['verdict']}")
    left = [stage.name for stage in chosen[len(rows) :]]
    print(f"{'all':<12} {summary['seconds']:>6} s" + (f"  not run: {', '.join(left)}" if left else ""))
    return 1 if any(str(row["verdict"]).startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
