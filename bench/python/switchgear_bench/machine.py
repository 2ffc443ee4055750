# SPDX-License-Identifier: BSD-3-Clause
"""Describes this machine, what else runs on it, and the memory of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import switchgear
from switchgear.cli.common import optional
from switchgear.cli.machine import cpu, environment, read


def describe(threads: int) -> dict[str, Any]:
    """The machine and the software, for files of results."""
    transformers, _ = optional("transformers")
    return cpu() | {
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": getattr(transformers, "__version__", None),
        "switchgear": switchgear.__version__,
        "isa": switchgear.cpu_isa(),
        "environment": environment(),
    }


def has_fast_bfloat16() -> bool:
    """Whether the CPU has bfloat16 products; elsewhere they are emulated in float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu()["features"]))


def busy_seconds_elsewhere() -> float:
    """Core-seconds that everything but this process has used since boot, including time stolen by the host.
    Only differences are meaningful, to 0.01 s; 0 where the system does not report it."""
    found = re.search(r"cpu +([\d ]+)", read("/proc/stat") or "")
    if found is None:
        return 0.0
    ticks = [int(field) for field in found.group(1).split()[:8]]  # the last two are included in the first two
    own = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def free_memory_bytes() -> int | None:
    """Memory that programs can still allocate without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", read("/proc/meminfo") or "")
    return int(found.group(1)) * 1024 if found else None


def peak_memory_bytes() -> int | None:
    """The largest resident size of this process.

    VmHWM belongs to the address space, so it starts at zero with exec. ru_maxrss on Linux keeps the size of the
    process that forked this one, so it is only the fallback.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", read("/proc/self/status") or "")
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
