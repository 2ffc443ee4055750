# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench --parallel N`: experts distributed over N processes of this machine.

What is compared, around the same experts and over the same links: plain all_to_all_single with a row for each choice,
and switchgear's exchange without and with overlap. Links are throttled to a bandwidth at which a process is as long on
the link as in its experts (or to --bandwidth), since sockets of one machine are memory copies that take processor time
from the experts; --bandwidth 0 leaves them alone.

    sent      bytes that leave a rank, counted where they are sent; floor: what has to (a row for each rank that has an
              expert of the token, in and out, and its choices). The difference is the headers, or the run fails.
    waiting   seconds in which a rank has nothing to do but to wait; hidden: the share of the link's time that is not
    predicted by the model of plan-parallel, from bytes and bandwidth, and of the experts their time in one chunk (in
              training with its parts), and what each chunk more costs them, of which the largest number of chunks tells
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import socket
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import switchgear
from switchgear.parallel import ExpertParallel, ParallelExperts
from switchgear.parallel.cost import PAIR_BYTES, Traffic, count, draw_routing, pipeline
from switchgear.parallel.exchange import Event
from switchgear.parallel.header import LENGTH

from ..common import CommandError, console, require
from ..common.machine import cpu, has_fast_bfloat16
from ..common.plots import FAINT, INK, pyplot
from .case import FORMATS
from .shapes import SHAPES, Shape, forward_flops

DEFAULT_SHAPE, DEFAULT_TOKENS = "mixtral-half", 1024
VARIANTS = {"all_to_all_single": None, "switchgear, 1 chunk": 1, "switchgear, 4 chunks": 4, "switchgear, 8 chunks": 8}
TURNS = 4


class Task(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    tokens: int  # of a rank
    mode: str  # "forward" or "train"
    skew: float
    bandwidth: float | None  # bytes/s; None: as fast as the experts; 0: not throttled
    threads: int
    turns: int


class Step(NamedTuple):
    """One step of one variant on one rank."""

    seconds: float
    waited: float
    experts: float
    link: float
    sent: dict[str, int]
    events: list[Event]
    begin: float


def run(args: argparse.Namespace) -> int:
    require("rich")
    name = args.shapes or DEFAULT_SHAPE
    if name not in SHAPES:
        raise CommandError(f"--shapes: expected one of {', '.join(SHAPES)} beside --parallel, got {name!r}")
    dtype = args.dtypes or ("bf16" if has_fast_bfloat16() else "fp32")
    if dtype not in ("bf16", "fp32"):
        raise CommandError(f"--dtypes: expected bf16 or fp32 beside --parallel, got {dtype!r}")
    modes = [mode.strip() for mode in args.modes.split(",")]
    if not set(modes) <= {"forward", "train"}:
        raise CommandError(f"--modes: expected a list of forward, train; got {args.modes!r}")
    try:
        tokens = int(args.tokens or DEFAULT_TOKENS)
    except ValueError:
        raise CommandError(f"--tokens: expected one number beside --parallel, got {args.tokens!r}") from None
    size = args.parallel
    threads = max(1, (os.cpu_count() or 1) // size)
    skew = 1.0 if args.routing == "zipf" else 0.0
    results = []
    for mode in modes:
        bandwidth = None if args.bandwidth is None else 1e6 * args.bandwidth
        task = Task(
            SHAPES[name], FORMATS[dtype].dtype, tokens, mode, skew, bandwidth, threads, 2 if args.quick else TURNS
        )
        results.append({"shape": name, "dtype": dtype, "ranks": size} | summarise(task, launch(task, size)))
        print_case(results[-1])
    if args.json:
        kept = [{k: v for k, v in result.items() if k != "timelines"} for result in results]
        with open(args.json, "w") as file:
            json.dump({"schema": "switchgear-bench-parallel/1", "machine": cpu(), "results": kept}, file, indent=2)
    if args.plot:
        for result in results:
            plot(result, args.plot)
    return (
        0
        if all(variant["at_floor"] for result in results for variant in result["variants"] if variant["chunks"])
        else 1
    )


# ---- processes -------------------------------------------------------------------------------------------------------


def launch(task: Task, size: int) -> list[dict[str, Any]]:
    """What each rank measured."""
    context = mp.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_worker, args=(rank, size, port, task, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise CommandError("a process ended before it had measured anything; see above") from None
    finally:
        for process in processes:
            process.join()


def _worker(rank: int, size: int, port: int, task: Task, answers: Any) -> None:
    torch.set_num_threads(task.threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    with ExpertParallel(timeout=300.0) as parallel:
        answers.send(measure(parallel, task))
        dist.barrier()
    dist.destroy_process_group()


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
        "all_to_all_single": lambda: plain(experts, x, ids[parallel.rank], weights),
        "switchgear": lambda: experts(x, ids[parallel.rank], weights),
    }
    _agree(parallel, experts, x, ids[parallel.rank], weights)

    def step(name: str) -> Step:
        parallel.num_chunks = VARIANTS[name]
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
        link = sum(event.end - event.begin for event in events if event.lane == "link" and event.name != "header")
        if parallel.num_chunks is None:
            events += _between(events, begin, begin + seconds)
        return Step(seconds, record.waited, seconds - record.waited, link, dict(record.bytes), events, begin)

    first = "switchgear, 1 chunk"
    step(first)
    bandwidth = task.bandwidth
    if bandwidth is None:  # as fast as the experts once they are warm, and not slowed down by faster transfers
        for name in VARIANTS:
            step(name)
        for _ in range(3):
            taken = [step(first) for _ in range(2)]
            sent = max(_gather(parallel, sum(taken[0].sent[kind] for kind in ("dispatch", "combine"))))
            bandwidth = sent / max(_gather(parallel, min(each.experts for each in taken)))
            parallel.throttle(bandwidth)
    elif bandwidth:
        parallel.throttle(bandwidth)
    for name in VARIANTS:
        step(name)
    steps: dict[str, list[Step]] = {name: [] for name in VARIANTS}
    for _ in range(task.turns):
        for name, taken in steps.items():
            taken.append(step(name))
    rows, pairs = count(list(ids), experts.placement)
    return {"bandwidth": bandwidth, "rows": rows.tolist(), "pairs": pairs.tolist(), "steps": steps}


def _between(events: list[Event], begin: float, end: float) -> list[Event]:
    """The times without a transfer, which nobody has measured by themselves: experts and what is around them."""
    edges = [begin, *(edge for event in events for edge in (event.begin, event.end)), end]
    return [Event("experts", "experts", edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]


def _gather(parallel: ExpertParallel, value: float) -> list[float]:
    values: list[Any] = [None] * parallel.size
    dist.all_gather_object(values, value)
    return values


def _agree(parallel: ExpertParallel, experts: ParallelExperts, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Both ways compute the same, up to rounding in the dtype; an AssertionError otherwise."""
    with torch.no_grad():
        got, want = experts(x, ids, weights).float(), plain(experts, x, ids, weights).float()
    limit = 16 * torch.finfo(x.dtype).eps * float(want.abs().max())
    difference = float((got - want).abs().max())
    assert difference <= limit, f"rank {parallel.rank}: the results differ by {difference}, {limit} is allowed"


# ---- the plain way ---------------------------------------------------------------------------------------------------


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, parallel: ExpertParallel, rows_out: list[int], rows_in: list[int]) -> Tensor:
        ctx.parallel, ctx.rows_out, ctx.rows_in = parallel, rows_out, rows_in
        return _transfer(parallel, rows, rows_out, rows_in)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _transfer(ctx.parallel, grad.contiguous(), ctx.rows_in, ctx.rows_out), None, None, None


def _transfer(parallel: ExpertParallel, rows: Tensor, rows_out: list[int], rows_in: list[int]) -> Tensor:
    received = rows.new_empty(sum(rows_in), *rows.shape[1:])
    begin = time.monotonic()
    work = parallel.transport_for(rows.device).all_to_all(received, rows, rows_in, rows_out)
    parallel.peers.wait(work)
    end = time.monotonic()
    row = rows.shape[1:].numel() * rows.element_size()
    parallel.record.bytes["rows"] += (sum(rows_out) - rows_out[parallel.rank]) * row
    parallel.record.waited += end - begin
    if parallel.record.events is not None:
        parallel.record.events.append(Event("link", "rows", begin, end))
    return received


def plain(experts: ParallelExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """A row for each choice, in the order of experts, there and back by all_to_all_single; weighted at the end."""
    parallel, placement = experts.parallel, experts.placement
    order = topk_ids.flatten().argsort(stable=True)
    per_expert = torch.bincount(topk_ids.flatten(), minlength=placement.num_experts)
    local = [len(held) for held in placement.experts_of_rank]
    mine = local[parallel.rank]
    counts = _transfer(parallel, per_expert[:, None], local, [mine] * parallel.size).view(parallel.size, mine)
    rows_out = [int(part.sum()) for part in torch.split(per_expert, local)]
    rows_in = counts.sum(1).tolist()
    sent = x[torch.div(order, topk_ids.shape[1], rounding_mode="floor")]
    rows: Tensor = _AllToAll.apply(sent, parallel, rows_out, rows_in)  # type: ignore[no-untyped-call]
    ids = torch.arange(mine).repeat(parallel.size).repeat_interleave(counts.flatten())[:, None]
    first: Tensor = getattr(experts, experts._first)
    y = switchgear.moe(rows, first, experts.down_proj, ids, torch.ones(len(ids), 1))
    back: Tensor = _AllToAll.apply(y, parallel, rows_in, rows_out)  # type: ignore[no-untyped-call]
    each = torch.empty_like(back).index_copy(0, order, back).view(*topk_ids.shape, -1)
    return (each * topk_weights[..., None].to(each.dtype)).sum(1)


# ---- results ---------------------------------------------------------------------------------------------------------


def floor_bytes(traffic: Traffic, rank: int, row: int, train: bool) -> int:
    """What has to leave a rank, counted from the routing alone: rows of its tokens and of those that it hosts."""
    rows = int(traffic.rows[rank].sum() + traffic.rows[:, rank].sum() - 2 * traffic.rows[rank, rank])
    pairs = int(traffic.pairs[rank].sum() - traffic.pairs[rank, rank])
    hosted = int(traffic.pairs[:, rank].sum() - traffic.pairs[rank, rank])
    return rows * row * (2 if train else 1) + pairs * PAIR_BYTES + (hosted * 4 if train else 0)


def summarise(task: Task, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over steps, of the rank that takes longest."""
    size, train = len(answers), task.mode == "train"
    row = task.shape.hidden_size * task.dtype.itemsize
    bandwidth = float(answers[0]["bandwidth"])
    traffic = Traffic(torch.tensor(answers[0]["rows"]), torch.tensor(answers[0]["pairs"]))
    overhead = chunk_overhead(answers)
    variants = []
    for name, chunks in VARIANTS.items():

        def middle(what: str, name: str = name) -> float:
            return max(float(median(getattr(step, what) for step in answer["steps"][name])) for answer in answers)

        sent = [sum(answer["steps"][name][0].sent.values()) for answer in answers]
        floors = [floor_bytes(traffic, rank, row, train) for rank in range(size)]
        headers = (size - 1) * 8 * LENGTH * (2 if train else 1)
        link = middle("link")
        variants.append({
            "name": name, "chunks": chunks, "ms": 1e3 * middle("seconds"), "waiting_ms": 1e3 * middle("waited"),
            "experts_ms": 1e3 * middle("experts"), "link_ms": 1e3 * link,
            "hidden": max(0.0, 1 - middle("waited") / link) if link else 1.0,
            "sent_bytes": max(sent), "floor_bytes": max(floors),
            "at_floor": all(s == f + headers for s, f in zip(sent, floors, strict=True)),
            "predicted_ms": _predicted(task, answers, traffic, chunks, bandwidth, overhead)
            if chunks and bandwidth else None,
        })  # fmt: skip
    timelines = {name: [answer["steps"][name][-1] for answer in answers] for name in VARIANTS}
    gflop = size * forward_flops(task.shape, task.tokens) * (3 if train else 1) / 1e9
    return {"mode": task.mode, "tokens": task.tokens, "threads": task.threads, "bandwidth": bandwidth,
            "skew": task.skew, "gflop": gflop, "chunk_overhead_ms": 1e3 * overhead, "variants": variants,
            "timelines": timelines}  # fmt: skip


def _experts_seconds(answers: list[dict[str, Any]], name: str) -> float:
    return max(float(median(step.experts for step in answer["steps"][name])) for answer in answers)


def chunk_overhead(answers: list[dict[str, Any]]) -> float:
    """Seconds that one more chunk of a step costs the experts: its products are smaller, and more messages pass."""
    (few, one), *_, (many, eight) = ((chunks, name) for name, chunks in VARIANTS.items() if chunks)
    return max(0.0, (_experts_seconds(answers, eight) - _experts_seconds(answers, one)) / (many - few))


def _predicted(
    task: Task, answers: list[dict[str, Any]], traffic: Traffic, chunks: int, bandwidth: float, overhead: float
) -> float:
    """Milliseconds of a step by cost.pipeline. A chunk costs the same in forward and in backward."""
    away = traffic.rows - torch.diag(traffic.rows.diagonal())
    most = int(torch.maximum(away.sum(1), away.sum(0)).max())
    seconds = most * task.shape.hidden_size * task.dtype.itemsize / bandwidth
    experts = _experts_seconds(answers, "switchgear, 1 chunk") - overhead
    if task.mode == "forward":
        return 1e3 * pipeline(seconds, experts, seconds, chunks, overhead=overhead).seconds
    step = answers[0]["steps"]["switchgear, 1 chunk"][-1]
    parts = [experts * _share(step, name) for name in ("experts", "backward", "weight gradients")]
    forward = pipeline(seconds, parts[0], seconds, chunks, overhead=overhead / 2)
    backward = pipeline(seconds, parts[1], seconds, chunks, tail=parts[2], overhead=overhead / 2)
    return 1e3 * (forward.seconds + backward.seconds)


def _share(step: Step, name: str) -> float:
    """Of a step's time in the experts, in events whose names begin so; what is around them goes with them."""
    spent = [(event.name, event.end - event.begin) for event in step.events if event.lane == "experts"]
    whole = sum(seconds for part, seconds in spent if part != "sum")
    return sum(seconds for part, seconds in spent if part.startswith(name)) / whole


def print_case(result: dict[str, Any]) -> None:
    out = console()
    speed = f"links of {result['bandwidth'] / 1e6:.0f} MB/s" if result["bandwidth"] else "links not throttled"
    out.print(f"\n[bold]{result['shape']}, {result['dtype']}, {result['mode']}[/]: {result['ranks']} ranks of "
              f"{result['threads']} threads, {result['tokens']} tokens each, {speed}", highlight=False)  # fmt: skip
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for column in ("ms", "predicted", "experts", "link", "waiting", "hidden", "sent MB", "floor MB"):
        table.add_column(column, justify="right")
    for v in result["variants"]:
        predicted = f"{v['predicted_ms']:.0f}" if v["predicted_ms"] else ""
        table.add_row(v["name"], f"{v['ms']:.0f}", predicted, f"{v['experts_ms']:.0f}", f"{v['link_ms']:.0f}",
                      f"{v['waiting_ms']:.0f}", f"{v['hidden']:.0%}", f"{v['sent_bytes'] / 1e6:.3f}",
                      f"{v['floor_bytes'] / 1e6:.3f}" + ("" if v["at_floor"] or not v["chunks"] else " !"))  # fmt: skip
    out.print(table)
    out.print(f"one more chunk costs the experts {result['chunk_overhead_ms']:.2f} ms", highlight=False)


def plot(result: dict[str, Any], folder: str) -> None:
    """folder/parallel-<mode>.svg: one step of rank 0, the link's lane over the experts', for each variant."""
    os.makedirs(folder, exist_ok=True)
    plt = pyplot()
    names = list(result["timelines"])
    longest = max(result["timelines"][name][0].seconds for name in names)
    figure, axes = plt.subplots(len(names), 1, figsize=(8.5, 1.1 + 1.05 * len(names)), sharex=True)
    for axis, name in zip(axes, names, strict=True):
        step = result["timelines"][name][0]
        for event in step.events:
            if event.end - event.begin < 1e-4:
                continue
            inward = event.name == "dispatch" or event.name == "rows"
            color = ("#3f7cac" if inward else "#95b8d1") if event.lane == "link" else "#e4572e"
            lane = 1 if event.lane == "link" else 0
            left, width = 1e3 * (event.begin - step.begin), 1e3 * (event.end - event.begin)
            axis.barh(lane, width, left=left, height=0.72, color=color, edgecolor="white", linewidth=0.6)
        axis.axvline(1e3 * step.seconds, color=INK, linewidth=1)
        axis.set_yticks([0, 1], ["experts", "link"], fontsize=8)
        axis.set_ylim(-0.55, 1.55)
        axis.set_title(f"{name}: {1e3 * step.seconds:.0f} ms", fontsize=9, pad=3)
        axis.grid(False, axis="y")
    axes[-1].set_xlim(0, 1.02e3 * longest)
    axes[-1].set_xlabel("ms")
    figure.supxlabel(f"{result['shape']}, {result['dtype']}, {result['mode']}, {result['tokens']} tokens on each of "
                     f"{result['ranks']} ranks, links of {result['bandwidth'] / 1e6:.0f} MB/s; {cpu()['model']}",
                     fontsize=8, color=FAINT)  # fmt: skip
    path = os.path.join(folder, f"parallel-{result['mode']}.svg")
    figure.savefig(path, facecolor="white")
    plt.close(figure)
    print(f"wrote {path}")
