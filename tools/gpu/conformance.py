# SPDX-License-Identifier: BSD-3-Clause
"""Builds conformance.cu for the device, and for the C++ models of tests/simt, whose results the device's must equal.

    conformance.py [--build DIR] [--model-only]

Writes DIR/model.txt and DIR/conformance. The run on the device is `DIR/conformance --expected DIR/model.txt --group G`.
The model needs no card: `make gpu STAGE=prepare` makes it beforehand.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import machine
from gpu.machine import ROOT

ORDERS = ("forward", "random:1")  # thread orders of the model: its results must not depend on them
EVERYWHERE = ("basic", "lanes", "memory")
HOPPER = ("hopper", "tma", "clusters", "wgmma", "far", "ring", "order")


def groups(capability: str | None) -> tuple[str, ...]:
    """The groups of cases for a device. Each runs in a process of its own."""
    return EVERYWHERE + (HOPPER if capability == "9.0" else ())


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False,
                          env={**os.environ, **environment})  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}")
    return done.stdout


def make_model(build: Path) -> int:
    """Writes model.txt; returns the number of cases."""
    options = ["-DSWITCHGEAR_SIMT=plain", "-DSWITCHGEAR_CUDA=OFF", "-DSWITCHGEAR_PYTHON=OFF", "-DSWITCHGEAR_WERROR=OFF"]
    run("cmake", "-S", ROOT, "-B", build / "model", "-G", "Ninja", *options)
    run("cmake", "--build", build / "model", "--target", "simt_conformance")
    program = build / "model" / "tools" / "gpu" / "simt_conformance"
    results = [run(program, SWITCHGEAR_SIMT_ORDER=order) for order in ORDERS]
    if results[0] != results[1]:
        names = [
            one.partition("\t")[0] for one, other in zip(*map(str.splitlines, results), strict=True) if one != other
        ]
        raise SystemExit(f"the model's results depend on the order of threads: {', '.join(names)}")
    (build / "model.txt").write_text(results[0])
    return len(results[0].splitlines())


def device_command(build: Path, capability: str) -> list[str | Path]:
    """nvcc's command. Without -Werror: a compiler that was not tested may warn of more."""
    hopper = capability == "9.0"
    kind = "90a" if hopper else capability.replace(".", "")
    flags = ["-gencode", f"arch=compute_{kind},code=sm_{kind}", *(["-DHOPPER"] if hopper else [])]
    includes = [f"-I{ROOT / folder}" for folder in ("csrc/cuda", "csrc", "include", "tests/simt", "tools/gpu")]
    sources = [ROOT / "tools/gpu/conformance.cu", *([ROOT / "csrc/cuda/tensor_map.cu"] if hopper else [])]
    return ["nvcc", "-std=c++20", *flags, *includes, *sources, "-o", build / "conformance"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--model-only", action="store_true", help="for a machine without a card")
    args = parser.parse_args(arguments)
    build = args.build if args.build.is_absolute() else ROOT / args.build
    build.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "tools/gpu", ROOT / "csrc/cuda", ROOT / "tests/simt"]
    newest = max(file.stat().st_mtime for folder in sources for file in folder.iterdir())
    model = build / "model.txt"
    if args.model_only or not model.exists() or model.stat().st_mtime < newest:
        print(f"{make_model(build)} cases of the model, the same in every order of threads")
    if args.model_only:
        return 0
    capability = machine.capability()
    if capability is None:
        raise SystemExit("nvidia-smi finds no card")
    run(*device_command(build, capability))
    print(f"{build / 'conformance'} for compute capability {capability}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
