# SPDX-License-Identifier: BSD-3-Clause
"""Resources and instructions of each CUDA kernel in the built module `_cuda`, as nvcc compiled it.

cuobjdump and nvdisasm read it: those on PATH, in nvcc's toolkit, or in the wheels nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


def module_path() -> Path | None:
    """The built module: the installed one, or the one that the environment variable SWITCHGEAR_CUDA_MODULE names."""
    if named := os.environ.get("SWITCHGEAR_CUDA_MODULE"):
        return Path(named)
    spec = importlib.util.find_spec("switchgear._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def _tool_directories() -> Iterator[Path]:
    """Directories of CUDA toolkit programs other than PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc:  # nvcc on PATH may be a wrapper, so nvcc itself prints its toolkit
        text = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
        if top := re.search(r"^#\$ TOP=(.*)$", text, re.MULTILINE):
            yield Path(top[1]) / "bin"
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or () if wheels else ():
        yield from sorted(Path(folder).glob("cu*/bin"))


@functools.cache
def tool(name: str) -> Path | None:
    if found := shutil.which(name):
        return Path(found)
    return next((folder / name for folder in _tool_directories() if os.access(folder / name, os.X_OK)), None)


MISSING_TOOLS = "no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"


def has_tools() -> bool:
    return all(tool(name) is not None for name in ("cuobjdump", "nvdisasm", "c++filt"))


def missing() -> str | None:
    """Why there is no machine code to inspect, or None."""
    if module_path() is None:
        return "switchgear was built without its CUDA module (no nvcc, or SWITCHGEAR_CUDA=OFF)"
    return None if has_tools() else MISSING_TOOLS


def dump(path: Path, *options: str) -> str:
    """The output of cuobjdump for a module or a cubin."""
    program, disassembler = tool("cuobjdump"), tool("nvdisasm")
    assert program is not None
    assert disassembler is not None
    environment = {**os.environ, "PATH": f"{disassembler.parent}:{os.environ['PATH']}"}
    done = subprocess.run([program, *options, path], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


class Kernel(NamedTuple):
    arch: str  # sm_80
    symbol: str
    name: str  # without template arguments and namespaces: gemm_kernel
    registers: int
    shared: int  # bytes of static shared memory
    local: int  # bytes of local memory: spilled registers, and arrays that registers cannot hold


Instruction = tuple[int, str]  # address, text

RESERVED = 1024  # bytes of shared memory that ptxas counts from sm_90 on but the system uses


def demangled(symbols: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def base_name(readable: str) -> str:
    """void a::b_kernel<(c::D)1, e<f>>(g) -> b_kernel"""
    head = re.match(r"(?:void )?((?:\w+::|\(anonymous namespace\)::)*)(\w+)", readable)
    return head[2] if head else readable


def parse_resources(text: str) -> list[Kernel]:
    """Parses a dump with --dump-resource-usage."""
    rows, arch, symbol = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            reserved = RESERVED if arch and int(re.sub(r"\D", "", arch)) >= 90 and shared else 0
            rows.append((arch, symbol, registers, shared - reserved, max(stack, local)))
    names = demangled([row[1] for row in rows])
    return [Kernel(*row[:2], base_name(name), *row[2:]) for row, name in zip(rows, names, strict=True)]


def parse_instructions(text: str) -> dict[str, list[Instruction]]:
    """{symbol: its instructions in order}, from a dump of one architecture with --dump-sass."""
    functions: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            current = functions.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);", line):
            current.append((int(match[1], 16), match[2].strip()))
    return functions


def opcode(text: str) -> str:
    """@!P0 LDG.E.128 R4, [R2] -> LDG.E.128"""
    return re.sub(r"^@\S+\s+", "", text).split()[0]
