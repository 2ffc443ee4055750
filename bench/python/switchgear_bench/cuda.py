# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench cuda`: MoE layers and single ops on a GPU, at the shapes of published figures.

Results are compared with float64 before they are timed, as on the CPU. Competitors take turns. Events time each call,
or the replay of a CUDA graph of it, after reads that displace what L2 holds. The limits of the card are measured in the
same run. cuda_tables.py makes tables and files from the results. Files are written after each case, and an exception
ends its case alone.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any

import torch

from switchgear import cuda
from switchgear.cli.common import CommandError, console

from . import cuda_ops, cuda_tables
from .case import Case, Inputs, Layer, call_of, make_inputs
from .competitors import COMPETITORS, Skip
from .cuda_clock import best_seconds, captured, in_turns, peak_memory
from .options import add_budget, add_files, add_modes, add_routing, add_shapes, add_tokens, choose
from .results import Row, open_outputs
from .shapes import GPU_SHAPES, GPU_TOKENS, Shape
from .verify import verify

COMPETITORS_HERE = ("switchgear", "torch_grouped_mm", "hf_grouped_mm", "hf_batched_mm", "hf_eager", "hf_sonicmoe")
DEFAULT_COMPETITORS = ("switchgear", "torch_grouped_mm", "hf_grouped_mm", "hf_batched_mm", "hf_sonicmoe")
DECODE = (("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 16), ("qwen3-30b-a3b", 256))  # forward, in addition to GPU_TOKENS
OPS = "ops"  # a name for --shapes: router, bare grouped GEMM, permutation
BUDGET = 240.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, (*GPU_SHAPES, OPS))
    add_tokens(parser, "those of published figures, and few")
    add_modes(parser)
    default = ",".join(DEFAULT_COMPETITORS)
    parser.add_argument("--competitors", metavar="LIST", help=f"of {', '.join(COMPETITORS_HERE)} (default: {default})")
    add_routing(parser)
    add_budget(parser, f"{BUDGET:.0f}")
    add_files(parser, "json csv markdown")


def run(args: argparse.Namespace) -> int:
    shapes = choose("shapes", args.shapes or ",".join((*GPU_SHAPES, OPS)), (*GPU_SHAPES, OPS))
    names = choose("competitors", args.competitors or ",".join(DEFAULT_COMPETITORS), COMPETITORS_HERE)
    plan = cases([name for name in shapes if name != OPS], args.modes, args.tokens)
    outputs = open_outputs(args)
    try:
        cuda.require()
    except RuntimeError as error:
        raise CommandError(str(error)) from None
    results = measure_all(
        plan, names, OPS in shapes, args.routing, args.budget or BUDGET, partial(cuda_tables.write, outputs=outputs)
    )
    return 1 if results["failed"] or any(row["wrong"] for row in results["results"]) else 0


def cases(shapes: list[str], modes: list[str], tokens: tuple[int, ...] | None) -> list[tuple[str, int, str]]:
    """(shape, tokens, mode): --tokens, or else the tokens of published figures and small counts as in decoding."""
    plan = [(shape, count, mode) for shape in shapes for mode in modes for count in tokens or (GPU_TOKENS[shape],)]
    if tokens is None and "forward" in modes:
        plan += [(shape, count, "forward") for shape, count in DECODE if shape in shapes]
    return plan


def measure_all(
    plan: list[tuple[str, int, str]],
    competitors: list[str],
    ops: bool,
    routing: str,
    budget: float,
    note: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Ceilings, ops, then layers, until the budget is used up. Prints tables as it goes, and calls `note` with all
    results so far after each case."""
    end = perf_counter() + budget
    results: dict[str, Any] = {
        "schema": cuda_tables.SCHEMA, "machine": describe(), "ceilings": ceilings(), "routing": routing,
        "ops": [], "results": [], "skipped": [], "failed": [],
    }  # fmt: skip
    out = console()
    cuda_tables.print_machine(out, results)
    note(results)
    if ops:
        cuda_ops.measure(end, results, note)
        cuda_tables.print_ops(out, results)
    for name, tokens, mode in plan:
        if perf_counter() > end:
            late = {"case": f"{name}, T={tokens}, {mode}", "competitor": "all", "reason": "--budget"}
            results["skipped"].append(late)
            continue
        title = f"{name}, T={tokens}, {mode}"
        try:
            rows, skipped = measure_case(make_case(name, GPU_SHAPES[name], tokens, mode, routing), competitors)
        except Exception as error:  # of switchgear itself, or of the device
            rows, skipped = [], [cuda_tables.failure(title, error)]
            results["failed"].append(title)
        results["results"] += rows
        results["skipped"] += skipped
        cuda_tables.print_case(out, results, rows, skipped)
        note(results)
        release()
    return results


def release() -> None:
    """Returns freed memory to the device, unless an earlier error of the device stays."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def describe() -> dict[str, Any]:
    """The card, its clocks and the software: figures are meaningless without them."""
    properties = torch.cuda.get_device_properties(0)
    about = {
        "gpu": properties.name, "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__, "cuda": torch.version.cuda, "driver": cuda.module().driver_version(),
    }  # fmt: skip
    if shutil.which("nvidia-smi"):
        fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        about |= dict(zip(fields.split(","), (part.strip() for part in answer.split(",")), strict=False))
    return about


def ceilings() -> dict[str, float]:
    """This card's limits: flop/s of a dense bfloat16 product of 8192³, bytes/s of reading and writing 1 GiB."""
    n, device = 8192, torch.device("cuda")
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "compute": 2.0 * n**3 / best_seconds(lambda: torch.matmul(a, b.T)),
        "memory": 2.0 * source.nbytes / best_seconds(lambda: target.copy_(source)),
    }


def make_case(name: str, shape: Shape, tokens: int, mode: str, routing: str) -> Case:
    dtype, device = torch.bfloat16, torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def weight(*size: int) -> torch.nn.Parameter:
        data = torch.empty(shape.num_experts, *size, dtype=dtype, device=device)
        for expert in data:  # one at a time: all in float32 would double the memory
            expert.copy_(torch.randn(size, generator=generator, device=device) * 0.02)
        return torch.nn.Parameter(data)

    weights = weight(2 * shape.intermediate_size, shape.hidden_size), weight(shape.hidden_size, shape.intermediate_size)
    inputs = Inputs(*(tensor.to(device) for tensor in make_inputs(shape, dtype, tokens, routing, seed=0)))
    grad_y = torch.randn(tokens, shape.hidden_size, generator=generator, device=device).to(dtype)
    return Case(name, shape, "bf16", tokens, mode, *weights, [inputs], grad_y)


def measure_case(case: Case, names: list[str]) -> tuple[list[Row], list[dict[str, str]]]:
    """Verify, then time all competitors of one case: (rows, what was left out and why)."""

    def clear() -> None:
        case.gate_up_proj.grad = case.down_proj.grad = None
        torch.cuda.empty_cache()

    def prepare(name: str) -> Layer:
        clear()
        if not COMPETITORS[name].runs("bf16", case.mode):
            raise Skip(f"has only {', '.join(COMPETITORS[name].modes)}")
        return COMPETITORS[name].make(case)

    found = verify(case, names, prepare, case.name)
    clear()
    calls = {name: partial(call_of(case, layer), 0) for name, layer in found.layers.items()}
    memory = {name: peak_memory(call) for name, call in calls.items()}
    timed = {name: captured(call) if case.mode == "forward" else None for name, call in calls.items()}
    for name, replay in timed.items():
        if replay:
            found.errors[name] = max(found.errors[name], replayed_error(replay, calls[name]))
    right = [name for name in calls if found.errors[name] <= found.limit]
    times = in_turns({name: timed[name] or calls[name] for name in right})
    clear()
    rows = [
        cuda_tables.row_of(case, name, error, found.limit, times.get(name, []), memory.get(name))
        | {"timed": "graph" if timed.get(name) else "call"}
        for name, error in found.errors.items()
    ]
    return rows, found.skipped


def replayed_error(replay: Callable[[], Any], call: Callable[[], Any]) -> float:
    """How far what a replay writes is from the output of a call, which was verified: root mean square, relative."""
    with torch.inference_mode():
        replay().fill_(math.nan)  # what it does not write is wrong
        got, want = replay().double(), call().double()
        error = float((got - want).norm() / want.norm())
    return error if math.isfinite(error) else math.inf
