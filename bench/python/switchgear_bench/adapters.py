# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench adapters`: what LoRA on every expert costs, beside the frozen base and other implementations.

A step is forward and backward: gradients of x, of topk_weights, and of all A and B. One token is a forward alone. Each
layer is compared with float64 before it is timed; all take turns in one process per case. Peak memory is what a step
adds to the process, weights and adapters excluded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switchgear.cli.common import require
from switchgear.weights import Weight, encode, use_huge_pages
from switchgear_bench.processes import Child

from . import machine
from .adapted_kt import kt_kernel
from .adapted_layers import BASE, LAYERS, OURS, Adapted, AdaptedCase, make_adapters
from .adapter_tables import DTYPES, markdown, show
from .case import FORMATS, Case, Inputs, make_case, make_weights
from .competitors import Skip
from .minifloats import in_bfloat16, make_stored
from .options import (
    add_budget,
    add_cases,
    add_competitors_folder,
    add_files,
    add_shapes,
    add_threads,
    begin,
    choose,
    positives,
)
from .report import write_outputs
from .results import Row, earlier_results, read_json, rounded, write_json
from .shapes import SHAPES, Shape
from .timing import interleave
from .verify import SAMPLED_TOKENS

SCHEMA = "switchgear-bench-adapters/1"
DEFAULT_SHAPES, DEFAULT_TOKENS, DEFAULT_RANKS = "olmoe,qwen3-30b-a3b,mixtral-half", (1, 16, 512), (8, 16, 64)
SECONDS = 10.0  # of timing, for each case
OTHERS = {
    "materialised": "switchgear on W + B·A",
    "peft": "PEFT on grouped_mm",
    "split": "split, torch",
    "kt": "kt-kernel",
}


class Task(NamedTuple):
    shape: str
    dtype: str
    tokens: int
    rank: int
    threads: int
    seconds: float
    others: tuple[str, ...] = tuple(OTHERS)

    @property
    def title(self) -> str:
        return f"{self.shape}, {self.dtype} base, rank {self.rank}, T={self.tokens}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, SHAPES, DEFAULT_SHAPES)
    add_cases(parser, DTYPES, "all", "1,16,512")
    parser.add_argument("--ranks", metavar="LIST", type=positives, help="of the adapters (default: 8,16,64)")
    parser.add_argument("--competitors", metavar="LIST", help=f"of {', '.join(OTHERS)}; or none (default: all)")
    add_competitors_folder(parser)
    add_budget(parser, f"{SECONDS:.0f} a case")
    add_threads(parser)
    add_files(parser, "source json markdown")


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    require("rich")
    results = read_json(args.source, "--from", SCHEMA) if args.source else _measure_all(args, about)
    if args.source and not args.markdown:
        print(markdown(results))
    write_outputs(args, results, {"adapters": lambda: markdown(results)})
    failed = any(row["ms"] is None for case in results["cases"] for row in case["results"])
    return int(not args.source and failed)


def _measure_all(args: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    others = (
        () if args.competitors == "none" else tuple(choose("competitors", args.competitors or ",".join(OTHERS), OTHERS))
    )
    tasks = [
        Task(shape, dtype, tokens, rank, args.threads, SECONDS, others)
        for shape in choose("shapes", args.shapes or DEFAULT_SHAPES, SHAPES)
        for dtype in args.dtypes or DTYPES
        for rank in args.ranks or DEFAULT_RANKS
        for tokens in args.tokens or DEFAULT_TOKENS
    ]
    if args.budget:
        tasks = [task._replace(seconds=args.budget / len(tasks)) for task in tasks]
    earlier = earlier_results(args, SCHEMA, about)
    results: dict[str, Any] = {"schema": SCHEMA, "machine": about, "cases": earlier["cases"] if earlier else []}
    for task in tasks:
        with closing(Child(task.title, _serve, task)) as child:
            case = child.receive()
        show(case)
        replace(results["cases"], case)
        if args.json:
            write_json(results, args.json)
    return results


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("shape", "dtype", "tokens", "rank"))


def replace(cases: list[Row], case: Row) -> None:
    """Puts a case in the place of an earlier one, whose results it keeps if they have layers that it leaves out."""
    for earlier in [other for other in cases if _key(other) == _key(case)]:
        full: list[Row] = earlier.get("before") or earlier["results"]
        if {row["layer"] for row in full} - {row["layer"] for row in case["results"]}:
            case["before"] = full
        cases.remove(earlier)
    cases.append(case)


def _serve(connection: Connection, task: Task) -> None:
    connection.send(("ok", measure(task)))


# ---- measuring -------------------------------------------------------------------------------------------------------


def make(task: Task) -> AdaptedCase:
    """The case of a task. Others get the decoded values of a stored base, in bfloat16."""
    shape, plain = SHAPES[task.shape], "fp32" if task.dtype == "fp32" else "bf16"
    stored = _stored(task.dtype, shape)
    if stored is not None:
        parameters = in_bfloat16(stored[0], True), in_bfloat16(stored[1], True)
    else:
        parameters = make_weights(shape, FORMATS[plain].dtype)
    for parameter in parameters:
        parameter.requires_grad_(False)
    mode = "forward" if task.tokens == 1 else "train"
    case = make_case(task.shape, shape, plain, task.tokens, mode, "balanced", parameters, stored=stored)
    return AdaptedCase(case, stored or parameters, make_adapters(case, task.rank))


def _stored(dtype: str, shape: Shape) -> tuple[Weight, Weight] | None:
    if dtype == "mxfp4":
        return make_stored(dtype, shape, True)
    if dtype != "int4":
        return None
    gate_up, down = (parameter.detach() for parameter in make_weights(shape, torch.bfloat16))
    stored = encode(gate_up, dtype, parts=2), encode(down, dtype)
    use_huge_pages(tensor for weight in stored for tensor in weight.tensors)
    return stored


def measure(task: Task) -> Row:
    torch.set_num_threads(task.threads)
    case = make(task)
    want, limit = expected(case), tolerance(case)
    found: dict[str, Adapted] = {}
    rows: dict[str, Row] = {}
    skipped = []
    wanted = {BASE, OURS, *(OTHERS[name] for name in task.others)}
    for name, build in (LAYERS | {"kt-kernel": kt_kernel}).items():
        if name not in wanted:
            continue
        try:
            adapted = build(case)
            error = 0.0 if name == BASE else relative_error(case, adapted, want)
        except Skip as problem:
            skipped.append({"layer": name, "reason": str(problem)})
            continue
        rows[name] = {"layer": name, "ms": None, "error": error, "peak_bytes": None, "quiet_turns": 0}
        if error <= limit:
            found[name] = adapted
            rows[name]["peak_bytes"] = machine.peak_of(partial(call(case, adapted), 0))
    calls = {name: call(case, adapted) for name, adapted in found.items()}
    for name, timed in interleave(calls, task.seconds, leaves_memory=task.tokens > 1).items():
        rows[name] |= {"ms": 1e3 * median(timed.seconds), "quiet_turns": timed.quiet_turns}
    measured: Row = rounded(task._asdict() | {"results": list(rows.values()), "skipped": skipped, "limit": limit})
    for name in ("seconds", "threads", "others"):
        del measured[name]
    return measured


def call(case: AdaptedCase, adapted: Adapted) -> Callable[[int], object]:
    """One timed call: a step as in a training loop, with gradients dropped; or a forward of one token."""
    all_inputs = case.case.inputs

    def step(number: int) -> object:
        return train(case.case, adapted, all_inputs[number % len(all_inputs)])

    def forward(number: int) -> Tensor:
        with torch.inference_mode():
            return adapted.layer(all_inputs[number % len(all_inputs)])

    return step if case.case.mode == "train" else forward


def train(case: Case, adapted: Adapted, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients of x and of the router's weights."""
    for parameter in adapted.parameters:
        parameter.grad = None
    x = inputs.x.detach().requires_grad_()
    high = inputs.topk_weights.detach().requires_grad_()
    low = inputs.topk_weights_low.detach().requires_grad_()
    y = adapted.layer(inputs._replace(x=x, topk_weights=high, topk_weights_low=low))
    torch.autograd.backward(y, case.grad_y)
    grad = high.grad if low.grad is None else low.grad
    if x.grad is None or grad is None:
        raise RuntimeError("a gradient is missing")
    return y.detach(), x.grad, grad


# ---- verifying -------------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """In float64: y and the gradients of x and topk_weights of some tokens; A, B, A, B's of an expert."""

    tokens: list[int]
    expert: int
    values: list[Tensor]


def expected(case: AdaptedCase) -> Expected:
    inputs = case.case.inputs[0]
    order = torch.randperm(case.case.tokens, generator=torch.Generator().manual_seed(1))
    tokens = sorted(order[:SAMPLED_TOKENS].tolist())
    expert = int(inputs.topk_ids_int64[tokens[0], 0])
    x = inputs.x[tokens].double().requires_grad_()
    topk_weights = inputs.topk_weights[tokens].double().requires_grad_()
    y = torch.zeros_like(x)
    for number in torch.unique(inputs.topk_ids_int64[tokens]).tolist():
        token, choice = (inputs.topk_ids_int64[tokens] == number).nonzero(as_tuple=True)
        rows = _expert(x[token], *case.matrices(number)) * topk_weights[token, choice, None]
        y = y.index_add(0, token, rows)
    if case.case.mode == "forward":
        return Expected(tokens, expert, [y.detach()])
    torch.autograd.backward(y, case.case.grad_y[tokens].double())
    parameters = case.adapters.parameters
    for parameter in parameters:
        parameter.grad = None
    token, choice = (inputs.topk_ids_int64 == expert).nonzero(as_tuple=True)
    rows = _expert(inputs.x[token].double(), *case.matrices(expert))
    rows = rows * inputs.topk_weights[token, choice, None].double()
    grads = torch.autograd.grad(rows, parameters, case.case.grad_y[token].double())
    values = [y.detach(), x.grad, topk_weights.grad, *(grad[expert] for grad in grads)]
    return Expected(tokens, expert, [value for value in values if value is not None])


def _expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def tolerance(case: AdaptedCase) -> float:
    """As verify.tolerance, with four more roundings: x·Aᵀ and its product with B, in both projections. With int4, x and
    a are rounded to int8, 0.9 % of each: 1.3 % together; the bound allows four times as much."""
    if case.is_integer:
        return 0.05
    unit = 2.0**-9 if case.case.dtype == torch.bfloat16 else 2.0**-23
    return unit * 2 * (12 + case.case.shape.top_k)


def relative_error(case: AdaptedCase, adapted: Adapted, want: Expected) -> float:
    """The worst root-mean-square error, relative, of all that is known."""
    inputs = case.case.inputs[0]
    if case.case.mode == "forward":
        with torch.inference_mode():
            got = [adapted.layer(inputs)[want.tokens]]
    else:
        got = [value[want.tokens] for value in train(case.case, adapted, inputs)]
        got += [gradient[want.expert] for gradient in adapted.gradients()]
    errors = [
        float((value.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
        for value, wanted in zip(got, want.values, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)
