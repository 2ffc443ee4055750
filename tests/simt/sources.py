# SPDX-License-Identifier: BSD-3-Clause
"""Rules for the text of csrc/cuda, about what a C++ compiler accepts silently and nvcc compiles to something else.

Each takes the text of a file and returns a complaint per violation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "csrc" / "cuda"

_NARROW = re.compile(r"\* static_cast<(?:u?int32_t|int|unsigned)>\([^()]*stride[^()]*\)")
_NARROW_FIRST = re.compile(r"static_cast<(?:u?int32_t|int|unsigned)>\([^()]*stride[^()]*\) \*")
_STRUCT = re.compile(r"^struct (\w+) \{(.*?)^\};", re.MULTILINE | re.DOTALL)
_KERNEL = re.compile(r"\b__global__ void(?: __launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s+(\w+)\(([^)]*)\)")


def source_files(folder: Path = KERNELS) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".h"))


def _is_wide(operand: str) -> bool:
    """Whether the text ends in an operand of 64 bits, by its own cast."""
    if not operand.endswith(")"):
        return False
    depth = 0
    for at in range(len(operand) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(operand[at], 0)
        if depth == 0:
            return operand[:at].endswith(("static_cast<int64_t>", "static_cast<size_t>"))
    return False


def narrow_offsets(text: str) -> list[str]:
    """Products of a stride in 32 bits whose other factor is not widened on the spot: they overflow for distant rows."""
    found = [match[0] for match in _NARROW_FIRST.finditer(text)]
    return found + [match[0] for match in _NARROW.finditer(text) if not _is_wide(text[: match.start()].rstrip())]


def structs_with_tensor_maps(texts: Iterable[str]) -> set[str]:
    """The structs that hold a CUtensorMap, directly or in a member. An inner struct makes its outer one match too."""
    bodies = {name: body for text in texts for name, body in _STRUCT.findall(text)}
    holding = {"CUtensorMap"}
    while more := {
        name
        for name, body in bodies.items()
        if name not in holding and any(re.search(rf"\b{held} \w", body) for held in holding)
    }:
        holding |= more
    return holding


def parameters(text: str) -> Iterator[tuple[str, str]]:
    for kernel, listed in _KERNEL.findall(text):
        for parameter in listed.split(","):
            yield kernel, " ".join(parameter.split())


def copied_tensor_maps(text: str, holding: set[str]) -> list[str]:
    """Kernels that take tensor maps in an ordinary parameter: TMA cannot read the copy of it in local memory."""
    found = []
    for kernel, parameter in parameters(text):
        kind = re.sub(r"\b(const|__grid_constant__)\b ?", "", parameter).split(" ")[0].split("<")[0]
        if kind in holding and not parameter.startswith("const __grid_constant__ "):
            found.append(f"{kernel}: {parameter}")
    return found
