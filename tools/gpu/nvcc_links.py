# SPDX-License-Identifier: BSD-3-Clause
"""Makes the CUDA compiler of NVIDIA's wheels (nvidia-cuda-nvcc, …) usable for CMake: adds the library names that CMake
looks for, and a program `nvcc` in the directory of this environment's Python."""

import sys
from pathlib import Path

import nvidia


def link(path: Path, target: str) -> None:
    if not path.exists():
        path.symlink_to(target)


def main() -> None:
    toolkits = [path.parents[1] for folder in nvidia.__path__ for path in Path(folder).glob("cu*/bin/nvcc")]
    if not toolkits:
        raise SystemExit("no nvcc in NVIDIA's wheels: pip install nvidia-cuda-nvcc")
    toolkit = toolkits[-1]
    link(toolkit / "lib64", "lib")
    for library in (toolkit / "lib").glob("libcudart.so.*"):
        link(toolkit / "lib" / "libcudart.so", library.name)
    program = Path(sys.executable).parent / "nvcc"
    program.write_text(f'#!/bin/sh\nexec "{toolkit}/bin/nvcc" "$@"\n')
    program.chmod(0o755)
    print(program)


if __name__ == "__main__":
    main()
