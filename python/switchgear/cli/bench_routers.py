# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench --routers`: what routing policies cost, by the layer that they route for and by plain torch.

Each policy's choice and plan are timed from the same logits as the same policy in torch ops (plain_routers.py), in
turns, after both were found equal. The layer is the experts' forward in the dtype that this CPU is fast at, for the
shape's own top_k. Where its weights would be large, a slice of it is timed: fewer experts and as many fewer tokens, so
that each expert has as many rows and the layer costs in proportion.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import moe, plan
from switchgear.functional import Routing
from switchgear.routing import (
    BalancedAssignment,
    Capacity,
    Context,
    Dense,
    ExpertChoice,
    Grouped,
    RankK,
    SkipBelow,
    Threshold,
    TopK,
    TopP,
)

from . import machine, plain_routers
from .bench_case import make_inputs, make_weights
from .common import CommandError, console, require, threads
from .shapes import ROUTER_SHAPES, Shape
from .timing import interleave

TOKENS, SEQUENCE = 2048, 256
MOST_BYTES = 1 << 30  # of weights
SECONDS = 1.0  # for each pair of contestants
CONTEXT = Context(training=True, sequence_length=SEQUENCE)


class Policy(NamedTuple):
    """ours: logits [T,E] -> Routing. plain: the same in torch ops, -> topk_ids and topk_weights [T,K'] of any order and
    width. limit: of the cost, in percent of the layer."""

    name: str
    ours: Callable[[Tensor], Routing]
    plain: Callable[[Tensor], tuple[Tensor, Tensor]]
    limit: float = 10.0


def policies(shape: Shape) -> list[Policy]:
    k, experts = shape.top_k, shape.num_experts
    p = plain_routers

    def limited(**options: Any) -> Callable[[Tensor], Routing]:
        limit = Capacity(1.25, **options)
        return lambda logits: limit(TopK(k)(logits, CONTEXT), CONTEXT)

    def selected(select: Any) -> Callable[[Tensor], Routing]:
        return lambda logits: select(logits, CONTEXT)

    return [
        Policy("top-k", selected(TopK(k)), lambda z: p.top_k(z, k), 3.0),
        Policy("top-k, normalised", selected(TopK(k, normalize=True)), lambda z: p.top_k(z, k, normalize=True), 3.0),
        Policy(
            "top-k, sigmoid in groups", selected(TopK(k, "sigmoid", True, 2.5, 8, 4, "top2_sum")),
            lambda z: p.deepseek(z, k, 8, 4, 2.5), 3.0,
        ),
        Policy("group of top-k", selected(Grouped(k, 8, 2)), lambda z: p.grouped(z, k, 8, 2)),
        Policy("top-p", selected(TopP(0.4)), lambda z: p.top_p(z, 0.4)),
        Policy("threshold", selected(Threshold(2 / experts)), lambda z: p.threshold(z, 2 / experts)),
        Policy("skip below", selected(SkipBelow(TopK(k), 0.5)), lambda z: p.skip_below(z, k, 0.5)),
        Policy("rank-k", selected(RankK((2,))), lambda z: p.rank_k(z, 2)),
        Policy("dense", selected(Dense()), p.dense),
        Policy("expert choice", selected(ExpertChoice(float(k))), lambda z: p.expert_choice(z, k, len(z))),
        Policy(
            "expert choice, by sequence", selected(ExpertChoice(float(k), scope="sequence")),
            lambda z: p.expert_choice(z, k, SEQUENCE),
        ),
        Policy("capacity, by order", limited(), lambda z: p.capacity(z, k, 1.25, "order")),
        Policy("capacity, by score", limited(drop="score"), lambda z: p.capacity(z, k, 1.25, "score")),
        Policy(
            "capacity, by sequence", limited(drop="score", scope="sequence"),
            lambda z: p.capacity(z, k, 1.25, "score", SEQUENCE),
        ),
        Policy("capacity, rerouted", limited(overflow="reroute"), lambda z: p.rerouted(z, k, 1.25)),
        Policy("balanced assignment", selected(BalancedAssignment()), p.balanced_assignment),
    ]  # fmt: skip


def run(args: argparse.Namespace) -> int:
    require("rich")
    torch.set_num_threads(args.threads)
    names = [name.strip() for name in (args.shapes or ",".join(ROUTER_SHAPES)).split(",")]
    unknown = [name for name in names if name not in ROUTER_SHAPES]
    if unknown:
        raise CommandError(
            f"--shapes: expected a list of {', '.join(ROUTER_SHAPES)} with --routers, got {unknown[0]!r}"
        )
    dtype = torch.bfloat16 if machine.has_fast_bfloat16() else torch.float32
    text, fails = "", 0
    for name in names:
        shape = ROUTER_SHAPES[name]
        layer = layer_seconds(shape, dtype)
        rows = [row_of(policy, shape, layer) for policy in policies(shape)]
        took = f"the layer takes {layer * 1e3:.0f} ms in {str(dtype).removeprefix('torch.')}, {threads(args.threads)}"
        title = f"{name}: E = {shape.num_experts}, K = {shape.top_k}, T = {TOKENS}; {took}"
        show(title, rows)
        text += markdown(title, rows)
        fails += sum(row["equal"] is False for row in rows)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(text)
        print(f"wrote {args.markdown}")
    return 1 if fails else 0


def layer_seconds(shape: Shape, dtype: torch.dtype) -> float:
    """The median of the experts' forward at TOKENS tokens."""
    part = 1
    while 3 * shape.hidden_size * shape.intermediate_size * shape.num_experts // part * dtype.itemsize > MOST_BYTES:
        part *= 2
    slice_ = shape._replace(num_experts=shape.num_experts // part)
    weights = make_weights(slice_, dtype)
    inputs = make_inputs(slice_, dtype, TOKENS // part, "balanced", 0)

    def call(_: int) -> Tensor:
        return moe(inputs.x, *weights, inputs.topk_ids, inputs.topk_weights)

    with torch.no_grad():
        return median(interleave({"layer": call}, 2 * SECONDS)["layer"].seconds) * part


def row_of(policy: Policy, shape: Shape, layer: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, shape.num_experts, generator=generator)

    def ours(_: int) -> object:
        routing = policy.ours(logits)
        return plan(routing.topk_ids, shape.num_experts)

    def plain(_: int) -> object:
        return plain_routers.plan(policy.plain(logits)[0], shape.num_experts)

    with torch.no_grad():
        equal = same(policy.ours(logits), policy.plain(logits), shape.num_experts)
        times = interleave({"ours": ours, "plain": plain}, SECONDS)
    seconds, theirs = median(times["ours"].seconds), median(times["plain"].seconds)
    return {
        "policy": policy.name, "us": seconds * 1e6, "percent": 100 * seconds / layer, "limit": policy.limit,
        "torch_us": theirs * 1e6, "ratio": theirs / seconds, "equal": equal,
    }  # fmt: skip


def same(routing: Routing, theirs: tuple[Tensor, Tensor], num_experts: int) -> bool:
    """Whether both weigh the same experts by the same numbers, up to the roundings of another softmax."""
    tables = []
    for ids, weights in ((routing.topk_ids, routing.topk_weights), theirs):
        table = torch.zeros(len(ids), num_experts + 1)
        index = torch.where(ids < 0, num_experts, ids).long()
        tables.append((table.scatter(1, index, weights.float()), table.scatter(1, index, 1.0)))
    (ours, taken), (other, wanted) = tables
    return torch.equal(taken[:, :-1], wanted[:, :-1]) and torch.allclose(ours[:, :-1], other[:, :-1], 1e-4, 1e-7)


HEADER = ("policy", "µs", "of the layer", "at most", "torch, µs", "torch / ours", "equal")


def cells(row: dict[str, Any]) -> list[str]:
    over = " (over)" if row["percent"] > row["limit"] else ""
    return [
        row["policy"], f"{row['us']:,.0f}", f"{row['percent']:.2f} %{over}", f"{row['limit']:.0f} %",
        f"{row['torch_us']:,.0f}", f"{row['ratio']:.1f}", "yes" if row["equal"] else "NO",
    ]  # fmt: skip


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = require("rich.table").Table(title=title)
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*cells(row))
    console().print(table)


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *map(cells, rows)]
    return f"{title}.\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"
