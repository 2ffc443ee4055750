# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels as nvcc and ptxas compiled them, read from the installed module; no GPU is needed.

Each kernel's file states its resources: `//   <kernel>: <registers> registers[, <bytes> bytes of shared memory][,
<bytes> of local memory]`, the maximum over its instances and all architectures. Shared memory is the static part; the
dynamic part follows from the tables of tiles, which the launchers pass to the runtime.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import machine_code
from machine_code import Instruction, Kernel, opcode

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
REASON = machine_code.missing()
needs_module = pytest.mark.skipif(REASON is not None, reason=REASON or "")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

ALL = {"sm_80", "sm_90a", "sm_100", "sm_120"}
# CUDAARCHS, which CMake reads too: a module for fewer, built faster
ASKED = {f"sm_{arch.removesuffix('-real')}" for arch in os.environ.get("CUDAARCHS", "").split(";") if arch}
MACHINE_CODE = ASKED or ALL
PTX = {"sm_80"}  # for architectures in between and later ones

# ---- what is stated --------------------------------------------------------------------------------------------------


class Stated(NamedTuple):
    file: str
    registers: int
    shared: int
    local: int


LINE = re.compile(
    r"^//   (\w+_kernel): (\d+) registers(?:, (\d+) bytes of shared memory)?(?:, (\d+) of local memory)?$", re.MULTILINE
)


@functools.cache
def stated() -> dict[str, Stated]:
    table = {}
    for file in sorted(SOURCES.glob("*.cu*")):
        for name, *numbers in LINE.findall(file.read_text()):
            assert name not in table, f"{name} is stated twice"
            table[name] = Stated(file.name, *(int(number or 0) for number in numbers))
    return table


# ---- what is built ---------------------------------------------------------------------------------------------------


@functools.cache
def kernels() -> list[Kernel]:
    path = machine_code.module_path()
    assert path is not None
    return machine_code.parse_resources(machine_code.dump(path, "--dump-resource-usage"))


@functools.cache
def instructions(arch: str) -> dict[str, list[Instruction]]:
    path = machine_code.module_path()
    assert path is not None
    return machine_code.parse_instructions(machine_code.dump(path, "--dump-sass", "--gpu-architecture", arch))


# ---- the rules -------------------------------------------------------------------------------------------------------
# Functions of parsed data, so that tests can show them planted violations.


def over_resources(kernel: Kernel, limits: Stated | None) -> str | None:
    """What a kernel uses beyond what its file states."""
    if limits is None:
        return f"{kernel.name} is stated nowhere in csrc/cuda"
    for what in ("registers", "shared", "local"):
        if getattr(kernel, what) > getattr(limits, what):
            return (
                f"{kernel.name} ({kernel.arch}, {kernel.symbol}): {getattr(kernel, what)} {what}, "
                f"{limits.file} states {getattr(limits, what)}"
            )
    return None


def loops(code: list[Instruction]) -> list[range]:
    """Ranges of instruction indices, from the target of each backward jump to the jump."""
    index = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for i, (address, text) in enumerate(code):
        target = re.search(r"\bBRA(?:\.\w+)* (?:!?U?P\w+, )?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            found.append(range(index[int(target[1], 16)], i + 1))
    return found


def serialised(code: list[Instruction], together: int = 4) -> bool:
    """Whether wgmma wait for each other: ptxas then ends a group after each, the source after `together` or more."""
    products = [text for _, text in code if opcode(text).startswith("HGMMA")]
    return sum("gsb0" in text for text in products) * together > len(products)


def factors_in_registers(code: list[Instruction]) -> bool:
    """Whether every wgmma reads its first factor from registers, not by a descriptor."""
    products = [text for _, text in code if opcode(text).startswith("HGMMA")]
    return products != [] and all(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", text) for text in products)


def between_products(code: list[Instruction], product: str) -> list[str]:
    """Opcodes of the innermost loop around the products, once per stage."""
    around = [i for i, (_, text) in enumerate(code) if opcode(text).startswith(product)]
    loop = min((loop for loop in loops(code) if around[0] in loop and around[-1] in loop), key=len, default=None)
    assert loop is not None, "the products are in no loop"
    return [opcode(code[i][1]) for i in loop]


def product_loops(code: list[Instruction], product: str) -> list[list[str]]:
    """Opcodes of each innermost loop with products, from its barrier on: a stage of a ring."""
    with_products = [loop for loop in loops(code) if any(opcode(code[i][1]).startswith(product) for i in loop)]
    innermost = [
        loop for loop in with_products
        if not any(other != loop and other[0] in loop and other[-1] in loop for other in with_products)
    ]  # fmt: skip
    found = []
    for loop in innermost:
        names = [opcode(code[i][1]) for i in loop]
        barrier = next((i for i, name in enumerate(names) if name.startswith("BAR")), 0)
        found.append(names[barrier:] + names[:barrier])
    return found


def reads_ahead(stage: list[str], load: str, product: str) -> bool:
    """Whether products follow a stage's barrier before any fragment is read, and fragments are read between them."""
    kinds = [name.startswith(product) for name in stage if name.startswith((load, product))]
    first_read = kinds.index(False) if False in kinds else len(kinds)
    return 0 < first_read < len(kinds) and True in kinds[first_read:]


def local_memory_between_products(code: list[Instruction], product: str) -> bool:
    return any(name.startswith(("LDL", "STL")) for name in between_products(code, product))


def device_fence_between_products(code: list[Instruction], product: str) -> bool:
    """A fence of the whole device takes hundreds of cycles. A release to another block of the cluster has one."""
    return any(re.match(r"MEMBAR\.\w+\.(GPU|SYS)", name) for name in between_products(code, product))


def most_loads_in_flight(code: list[Instruction], load: str = "LDG.E.128", store: str = "STG.E.128") -> int:
    """The most loads without a store between them: a store waits for the load of its register."""
    most = count = 0
    for _, text in code:
        name = opcode(text)
        count = count + 1 if name.startswith(load) else 0 if name.startswith(store) else count
        most = max(most, count)
    return most


class Promise(NamedTuple):
    kernel: str  # a name
    instance: str  # part of the symbol of the instances it applies to
    archs: tuple[str, ...]
    has: tuple[str, ...]  # opcode prefixes that every instance has
    has_not: tuple[str, ...] = ()


EVERYWHERE = tuple(sorted(MACHINE_CODE))
PROMISES = [
    *(
        Promise(kernel, f"MmaProductI{symbol}", EVERYWHERE, (product, "LDGSTS", *matrices), ("HGMMA",))
        for kernel in ("gemm_kernel", "wgrad_kernel")
        for symbol, product, matrices in (
            ("13__nv_bfloat16", "HMMA.16816.F32.BF16", ("LDSM",)),
            ("6__half", "HMMA.16816.F32", ("LDSM",)),
            ("f", "HMMA.1688.F32.TF32", ()),  # ldmatrix transposes only 16-bit elements
        )
    ),
    Promise("gemm_kernel", "FmaProduct", EVERYWHERE, ("FFMA", "LDGSTS"), ("HMMA",)),
    Promise("wgrad_kernel", "FmaProduct", EVERYWHERE, ("FFMA", "LDGSTS"), ("HMMA",)),
    Promise("stored_kernel", "", EVERYWHERE, ("HMMA.16816.F32", "LDSM", "LDGSTS"), ("HGMMA",)),
    Promise("decoded_kernel", "MmaProductI13__nv_bfloat16", EVERYWHERE, ("HMMA.16816.F32.BF16", "LDSM", "LDGSTS")),
    Promise("decoded_kernel", "FmaProduct", EVERYWHERE, ("FFMA", "LDGSTS"), ("HMMA",)),
    Promise("decode_kernel", "", EVERYWHERE, ("HMMA.16816.F32", "LDG.E.EF.128", "SHFL.BFLY"), ("LDGSTS", "BAR")),
    Promise("gemm_sm90_kernel", "", ("sm_90a",),
            ("HGMMA.64x", "UTMALDG.3D", "LDGSTS", "SYNCS", "USETMAXREG"), ("HMMA",)),
    Promise("wgrad_sm90_kernel", "", ("sm_90a",),
            ("HGMMA.64x", "UTMALDG.3D", "LDGSTS", "SYNCS", "USETMAXREG"), ("HMMA",)),
    Promise("stored_sm90_kernel", "", ("sm_90a",),
            ("HGMMA.64x", "LDGSTS", "SYNCS", "USETMAXREG", "WARPGROUP.DEPBAR"), ("HMMA", "STS.U16")),
    # pairs of blocks, and tiles stored by stmatrix; "ELi2ELb": clusters of two
    Promise("gemm_sm90_kernel", "ELi2ELb", ("sm_90a",), ("UTMALDG.3D.MULTICAST", "UCGABAR_ARV", "UCGABAR_WAIT")),
    Promise("wgrad_sm90_kernel", "ELi2ELb", ("sm_90a",), ("UTMALDG.3D.MULTICAST", "UCGABAR_ARV", "UCGABAR_WAIT")),
    Promise("gemm_sm90_kernel", "EpilogueE0ENS1_6ConfigILNS1_5ShapeE0", ("sm_90a",),
            ("STSM.16.M88.4",), ("SHFL.BFLY",)),
    Promise("wgrad_sm90_kernel", "", ("sm_90a",), ("STSM.16.M88.4",), ("SHFL.BFLY",)),
    # cooperative tiles are stored by TMA, "ELi2ELb1E"
    *(Promise(kernel, "ELi2ELb1E", ("sm_90a",), ("STSM.16.M88.4", "UTMASTG.3D", "UTMACMDFLUSH"), ("SHFL.BFLY",))
      for kernel in ("gemm_sm90_kernel", "wgrad_sm90_kernel")),
    # dependent launches: griddepcontrol.wait and .launch_dependents
    *(Promise(kernel, "", ("sm_90a",), ("ACQBULK", "PREEXIT")) for kernel in ("gemm_sm90_kernel", "wgrad_sm90_kernel")),
    *(Promise(kernel, "", EVERYWHERE, ("LDG.E.128", "STG.E.128"))
      for kernel in ("permute_kernel", "combine_kernel", "glu_kernel", "glu_backward_kernel")),
    # flags visible to other GPUs, and nothing stale in L1 after an acquire
    Promise("exchange_kernel", "", EVERYWHERE,
            ("LDG.E.128", "STG.E.128", "LDG.E.STRONG.SYS", "CCTL.IVALL", "MEMBAR.ALL.SYS", "STG.E.STRONG.SYS")),
]  # fmt: skip


def broken(promise: Promise, code: list[Instruction]) -> list[str]:
    """The missing opcodes, and the forbidden ones that occur."""
    present = {opcode(text) for _, text in code}
    missing = [want for want in promise.has if not any(name.startswith(want) for name in present)]
    return missing + [f"not {name}" for name in sorted(present) if promise.has_not and name.startswith(promise.has_not)]


# ---- on the module ---------------------------------------------------------------------------------------------------


@needs_module
def test_architectures() -> None:
    path = machine_code.module_path()
    assert path is not None
    for option, kind, want in (("--list-elf", "cubin", MACHINE_CODE), ("--list-ptx", "ptx", PTX)):
        found = set(re.findall(rf"\.(sm_\w+)\.{kind}", machine_code.dump(path, option)))
        assert found == want
    archs = set(importlib.import_module("switchgear._cuda").built_archs())
    assert archs == MACHINE_CODE | {arch.replace("sm", "compute") for arch in PTX}


@needs_module
def test_resources_are_within_what_each_file_states() -> None:
    complaints = [over_resources(kernel, stated().get(kernel.name)) for kernel in kernels()]
    assert [text for text in complaints if text] == []


@needs_module
def test_every_kernel_is_there_for_every_architecture() -> None:
    for name in stated():
        hopper_only = name.endswith("_sm90_kernel")
        archs = {kernel.arch for kernel in kernels() if kernel.name == name}
        assert archs == ({"sm_90a"} if hopper_only else MACHINE_CODE), name


@needs_module
def test_no_kernel_is_named_by_a_path() -> None:
    """nvcc names what is in an unnamed namespace by a hash of its file's path, and no two builds would be equal."""
    assert [kernel.symbol for kernel in kernels() if "_GLOBAL__N_" in kernel.symbol] == []


@needs_module
@pytest.mark.skipif(MACHINE_CODE != ALL, reason=f"the module has no code for {', '.join(sorted(ALL - MACHINE_CODE))}")
def test_statements_are_not_generous() -> None:
    """A limit far above the actual use would hide growth. Registers are allocated in eights."""
    for name, limits in stated().items():
        instances = [kernel for kernel in kernels() if kernel.name == name]
        assert limits.registers < max(kernel.registers for kernel in instances) + 16, name
        assert limits.shared == max(kernel.shared for kernel in instances), name
        assert limits.local < max(kernel.local for kernel in instances) + 8, name


@needs_module
@pytest.mark.parametrize("arch", sorted(MACHINE_CODE))
def test_instructions(arch: str) -> None:
    code = instructions(arch)
    names = {kernel.symbol: kernel.name for kernel in kernels() if kernel.arch == arch}
    assert set(names) <= set(code)
    for promise in PROMISES:
        if arch not in promise.archs:
            continue
        symbols = [symbol for symbol, name in names.items() if name == promise.kernel and promise.instance in symbol]
        assert symbols, f"no instance of {promise.kernel} {promise.instance}"
        for symbol in symbols:
            assert broken(promise, code[symbol]) == [], symbol
    for symbol, name in names.items():
        floats = [text for _, text in code[symbol] if re.match(r"(ATOM|RED)\w*(\.\w+)*\.F(16|32|64)", opcode(text))]
        assert floats == [], f"{name} adds floats by atomics: sums would depend on the order of threads"


@needs_module
@pytest.mark.parametrize("arch", sorted(MACHINE_CODE))
def test_the_exchange_loads_batches(arch: str) -> None:
    """Four 16-byte loads of a thread are in flight; one at a time would reach a fifth of the link's rate."""
    symbols = [kernel.symbol for kernel in kernels() if kernel.arch == arch and kernel.name == "exchange_kernel"]
    assert [most_loads_in_flight(instructions(arch)[symbol]) >= 4 for symbol in symbols] == [True]


@needs_module
def test_wgmma_are_not_serialised_and_nothing_is_spilled_between_them() -> None:
    code = instructions("sm_90a")
    hopper = [kernel for kernel in kernels() if kernel.name.endswith("_sm90_kernel") and "maps" not in kernel.name]
    assert len(hopper) >= 8
    for kernel in hopper:
        stored = kernel.name == "stored_sm90_kernel"  # a step of two products at a time
        assert not serialised(code[kernel.symbol], 2 if stored else 4), kernel.symbol
        assert factors_in_registers(code[kernel.symbol]) == stored, kernel.symbol
        assert not local_memory_between_products(code[kernel.symbol], "HGMMA"), kernel.symbol
        assert not device_fence_between_products(code[kernel.symbol], "HGMMA"), kernel.symbol


@needs_module
@pytest.mark.parametrize("arch", sorted(MACHINE_CODE))
def test_fragments_are_read_ahead_and_nothing_is_spilled_between_products(arch: str) -> None:
    code = instructions(arch)
    names = {kernel.symbol: kernel.name for kernel in kernels() if kernel.arch == arch}
    checked = 0
    for symbol, name in names.items():
        if name not in ("gemm_kernel", "wgrad_kernel") or "MmaProduct" not in symbol:
            continue
        stages = product_loops(code[symbol], "HMMA")
        assert len(stages) == (2 if name == "gemm_kernel" else 1), symbol  # an adapter's, and the weights'
        for stage in stages:
            assert not any(op.startswith(("LDL", "STL")) for op in stage), symbol
            if "MmaProductIf" not in symbol:  # tf32 reads words where ldmatrix cannot transpose
                assert reads_ahead(stage, "LDSM", "HMMA"), symbol
                checked += 1
    assert checked >= 16


# ---- without the module ----------------------------------------------------------------------------------------------


def test_every_kernel_of_the_sources_states_its_resources() -> None:
    found = {}
    files = sorted(SOURCES.glob("*.cu*"))
    included = {name for file in files for name in re.findall(r'#include "(\w+\.cuh)"', file.read_text())}
    included |= set(re.findall(r"\w+\.cuh", (SOURCES / "sources.cmake").read_text()))  # of the units that cmake writes
    for file in files:
        if file.suffix == ".cuh" and file.name not in included:
            continue  # in no module: only tests/simt runs it
        for name in re.findall(r"\b__global__ void(?: __launch_bounds__\([^\n]*?\))?\s+(\w+)\(", file.read_text()):
            found[name] = file.name
    assert len(found) > 15
    assert {name: limits.file for name, limits in stated().items()} == found


@pytest.mark.parametrize(("file", "pattern", "size"), [
    ("tiles_sm80.h", r"\{\w+, (\d+), (\d+), \d+, \d+, (\d+), (\d+), \d+\},?\s*// (\d+) KB",
     lambda rows, columns, depth, stages: stages * (rows + columns) * depth),
])  # fmt: skip
def test_shared_memory_of_tiles_is_what_the_table_says(file: str, pattern: str, size: object) -> None:
    rows = re.findall(pattern, (SOURCES / file).read_text())
    assert len(rows) == 3
    for *numbers, kilobytes in rows:
        assert callable(size)
        assert size(*map(int, numbers)) == int(kilobytes) << 10
        assert int(kilobytes) <= 99  # the limit per block on sm_86, sm_89 and sm_120


def test_compilers_that_build_the_module(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("cmake is not installed")
    older, newer = "80;90a-real", "80;90a-real;100-real;120-real"
    wanted = {"12.4": "none", "12.5": older, "12.7": older, "12.8": newer, "13.0": newer, "": "none"}
    script = f"include({SOURCES}/nvcc.cmake)\n"
    for version in wanted:
        nvcc = tmp_path / f"nvcc{version}"
        text = f"Cuda compilation tools, release {version}, V{version}.40" if version else "clang version 19.1.7"
        nvcc.write_text(f"#!/bin/sh\necho '{text}'\n")
        nvcc.chmod(0o755)
        script += f"""
switchgear_nvcc_version({nvcc} version)
set(archs none)
if(version VERSION_GREATER_EQUAL switchgear_first_nvcc)
  switchgear_cuda_archs(${{version}} archs)
endif()
message("${{version}} ${{archs}}")
"""
    (tmp_path / "ask.cmake").write_text(script)
    run = subprocess.run([cmake, "-P", tmp_path / "ask.cmake"], capture_output=True, text=True, check=True)
    assert run.stderr.splitlines() == [f"{version} {archs}" for version, archs in wanted.items()]


# ---- the rules see what they are for ---------------------------------------------------------------------------------

PLANTED = """
#include <cstdint>

__device__ void multiply(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
}
__device__ void wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Adds to the sums while wgmma still work on them where kTouch: ptxas then waits after each.
template <bool kTouch>
__global__ void wgmma_kernel(float* out, uint64_t a, uint64_t b, int stages) {
  float d[4] = {};
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      multiply(d, a + i, b + i);
      if (kTouch) d[0] += 1.0f;
      if (kTouch) __threadfence();
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    wait();
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}
template __global__ void wgmma_kernel<false>(float*, uint64_t, uint64_t, int);
template __global__ void wgmma_kernel<true>(float*, uint64_t, uint64_t, int);

// 128 values a thread in 32 registers.
__global__ void __launch_bounds__(1024, 2) spill_kernel(float* out, const float* in) {
  float v[128], sum = 0;
  for (int i = 0; i < 128; ++i) v[i] = in[threadIdx.x + i * 1024];
  __syncthreads();
  for (int i = 0; i < 128; ++i) sum += v[i] * v[127 - i];
  for (int i = 0; i < 128; ++i) out[threadIdx.x + i * 1024] = v[i] * sum;
}

__global__ void __launch_bounds__(128) atomic_kernel(float* out) { atomicAdd(out, 1.0f); }
"""
