# SPDX-License-Identifier: BSD-3-Clause
"""Describes this machine and process. Plain dicts and strings, ready for JSON; unknown values are None."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
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
CGROUPS = Path("/sys/fs/cgroup")
_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "sve"),
)


def read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def openmp_runtimes(maps: str | None = None) -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process, from the text of /proc/self/maps (empty elsewhere).

    More than one means two thread pools that spin against each other.
    """
    text = maps if maps is not None else read("/proc/self/maps") or ""
    fields = (line.split(maxsplit=5) for line in text.splitlines())  # range, rights, offset, device, inode, path
    paths = {line[5].strip() for line in fields if len(line) == 6}
    return sorted(path for path in paths if _OPENMP.search(path.removesuffix(" (deleted)")))


def transparent_huge_pages() -> str | None:
    """always, madvise or never: the bracketed word of the kernel's setting."""
    found = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled") or "")
    return found.group(1) if found else None


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
    cpuinfo = read("/proc/cpuinfo")
    flags = set((_first(r"^(?:flags|Features)\s*:(.*)$", cpuinfo) or "").split())
    cache = _first(r"^(\d+)K", read("/sys/devices/system/cpu/cpu0/cache/index3/size"))
    memory = _first(r"^MemTotal:\s+(\d+) kB", read("/proc/meminfo"))
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


def cpu_quota(root: Path = CGROUPS) -> float | None:
    """Processors that the control group grants, or None without a limit (cgroup v2, v1)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties: Iterable[Any] = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in properties]


def environment() -> dict[str, str]:
    """The variables that affect measurements, if set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
