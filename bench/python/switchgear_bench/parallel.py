# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench parallel N`: experts distributed over N processes of this machine.

It compares, around the same experts and over the same links, plain all_to_all_single with a row per choice, and
switchgear's exchange with and without overlap. Sockets on one machine are memory copies that take processor time from
the experts. So links are throttled until transfers take as long as the experts (or to --bandwidth); --bandwidth 0
turns throttling off. --nodes groups the processes: links within a node are then 8 times as fast as those between nodes,
and rows that go to each rank are compared with rows that go to each node once. Processes without a processor of their
own compete. With --gflops their experts have a speed too: a product ends no earlier, and its process sleeps meanwhile.

    sent      bytes that leave a rank, counted by the sender; floor: the minimum (a row for each rank that has an expert
              of the token, in and out, and its choices). The difference must be the headers, or the run fails.
    waiting   seconds that the rank with most work for its experts is idle (others also wait for it); hidden: the share
              of the link's time that overlaps with other work
    predicted by the model of plan-parallel, from bytes, bandwidth, the experts' time in one chunk (in training split
              into its parts), and the cost of each further chunk, estimated from the largest number of chunks
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from switchgear import ops
from switchgear.cli.common import CommandError, not_negative, positive
from switchgear.cli.machine import cpu
from switchgear.parallel import ExpertParallel, ParallelExperts
from switchgear.parallel.cost import count, draw_routing
from switchgear.parallel.rows import Event
from switchgear_bench.processes import Child

from .case import FORMATS
from .machine import has_fast_bfloat16
from .options import add_cases, add_files, add_modes, add_quick, add_routing, add_shapes
from .parallel_plain import plain
from .parallel_results import NEAR, PLAIN, Step, Task, base_of, plot, print_case, summarise, variants_of
from .results import open_outputs, write_json
from .shapes import SHAPES

DEFAULT_SHAPE, DEFAULT_TOKENS = "mixtral-half", 1024
TURNS = 4
TRAINED = [name for name, form in FORMATS.items() if "train" in form.modes]
SMALL = ("header", "pairs", "routes")  # transfers that are not rows
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ranks", type=positive, metavar="N", help="processes")
    add_shapes(parser, SHAPES, DEFAULT_SHAPE)
    add_cases(parser, TRAINED, "bf16, or fp32 where bf16 is emulated", str(DEFAULT_TOKENS))
    add_modes(parser)
    add_routing(parser)
    add_quick(parser, "few turns")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="that they are on, of equal size")
    parser.add_argument(
        "--bandwidth",
        type=not_negative,
        metavar="MB/s",
        help="of their links (default: as fast as the experts; 0: no limit)",
    )
    parser.add_argument(
        "--gflops", type=not_negative, default=0.0, metavar="GFLOP/s", help="of their experts (default: no limit)"
    )
    add_files(parser, "json plot")


def run(args: argparse.Namespace) -> int:
    name = _one("shapes", (args.shapes or DEFAULT_SHAPE).split(","))
    if name not in SHAPES:
        raise CommandError(f"--shapes: expected one of {', '.join(SHAPES)}, got {name!r}")
    dtype = _one("dtypes", args.dtypes or ["bf16" if has_fast_bfloat16() else "fp32"])
    tokens, size = _one("tokens", args.tokens or [DEFAULT_TOKENS]), args.ranks
    if size % args.nodes:
        raise CommandError(f"--nodes: expected a divisor of {size} (the processes), got {args.nodes}")
    outputs = open_outputs(args)
    results = []
    for mode in args.modes:
        task = Task(
            SHAPES[name], FORMATS[dtype].dtype, tokens, mode, 1.0 if args.routing == "zipf" else 0.0,
            None if args.bandwidth is None else 1e6 * args.bandwidth,
            max(1, (os.cpu_count() or 1) // size), 2 if args.quick else TURNS, args.nodes, 1e9 * args.gflops,
        )  # fmt: skip
        results.append({"shape": name, "dtype": dtype, "ranks": size} | summarise(task, launch(task, size)))
        print_case(results[-1])
    for result in results:
        timelines = result.pop("timelines")
        if "plot" in outputs:
            plot(result, timelines, outputs["plot"])
    if "json" in outputs:
        write_json({"schema": "switchgear-bench-parallel/1", "machine": cpu(), "results": results}, outputs["json"])
    ours = [variant for result in results for variant in result["variants"] if variant["chunks"]]
    return 0 if all(variant["at_floor"] for variant in ours) else 1


def _one(option: str, values: Sequence[T]) -> T:
    if len(values) != 1:
        raise CommandError(f"--{option}: expected one beside --parallel, got {len(values)}")
    return values[0]


# ---- processes -------------------------------------------------------------------------------------------------------


def launch(task: Task, size: int) -> list[dict[str, Any]]:
    """The measurements of each rank."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        ranks = [Child(f"rank {rank}", _serve, rank, size, port, task) for rank in range(size)]
        for child in ranks:
            stack.callback(child.close)
        return [child.receive() for child in ranks]


def _serve(answers: Connection, rank: int, size: int, port: int, task: Task) -> None:
    torch.set_num_threads(task.threads)
    if task.flops:
        for name, flop in FLOP.items():
            setattr(ops, name, _paced(getattr(ops, name), flop, task.flops))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    with ExpertParallel(timeout=300.0, nodes=size // task.nodes) as parallel:
        answers.send(("ok", measure(parallel, task)))
        dist.barrier()
    dist.destroy_process_group()


def _paced(function: Callable[..., T], flop: Callable[..., int], speed: float) -> Callable[..., T]:
    """It ends no earlier than at `speed` flop/s, and sleeps meanwhile."""

    def paced(*args: Any, **options: Any) -> T:
        begin = time.monotonic()
        result = function(*args, **options)
        end = begin + flop(result, *args) / speed
        time.sleep(max(0.0, end - time.monotonic()))
        return result

    return paced


def _forward_flop(_: Any, x: Tensor, layer: Sequence[Any], *rest: Any) -> int:
    """Of gated experts, for the choices that are not empty. layer: the fields of ops.Layer."""
    (gate_up_proj, *_), topk_ids = layer[0], layer[6]
    return 3 * int((topk_ids >= 0).sum()) * int(gate_up_proj.shape[1]) * x.shape[1]


FLOP: dict[str, Callable[..., int]] = {  # of ops, from their results and arguments
    "grouped_gemm": lambda out, x, *_: 2 * out.numel() * x.shape[1],
    "grouped_gemm_wgrad": lambda out, rows, *_: 2 * len(rows) * out[0].numel(),
    "layer_forward": _forward_flop,
    "moe_forward_on_host": _forward_flop,
    "plain_layer_on_host": lambda y, x, first, *rest: 3 * int((rest[3] >= 0).sum()) * first.shape[1] * x.shape[1],
    "layer_backward": lambda _, grad_y, x, h, *rest: 6 * h.numel() * x.shape[1],
    "moe_backward_on_host": lambda _, there, grad_y, x, h, *rest: 6 * h.numel() * x.shape[1],
}


def measure(parallel: ExpertParallel, task: Task) -> dict[str, Any]:
    """Steps of all variants, in turns."""
    shape = task.shape
    experts = ParallelExperts(
        shape.hidden_size, shape.intermediate_size, shape.num_experts, parallel=parallel, dtype=task.dtype
    )
    routing = draw_routing(task.tokens * parallel.size, shape.num_experts, shape.top_k, task.skew)
    ids = routing.split(task.tokens)  # type: ignore[no-untyped-call]
    torch.manual_seed(parallel.rank)
    x = torch.randn(task.tokens, shape.hidden_size).to(task.dtype).requires_grad_(task.mode == "train")
    weights = torch.full((task.tokens, shape.top_k), 1 / shape.top_k).requires_grad_(x.requires_grad)
    grad = torch.randn_like(x)
    calls: dict[str, Callable[[], Tensor]] = {
        PLAIN: lambda: plain(experts, x, ids[parallel.rank], weights),
        "switchgear": lambda: experts(x, ids[parallel.rank], weights),
    }
    variants = variants_of(task.nodes)
    for levels in sorted({variant.levels for variant in variants.values()}):
        parallel.levels = levels
        _agree(parallel, experts, x, ids[parallel.rank], weights)

    def step(name: str) -> Step:
        parallel.num_chunks, parallel.levels = variants[name]
        parallel.record.events = []
        parallel.record.clear()
        dist.barrier()
        begin = time.monotonic()
        with torch.set_grad_enabled(task.mode == "train"):
            y = calls["switchgear" if parallel.num_chunks else name]()
        if task.mode == "train":
            torch.autograd.backward(y, grad)
        seconds = time.monotonic() - begin
        record = parallel.record
        events = list(record.events or [])
        link = sum(event.end - event.begin for event in events if event.lane != "experts" and event.name not in SMALL)
        if parallel.num_chunks is None:
            events += _between(events, begin, begin + seconds)
        sent = dict(record.bytes), dict(record.between_nodes)
        return Step(seconds, record.waited, seconds - record.waited, link, *sent, events, begin)

    first = base_of(task, 1)
    step(first)
    bandwidth = task.bandwidth
    if bandwidth is None:  # the speed of warm experts, not reduced by faster transfers
        for name in variants:
            step(name)
        for _ in range(3):
            taken = [step(first) for _ in range(2)]
            counted = taken[0].sent if task.nodes == 1 else taken[0].between_nodes
            sent = max(_gather(parallel, sum(counted[kind] for kind in ("dispatch", "combine"))))
            bandwidth = sent / max(_gather(parallel, min(each.experts for each in taken)))
            _throttle(parallel, task, bandwidth)
    elif bandwidth:
        _throttle(parallel, task, bandwidth)
    for name in variants:
        step(name)
    steps: dict[str, list[Step]] = {name: [] for name in variants}
    for _ in range(task.turns):
        for name, taken in steps.items():
            taken.append(step(name))
    traffic = count(list(ids), experts.placement, parallel.nodes)
    counts = {name: rows.tolist() for name, rows in traffic._asdict().items()}
    return {"bandwidth": bandwidth, **counts, "steps": steps}


def _throttle(parallel: ExpertParallel, task: Task, bandwidth: float) -> None:
    parallel.throttle(bandwidth, near_bandwidth=NEAR * bandwidth if task.nodes > 1 else None)


def _between(events: list[Event], begin: float, end: float) -> list[Event]:
    """The intervals without a transfer, which are not measured separately: experts and the work around them."""
    edges = [begin, *(edge for event in events for edge in (event.begin, event.end)), end]
    return [Event("experts", "experts", edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]


def _gather(parallel: ExpertParallel, value: float) -> list[float]:
    values: list[Any] = [None] * parallel.size
    dist.all_gather_object(values, value)
    return values


def _agree(parallel: ExpertParallel, experts: ParallelExperts, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """AssertionError unless both ways compute the same result, up to rounding in the dtype."""
    with torch.no_grad():
        got, want = experts(x, ids, weights).float(), plain(experts, x, ids, weights).float()
    limit = 16 * torch.finfo(x.dtype).eps * float(want.abs().max())
    difference = float((got - want).abs().max())
    assert difference <= limit, f"rank {parallel.rank}: the results differ by {difference}, {limit} is allowed"
