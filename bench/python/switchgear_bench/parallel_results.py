# SPDX-License-Identifier: BSD-3-Clause
"""Results of `switchgear bench parallel`: medians beside predictions, a table and a plot."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from switchgear.cli.common import FAINT, INK, console, pyplot, save, table
from switchgear.cli.machine import cpu
from switchgear.parallel.cost import (
    PAIR_BYTES,
    Timeline,
    Traffic,
    link_seconds,
    pipeline,
    two_level_pipeline,
)
from switchgear.parallel.header import LENGTH
from switchgear.parallel.nodes import Nodes, find_nodes
from switchgear.parallel.rows import Event

from .case import flops_of
from .shapes import Shape


class Variant(NamedTuple):
    chunks: int | None  # None: all_to_all_single
    levels: int = 1


CHUNKS = (1, 4, 8)
PLAIN = "all_to_all_single"
# When a rank that relays looks, as a part of a chunk's work: after the first product (local.py).
LOOKS = {"forward": 2 / 3, "backward": 1 / 3}
NEAR = 8.0  # the speed of links within a node, relative to those between nodes


def variants_of(nodes: int) -> dict[str, Variant]:
    """What is compared on so many nodes, the plainest first."""
    names = {1: "switchgear"} if nodes == 1 else {1: "one level", 2: "two levels"}
    ours = {
        f"{name}, {chunks} chunk{'s' * (chunks > 1)}": Variant(chunks, levels)
        for levels, name in names.items()
        for chunks in CHUNKS
    }
    return {PLAIN: Variant(None), **ours}


def base_of(task: Task, levels: int) -> str:
    """The variant with these levels and one chunk."""
    return next(name for name, variant in variants_of(task.nodes).items() if variant == Variant(1, levels))


class Task(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    tokens: int  # of a rank
    mode: str  # "forward" or "train"
    skew: float
    bandwidth: float | None  # bytes/s; None: as fast as the experts; 0: not throttled
    threads: int
    turns: int
    nodes: int = 1
    flops: float = 0.0  # flop/s of the experts; 0: not throttled


class Step(NamedTuple):
    """One step of one variant on one rank."""

    seconds: float
    waited: float
    experts: float
    link: float
    sent: dict[str, int]
    between_nodes: dict[str, int]
    events: list[Event]
    begin: float


class Floor(NamedTuple):
    """The minimum that leaves a rank: all, and to other nodes."""

    sent: int
    between: int


def floor_bytes(traffic: Traffic, nodes: Nodes, rank: int, row: int, train: bool) -> Floor:
    """From the routing only: rows of the rank's tokens and of those that it hosts or, with two levels, relays; pairs
    and routes."""
    away = [r for r in range(len(nodes.node_of)) if r != rank]
    far = [r for r in away if nodes.node_of[r] != nodes.node_of[rank]]
    width = max(map(len, nodes.members))

    def count(ranks: list[int]) -> int:
        rows = sum(int(leg[rank, ranks].sum() + leg[ranks, rank].sum()) for leg in traffic.legs)
        routes = 0 if traffic.between is None else 2 * width * int(traffic.between[rank, ranks].sum())
        pairs = int(traffic.pairs[rank, ranks].sum()) * PAIR_BYTES
        grads = int(traffic.pairs[ranks, rank].sum()) * 4 if train else 0
        headers = 8 * LENGTH * len(ranks) * (2 if train else 1)
        return rows * row * (2 if train else 1) + routes + pairs + grads + headers

    return Floor(count(away), count(far))


def summarise(task: Task, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over steps: the time of the slowest rank, and what the rank with most work for its experts did."""
    size, train = len(answers), task.mode == "train"
    row = task.shape.hidden_size * task.dtype.itemsize
    bandwidth = float(answers[0]["bandwidth"])
    counted = [torch.tensor(answers[0][name]) for name in Traffic._fields]
    nodes = find_nodes(size // task.nodes, [""] * size)
    variants = []
    for name, variant in variants_of(task.nodes).items():

        def middles(what: str, name: str = name) -> list[float]:
            return [float(median(getattr(step, what) for step in answer["steps"][name])) for answer in answers]

        steps = [answer["steps"][name][0] for answer in answers]
        sent = [Floor(sum(step.sent.values()), sum(step.between_nodes.values())) for step in steps]
        traffic = Traffic(*(counted if variant.levels == 2 else counted[:2]))
        floors = [floor_bytes(traffic, nodes, rank, row, train) for rank in range(size)]
        experts = middles("experts")
        busiest = experts.index(max(experts))  # the rank that the model describes; others also wait for it
        waiting, link = middles("waited")[busiest], middles("link")[busiest]
        predicted = None
        if variant.chunks and bandwidth:
            predicted = _predicted(task, answers, traffic, nodes, variant, bandwidth)
        variants.append({
            "name": name, "chunks": variant.chunks, "levels": variant.levels, "ms": 1e3 * max(middles("seconds")),
            "waiting_ms": 1e3 * waiting, "experts_ms": 1e3 * experts[busiest], "link_ms": 1e3 * link,
            "hidden": max(0.0, 1 - waiting / link) if link else 1.0,
            "sent_bytes": max(each.sent for each in sent), "floor_bytes": max(each.sent for each in floors),
            "between_bytes": max(each.between for each in sent), "at_floor": sent == floors,
            "predicted_ms": None if predicted is None else 1e3 * predicted.seconds,
            "predicted_waiting_ms": None if predicted is None else 1e3 * predicted.exposed,
        })  # fmt: skip
    timelines = {name: [answer["steps"][name][-1] for answer in answers] for name in variants_of(task.nodes)}
    gflop = size * flops_of(task.shape, task.tokens, task.mode) / 1e9
    overheads = {f"chunk_overhead_ms_{n}" if n > 1 else "chunk_overhead_ms": 1e3 * chunk_overhead(task, answers, n)
                 for n in range(1, 2 + (task.nodes > 1))}  # fmt: skip
    return {"mode": task.mode, "tokens": task.tokens, "threads": task.threads, "bandwidth": bandwidth,
            "gflops": task.flops / 1e9, "nodes": task.nodes, "near": NEAR, "skew": task.skew, "gflop": gflop,
            **overheads, "variants": variants, "timelines": timelines}  # fmt: skip


def _experts_seconds(answers: list[dict[str, Any]], name: str) -> float:
    return max(float(median(step.experts for step in answer["steps"][name])) for answer in answers)


def chunk_overhead(task: Task, answers: list[dict[str, Any]], levels: int) -> float:
    """Seconds that each further chunk costs the experts of a step: smaller products, more messages."""
    names = [name for name, variant in variants_of(task.nodes).items() if variant.chunks and variant.levels == levels]
    first, last = names[0], names[-1]
    spent = _experts_seconds(answers, last) - _experts_seconds(answers, first)
    return max(0.0, spent / (CHUNKS[-1] - CHUNKS[0]))


def _predicted(
    task: Task, answers: list[dict[str, Any]], traffic: Traffic, nodes: Nodes, variant: Variant, bandwidth: float
) -> Timeline:
    """A step by cost.pipeline or two_level_pipeline. A chunk has the same overhead in forward and in backward."""
    row = task.shape.hidden_size * task.dtype.itemsize
    near = NEAR * bandwidth if task.nodes > 1 else bandwidth
    base, chunks = base_of(task, variant.levels), variant.chunks or 1
    overhead = chunk_overhead(task, answers, variant.levels)
    experts = _experts_seconds(answers, base) - overhead

    def seconds(rows: torch.Tensor) -> float:
        return link_seconds(rows, nodes, row, bandwidth, near)

    def line(what: str, work: float, cost: float, tail: float = 0.0) -> Timeline:
        first, *second = ((seconds(rows), seconds(rows.T)) for rows in traffic.legs)
        if not second:
            return pipeline(first[0], work, first[1], chunks, tail=tail, overhead=cost)
        return two_level_pipeline(first, second[0], work, chunks, tail=tail, overhead=cost, look=LOOKS[what])

    if task.mode == "forward":
        return line("forward", experts, overhead)
    step = answers[0]["steps"][base][-1]
    parts = [experts * _share(step, name) for name in ("experts", "backward", "weight gradients")]
    forward = line("forward", parts[0], overhead / 2)
    backward = line("backward", parts[1], overhead / 2, parts[2])
    whole = (a + b for a, b in zip(forward[1:], backward[1:], strict=True))
    return Timeline([*forward.events, *backward.events], *whole)


def _share(step: Step, name: str) -> float:
    """The share of a step's expert time in events whose names start with `name`; time around events is split alike."""
    spent = [(event.name, event.end - event.begin) for event in step.events if event.lane == "experts"]
    whole = sum(seconds for part, seconds in spent if part != "sum")
    return sum(seconds for part, seconds in spent if part.startswith(name)) / whole


def print_case(result: dict[str, Any]) -> None:
    out = console()
    several = result["nodes"] > 1
    speed = f"links of {result['bandwidth'] / 1e6:.0f} MB/s" if result["bandwidth"] else "links not throttled"
    speed += f", {result['near']:.0f} times that within each of {result['nodes']} nodes" if several else ""
    speed += f", experts of {result['gflops']:.0f} GFLOP/s" if result["gflops"] else ""
    out.print(f"\n[bold]{result['shape']}, {result['dtype']}, {result['mode']}[/]: {result['ranks']} ranks of "
              f"{result['threads']} threads, {result['tokens']} tokens each, {speed}")  # fmt: skip
    columns = ["between MB"] if several else []
    shown = table(
        "", "ms", "predicted", "experts", "link", "waiting", "predicted", "hidden", "sent MB", "floor MB", *columns
    )
    for v in result["variants"]:
        predicted = [f"{v[key]:.0f}" if v[key] is not None else "" for key in ("predicted_ms", "predicted_waiting_ms")]
        between = [f"{v['between_bytes'] / 1e6:.3f}"] if several else []
        shown.add_row(v["name"], f"{v['ms']:.0f}", predicted[0], f"{v['experts_ms']:.0f}", f"{v['link_ms']:.0f}",
                      f"{v['waiting_ms']:.0f}", predicted[1], f"{v['hidden']:.0%}", f"{v['sent_bytes'] / 1e6:.3f}",
                      f"{v['floor_bytes'] / 1e6:.3f}" + ("" if v["at_floor"] or not v["chunks"] else " !"),
                      *between)  # fmt: skip
    out.print(shown)
    out.print(f"one more chunk costs the experts {result['chunk_overhead_ms']:.2f} ms")
    if several:
        for chunks in CHUNKS:
            one, two = (v for v in result["variants"] if v["chunks"] == chunks)
            out.print(f"{chunks} chunks: waiting falls to {fall(one, two, 'waiting_ms'):.0%}, predicted "
                      f"{fall(one, two, 'predicted_waiting_ms'):.0%}")  # fmt: skip


def fall(one: dict[str, Any], two: dict[str, Any], key: str) -> float:
    return float(two[key] or 0.0) / (float(one[key] or 0.0) or 1.0)


def plot(result: dict[str, Any], timelines: dict[str, list[Step]], folder: str) -> None:
    """folder/parallel-<mode>.png: one step of rank 0 for each variant, with the link's lane above the experts'."""
    plt = pyplot()
    names = list(timelines)
    lanes = 2 if result["nodes"] == 1 else 3
    longest = max(timelines[name][0].seconds for name in names)
    figure, axes = plt.subplots(len(names), 1, figsize=(8.5, 1.1 + 1.05 * len(names)), sharex=True)
    for axis, name in zip(axes, names, strict=True):
        step = timelines[name][0]
        for event in step.events:
            if event.end - event.begin < 1e-4:
                continue
            inward = event.name.startswith("dispatch") or event.name == "rows"
            color = ("#3f7cac" if inward else "#95b8d1") if event.lane != "experts" else "#e4572e"
            lane = {"experts": 0, "near": 1}.get(event.lane, lanes - 1)
            left, width = 1e3 * (event.begin - step.begin), 1e3 * (event.end - event.begin)
            axis.barh(lane, width, left=left, height=0.72, color=color, edgecolor="white", linewidth=0.6)
        axis.axvline(1e3 * step.seconds, color=INK, linewidth=1)
        axis.set_yticks(range(lanes), ["experts", *(["within"] if lanes > 2 else []), "link"], fontsize=8)
        axis.set_ylim(-0.55, lanes - 0.45)
        axis.set_title(f"{name}: {1e3 * step.seconds:.0f} ms", fontsize=9, pad=3)
        axis.grid(False, axis="y")
    axes[-1].set_xlim(0, 1.02e3 * longest)
    axes[-1].set_xlabel("ms")
    figure.supxlabel(f"{result['shape']}, {result['dtype']}, {result['mode']}, {result['tokens']} tokens on each of "
                     f"{result['ranks']} ranks, links of {result['bandwidth'] / 1e6:.0f} MB/s; {cpu()['model']}",
                     fontsize=8, color=FAINT)  # fmt: skip
    nodes = f"-{result['nodes']}-nodes" if result["nodes"] > 1 else ""
    path = Path(folder) / f"parallel-{result['mode']}{nodes}.png"
    save(figure, path)
    print(f"wrote {path}")
