# SPDX-License-Identifier: BSD-3-Clause
"""Results of `switchgear bench --parallel`: medians beside predictions, a table and a plot."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from switchgear.parallel.cost import PAIR_BYTES, Traffic, pipeline
from switchgear.parallel.header import LENGTH
from switchgear.parallel.record import Event

from ..common import console, table
from ..common.machine import cpu
from ..common.plots import FAINT, INK, pyplot, save
from .case import flops_of
from .shapes import Shape

VARIANTS = {"all_to_all_single": None, "switchgear, 1 chunk": 1, "switchgear, 4 chunks": 4, "switchgear, 8 chunks": 8}


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


def floor_bytes(traffic: Traffic, rank: int, row: int, train: bool) -> int:
    """The minimum that leaves a rank, from the routing only: rows of its tokens and of the tokens that it hosts."""
    rows = int(traffic.rows[rank].sum() + traffic.rows[:, rank].sum() - 2 * traffic.rows[rank, rank])
    pairs = int(traffic.pairs[rank].sum() - traffic.pairs[rank, rank])
    hosted = int(traffic.pairs[:, rank].sum() - traffic.pairs[rank, rank])
    return rows * row * (2 if train else 1) + pairs * PAIR_BYTES + (hosted * 4 if train else 0)


def summarise(task: Task, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over steps, of the slowest rank."""
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
    gflop = size * flops_of(task.shape, task.tokens, task.mode) / 1e9
    return {"mode": task.mode, "tokens": task.tokens, "threads": task.threads, "bandwidth": bandwidth,
            "skew": task.skew, "gflop": gflop, "chunk_overhead_ms": 1e3 * overhead, "variants": variants,
            "timelines": timelines}  # fmt: skip


def _experts_seconds(answers: list[dict[str, Any]], name: str) -> float:
    return max(float(median(step.experts for step in answer["steps"][name])) for answer in answers)


def chunk_overhead(answers: list[dict[str, Any]]) -> float:
    """Seconds that each further chunk costs the experts of a step: smaller products, more messages."""
    (few, one), *_, (many, eight) = ((chunks, name) for name, chunks in VARIANTS.items() if chunks)
    return max(0.0, (_experts_seconds(answers, eight) - _experts_seconds(answers, one)) / (many - few))


def _predicted(
    task: Task, answers: list[dict[str, Any]], traffic: Traffic, chunks: int, bandwidth: float, overhead: float
) -> float:
    """Milliseconds of a step by cost.pipeline. A chunk has the same overhead in forward and in backward."""
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
    """The share of a step's expert time in events whose names start with `name`; time around events is split alike."""
    spent = [(event.name, event.end - event.begin) for event in step.events if event.lane == "experts"]
    whole = sum(seconds for part, seconds in spent if part != "sum")
    return sum(seconds for part, seconds in spent if part.startswith(name)) / whole


def print_case(result: dict[str, Any]) -> None:
    out = console()
    speed = f"links of {result['bandwidth'] / 1e6:.0f} MB/s" if result["bandwidth"] else "links not throttled"
    out.print(f"\n[bold]{result['shape']}, {result['dtype']}, {result['mode']}[/]: {result['ranks']} ranks of "
              f"{result['threads']} threads, {result['tokens']} tokens each, {speed}")  # fmt: skip
    shown = table("", "ms", "predicted", "experts", "link", "waiting", "hidden", "sent MB", "floor MB")
    for v in result["variants"]:
        predicted = f"{v['predicted_ms']:.0f}" if v["predicted_ms"] else ""
        shown.add_row(v["name"], f"{v['ms']:.0f}", predicted, f"{v['experts_ms']:.0f}", f"{v['link_ms']:.0f}",
                      f"{v['waiting_ms']:.0f}", f"{v['hidden']:.0%}", f"{v['sent_bytes'] / 1e6:.3f}",
                      f"{v['floor_bytes'] / 1e6:.3f}" + ("" if v["at_floor"] or not v["chunks"] else " !"))  # fmt: skip
    out.print(shown)
    out.print(f"one more chunk costs the experts {result['chunk_overhead_ms']:.2f} ms")


def plot(result: dict[str, Any], timelines: dict[str, list[Step]], folder: str) -> None:
    """folder/parallel-<mode>.png: one step of rank 0 for each variant, with the link's lane above the experts'."""
    plt = pyplot()
    names = list(timelines)
    longest = max(timelines[name][0].seconds for name in names)
    figure, axes = plt.subplots(len(names), 1, figsize=(8.5, 1.1 + 1.05 * len(names)), sharex=True)
    for axis, name in zip(axes, names, strict=True):
        step = timelines[name][0]
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
    path = Path(folder) / f"parallel-{result['mode']}.png"
    save(figure, path)
    print(f"wrote {path}")
