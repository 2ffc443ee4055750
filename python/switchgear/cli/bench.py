# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench`: whole MoE layers at the shapes of real models, against other implementations on this machine.

Everything is measured in one run, in turns: the machine's ceilings, and all peers of a case. Each peer's result is
compared with float64 before it is timed; one that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from . import bench_cuda, bench_model, bench_tables, machine
from .bench_case import DTYPES, Case, Layer, forward, make_case, make_weights, train
from .bench_verify import expected, relative_error, tolerance
from .ceilings import floor_seconds, measure, measure_again
from .common import CommandError, optional, positive, require
from .info import ENVIRONMENT
from .peers import PEERS, Skip
from .shapes import SHAPES
from .timing import interleave

DEFAULT_SHAPES = "tiny,olmoe,qwen3-30b-a3b,mixtral-half"
TOKENS = {"forward": (1, 16, 256, 2048), "train": (256, 2048)}  # of a run that names none
QUICK_SHAPES, QUICK_TOKENS = "tiny,olmoe", {"forward": (1, 256), "train": (256,)}
LONGEST_CASE, LONGEST_QUICK_CASE = 12.0, 3.0  # seconds of timing: more adds nothing
SLOWEST_CALL = 4.0  # seconds; a slower one would cost the other cases their time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shapes", metavar="LIST", help=f"of {', '.join(SHAPES)} (default: {DEFAULT_SHAPES})")
    add("--tokens", metavar="LIST", help="tokens per call (default: 1,16,256,2048; in training 256,2048)")
    add("--dtype", metavar="LIST", help="bf16, fp32 (default: bf16 if the CPU multiplies it, else fp32)")
    add("--mode", metavar="LIST", default="forward,train", help="forward, train (forward and backward)")
    add(
        "--peers",
        metavar="LIST",
        help=f"of {', '.join(PEERS)}, or all (default: torch's, transformers' and switchgear)",
    )
    skew_help = "none: experts are equally likely; zipf: expert e is 1/(e+1) times as likely"
    add("--skew", choices=("none", "zipf"), default="none", help=skew_help)
    pages_help = "of the weights, for every peer: huge as after switchgear.use_huge_pages, or as torch allocates them"
    add("--pages", choices=("huge", "default"), default="huge", help=pages_help)
    add("--quick", action="store_true", help="a few small cases, within a minute")
    add("--budget", type=float, metavar="SECONDS", help="time for the whole run (default: 540; quick: 45)")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the layers run (cuda: at shapes of GPU models)")
    add("--model", action="store_true", help="predict what the CUDA kernels cost, beside published figures, and stop")
    add("--list", action="store_true", help="list shapes and peers, and stop")
    add("--json", metavar="FILE", help="write all results, with machine and ceilings")
    add("--csv", metavar="FILE", help="write one row per result")
    add("--markdown", metavar="FILE", help="write a table for a README")
    add("--plot", metavar="FILE", help="write a picture (PNG, SVG or PDF)")


def choose(option: str, text: str, known: Any) -> list[str]:
    """The names of a comma-separated option, each of which must be known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise CommandError(f"--{option}: expected a list of {', '.join(known)}; got {text!r}")
    return list(dict.fromkeys(names))


def tokens_of(text: str | None, mode: str, quick: bool) -> tuple[int, ...]:
    if text is None:
        return (QUICK_TOKENS if quick else TOKENS)[mode]
    try:
        return tuple(positive(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise CommandError(f"--tokens: expected positive integers, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    if args.list:
        bench_tables.print_choices()
        return 0
    if args.model:
        return bench_model.run(args)
    if args.device == "cuda":
        return bench_cuda.run(args)
    require("rich")
    if args.plot:
        require("matplotlib")
    torch.set_num_threads(args.threads)
    shapes = choose("shapes", args.shapes or (QUICK_SHAPES if args.quick else DEFAULT_SHAPES), SHAPES)
    dtypes = choose("dtype", args.dtype or ("bf16" if machine.has_fast_bfloat16() else "fp32"), DTYPES)
    modes = choose("mode", args.mode, TOKENS)
    named = args.peers is not None and args.peers != "all"
    peers = choose("peers", args.peers, PEERS) if named else [n for n, p in PEERS.items() if p.default or args.peers]
    plan = [(shape, dtype, mode, tokens) for shape in shapes for dtype in dtypes for mode in modes
            for tokens in tokens_of(args.tokens, mode, args.quick)]  # fmt: skip
    outputs = open_outputs(args)  # before minutes of work
    results = measure_all(plan, peers, named, args)
    bench_tables.write(results, outputs)
    return 1 if any(row["wrong"] for row in results["results"]) else 0


def open_outputs(args: argparse.Namespace) -> dict[str, str]:
    """Paths by kind; each can be written. CommandError for one that can't."""
    outputs = {kind: getattr(args, kind) for kind in ("json", "csv", "markdown", "plot") if getattr(args, kind)}
    for kind, path in outputs.items():
        try:
            with open(path, "ab"):
                pass
        except OSError as error:
            raise CommandError(f"--{kind}: cannot write {path}: {error.strerror}") from None
    return outputs


def describe_machine(threads: int) -> dict[str, Any]:
    native, reason = optional("switchgear._C")
    transformers, _ = optional("transformers")
    return machine.cpu() | {
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": getattr(transformers, "__version__", None),
        "switchgear": native.version if native else f"reference only: {reason}",
        "isa": native.cpu_isa() if native else None,
        "environment": machine.environment(ENVIRONMENT),
    }


def measure_all(
    plan: list[tuple[str, str, str, int]], peers: list[str], named: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """Run the cases in order, print a table after each, and return what --json writes."""
    budget = args.budget or (45.0 if args.quick else 540.0)
    end = perf_counter() + budget
    console = require("rich.console").Console()
    about = describe_machine(args.threads)
    with console.status("measuring the ceilings of this machine"):
        ceilings = measure(sorted({dtype for _, dtype, _, _ in plan}), args.threads, 0.2 if args.quick else 0.5)
    bench_tables.print_machine(console, about, ceilings)
    results: dict[str, Any] = {
        "schema": "switchgear-bench/1", "machine": about, "ceilings": ceilings,
        "settings": {"skew": args.skew, "pages": args.pages, "quick": args.quick, "budget_seconds": budget},
        "results": [], "skipped": [],
    }  # fmt: skip
    weights, weights_of = None, None
    for i, (shape_name, dtype, mode, tokens) in enumerate(plan):
        left = end - perf_counter()
        title = f"{shape_name}, T={tokens}, {dtype}, {mode}"
        if left <= 0:
            results["skipped"].append({"case": title, "peer": "all", "reason": "the time of --budget is used up"})
            continue
        if weights_of != (shape_name, dtype):
            weights = None  # the old ones go before the new ones come
            with console.status(f"making the weights of {shape_name}"):
                weights = make_weights(SHAPES[shape_name], DTYPES[dtype], huge_pages=args.pages == "huge")
                weights_of = (shape_name, dtype)
        assert weights is not None
        case = make_case(shape_name, SHAPES[shape_name], dtype, tokens, mode, args.skew, weights)
        with console.status(title) as status:
            measure_again(ceilings, dtype, args.threads)
            share = min(LONGEST_QUICK_CASE if args.quick else LONGEST_CASE, left / (len(plan) - i))
            rows, skipped = measure_case(case, peers, named, ceilings, share, status.update)
        results["results"] += rows
        results["skipped"] += skipped
        bench_tables.print_case(console, case, rows, skipped)
    for row in results["results"]:
        row |= against_ceilings(ceilings, row)  # with the ceilings as they are at the end
    bench_tables.print_skipped(console, [s for s in results["skipped"] if s["peer"] == "all"])
    about["openmp_runtimes"] = [Path(path).name for path in machine.openmp_runtimes()]
    if len(about["openmp_runtimes"]) > 1:  # a peer has brought its own, whose threads spin against the others'
        console.print(f"[yellow]more than one OpenMP runtime is loaded: {', '.join(about['openmp_runtimes'])}[/]")
    return results


def measure_case(
    case: Case, peers: list[str], named: bool, ceilings: dict[str, Any], seconds: float, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Verify, then time all peers of one case: (rows, what was left out and why)."""
    start = perf_counter()
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    layers: dict[str, Layer] = {}
    say(f"{case.name}: computing what is expected")
    want, limit, errors = expected(case), tolerance(case), {}
    for name in peers:
        try:
            say(f"{case.name}: verifying {name}")
            layer = prepare(case, name, named, ceilings)
            errors[name] = relative_error(case, layer, want)
        except Skip as reason:
            skipped.append({"case": case.name, "peer": name, "reason": str(reason)})
            continue
        if errors[name] > limit:
            rows.append(result(case, name, [], errors[name], limit))
        else:
            layers[name] = layer
    say(f"{case.name}: timing {', '.join(layers)}")
    calls = {name: call_of(case, layer) for name, layer in layers.items()}
    times = interleave(calls, seconds - (perf_counter() - start))
    case.gate_up_proj.grad = case.down_proj.grad = None
    rows += [result(case, name, taken, errors[name], limit) for name, taken in times.items()]
    return [row | against_ceilings(ceilings, row) for row in rows], skipped


def prepare(case: Case, name: str, named: bool, ceilings: dict[str, Any]) -> Layer:
    """The layer of a peer; raises Skip for what the peer has not, and for what would take too long to be useful."""
    peer = PEERS[name]
    if case.dtype_name not in peer.dtypes or case.mode not in peer.modes:
        raise Skip(f"has only {', '.join(peer.dtypes)} and {', '.join(peer.modes)}")
    if name == "hf_eager" and case.mode == "train" and not named:
        # Indexing the stacked weights makes autograd write, and add, a zero gradient of all experts for each expert:
        # one pass to write and three to add (read two, write one).
        whole = sum(weight.numel() * weight.element_size() for weight in (case.gate_up_proj, case.down_proj))
        seconds = 4 * case.touched_experts * whole / ceilings["read"]
        if seconds > SLOWEST_CALL:
            raise Skip(
                f"some {seconds:.0f} s per step: a gradient of all experts for each one (name it in --peers to see)"
            )
    try:
        return peer.make(case)
    except (ImportError, AttributeError, RuntimeError) as error:  # other libraries break in their own ways
        if name == "switchgear":
            raise
        raise Skip(f"{type(error).__name__}: {error}") from None


def call_of(case: Case, layer: Layer) -> Callable[[int], object]:
    """One timed call; numbers choose among the routings."""
    if case.mode == "train":
        return lambda number: train(layer, case, case.inputs[number % len(case.inputs)])
    return lambda number: forward(layer, case.inputs[number % len(case.inputs)])


def result(case: Case, peer: str, times: list[float], error: float, limit: float) -> dict[str, Any]:
    """One result, as --json and --csv have it; `times` is empty for a peer that is wrong."""
    seconds = median(times) if times else None
    return {
        "shape": case.shape_name, "hidden_size": case.shape.hidden_size,
        "intermediate_size": case.shape.intermediate_size, "num_experts": case.shape.num_experts,
        "top_k": case.shape.top_k, "tokens": case.tokens, "dtype": case.dtype_name, "mode": case.mode, "peer": peer,
        "ms": seconds and 1e3 * seconds, "best_ms": 1e3 * min(times) if times else None, "repetitions": len(times),
        "flops": case.flops, "weight_bytes": case.weight_bytes, "touched_experts": case.touched_experts,
        "gflops": seconds and case.flops / seconds / 1e9, "gbytes_per_s": seconds and case.weight_bytes / seconds / 1e9,
        "relative_error": error, "error_limit": limit, "wrong": error > limit,
    }  # fmt: skip


def against_ceilings(ceilings: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that depends on the ceilings."""
    floor, bound = floor_seconds(ceilings, row["dtype"], row["flops"], row["weight_bytes"])
    return {
        "floor_ms": 1e3 * floor,
        "bound": bound,
        "percent_of_ceiling": row["ms"] and 1e5 * floor / row["ms"],
    }
