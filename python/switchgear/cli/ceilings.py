# SPDX-License-Identifier: BSD-3-Clause
"""What this machine can do at best, measured: multiply-adds per second and bytes read per second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bench_case import FORMATS, Case
from .common import optional


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


def _native(dtype_names: Iterable[str], num_threads: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The native probes: (read, compute by dtype), empty without the native module."""
    native, _ = optional("switchgear._C")
    if native is None:
        return {}, {name: {} for name in dtype_names}
    compute = {name: {"switchgear, registers": multiply_rate(native, name, num_threads)} for name in dtype_names}
    return {"switchgear, vector loads": native.read_bandwidth(num_threads)}, compute


def multiply_rate(native: Any, dtype_name: str, num_threads: int) -> float:
    """The native probe of multiply-adds in registers, in flop/s."""
    arithmetic = FORMATS[dtype_name].arithmetic
    if arithmetic == "int8":
        return float(native.int8_rate(num_threads))
    return float(native.fma_rate(arithmetic, num_threads))


def measure(dtype_names: list[str], num_threads: int, seconds: float = 0.5) -> dict[str, Any]:
    """{"read": best, "compute": {dtype: best}, "candidates": all of them with their names}, in bytes/s and flop/s.

    The native probes are multiply-adds in registers, and vector loads. The best of all candidates counts. Without the
    native module the ceilings are torch's own rates, and "remark" says so.
    """
    read, compute = _native(dtype_names, num_threads)
    remark = "" if read else f"no native probes ({optional('switchgear._C')[1]}): the ceilings are torch's own rates"
    for name in dtype_names:
        compute[name] |= gemm_rates(FORMATS[name].dtype, seconds)
    ceilings = {"candidates": {"read": read or torch_read_rates(seconds), "compute": compute}, "remark": remark}
    return _with_best(ceilings)


def _with_best(ceilings: dict[str, Any]) -> dict[str, Any]:
    candidates = ceilings["candidates"]
    ceilings["read"] = max(candidates["read"].values())
    ceilings["compute"] = {name: max(rates.values()) for name, rates in candidates["compute"].items()}
    return ceilings


# ---- in the turns of a case ------------------------------------------------------------------------------------------


def multiply_probe(case: Case) -> Callable[[], float]:
    """flop/s on all threads now: multiply-adds in registers; without the native module, dense products."""
    native, _ = optional("switchgear._C")
    if native is not None:
        return lambda: multiply_rate(native, case.dtype_name, torch.get_num_threads())
    return lambda: max(gemm_rates(case.dtype, 0.0).values())


def read_probe(case: Case) -> Callable[[int], object]:
    """Reads the weights of the experts that a routing touches, once: the least that any layer does."""
    weights = case.weights
    if case.format.weight_bytes != case.dtype.itemsize:  # quantised: as many bytes on the same pages
        weights = [quantised_stand_in(case, weight) for weight in weights]
    parts = [[weight[expert] for expert in experts for weight in weights] for experts in case.touched]
    native, _ = optional("switchgear._C")
    if native is not None:
        return lambda number: native.read(parts[number % len(parts)], torch.get_num_threads())
    return lambda number: [part.view(torch.int16).sum() for part in parts[number % len(parts)]]


def quantised_stand_in(case: Case, weight: Tensor) -> Tensor:
    """[E, bytes] of what the quantised weight takes, written once so that the memory is there."""
    num_experts, size = weight.shape[0], weight[0].numel()
    data = torch.empty(num_experts, int(size * case.format.weight_bytes), dtype=torch.uint8)
    return case.on_its_pages(data.fill_(1))
