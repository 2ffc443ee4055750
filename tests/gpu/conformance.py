# SPDX-License-Identifier: BSD-3-Clause
"""Runs conformance.cu on the device and on the C++ models of tests/simt, and compares what they print.

    conformance.py [--build DIR] [--model-only]

Exits with status 1 if a wrapper's result differs, and prints the first differing words.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ORDERS = ("forward", "random:1")  # thread orders of the model: its results must not depend on them


def parse(output: str) -> dict[str, list[str]]:
    """Returns {case: its words}."""
    return {name: words.split() for name, _, words in (line.partition("\t") for line in output.splitlines())}


def differences(model: dict[str, list[str]], device: dict[str, list[str]]) -> list[str]:
    """Where the device differs, one line per case. Cases missing on the device are for another architecture."""
    found = [f"{name}: the model has no such case" for name in device.keys() - model.keys()]
    for name, got in device.items():
        want = model.get(name, got)
        if len(want) != len(got):
            found.append(f"{name}: {len(got)} words, the model writes {len(want)}")
        elif wrong := [i for i in range(len(want)) if want[i] != got[i]]:
            first = wrong[0]
            found.append(f"{name}: {len(wrong)} of {len(want)} words differ, first word {first}: "
                         f"0x{got[first]}, the model has 0x{want[first]}")  # fmt: skip
    return sorted(found)


def run(*command: str | Path, **environment: str) -> str:
    import os

    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False,
                          env={**os.environ, **environment})  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}")
    return done.stdout


def model(build: Path) -> dict[str, list[str]]:
    options = ["-DSWITCHGEAR_SIMT=plain", "-DSWITCHGEAR_CUDA=OFF", "-DSWITCHGEAR_PYTHON=OFF"]
    run("cmake", "-S", ROOT, "-B", build / "model", "-G", "Ninja", *options)
    run("cmake", "--build", build / "model", "--target", "simt_conformance")
    program = build / "model" / "tests" / "gpu" / "simt_conformance"
    results = [parse(run(program, SWITCHGEAR_SIMT_ORDER=order)) for order in ORDERS]
    if results[0] != results[1]:
        raise SystemExit(f"the model's results depend on the order of threads: {differences(*results)}")
    return results[0]


def device(build: Path) -> dict[str, list[str]]:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    capability = run(*query).splitlines()[0].strip().replace(".", "")
    hopper = capability == "90"
    kind = "90a" if hopper else capability
    flags = ["-gencode", f"arch=compute_{kind},code=sm_{kind}", *(["-DHOPPER"] if hopper else [])]
    includes = [f"-I{ROOT / folder}" for folder in ("csrc/cuda", "csrc", "include", "tests/simt")]
    program = build / "conformance"
    run("nvcc", "-std=c++20", *flags, *includes, ROOT / "tests/gpu/conformance.cu", "-o", program)
    return parse(run(program))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "conformance", metavar="DIR")
    parser.add_argument("--model-only", action="store_true", help="without a device: what the model prints is stable")
    args = parser.parse_args(arguments)
    build = args.build if args.build.is_absolute() else ROOT / args.build
    build.mkdir(parents=True, exist_ok=True)
    wanted = model(build)
    if args.model_only:
        print(f"{len(wanted)} cases, the same in every order of threads")
        return 0
    got = device(build)
    wrong = differences(wanted, got)
    print("\n".join([*wrong, f"{len(got) - len(wrong)} of {len(got)} cases agree with the model"]))
    return 1 if wrong or not got else 0


if __name__ == "__main__":
    sys.exit(main())
