# SPDX-License-Identifier: BSD-3-Clause
"""Offsets beyond 2^31, 2^32 and 2^33 elements. Memory is mapped but only the few rows in use are touched, so the widest
case addresses 96 GB and uses a few megabytes. Also a lint of the sources for 32-bit offsets."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from native_calls import OPS, arguments, call, outputs_of, poison, sizes_of, spec_of
from problems import DTYPES, equal_bits, on_kernels
from torch import Tensor

import switchgear
from errors import raises
from switchgear import _C

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
TOTALS = (2**31 + 1, 2**32 + 1, 2**33 + 1)
linux_only = pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs mmap of memory without reservation")


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros; only touched pages take memory."""
    size = elements * torch.empty((), dtype=dtype).element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype)


def far_apart(tensor: Tensor, dim: int, total: int) -> Tensor:
    """A copy whose last index along `dim` is `total` elements after the first; the other dimensions are contiguous."""
    strides, stride = [0] * tensor.dim(), 1
    for other in reversed([d for d in range(tensor.dim()) if d != dim]):
        strides[other], stride = stride, stride * tensor.shape[other]
    strides[dim] = total // (tensor.shape[dim] - 1)
    return sparse(total + stride, tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


@linux_only
@on_kernels
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["experts", "rows", "columns"])
@pytest.mark.parametrize("op", [op for op, parts in OPS.items() if any("float " in s for s in parts.tensors.values())])
def test_elements_far_apart(backend: str, op: str, dim: int) -> None:
    """Spreads the rows of all tensors of tokens or slots, or one dimension of the weights, outputs included."""
    if dim and not any("matrices" in spec for spec in OPS[op].tensors.values()):
        dim = 0  # an op without weights
    for total, dtype in zip(TOTALS, DTYPES, strict=True):
        args = arguments(op, sizes_of(T=12, K=2, E=3, H=20, I=18), dtype)
        call(op, args)
        wanted = [args[name].clone() for name in outputs_of(op)]
        for name in outputs_of(op):
            poison(args[name])
        far = {
            name: far_apart(args[name], dim if spec_of(op, name).layout == "matrices" else 0, total)
            for name in OPS[op].tensors
            if spec_of(op, name).layout != "contiguous"
        }
        call(op, args | far)
        assert equal_bits([(args | far)[name] for name in outputs_of(op)], wanted), f"{op}, 2^{total.bit_length() - 1}"


@linux_only
@on_kernels
def test_gathered_rows_of_a_large_table(backend: str) -> None:
    """x [2^21 + 1, 4096] and weight [2^13 + 1, 256, 4096], contiguous; only a few rows and experts are used."""
    rows, experts, width, depth = 2**21 + 1, 2**13 + 1, 256, 4096
    x = sparse(rows * depth, torch.bfloat16).view(rows, depth)
    weight = sparse(experts * width * depth, torch.bfloat16).view(experts, width, depth)
    used_rows, used_experts = torch.tensor([0, 2**19, 2**20 - 1, 2**21]), torch.tensor([0, 2**11, 2**12 + 1, 2**13])
    x[used_rows] = torch.randn(4, depth).bfloat16()
    weight[used_experts, :3] = torch.randn(4, 3, depth).bfloat16()
    counts = torch.zeros(experts, dtype=torch.int32)
    counts[used_experts] = 1
    expert_offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    out = switchgear.grouped_gemm(x, weight, expert_offsets, token_indices=used_rows.int())
    compact = switchgear.grouped_gemm(x[used_rows], weight[used_experts], torch.arange(5, dtype=torch.int32))
    assert equal_bits(out, compact)
    assert out[:, :3].ne(0).all()


@linux_only
def test_more_slots_than_int32_counts() -> None:
    """Slot numbers are int32, so 2^31 slots are refused before any of them is read."""
    topk_ids = sparse(2**31, torch.int32).view(2**30, 2)
    outputs = torch.empty(2, dtype=torch.int32), topk_ids.view(-1), topk_ids
    with raises(ValueError, "topk_ids"):
        _C.plan((topk_ids,), (), outputs, 1)


@pytest.mark.slow
def test_two_billion_elements_in_memory() -> None:
    """The same with real memory: an output of 2^31 + 2^18 elements, and its glu, in 6.5 GB."""
    (kilobytes,) = re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    if int(kilobytes) < 12 << 20:
        pytest.skip(f"needs 12 GB of available memory, there are {int(kilobytes) / 2**20:.1f}")
    torch.set_num_threads(2)
    slots, width = 2**16 + 8, 2**15
    x, weight = torch.randn(slots, 2).bfloat16(), torch.randn(2, width, 2).bfloat16()
    expert_offsets = torch.tensor([0, 5, slots - 1], dtype=torch.int32)
    h = switchgear.grouped_gemm(x, weight, expert_offsets)
    assert h.numel() > 2**31
    a = switchgear.glu(h)
    for row in (0, 5, 2**15, slots - 2, slots - 1):
        expert = int(row >= 5)
        wanted = x[row].double() @ weight[expert].double().T if row < slots - 1 else torch.zeros(width).double()
        assert torch.allclose(h[row].double(), wanted, rtol=2.0**-7, atol=1e-6)
        assert equal_bits(a[row], switchgear.glu(h[row]))


# ---- lint ------------------------------------------------------------------------------------------------------------

SOURCES = Path(__file__).parents[2] / "csrc"
NARROW = r"(?:unsigned(?: int)?|u?int32_t|int)"
SIZE = r"(?:shape\[|stride\[|numel|\bnum_(?:tokens|slots|experts|rows|columns)|\w*_size\b)"


def narrow_offsets(source: str) -> list[str]:
    """Lines of C++ that could compute an offset in 32 bits: a narrow loop counter or variable initialised from a size,
    or the product of two narrow variables."""
    code = [line.split("//")[0] for line in source.splitlines()]
    names = {n for line in code for n in re.findall(rf"\b{NARROW}\b (\w+)\b(?! *\()", line)}
    names -= {n for line in code for n in re.findall(r"\bint64_t (\w+)\b", line)}
    names = {n for n in names if not re.match(r"k[A-Z]", n)}
    suspicious = []
    for line in code:
        counter = re.search(rf"for \({NARROW} \w+ = [^;]*; [^;]*{SIZE}", line)
        made = re.search(rf"\b{NARROW} \w+ = [^;]*{SIZE}|static_cast<{NARROW}>\([^)]*{SIZE}", line)
        products = re.findall(r"\b(\w+) \* (\w+)\b(?!::)", line)
        if counter or made or any(a in names and b in names for a, b in products):
            suspicious.append(line.strip())
    return suspicious


def narrow_offsets_on_device(source: str) -> list[str]:
    """The same for CUDA, where rows, columns and counts are 32-bit by contract, but a product of a narrow row and a
    narrow width is not. Offsets in shared memory are small, and their lines say so."""
    lines = [line for line in source.splitlines() if "in shared memory" not in line]
    code = [line.split("//")[0] for line in lines]
    names = {n for line in code for n in re.findall(rf"\b{NARROW}\b (\w+)\b(?! *\()", line)}
    names -= {n for line in code for n in re.findall(r"\bint64_t (\w+)\b", line)}
    row, width = r"(?:row|slot|token|expert|pair)", r"(?:stride|columns|width|hidden|intermediate|depth|vectors)"
    suspicious = []
    for line in code:
        products = re.findall(r"\b(\w+) \* (\w+)\b(?!::|\.|->)", line)
        pairs = [(a, b) for x, y in products if x in names and y in names for a, b in ((x, y), (y, x))]
        if any(re.search(row, a) and re.search(width, b) for a, b in pairs):
            suspicious.append(line.strip())
    return suspicious


CODE = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh"))


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_sources_compute_offsets_in_64_bits(path: Path) -> None:
    lint = narrow_offsets_on_device if path.parent.name == "cuda" else narrow_offsets
    assert lint(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "for (int i = 0; i < x.shape[0]; ++i) {",
        "for (int32_t s = 0; s < num_slots; ++s) {",
        "const int rows = args.x.shape[0];",
        "const auto n = static_cast<int>(tensor.numel());",
        "int token = 0; int hidden = 1; p += token * hidden;",
        "unsigned a; uint32_t b; q[a * b] = 0;",
    ],
)
def test_the_lint_finds(line: str) -> None:
    assert narrow_offsets(line)


def test_the_lint_of_device_code_finds() -> None:
    assert narrow_offsets_on_device("int row = 0; int columns = 1; out[row * columns] = 0;")
    assert not narrow_offsets_on_device("int row = 0; int64_t columns = 1; out[row * columns] = 0;")
