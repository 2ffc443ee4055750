# SPDX-License-Identifier: BSD-3-Clause
"""torch.export and AOTInductor: a layer as a package that a program loads without the layer's Python code."""

from __future__ import annotations

import tempfile
import timeit
from pathlib import Path

import torch

import switchgear


def main() -> float:
    """The largest difference of the package's output."""
    moe = switchgear.MoE(512, 256, 32, 4).eval().requires_grad_(False)
    x = torch.randn(2, 64, 512)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(moe, (x,), dynamic_shapes=({1: tokens},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "moe.pt2")))
        compiled = torch._inductor.aoti_load_package(package)
        longer = torch.randn(2, 100, 512)
        difference = float((compiled(longer) - moe(longer)).abs().max())
        eager = timeit.timeit(lambda: moe(longer), number=20)
        packaged = timeit.timeit(lambda: compiled(longer), number=20)
    times = f"{eager * 50:.1f} ms the layer | {packaged * 50:.1f} ms the package | {eager / packaged:.2f}x"
    print(f"| torch.export, AOTInductor | {times} | difference {difference:.1e} |")
    return difference


if __name__ == "__main__":
    assert main() == 0.0
