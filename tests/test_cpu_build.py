# SPDX-License-Identifier: BSD-3-Clause
"""The AMX instructions in the built module, read by objdump; works on processors without AMX.

Emulation (tests/cpp/amx_emulation.h) covers everything except the assembly in csrc/cpu/amx.h. So this checks that the
instructions exist, that each tile has its role, and that nothing else uses tiles.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from switchgear import _C

SUMS, OPERANDS = {"tmm0", "tmm1", "tmm2", "tmm3"}, {"tmm4", "tmm5"}
PRODUCTS = {("tmm5", "tmm4", sums) for sums in SUMS}
MULTIPLICATIONS = {"tdpbf16ps", "tdpbsud"}  # of bfloat16; of int8 and uint8
TILES_OF: dict[str, set[str]] = {
    "ldtilecfg": set(), "tilerelease": set(), "tilezero": SUMS, "tilestored": SUMS,
    "tileloadd": SUMS | OPERANDS, "tdpbf16ps": SUMS | OPERANDS, "tdpbsud": SUMS | OPERANDS,
}  # fmt: skip

Instruction = tuple[str, list[str]]  # mnemonic, its tile registers in order


def instructions_on_tiles(text: str) -> list[Instruction]:
    """Parses objdump's output, `1234:  tdpbf16ps %tmm6,%tmm4,%tmm0`, with operands in AT&T order."""
    lines = re.findall(r"^\s*[0-9a-f]+:\s+((?:tile|tdp|tcmm)\w*|\w+tilecfg)\b(.*)$", text, re.MULTILINE)
    return [(mnemonic, re.findall(r"tmm\d", operands)) for mnemonic, operands in lines]


def broken(code: Sequence[Instruction]) -> list[str]:
    """Lists what is missing, and what must not be there."""
    present = {mnemonic for mnemonic, _ in code}
    complaints = [f"no {mnemonic}" for mnemonic in sorted(TILES_OF.keys() - present)]
    for product in sorted(MULTIPLICATIONS & present):
        roles_of = {tuple(tiles) for mnemonic, tiles in code if mnemonic == product}
        complaints += [f"no {product} {' '.join(roles)}" for roles in sorted(PRODUCTS - roles_of)]
    for mnemonic, tiles in code:
        fits = tuple(tiles) in PRODUCTS if mnemonic in MULTIPLICATIONS else set(tiles) <= TILES_OF.get(mnemonic, set())
        if mnemonic not in TILES_OF or not fits:
            complaints.append(f"not {mnemonic} {' '.join(tiles)}")
    return complaints


@pytest.mark.skipif("amx" not in _C.build_info()["isas"], reason="built without the kernels for AMX")
def test_instructions_on_tiles() -> None:
    program = shutil.which("objdump") or shutil.which("llvm-objdump")
    if program is None:
        pytest.skip("neither objdump nor llvm-objdump is installed")
    command = [program, "--disassemble", "--no-show-raw-insn", _C.__file__]
    code = instructions_on_tiles(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert broken(code) == []


def cmake() -> str:
    found = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("cmake is not installed")
    return found


def test_a_compiler_that_is_too_old_is_named() -> None:
    program, script = cmake(), Path(__file__).parents[1] / "csrc/compiler.cmake"

    def answer(id: str, version: str) -> str:
        names = {"": "/usr/bin/c++", "_ID": id, "_VERSION": version}
        command = [program, *(f"-DCMAKE_CXX_COMPILER{name}={value}" for name, value in names.items()), "-P", script]
        return " ".join(subprocess.run(command, capture_output=True, text=True).stderr.split())

    wanted = "switchgear needs GCC 11 or Clang 14, or newer, got {} (/usr/bin/c++). Environment CXX=…"
    for id, version in (("GNU", "10.2.1"), ("GNU", "9.4.0"), ("Clang", "13.0.1")):
        assert wanted.format(f"{id} {version}") in answer(id, version)
    tried = (("GNU", "11.4.0"), ("GNU", "14.2.0"), ("Clang", "14.0.6"), ("AppleClang", "13.0"), ("IntelLLVM", "13.0"))
    nameless = (("GNU", ""), ("", ""))  # in toolchain files
    for id, version in (*tried, ("NVHPC", "1.0"), *nameless):
        assert not answer(id, version)


GPUS = [
    (["9.0", "9.0"], "90a-real"),
    (["8.9"], "89-real"),
    (["12.0", "8.6"], "80-virtual;120-real;86-real"),  # one PTX for all
    (["7.5"], ""),
    (["[N/A]"], ""),
]


@pytest.mark.parametrize(("capabilities", "archs"), GPUS)
def test_kernels_are_built_for_the_gpus_that_are_there(capabilities: list[str], archs: str, tmp_path: Path) -> None:
    driver, script = tmp_path / "nvidia-smi", tmp_path / "print.cmake"
    driver.write_text("#!/bin/sh\necho '" + "\n".join(capabilities) + "'\n")
    driver.chmod(0o755)
    nvcc = Path(__file__).parents[1] / "csrc/cuda/nvcc.cmake"
    script.write_text(f'include({nvcc})\nswitchgear_gpu_archs(archs)\nmessage("<${{archs}}>")\n')
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def answer(**more: str) -> str:
        return subprocess.run([cmake(), "-P", script], capture_output=True, text=True, env=environment | more).stderr

    environment.pop("CUDA_VISIBLE_DEVICES", None)
    assert answer().strip() == f"<{archs}>"
    assert answer(CUDA_VISIBLE_DEVICES="").strip() == "<>"
