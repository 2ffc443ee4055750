# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench threads`: layers of real models on 2 to 128 threads and 1 to 8 memory nodes, predicted from
their recorded tasks (threads_model.py), and on two threads beside the measurement."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import torch

import switchgear
from switchgear import _C
from switchgear.cli.common import console, markdown_table, require, table
from switchgear.weights import Weight
from switchgear_bench.processes import Child

from .case import DECODE_TOKENS, FORMATS, ROUTINGS, Inputs, call_of, make_case, make_weights
from .options import add_cases, add_files, add_modes, add_routing, add_shapes, begin, choose
from .report import threads as threads_of
from .report import write_outputs
from .results import Row, earlier_results, read_json, rounded, write_json
from .shapes import SHAPES, Shape
from .threads_model import LOSSES, MACHINES, Cores, Measured, as_row, fork_seconds, machine, measured, predict, record

SCHEMA = "switchgear-threads-model/2"
MODEL_SHAPES = {
    "olmoe": SHAPES["olmoe"],
    "qwen3-30b-a3b": SHAPES["qwen3-30b-a3b"],
    "mixtral-8x7b": Shape(4096, 14336, 8, 2, "Mixtral-8x7B"),
    "gpt-oss-20b": SHAPES["gpt-oss-20b"],
    "deepseek-v3": Shape(7168, 2048, 256, 8, "DeepSeek-V3, without its shared expert"),
}
TOKENS = {"forward": (1, 16, 512, 2048), "train": (512, 2048)}
MOST_BYTES = 3 << 30  # of weights; experts beyond share the memory of others, still far more than caches hold
REPEATS = ((0.2, 9), (float("inf"), 3))  # recordings of a call by its seconds on two threads


class Task(NamedTuple):
    shape: str
    dtype: str
    tokens: int
    mode: str
    routing: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, MODEL_SHAPES)
    add_cases(parser, FORMATS, "bf16", "1,16,512,2048; in training 512,2048")
    add_modes(parser)
    add_routing(parser)
    add_files(parser, "source json markdown")


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    require("rich")
    results = read_json(args.source, "--from", SCHEMA) if args.source else _record_all(args, about)
    if args.source and not args.markdown:
        print(markdown(results))
    write_outputs(args, results, {"threads": partial(markdown, results)})
    return 0


def _record_all(args: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    earlier = earlier_results(args, SCHEMA, about)
    results: dict[str, Any] = {"schema": SCHEMA, "machine": about, "cases": earlier["cases"] if earlier else []}
    for shape in choose("shapes", args.shapes or ",".join(MODEL_SHAPES), MODEL_SHAPES):
        for dtype in args.dtypes or ("bf16",):
            for mode in args.modes:
                for tokens in args.tokens or TOKENS[mode]:
                    task = Task(shape, dtype, tokens, mode, args.routing)
                    if mode == "train" and not _fits(MODEL_SHAPES[shape], dtype):
                        continue  # its gradients would not fit
                    with closing(Child(f"{shape}, T={tokens}", _serve, task)) as child:
                        case = child.receive()
                    show(case)
                    results["cases"] = [other for other in results["cases"] if _key(other) != _key(case)] + [case]
                    if args.json:
                        write_json(results, args.json)
    return results


def _fits(shape: Shape, dtype: str) -> bool:
    return _expert_bytes(shape, dtype) * shape.num_experts <= MOST_BYTES


def _expert_bytes(shape: Shape, dtype: str) -> int:
    return 3 * shape.hidden_size * shape.intermediate_size * FORMATS[dtype].dtype.itemsize


def _key(case: Row) -> tuple[Any, ...]:
    return tuple(case[name] for name in Task._fields)


def _serve(connection: Connection, task: Task) -> None:
    connection.send(("ok", evaluate(task)))


# ---- one case --------------------------------------------------------------------------------------------------------


def make_calls(task: Task) -> tuple[Callable[[int], object], Callable[[int, int], int]]:
    """A call of the layer, and a read of the weights of some experts by some threads, of others each time. Experts
    whose weights do not fit share those of others."""
    shape, dtype = MODEL_SHAPES[task.shape], FORMATS[task.dtype].dtype
    stored = min(shape.num_experts, MOST_BYTES // _expert_bytes(shape, task.dtype))
    weights = make_weights(shape._replace(num_experts=stored), dtype)
    case = make_case(task.shape, shape, task.dtype, task.tokens, task.mode, task.routing, weights)
    few = max(min(stored, shape.top_k), 1)

    def read(number: int, threads: int) -> int:
        experts = [(number * few + index) % stored for index in range(few)]
        tensors = [weight[expert].detach() for expert in experts for weight in weights]
        _C.read(tensors, threads)
        return sum(tensor.nbytes for tensor in tensors)

    if stored == shape.num_experts:
        return call_of(case, partial(_layer, weights)), read
    slots = torch.arange(shape.num_experts, dtype=torch.int32) % stored
    first, second = (Weight("plain", w.detach(), w.shape[1], w.shape[2], dtype, slots=slots) for w in weights)
    return call_of(case, partial(_layer, (first, second))), read


def _layer(weights: tuple[Any, Any], inputs: Inputs) -> torch.Tensor:
    return switchgear.moe(inputs.x, *weights, inputs.topk_ids, inputs.topk_weights)


def evaluate(task: Task, machines: Any = MACHINES) -> Row:
    """One row of --json: the call on one core, two threads predicted and measured, and the machines."""
    torch.set_num_threads(2)
    call, read = make_calls(task)
    fork = fork_seconds()
    seconds = measured(call, read, 2, 1).seconds
    repeats = next(repeats for most, repeats in REPEATS if seconds < most)
    routings = ROUTINGS if task.tokens <= DECODE_TOKENS else 1
    cuts = {n: record(call, n, repeats, routings) for n in sorted({1, *(m.threads for m in machines)})}
    turns = [_turn(call, read, fork, routings) for _ in range(2 * repeats + 1)]
    cores = Cores(fork, median(real.core_read for _, real in turns))
    one = cuts[1].seconds
    predictions = [predict(cuts[on.threads], on, cores) for on in machines]
    row = task._asdict() | {
        "one_core_ms": 1e3 * one, "bytes": cuts[1].bytes, "fork_us": 1e6 * fork,
        "read": median(real.read for _, real in turns), "core_read": cores.read,
        "two_predicted_ms": 1e3 * median(seconds for seconds, _ in turns),
        "two_measured_ms": 1e3 * median(real.seconds for _, real in turns),
        "two_error": median(seconds / real.seconds - 1 for seconds, real in turns),
        "loops": [{"name": loop.name, "ms": 1e3 * loop.seconds, "tasks": len(loop.tasks), "bytes": loop.bytes}
                  for loop in cuts[1].loops],
        "machines": [as_row(prediction, one) for prediction in predictions],
    }  # fmt: skip
    result: Row = rounded(row, 4)  # more digits than predictions are worth
    return result


def _turn(
    call: Callable[[int], object], read: Callable[[int, int], int], fork: float, routings: int
) -> tuple[float, Measured]:
    """Two threads, predicted and measured in the same seconds, since the speed of a shared memory drifts."""
    recording = record(call, 2, 1, routings)
    real = measured(call, read, 2, 2)
    here = machine(2)._replace(node_bandwidth=real.read)
    return predict(recording, here, Cores(fork, real.core_read)).seconds, real


# ---- tables ----------------------------------------------------------------------------------------------------------

HEADER = ("layer", "tokens", "mode", "one core, ms", "two threads: predicted, measured, ms", "error",
          "16 threads", "64 threads", "128, 2 sockets", "most lost at 64")  # fmt: skip


def place(row: Row) -> str:
    if row["nodes"] == 1:
        return f"{row['threads']} threads"
    return f"{row['threads']} threads, {row['nodes']} nodes, {row['sockets']} sockets, {row['placement']}"


def show(case: Row) -> None:
    shown = table("machine", "ms", "efficiency", "of memory", "remote", *LOSSES)
    for row in case["machines"]:
        parts = (row[name] for name in ("efficiency", "of_bandwidth", "remote", *LOSSES))
        shown.add_row(place(row), f"{row['ms']:.3g}", *(f"{part:.0%}" for part in parts))
    both = f"{case['two_predicted_ms']:.3g} ms predicted, {case['two_measured_ms']:.3g} measured"
    both = f"{both} ({case['two_error']:+.1%} in the typical turn)"
    name = f"{case['shape']}, {case['dtype']}, T = {case['tokens']}, {case['mode']}"
    title = f"{name}: one core {case['one_core_ms']:.3g} ms, two threads {both}"
    console().print(title, shown, sep="\n", soft_wrap=True)


def markdown(results: dict[str, Any]) -> str:
    """Efficiency where multiply-adds bind, the part of the nodes' bandwidth in brackets where memory does."""

    def order(case: Row) -> tuple[int, bool, int]:
        return list(MODEL_SHAPES).index(case["shape"]), case["mode"] == "train", case["tokens"]

    def cell(case: Row, threads: int, nodes: int, sockets: int) -> str:
        for row in case["machines"]:
            same = (row["threads"], row["nodes"], row["sockets"]) == (threads, nodes, sockets)
            if same and (nodes == 1 or row["placement"] == "interleaved"):
                return f"{row['efficiency']:.0%} ({row['of_bandwidth']:.0%})".replace("%", " %")
        return ""

    lines = []
    for case in sorted(results["cases"], key=order):
        row = next(row for row in case["machines"] if (row["threads"], row["nodes"]) == (64, 1))
        worst = max(((name, row[name]) for name in LOSSES), key=lambda item: item[1])
        lines.append([
            case["shape"], f"{case['tokens']:,}", case["mode"], f"{case['one_core_ms']:.3g}",
            f"{case['two_predicted_ms']:.3g}, {case['two_measured_ms']:.3g}", f"{100 * case['two_error']:+.1f} %",
            cell(case, 16, 1, 1), cell(case, 64, 1, 1), cell(case, 128, 2, 2),
            f"{worst[0]} {worst[1]:.0%}".replace("%", " %"),
        ])  # fmt: skip
    about = results["machine"]
    note = f"{about['model']}, {threads_of(about['threads'])}, {about['isa']}; torch {about['torch']}.\n"
    return f"{markdown_table(HEADER, lines, left=(0, 2, 9))}\n{note}"
