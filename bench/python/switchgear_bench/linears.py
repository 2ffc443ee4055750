# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench linears`: products of a model's linears, beside torch's.

Each product is compared with float64, then timed in turns with torch's and with a plain read of the weight. A weight
has copies, taken in turns, so that each call reads one from memory.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import switchgear
from switchgear import _C
from switchgear.cli.common import CommandError, console, markdown_table, require, table

from .case import FORMATS
from .ceilings import multiply_rate
from .options import add_cases, add_files, add_shapes, add_threads, begin, choose
from .report import threads, write_outputs
from .results import Row, earlier_results, read_json, rounded, write_json
from .timing import FEWEST_QUIET, interleave


class Shape(NamedTuple):
    width: int  # out_features
    columns: int  # in_features
    what: str


SHAPES = {
    "olmoe-attention": Shape(2048, 2048, "OLMoE's q, k, v and o"),
    "olmoe-router": Shape(64, 2048, "OLMoE's router"),
    "olmoe-head": Shape(50304, 2048, "OLMoE's head"),
    "qwen3-q": Shape(4096, 2048, "Qwen3-30B-A3B's q"),
    "qwen3-kv": Shape(512, 2048, "its k and v"),
    "qwen3-o": Shape(2048, 4096, "its o"),
    "gpt-oss-q": Shape(4096, 2880, "gpt-oss's q"),
    "gpt-oss-kv": Shape(512, 2880, "its k and v"),
    "mixtral-q": Shape(4096, 4096, "Mixtral's q and o"),
    "mixtral-kv": Shape(1024, 4096, "its k and v"),
    "mixtral-router": Shape(8, 4096, "its router"),
    "deepseek-router": Shape(256, 7168, "DeepSeek-V3's router"),
}
TOKENS, DTYPES = (1, 16, 256), ("bf16", "fp32")
SECONDS = 0.5  # for each case
COPIES_BYTES = 200 << 20
SCHEMA = "switchgear-bench-linears/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, SHAPES)
    add_cases(parser, DTYPES, ",".join(DTYPES), ",".join(map(str, TOKENS)))
    add_threads(parser)
    add_files(parser, "source json markdown")


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    require("rich")
    names = choose("shapes", args.shapes or ",".join(SHAPES), SHAPES)
    if args.source:
        results = read_json(args.source, "--from", SCHEMA)
    else:
        torch.set_num_threads(args.threads)
        wanted = [(n, d, t) for n in names for d in args.dtypes or DTYPES for t in args.tokens or TOKENS]
        earlier = earlier_results(args, SCHEMA, about)
        rows = [row for row in (earlier["results"] if earlier else []) if _case(row) not in wanted]
        results = {"schema": SCHEMA, "machine": about, "results": rows}
        for case in wanted:
            rows.append(measure(*case, args.threads))
            if args.json:
                write_json(results, args.json)
        rows.sort(key=lambda row: (list(SHAPES).index(row["shape"]), DTYPES.index(row["dtype"]), row["tokens"]))
    show(results)
    write_outputs(args, results, {"linears": lambda: markdown(results)})
    return 0


def _case(row: Row) -> tuple[Any, ...]:
    return row["shape"], row["dtype"], row["tokens"]


# ---- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(name: str, dtype_name: str, tokens: int, num_threads: int) -> Row:
    """CommandError if the product is wrong."""
    shape, dtype = SHAPES[name], FORMATS[dtype_name].dtype
    weight = torch.randn(shape.width, shape.columns).to(dtype)
    copies = [weight, *(weight.clone() for _ in range(COPIES_BYTES // weight.nbytes))]
    x = torch.randn(tokens, shape.columns).to(dtype)
    check(x, weight, switchgear.linear(x, weight))
    times = interleave({
        "ours": lambda i: switchgear.linear(x, copies[i % len(copies)]),
        "torch": lambda i: F.linear(x, copies[i % len(copies)]),
        "read": lambda i: _C.read([copies[i % len(copies)]], num_threads),
    }, SECONDS)  # fmt: skip
    us = {f"{who}_us": 1e6 * median(timed.seconds) for who, timed in times.items()}
    rate = multiply_rate(dtype_name, num_threads)
    quiet = min(timed.quiet_turns for timed in times.values())
    row: Row = {"shape": name, "width": shape.width, "columns": shape.columns, "dtype": dtype_name, "tokens": tokens}
    return rounded(row | us | {"bytes": weight.nbytes, "multiply_rate": rate, "quiet_turns": quiet})


def check(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compares with float64. Sums of products of random numbers have an error of few roundings of their size."""
    some = torch.linspace(0, len(weight) - 1, 64).long()
    want = x.double() @ weight[some].double().mT
    error = float((out[:, some].double() - want).abs().max()) / weight.shape[1] ** 0.5
    if not error < 32 * torch.finfo(out.dtype).eps:
        raise CommandError(f"the product is wrong: its error is {error:.1e} of the size of its elements")


# ---- tables ----------------------------------------------------------------------------------------------------------

HEADER = ("weight", "dtype", "tokens", "µs", "GB/s", "of a read", "GFLOP/s", "of multiply-adds", "torch / ours")


def cells(row: Row, rate: float) -> list[str]:
    """rate: the multiply-adds per second of the row's dtype."""
    seconds, read = row["ours_us"] / 1e6, row["read_us"] / row["ours_us"]
    flops = 2 * row["tokens"] * row["width"] * row["columns"] / seconds
    disturbed = " (disturbed)" if row["quiet_turns"] < FEWEST_QUIET else ""
    return [
        f"{row['shape']} [{row['width']}, {row['columns']}]{disturbed}", row["dtype"], f"{row['tokens']:,}",
        f"{row['ours_us']:,.0f}", f"{row['bytes'] / seconds / 1e9:.1f}", f"{100 * read:.0f} %",
        f"{flops / 1e9:,.0f}", f"{100 * flops / rate:.0f} %",
        f"{row['torch_us'] / row['ours_us']:.2f}",
    ]  # fmt: skip


def lines(results: dict[str, Any]) -> list[list[str]]:
    """Cells of each row, by the highest rate of multiply-adds that was seen: others share the cores."""
    rows = results["results"]
    rates = {d: max((row["multiply_rate"] for row in rows if row["dtype"] == d), default=0.0) for d in DTYPES}
    return [cells(row, rates[row["dtype"]]) for row in rows]


def show(results: dict[str, Any]) -> None:
    shown = table(*HEADER)
    for line in lines(results):
        shown.add_row(*line)
    console().print(shown)


def markdown(results: dict[str, Any]) -> str:
    """A row per weight, dtype and number of tokens."""
    about = results["machine"]
    versions = f"torch {about['torch']}, switchgear {about['switchgear']}"
    note = f"{about['model']}, {threads(about['threads'])}, {about['isa']}; {versions}.\n"
    return f"{markdown_table(HEADER, lines(results))}\n{note}"
