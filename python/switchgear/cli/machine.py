# SPDX-License-Identifier: BSD-3-Clause
"""Describes this machine and process. Plain dicts and strings, ready for JSON; unknown values are None."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

# libgomp-<hash>.so.1 is the private copy in a wheel, renamed. It is still a second runtime.
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)(?:-[0-9a-f]+)?\.so[^/]*$")
ENVIRONMENT = (
    "SWITCHGEAR_BACKEND", "SWITCHGEAR_CPU_ISA", "SWITCHGEAR_CUDA_KERNELS", "SWITCHGEAR_STRICT",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "LD_PRELOAD",
    "THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
# Makes glibc keep freed memory and torch use huge pages: without them page faults are half of a training step.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "17179869184",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "THP_MEM_ALLOC_ENABLE": "1",
}
_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "sve"),
)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def openmp_runtimes(maps: str | None = None) -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process, from the text of /proc/self/maps (empty elsewhere).

    More than one means two thread pools that spin against each other.
    """
    text = maps if maps is not None else _read("/proc/self/maps") or ""
    fields = (line.split(maxsplit=5) for line in text.splitlines())  # range, rights, offset, device, inode, path
    paths = {line[5].strip() for line in fields if len(line) == 6}
    return sorted(path for path in paths if _OPENMP.search(path.removesuffix(" (deleted)")))


def transparent_huge_pages() -> str | None:
    """always, madvise or never: the bracketed word of the kernel's setting."""
    found = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled") or "")
    return found.group(1) if found else None


def busy_seconds_elsewhere() -> float:
    """Core-seconds that everything but this process has used since boot, including time stolen by the host.
    Only differences are meaningful, to 0.01 s; 0 where the system does not report it."""
    found = re.search(r"cpu +([\d ]+)", _read("/proc/stat") or "")
    if found is None:
        return 0.0
    ticks = [int(field) for field in found.group(1).split()[:8]]  # the last two are included in the first two
    own = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def free_memory_bytes() -> int | None:
    """Memory that programs can still allocate without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return int(found.group(1)) * 1024 if found else None


def peak_memory_bytes() -> int | None:
    """The largest resident size of this process.

    VmHWM belongs to the address space, so it starts at zero with exec. ru_maxrss on Linux keeps the size of the
    process that forked this one, so it is only the fallback.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", _read("/proc/self/status") or "")
    if found:
        return int(found.group(1)) * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(function: Callable[[], object]) -> int | None:
    """Bytes by which this process grows at most while `function` runs; None if the system does not count it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process keeps would hide allocations
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    except (OSError, AttributeError):
        return None
    before = peak_memory_bytes()
    function()
    after = peak_memory_bytes()
    return None if before is None or after is None else after - before


def _first(pattern: str, text: str | None) -> str | None:
    found = re.search(pattern, text or "", re.MULTILINE)
    return found.group(1).strip() if found else None


def _model(cpuinfo: str | None) -> str:
    """The processor's name; on x86 with family and model, since virtual machines give different CPUs the same name."""
    name = _first(r"^model name\s*:(.*)$", cpuinfo) or platform.processor() or platform.machine()
    family, model = _first(r"^cpu family\s*:(.*)$", cpuinfo), _first(r"^model\s*:(.*)$", cpuinfo)
    return f"{name} (family {family}, model {model})" if family and model else name


def cpu() -> dict[str, Any]:
    """Model, usable cores, instruction sets of interest, last-level cache and memory."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set((_first(r"^(?:flags|Features)\s*:(.*)$", cpuinfo) or "").split())
    cache = _first(r"^(\d+)K", _read("/sys/devices/system/cpu/cpu0/cache/index3/size"))
    memory = _first(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _model(cpuinfo),
        "architecture": platform.machine(),
        "cores": affinity,
        "features": [flag for flag in _FLAGS if flag in flags],
        "l3_bytes": int(cache) * 1024 if cache else None,
        "memory_bytes": int(memory) * 1024 if memory else None,
        "transparent_huge_pages": transparent_huge_pages(),
    }


def has_fast_bfloat16() -> bool:
    """Whether the CPU has bfloat16 products; elsewhere they are emulated in float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu()["features"]))


def gpus() -> list[dict[str, Any]]:
    """The GPUs visible to torch."""
    if not torch.cuda.is_available():
        return []
    properties: Iterable[Any] = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in properties]


def environment() -> dict[str, str]:
    """The variables that affect measurements, if set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
