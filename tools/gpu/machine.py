# SPDX-License-Identifier: BSD-3-Clause
"""What a machine has: the card, compilers and tools, on PATH, in the usual places, or in NVIDIA's wheels; and how to
install what is missing. Uses only Python's standard library."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NVCC_WHEELS = ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]
SANITIZER_WHEEL = "nvidia-cuda-sanitizer-api"
PACKAGES = {  # imported name: package to install if it is missing
    "pytest": "pytest", "hypothesis": "hypothesis", "numpy": "numpy>=2.1", "rich": "rich",
    "transformers": "transformers>=5.0", "scikit_build_core": "scikit-build-core>=0.11", "pybind11": "pybind11>=3.0",
    "cmake": "cmake>=3.26", "ninja": "ninja",
}  # fmt: skip


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def pip(*arguments: str) -> list[str]:
    constraints = ["--constraint", "constraints.txt"] if (ROOT / "constraints.txt").exists() else []
    return python("-m", "pip", "install", "--disable-pip-version-check", *constraints, *arguments)


def answers(*command: str) -> str | None:
    """The output of a command, or None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def torch_with_cuda() -> bool:
    return answers(sys.executable, "-c", "import torch; assert torch.version.cuda") is not None


def installed(module: str) -> bool:
    return answers(sys.executable, "-c", f"import {module}") is not None or (
        module in ("cmake", "ninja") and shutil.which(module) is not None
    )


def wheel_files(name: str) -> list[Path]:
    """All copies of a file in this environment's NVIDIA wheels."""
    folders = answers(sys.executable, "-c", "import nvidia; print(*nvidia.__path__, sep='\\n')") or ""
    return sorted(file for folder in folders.splitlines() for file in Path(folder).glob(f"cu*/{name}"))


def _found(name: str, wheel: str) -> str | None:
    usual = Path("/usr/local/cuda/bin") / name
    found = shutil.which(name) or (str(usual) if usual.exists() else None)
    return found or next((str(path) for path in wheel_files(wheel)), None)


def nvcc() -> str | None:
    return _found("nvcc", "bin/nvcc")


def compute_sanitizer() -> str | None:
    return _found("compute-sanitizer", "compute-sanitizer/compute-sanitizer")


def ncu() -> str | None:
    return _found("ncu", "nsight-compute/ncu")


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


def old_driver() -> str | None:
    """Why the driver does not run what the compiler builds, or None if it does."""
    driver = re.search(r"CUDA Version: (\d+)", answers("nvidia-smi") or "")
    compiler = re.search(r"release (\d+)", answers(nvcc() or "nvcc", "--version") or "")
    if driver is None or compiler is None or int(driver[1]) >= int(compiler[1]):
        return None
    return f"{nvcc()} is of CUDA {compiler[1]}, the driver is for CUDA {driver[1]}: install a compiler of that version"


def missing() -> list[list[str]]:
    """The commands that install what is missing. Without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER."""
    commands = []
    if not torch_with_cuda():
        commands.append(pip("--force-reinstall", "torch"))  # on Linux, PyPI's torch has CUDA
    packages = [package for name, package in PACKAGES.items() if not installed(name)]
    if packages:
        commands.append(pip(*packages))
    if nvcc() is None:
        commands.append(pip(*NVCC_WHEELS))
        commands.append(python("tools/gpu/nvcc_links.py"))
    if compute_sanitizer() is None:
        commands.append(pip(SANITIZER_WHEEL))
    return commands


def list_packages() -> list[str]:
    """All packages of a run, whether this machine has them or not."""
    return sorted({"torch", *PACKAGES.values(), *NVCC_WHEELS, SANITIZER_WHEEL})
