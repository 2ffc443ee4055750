# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench --device cuda`: whole MoE layers on a GPU, at the shapes for which others have published figures.

As on the CPU, a result is compared with float64 before it is timed. Peers take turns; each call is timed by events, and
the L2 cache is overwritten before it.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from .. import cuda
from .bench_case import Case, Inputs, Layer, forward, make_inputs, train
from .bench_verify import expected, relative_error, tolerance
from .common import CommandError, positive, require
from .cost_model import GPUS
from .peers import PEERS, Skip
from .published import FIGURES
from .shapes import GPU_SHAPES, GPU_TOKENS, Shape

PEERS_HERE = ("switchgear", "torch_grouped_mm", "hf_grouped_mm", "hf_batched_mm", "hf_eager", "hf_sonicmoe")
DEFAULT_PEERS = ("switchgear", "torch_grouped_mm", "hf_grouped_mm", "hf_batched_mm", "hf_sonicmoe")
DECODE = (("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 16), ("qwen3-30b-a3b", 256))  # forward, beside GPU_TOKENS
FLUSHED_BYTES = 256 << 20  # more than the L2 of any GPU
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
CASE_SECONDS = 4.0


def run(args: argparse.Namespace) -> int:
    try:
        cuda.require()
    except RuntimeError as error:
        raise CommandError(f"--device cuda: {error}") from None
    from .bench import choose, open_outputs

    console = require("rich.console").Console()
    shapes = choose("shapes", args.shapes or ",".join(GPU_SHAPES), GPU_SHAPES)
    modes = choose("modes", args.modes, ("forward", "train"))
    peers = choose("peers", args.peers or ",".join(DEFAULT_PEERS), PEERS_HERE)
    outputs = open_outputs(args)
    end = perf_counter() + (args.budget or 240.0)
    results: dict[str, Any] = {"schema": "switchgear-bench-cuda/1", "machine": describe(), "results": [], "skipped": []}
    console.print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), highlight=False)
    for name, tokens, mode in cases(shapes, modes, args.tokens):
        if perf_counter() > end:
            results["skipped"].append({"case": f"{name}, T={tokens}, {mode}", "peer": "all", "reason": "--budget"})
            continue
        case = make_case(name, GPU_SHAPES[name], tokens, mode, args.routing)
        rows, skipped = measure_case(case, peers)
        results["results"] += rows
        results["skipped"] += skipped
        print_case(console, case, rows, skipped)
        del case
        torch.cuda.empty_cache()
    write(results, outputs)
    return 1 if any(row["wrong"] for row in results["results"]) else 0


def cases(shapes: list[str], modes: list[str], tokens: str | None) -> list[tuple[str, int, str]]:
    """(shape, tokens, mode): the tokens of published figures, and few as in decoding, or else --tokens."""
    if tokens is not None:
        try:
            counts = [positive(part) for part in tokens.split(",")]
        except (ValueError, argparse.ArgumentTypeError):
            raise CommandError(f"--tokens: expected positive integers, got {tokens!r}") from None
        return [(shape, count, mode) for shape in shapes for mode in modes for count in counts]
    plan = [(shape, GPU_TOKENS[shape], mode) for shape in shapes for mode in modes]
    return plan + [(shape, count, "forward") for shape, count in DECODE if shape in shapes and "forward" in modes]


def describe() -> dict[str, Any]:
    """The card, its clocks and the software: without them a figure means nothing."""
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


def make_case(name: str, shape: Shape, tokens: int, mode: str, routing: str) -> Case:
    dtype, device = torch.bfloat16, torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def weight(*size: int) -> torch.nn.Parameter:
        data = torch.empty(shape.num_experts, *size, dtype=dtype, device=device)
        for expert in data:  # one at a time: in float32 all would take twice the memory
            expert.copy_(torch.randn(size, generator=generator, device=device) * 0.02)
        return torch.nn.Parameter(data)

    weights = weight(2 * shape.intermediate_size, shape.hidden_size), weight(shape.hidden_size, shape.intermediate_size)
    inputs = Inputs(*(tensor.to(device) for tensor in make_inputs(shape, dtype, tokens, routing, seed=0)))
    grad_y = torch.randn(tokens, shape.hidden_size, generator=generator, device=device).to(dtype)
    return Case(name, shape, "bf16", tokens, mode, *weights, [inputs], grad_y)


def measure_case(case: Case, peers: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Verify, then time all peers of one case: (rows, what was left out and why)."""
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    layers: dict[str, Layer] = {}
    want, limit = expected(case), tolerance(case)
    for name in peers:
        try:
            peer = PEERS[name]
            if case.mode not in peer.modes:
                raise Skip(f"has only {', '.join(peer.modes)}")
            layer = peer.make(case)
            error = relative_error(case, layer, want)
        except Skip as reason:
            skipped.append({"case": case.name, "peer": name, "reason": str(reason)})
            continue
        except Exception as problem:  # other libraries break in their own ways, out of memory among them
            if name == "switchgear":
                raise
            skipped.append({"case": case.name, "peer": name, "reason": f"{type(problem).__name__}: {problem}"})
            continue
        finally:
            case.gate_up_proj.grad = case.down_proj.grad = None
            torch.cuda.empty_cache()
        rows.append({
            "shape": case.shape_name, **case.shape._asdict(), "tokens": case.tokens, "dtype": "bf16",
            "mode": case.mode, "peer": name, "flops": case.flops, "relative_error": error, "error_limit": limit,
            "wrong": not error <= limit, "ms": None, "best_ms": None, "repetitions": 0, "tflops": None,
            "peak_MiB": None,
        })  # fmt: skip
        if error <= limit:
            layers[name] = layer
    calls = {name: call_of(case, layer) for name, layer in layers.items()}
    memory = {name: peak_memory(call) for name, call in calls.items()}
    times = in_turns(calls)
    for row in rows:
        if row["peer"] in times:
            taken = times[row["peer"]]
            row |= {
                "ms": median(taken), "best_ms": min(taken), "repetitions": len(taken),
                "tflops": case.flops / median(taken) / 1e9, "peak_MiB": memory[row["peer"]] / 2**20,
            }  # fmt: skip
    case.gate_up_proj.grad = case.down_proj.grad = None
    return rows, skipped


def call_of(case: Case, layer: Layer) -> Callable[[], object]:
    inputs = case.inputs[0]
    return (lambda: train(layer, case, inputs)) if case.mode == "train" else (lambda: forward(layer, inputs))


def peak_memory(call: Callable[[], object]) -> float:
    """Bytes that a call holds at most, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def timer() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each call, by turns, each after a write of more than the L2 cache holds."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = perf_counter(), 0
    while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and perf_counter() - start < CASE_SECONDS):
        events = {}
        for name, call in calls.items():
            flushed.zero_()
            begin, finish = timer(), timer()
            begin.record()
            call()
            finish.record()
            events[name] = (begin, finish)
        torch.cuda.synchronize()
        if rounds > 0:  # the first round warms up
            for name, (begin, finish) in events.items():
                times[name].append(begin.elapsed_time(finish))
        rounds += 1
    return times


def print_case(console: Any, case: Case, rows: list[dict[str, Any]], skipped: list[dict[str, str]]) -> None:
    console.print(f"\n[bold]{case.name}[/]", highlight=False)
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("peer", no_wrap=True)
    for column in ("ms", "TFLOP/s", "of peak", "peak MiB", "error", "calls"):
        table.add_column(column, justify="right", no_wrap=True)
    peak = next((gpu.tensor_rate for gpu in GPUS if gpu.name in torch.cuda.get_device_name(0)), None)
    for row in sorted(rows, key=lambda row: row["ms"] or float("inf")):
        error = f"{row['relative_error']:.0e}"
        if row["wrong"]:
            table.add_row(row["peer"], "not timed", "", "", "", f"[red]{error} > {row['error_limit']:.0e}[/]", "")
            continue
        of_peak = f"{1e14 * row['tflops'] / peak:.0f} %" if peak else ""
        table.add_row(row["peer"], f"{row['ms']:.3f}", f"{row['tflops']:.0f}", of_peak, f"{row['peak_MiB']:,.0f}",
                      error, str(row["repetitions"]))  # fmt: skip
    console.print(table)
    for entry in skipped:
        console.print(f"  {entry['peer']}: left out ({entry['reason']})", highlight=False, markup=False)
    for figure in FIGURES:
        if (figure.shape, figure.mode) == (case.shape_name, case.mode) and GPU_TOKENS[figure.shape] == case.tokens:
            console.print(f"  published, {figure.gpu}: {figure.who} {figure.tflops:.0f} TFLOP/s ({figure.source})",
                          highlight=False, soft_wrap=True)  # fmt: skip


def write(results: dict[str, Any], outputs: dict[str, str]) -> None:
    if "json" in outputs:
        with open(outputs["json"], "w") as file:
            json.dump(results, file, indent=2)
    columns = ("shape", "tokens", "mode", "peer", "ms", "best_ms", "tflops", "peak_MiB", "relative_error")
    if "csv" in outputs:
        with open(outputs["csv"], "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(results["results"])
    if "markdown" in outputs:
        with open(outputs["markdown"], "w") as file:
            about = results["machine"]
            file.write(f"{about['gpu']}, torch {about['torch']}, CUDA {about['cuda']}\n\n")
            file.write("| shape | tokens | mode | peer | ms | TFLOP/s | peak MiB |\n|---|---|---|---|---|---|---|\n")
            for row in results["results"]:
                timed = f"{row['ms']:.3f} | {row['tflops']:.0f} | {row['peak_MiB']:.0f}" if row["ms"] else "wrong | |"
                file.write(f"| {row['shape']} | {row['tokens']} | {row['mode']} | {row['peer']} | {timed} |\n")
