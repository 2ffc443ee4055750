# SPDX-License-Identifier: BSD-3-Clause
"""Measured limits of this machine: multiply-adds per second and bytes read per second."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switchgear import _C

from .case import FORMATS, Case


def multiply_rate(dtype_name: str, num_threads: int) -> float:
    """Multiply-adds in registers, in flop/s, by the instructions used for weights in this format."""
    arithmetic = FORMATS[dtype_name].arithmetic
    if isinstance(arithmetic, int):
        return _C.dot_rate(arithmetic, num_threads)
    return _C.fma_rate(arithmetic, num_threads)


def measure(dtype_names: list[str], num_threads: int, seconds: float = 0.5) -> dict[str, Any]:
    """{"read": rates, "compute": {dtype: rates}}, in bytes/s and flop/s, by the name of each probe: vector loads from
    512 MiB; multiply-adds in registers and dense products in torch."""
    registers = {name: {"switchgear, registers": multiply_rate(name, num_threads)} for name in dtype_names}
    return {
        "read": {"switchgear, vector loads": _C.read_bandwidth(num_threads)},
        "compute": {name: rates | dense_rates(name, seconds) for name, rates in registers.items()},
    }


def dense_rates(dtype_name: str, seconds: float) -> dict[str, float]:
    """flop/s of dense products in torch, in both layouts: A·B, and x·Wᵀ as in a linear layer."""
    if isinstance(FORMATS[dtype_name].arithmetic, int):
        return {}
    dtype = FORMATS[dtype_name].dtype
    return {
        "torch.matmul": _dense_rate(torch.matmul, dtype, seconds),
        "torch.nn.functional.linear": _dense_rate(F.linear, dtype, seconds),
    }


def _dense_rate(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, seconds: float) -> float:
    """Of 2048³, or of less where that takes longer: without AVX-512 torch has no fast product of bfloat16."""
    n, rate = 128, 0.0
    while rate == 0.0 or (n < 2048 and 2 * (2 * n) ** 3 / rate < seconds / 4):
        n *= 2
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        rate = 2 * n**3 / _fastest(partial(product, a, b), seconds if n == 2048 else 0.0)
    return rate


def _fastest(call: Callable[[], Any], seconds: float) -> float:
    """The fastest of the repetitions that fit into `seconds` (at least 3): a ceiling is not a median."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


# ---- in the turns of a case ------------------------------------------------------------------------------------------


def read_probe(case: Case) -> Callable[[int], object]:
    """Reads the weights of the experts that a routing touches, once: the minimum for any layer."""
    weights = case.weights
    if case.stored is not None:
        stored = [tensor for weight in case.stored for tensor in (weight.data, weight.scales) if tensor is not None]
        weights = [
            tensor.view(case.shape.num_experts, -1) for tensor in stored
        ]  # in groups an expert has several planes
    elif case.format.weight_bytes != case.dtype.itemsize:
        weights = [quantised_stand_in(case, weight) for weight in weights]
    parts = [[weight[expert] for expert in experts for weight in weights] for experts in case.touched]
    return lambda number: _C.read(parts[number % len(parts)], torch.get_num_threads())


def quantised_stand_in(case: Case, weight: Tensor) -> Tensor:
    """[E, words of 4 bytes] of the size of the quantised weight, written once so that its pages exist."""
    num_experts, size = weight.shape[0], weight[0].numel()
    data = torch.empty(num_experts, int(size * case.format.weight_bytes) // 4, dtype=torch.int32)
    return case.on_its_pages(data.fill_(1))
