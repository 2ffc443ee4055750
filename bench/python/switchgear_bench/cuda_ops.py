# SPDX-License-Identifier: BSD-3-Clause
"""Single ops on a GPU at the shapes of published figures: router, bare grouped GEMM, permutation and combination.

Each case's whole result is verified against torch before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switchgear import combine, functional, permute, plan, route

from .cuda_clock import in_turns
from .cuda_tables import failure

OP_SECONDS = 1.0


class OpCase(NamedTuple):
    op: str
    case: str
    flops: float
    bytes: float  # read once and written once
    calls: dict[str, Callable[[], Tensor]]  # by competitor; all return the same result
    tolerance: float  # between them, relative to the largest element


def router(tokens: int, num_experts: int, top_k: int, score_function: str, device: str = "cuda") -> OpCase:
    logits = torch.randn(tokens, num_experts, device=device).bfloat16()

    def in_torch() -> Tensor:
        scores = logits.float().softmax(-1) if score_function == "softmax" else logits.float().sigmoid()
        return scores.topk(top_k, -1).values

    return OpCase(
        "route", f"{score_function} T={tokens} E={num_experts} K={top_k}", 0.0,
        2.0 * logits.numel() + 8.0 * tokens * top_k,
        {"switchgear": lambda: route(logits, top_k, score_function=score_function).topk_weights, "torch": in_torch},
        1e-5,
    )  # fmt: skip


def grouped(rows: int, k: int, n: int, num_experts: int, device: str = "cuda") -> OpCase:
    """The rows are divided equally among the experts."""
    x = torch.randn(rows, k, device=device).bfloat16()
    weight = torch.randn(num_experts, n, k, device=device).bfloat16() * 0.02
    ends = torch.arange(1, num_experts + 1, device=device, dtype=torch.int32) * (rows // num_experts)
    offsets = F.pad(ends, (1, 0))
    calls: dict[str, Callable[[], Tensor]] = {"switchgear": lambda: functional.grouped_gemm(x, weight, offsets)}
    if hasattr(F, "grouped_mm"):
        calls["torch"] = lambda: F.grouped_mm(x, weight.mT, offs=ends)
    moved = 2.0 * (x.numel() + weight.numel() + rows * n)
    # two roundings of the result to bfloat16, half an ulp each
    return OpCase("grouped_gemm", f"M={rows} K={k} N={n} E={num_experts}", 2.0 * rows * k * n, moved, calls, 2.0**-7)


def rows_of(
    tokens: int, hidden: int, num_experts: int, top_k: int, device: str
) -> tuple[Tensor, functional.Plan, Tensor]:
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    ids = torch.rand(tokens, num_experts, device=device).topk(top_k, -1).indices.int()
    return x, plan(ids, num_experts), torch.rand(tokens, top_k, device=device)


def permutation(tokens: int, hidden: int, num_experts: int, top_k: int, device: str = "cuda") -> OpCase:
    x, order, _ = rows_of(tokens, hidden, num_experts, top_k, device)
    return OpCase(
        "permute", f"T={tokens} K={top_k} E={num_experts} H={hidden}", 0.0, 2.0 * (1 + top_k) * x.numel(),
        {"switchgear": lambda: permute(x, order), "torch": lambda: x[order.token_indices]}, 0.0,
    )  # fmt: skip


def combination(tokens: int, hidden: int, num_experts: int, top_k: int, device: str = "cuda") -> OpCase:
    x, order, weights = rows_of(tokens, hidden, num_experts, top_k, device)
    rows = permute(x, order)

    def in_torch() -> Tensor:
        return torch.einsum("tkh,tk->th", rows[order.slot_indices], weights.bfloat16())

    return OpCase(
        "combine", f"T={tokens} K={top_k} E={num_experts} H={hidden}", 0.0, 2.0 * (1 + top_k) * x.numel(),
        {"switchgear": lambda: combine(rows, order, weights), "torch": in_torch}, 2.0**-6,
    )  # fmt: skip


CASES: tuple[Callable[[], OpCase], ...] = (
    lambda: router(16384, 128, 8, "softmax"),
    lambda: router(1, 128, 8, "softmax"),
    lambda: router(8192, 256, 8, "softmax"),
    lambda: router(8192, 512, 8, "sigmoid"),
    lambda: grouped(8192, 5120, 8192, 16),
    lambda: grouped(65536, 2048, 1536, 128),
    lambda: permutation(4096, 7168, 128, 8),
    lambda: combination(4096, 7168, 128, 8),
)


def result(case: OpCase, competitor: str, times: list[float]) -> dict[str, Any]:
    """One result in the format of --json; `times` are milliseconds."""
    ms = median(times)
    return {
        "op": case.op, "case": case.case, "competitor": competitor, "us": 1e3 * ms, "best_us": 1e3 * min(times),
        "repetitions": len(times), "tflops": case.flops / ms / 1e9 if case.flops else None,
        "gbytes_per_s": case.bytes / ms / 1e6,
    }  # fmt: skip


def disagreement(results: dict[str, Tensor]) -> float:
    """The largest difference from the first result, relative to its largest element."""
    first = next(iter(results.values())).double()
    scale = first.abs().amax().clamp_min(1e-30)
    return max(float((other.double() - first).abs().amax() / scale) for other in results.values())


def measure_one(case: OpCase) -> list[dict[str, Any]]:
    """RuntimeError for a wrong result."""
    error = disagreement({competitor: call() for competitor, call in case.calls.items()})
    if not error <= case.tolerance:
        raise RuntimeError(f"{error:.1e} from torch, expected at most {case.tolerance:.1e}")
    return [result(case, competitor, times) for competitor, times in in_turns(case.calls, OP_SECONDS).items()]


def measure(end: float, results: dict[str, Any], note: Callable[[dict[str, Any]], None]) -> None:
    """All cases, until the time `end`, into `results`; an exception ends its case alone."""
    for number, make in enumerate(CASES):
        if perf_counter() > end:
            results["skipped"].append({"case": "ops", "competitor": "all", "reason": "--budget"})
            return
        title = f"op {number}"
        try:
            case = make()
            title = f"{case.op} {case.case}"
            results["ops"] += measure_one(case)
        except Exception as problem:  # of switchgear itself, or of the device
            results["skipped"].append(failure(title, problem))
            results["failed"].append(title)
        note(results)
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
