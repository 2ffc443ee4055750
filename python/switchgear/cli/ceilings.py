# SPDX-License-Identifier: BSD-3-Clause
"""What this machine can do at best, measured: multiply-adds per second and bytes read per second."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from .bench_case import DTYPES
from .errors import optional


def _best(call: Callable[[], Any], seconds: float) -> float:
    """The fastest of the repetitions that fit into `seconds` (at least 3): a ceiling is not a median."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def gemm_rates(dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """flop/s of dense products of 2048³ in torch, both ways round: A·B, and x·Wᵀ as in a linear layer."""
    n = 2048
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return {
        "torch.matmul": 2 * n**3 / _best(lambda: torch.matmul(a, b), seconds),
        "torch.nn.functional.linear": 2 * n**3 / _best(lambda: F.linear(a, b), seconds),
    }


def torch_read_rates(seconds: float) -> dict[str, float]:
    """bytes/s of torch operations that read 512 MiB and write next to nothing: lower bounds of what memory gives."""
    data = torch.ones(2**29, dtype=torch.uint8)
    matrix, vector = data.view(torch.float32).view(-1, 4096), torch.ones(4096)
    return {
        "torch.sum of int64": data.numel() / _best(lambda: data.view(torch.int64).sum(), seconds),
        "torch.mv of float32": data.numel() / _best(lambda: torch.mv(matrix, vector), seconds),
    }


def measure(dtype_names: list[str], num_threads: int, seconds: float = 0.5) -> dict[str, Any]:
    """{"read": best, "compute": {dtype: best}, and all candidates with their names}, in bytes/s and flop/s.

    The native probes are the reference where there are any: registers only for the multiply-adds, vector loads with
    prefetch for reading. The best of all candidates counts, so no implementation of the run is above 100 % by much.
    """
    native, reason = optional("switchgear._C")
    read = {}
    if native is not None and hasattr(native, "read_bandwidth"):
        read["switchgear, vector loads"] = float(native.read_bandwidth(num_threads))
    else:
        read |= torch_read_rates(seconds)
    compute: dict[str, dict[str, float]] = {}
    for name in dtype_names:
        compute[name] = gemm_rates(DTYPES[name], seconds)
        if native is not None and hasattr(native, "fma_rate"):
            torch_name = str(DTYPES[name]).removeprefix("torch.")
            compute[name]["switchgear, registers"] = float(native.fma_rate(torch_name, num_threads))
    return {
        "read": max(read.values()),
        "compute": {name: max(rates.values()) for name, rates in compute.items()},
        "candidates": {"read": read, "compute": compute},
        "remark": "" if native is not None else f"no native probes ({reason}): the ceilings are torch's own rates",
    }


def floor_seconds(ceilings: dict[str, Any], dtype_name: str, flops: float, weight_bytes: float) -> tuple[float, str]:
    """The least time for a case, and what binds it: "compute" or "memory"."""
    compute, memory = flops / ceilings["compute"][dtype_name], weight_bytes / ceilings["read"]
    return max(compute, memory), "compute" if compute >= memory else "memory"
