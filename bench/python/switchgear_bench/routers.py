# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench routers`: the cost of routing policies, relative to their layer and to plain torch.

Each policy's choice and plan are timed from the same logits, in turns with the same policy in torch ops
(router_policies.py) and with the layer, after both gave equal results. The layer is the experts' forward in the dtype
with the fastest products on this CPU, with the shape's own top_k, checked against float64. If its weights would be
large, a slice of it is timed, as the tables note: fewer experts and proportionally fewer tokens. Each expert then has
as many rows, and the layer's cost scales in proportion.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import plan
from switchgear.cli.common import console, markdown_table, require, table
from switchgear.functional import Routing

from . import machine, plain_routers
from .case import Case, Layer, forward, make_case, make_weights
from .competitors.ours import switchgear
from .options import add_files, add_shapes, add_threads, begin, choose
from .report import threads, write_outputs
from .results import Row, earlier_results, read_json, rounded, write_json
from .router_policies import Policy, policies
from .shapes import ROUTER_SHAPES, Shape, forward_flops
from .timing import FEWEST_QUIET, interleave
from .verify import expected, relative_error, tolerance

TOKENS = 2048
MOST_BYTES = 1 << 30  # of weights
SECONDS = 1.0  # for each policy
TRIES = 3  # if other processes disturb it
SCHEMA = "switchgear-bench-routers/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, ROUTER_SHAPES)
    add_threads(parser)
    add_files(parser, "source json markdown")


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    require("rich")
    names = choose("shapes", args.shapes or ",".join(ROUTER_SHAPES), ROUTER_SHAPES)
    if args.source:
        results = read_json(args.source, "--from", SCHEMA)
        for measured in results["shapes"]:
            show(measured, results["machine"])
    else:
        earlier = earlier_results(args, SCHEMA, about)
        others = [shape for shape in earlier["shapes"] if shape["shape"] not in names] if earlier else []
        results = {"schema": SCHEMA, "machine": about, "shapes": others}
        torch.set_num_threads(args.threads)
        dtype = "bf16" if machine.has_fast_bfloat16() else "fp32"
        for name in names:
            results["shapes"].append(measure(name, ROUTER_SHAPES[name], dtype))
            show(results["shapes"][-1], about)
            if args.json:
                write_json(results, args.json)
    results["shapes"].sort(key=lambda measured: list(ROUTER_SHAPES).index(measured["shape"]))
    write_outputs(args, results, {"routers": lambda: markdown(results)})
    wrong = sum(not row["equal"] for measured in results["shapes"] for row in measured["results"])
    return int(not args.source and wrong > 0)


# ---- measuring -------------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """A layer that fits in memory: 1/parts of the experts and of the tokens."""

    parts: int
    case: Case
    layer: Layer


def slice_of(shape: Shape, dtype: str) -> Slice:
    """RuntimeError if the layer is wrong."""
    parts, item = 1, {"bf16": 2, "fp32": 4}[dtype]
    while 3 * shape.hidden_size * shape.intermediate_size * shape.num_experts // parts * item > MOST_BYTES:
        parts *= 2
    part = shape._replace(num_experts=shape.num_experts // parts)
    weights = make_weights(part, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    case = make_case("", part, dtype, TOKENS // parts, "forward", "balanced", weights)
    layer = switchgear(case)
    error = relative_error(case, layer, expected(case))
    if error > tolerance(case):
        raise RuntimeError(f"the layer is wrong: its relative error is {error:.1e}, at most {tolerance(case):.1e}")
    return Slice(parts, case, layer)


def measure(name: str, shape: Shape, dtype: str) -> Row:
    part = slice_of(shape, dtype)
    draws = plain_routers.Draws()
    logits = torch.randn(TOKENS, shape.num_experts, generator=torch.Generator().manual_seed(0))
    rows, layer = [], []
    for policy in policies(shape, TOKENS, draws):
        row, seconds = row_of(policy, logits, part, draws)
        rows.append(row)
        layer += seconds
    ms = median(layer) * part.parts * 1e3
    measured: Row = rounded({
        "shape": name, **shape._asdict(), "tokens": TOKENS, "dtype": dtype, "layer_ms": ms,
        "gflops": forward_flops(shape, TOKENS) / ms / 1e6, "parts": part.parts,
        "timed_experts": part.case.shape.num_experts, "timed_tokens": part.case.tokens, "results": rows,
    })  # fmt: skip
    return measured


def row_of(policy: Policy, logits: Tensor, part: Slice, draws: plain_routers.Draws) -> tuple[Row, list[float]]:
    """The columns, and the seconds of the layer's slice."""
    num_experts = logits.shape[1]

    def ours(_: int) -> object:
        return plan(policy.ours(logits).topk_ids, num_experts)

    def plain(_: int) -> object:
        return plain_routers.plan(policy.plain(logits)[0], num_experts)

    def layer(_: int) -> Tensor:
        return forward(part.layer, part.case.inputs[0])

    with torch.no_grad():
        equal = agree(policy, logits, draws)
        for _ in range(TRIES):
            times = interleave({"layer": layer, "ours": ours, "plain": plain}, SECONDS)
            quiet = min(timed.quiet_turns for timed in times.values())
            if quiet >= FEWEST_QUIET:
                break
    seconds, theirs, whole = (median(times[name].seconds) for name in ("ours", "plain", "layer"))
    return {
        "policy": policy.name, "us": seconds * 1e6, "percent": 100 * seconds / (whole * part.parts),
        "limit": policy.limit, "torch_us": theirs * 1e6, "ratio": theirs / seconds, "equal": equal,
        "quiet_turns": quiet,
    }, times["layer"].seconds  # fmt: skip


def agree(policy: Policy, logits: Tensor, draws: plain_routers.Draws) -> bool:
    """Whether both sides give the same routing for the same random numbers."""
    draws.shared = True
    draws.generator.manual_seed(0)
    routing = policy.ours(logits)
    draws.generator.manual_seed(0)
    theirs = policy.plain(logits)
    draws.shared = False
    return same(routing, theirs, logits.shape[1])


def same(routing: Routing, theirs: tuple[Tensor, Tensor], num_experts: int) -> bool:
    """Whether both give the same experts the same weights, up to the rounding of another softmax."""
    tables = []
    for ids, weights in ((routing.topk_ids, routing.topk_weights), theirs):
        dense = torch.zeros(len(ids), num_experts + 1)
        index = torch.where(ids < 0, num_experts, ids).long()
        tables.append((dense.scatter(1, index, weights.float()), dense.scatter(1, index, 1.0)))
    (ours, taken), (other, wanted) = tables
    return torch.equal(taken[:, :-1], wanted[:, :-1]) and torch.allclose(ours[:, :-1], other[:, :-1], 1e-4, 1e-7)


# ---- tables ----------------------------------------------------------------------------------------------------------

HEADER = ("policy", "µs", "of the layer", "at most", "torch, µs", "torch / ours", "equal")


def title(measured: dict[str, Any], about: dict[str, Any]) -> str:
    """What the rows describe, and how the layer was timed."""
    m = measured
    layer = f"the layer takes {m['layer_ms']:,.0f} ms in {m['dtype']} ({m['gflops']:,.0f} GFLOP/s)"
    if m["parts"] > 1:
        layer += (
            f", {m['parts']} times what {m['timed_experts']} of the {m['num_experts']} experts take for "
            f"{m['timed_tokens']:,} of the {m['tokens']:,} tokens"
        )
    sizes = f"H = {m['hidden_size']}, I = {m['intermediate_size']}, E = {m['num_experts']}, K = {m['top_k']}"
    return f"{m['shape']}: {sizes}, T = {m['tokens']}; {layer}; {threads(about['threads'])}"


def cells(row: dict[str, Any]) -> list[str]:
    over = " (over)" if row["percent"] > row["limit"] else ""
    disturbed = " (disturbed)" if row["quiet_turns"] < FEWEST_QUIET else ""
    return [
        row["policy"] + disturbed, f"{row['us']:,.0f}", f"{row['percent']:.2f} %{over}", f"{row['limit']:.0f} %",
        f"{row['torch_us']:,.0f}", f"{row['ratio']:.1f}", "yes" if row["equal"] else "NO",
    ]  # fmt: skip


def show(measured: dict[str, Any], about: dict[str, Any]) -> None:
    shown = table(*HEADER)
    for row in measured["results"]:
        shown.add_row(*cells(row))
    console().print(title(measured, about), shown, sep="\n")


def markdown(results: dict[str, Any]) -> str:
    """A row per policy, with its share of each layer's time and torch's time over ours."""
    about, shapes = results["machine"], results["shapes"]
    header, found = ["policy"], dict[str, list[str]]()
    for measured in shapes:
        header += [f"of {measured['shape']}", "torch / ours"]
        for row in measured["results"]:
            name, _, share, _, _, ratio, equal = cells(row)
            disturbed = " (disturbed)" * name.endswith(" (disturbed)")
            found.setdefault(row["policy"], []).extend([share + disturbed, ratio if equal == "yes" else "not equal"])
    lines = [[policy, *columns] for policy, columns in found.items()]
    notes = "".join(f"- {title(measured, about)}.\n" for measured in shapes)
    machine_note = f"{about['model']}, {about['isa']}, torch {about['torch']}, switchgear {about['switchgear']}.\n"
    return f"{notes}\n{markdown_table(header, lines)}\n{machine_note}"
