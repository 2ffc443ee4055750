# SPDX-License-Identifier: BSD-3-Clause
"""What no run of the kernels as C++ shows: rules for their text (sources.py), and contraction in the PTX. Each check is
also shown the mistake that it is for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from sources import KERNELS, copied_tensor_maps, narrow_offsets, source_files, structs_with_tensor_maps

TEXTS = {path.name: path.read_text() for path in source_files()}
HOLDING = structs_with_tensor_maps(TEXTS.values())
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# Their results must have the bits of the CPU's, which contracts nothing.
ROUTING = ("assign_balanced", "column_topk", "fit_capacity", "route", "route_dynamic")


def edited(name: str, before: str, after: str) -> str:
    assert TEXTS[name].count(before) == 1, before
    return TEXTS[name].replace(before, after)


def test_offsets_are_wide() -> None:
    assert {name: found for name, text in TEXTS.items() if (found := narrow_offsets(text))} == {}


def test_tensor_maps_are_grid_constants() -> None:
    assert {name: found for name, text in TEXTS.items() if (found := copied_tensor_maps(text, HOLDING))} == {}


def ptx(source: Path, folder: Path, contract: bool) -> str:
    output = folder / f"{contract}.ptx"
    command = ["nvcc", "-std=c++20", "-O3", "-arch=compute_80", "-ptx", f"-fmad={str(contract).lower()}"]
    include = [f"-I{source.parent}", f"-I{KERNELS}", f"-I{KERNELS.parent}", f"-I{KERNELS.parents[1] / 'include'}"]
    subprocess.run([*command, *include, source, "-o", output], check=True)
    return output.read_text()


def is_contracted(source: Path, folder: Path) -> bool:
    """Whether nvcc fuses a product and a sum that the source does not."""
    return ptx(source, folder, True) != ptx(source, folder, False)


@needs_nvcc
@pytest.mark.parametrize("name", ROUTING)
@pytest.mark.some(2)
def test_routing_is_not_contracted(name: str, tmp_path: Path) -> None:
    assert not is_contracted(KERNELS / f"{name}.cu", tmp_path)


@needs_nvcc
def test_contraction_is_seen(tmp_path: Path) -> None:
    planted = edited("assign_balanced.cuh", "add(multiply(4.0f, spread), 1.0f)", "4.0f * spread + 1.0f")
    (tmp_path / "assign_balanced.cuh").write_text(planted)
    (tmp_path / "assign_balanced.cu").write_text(TEXTS["assign_balanced.cu"])
    assert is_contracted(tmp_path / "assign_balanced.cu", tmp_path)
