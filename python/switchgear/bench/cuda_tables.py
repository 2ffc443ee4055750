# SPDX-License-Identifier: BSD-3-Clause
"""What `switchgear bench --device cuda` prints and writes: plain data in, tables and files out; needs no GPU."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import median
from typing import Any

from ..common import require
from .case import Case
from .published import FIGURES, OP_FIGURES
from .shapes import GPU_TOKENS

SCHEMA = "switchgear-bench-cuda/2"
COLUMNS = ("shape", "tokens", "mode", "peer", "ms", "best_ms", "repetitions", "tflops", "gbytes_per_s",
           "percent_of_ceiling", "bound", "peak_MiB", "relative_error", "wrong")  # fmt: skip


def row_of(
    case: Case, peer: str, error: float, limit: float, times: list[float], peak_bytes: float | None
) -> dict[str, Any]:
    """One result; `times` are milliseconds, none for a peer that is wrong."""
    ms = median(times) if times else None
    return {
        "shape": case.shape_name, **case.shape._asdict(), "tokens": case.tokens, "dtype": "bf16", "mode": case.mode,
        "peer": peer, "ms": ms, "best_ms": min(times) if times else None, "repetitions": len(times),
        "flops": case.flops, "weight_bytes": case.weight_bytes, "tflops": ms and case.flops / ms / 1e9,
        "gbytes_per_s": ms and case.weight_bytes / ms / 1e6,
        "peak_MiB": None if peak_bytes is None else peak_bytes / 2**20,
        "relative_error": error, "error_limit": limit, "wrong": not error <= limit,
    }  # fmt: skip


def against_ceilings(ceilings: dict[str, float], row: dict[str, Any]) -> dict[str, Any]:
    """The row with what binds it on this card, and how much of that it reaches."""
    compute, memory = row["flops"] / ceilings["compute"], row["weight_bytes"] / ceilings["memory"]
    floor = max(compute, memory)
    return row | {
        "bound": "compute" if compute >= memory else "memory",
        "floor_ms": 1e3 * floor,
        "percent_of_ceiling": row["ms"] and 1e5 * floor / row["ms"],
    }


def figures_beside(row: dict[str, Any]) -> list[str]:
    """Published figures for the shape, tokens and mode of a row."""
    return [
        f"published, {figure.gpu}: {figure.who} {figure.tflops:.0f} TFLOP/s ({figure.source})"
        for figure in FIGURES
        if (figure.shape, figure.mode) == (row["shape"], row["mode"]) and GPU_TOKENS[figure.shape] == row["tokens"]
    ]


def machine_line(results: dict[str, Any]) -> str:
    ceilings = results["ceilings"]
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return (
        f"{about}; ceilings of this run: {ceilings['compute'] / 1e12:.0f} TFLOP/s (dense bfloat16 product, 8192³), "
        f"{ceilings['memory'] / 1e9:.0f} GB/s (copy of 1 GiB)"
    )


# ---- on the terminal -------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Any:
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def print_machine(console: Any, results: dict[str, Any]) -> None:
    console.print(machine_line(results), highlight=False, markup=False, soft_wrap=True)


def print_ops(console: Any, results: dict[str, Any]) -> None:
    table = _table("op", "case", "peer", "us", "TFLOP/s", "GB/s", "calls")
    for row in results["ops"]:
        rate = f"{row['tflops']:.0f}" if row["tflops"] else ""
        table.add_row(row["op"], row["case"], row["peer"], f"{row['us']:.1f}", rate, f"{row['gbytes_per_s']:,.0f}",
                      str(row["repetitions"]))  # fmt: skip
    console.print(table)
    for figure in OP_FIGURES:
        console.print(f"  published, {figure.gpu}: {figure.op} {figure.case}: {figure.who} {figure.text} "
                      f"({figure.source})", highlight=False, markup=False, soft_wrap=True)  # fmt: skip


def print_case(
    console: Any, results: dict[str, Any], rows: list[dict[str, Any]], skipped: list[dict[str, str]]
) -> None:
    for name in sorted({f"{row['shape']}, T={row['tokens']}, bf16, {row['mode']}" for row in rows}):
        console.print(f"\n[bold]{name}[/]", highlight=False)
    table = _table("peer", "ms", "TFLOP/s", "of ceiling", "peak MiB", "error", "calls")
    rows = [against_ceilings(results["ceilings"], row) for row in rows]
    for row in sorted(rows, key=lambda row: row["ms"] or float("inf")):
        error = f"{row['relative_error']:.0e}"
        if row["wrong"]:
            table.add_row(row["peer"], "not timed", "", "", "", f"[red]{error} > {row['error_limit']:.0e}[/]", "")
            continue
        table.add_row(row["peer"], f"{row['ms']:.3f}", f"{row['tflops']:.0f}",
                      f"{row['percent_of_ceiling']:.0f} % ({row['bound']})", f"{row['peak_MiB']:,.0f}", error,
                      str(row["repetitions"]))  # fmt: skip
    console.print(table)
    for entry in skipped:
        console.print(f"  {entry['peer']}: left out ({entry['reason']})", highlight=False, markup=False)
    for line in figures_beside(rows[0]) if rows else ():
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


# ---- files -----------------------------------------------------------------------------------------------------------


def complete(results: dict[str, Any]) -> dict[str, Any]:
    """The results as they are written: every row with its part of the ceiling."""
    return results | {"results": [against_ceilings(results["ceilings"], row) for row in results["results"]]}


def markdown(results: dict[str, Any]) -> str:
    lines = [
        machine_line(results), "",
        "| shape | tokens | mode | peer | ms | TFLOP/s | of ceiling | peak MiB | published |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for row in complete(results)["results"]:
        cells = [row["shape"], f"{row['tokens']:,}", row["mode"], row["peer"]]
        if row["wrong"]:
            cells += [f"wrong: error {row['relative_error']:.0e}", "", "", "", ""]
        else:
            published = "; ".join(line.partition(": ")[2].partition(" (")[0] for line in figures_beside(row))
            cells += [f"{row['ms']:.3f}", f"{row['tflops']:.0f}", f"{row['percent_of_ceiling']:.0f} % {row['bound']}",
                      f"{row['peak_MiB']:,.0f}", published if row["peer"] == "switchgear" else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if results["ops"]:
        lines += ["", "| op | case | peer | us | TFLOP/s | GB/s |", "| --- | --- | --- | ---: | ---: | ---: |"]
        for row in results["ops"]:
            rate = f"{row['tflops']:.0f}" if row["tflops"] else ""
            lines.append(f"| {row['op']} | {row['case']} | {row['peer']} | {row['us']:.1f} | {rate} | "
                         f"{row['gbytes_per_s']:,.0f} |")  # fmt: skip
    if results["skipped"]:
        lines += ["", "Left out:", ""]
        lines += [f"- {entry['case']}, {entry['peer']}: {entry['reason']}" for entry in results["skipped"]]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], outputs: dict[str, str]) -> None:
    if "json" in outputs:
        Path(outputs["json"]).write_text(json.dumps(complete(results), indent=2) + "\n")
    if "csv" in outputs:
        with open(outputs["csv"], "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(complete(results)["results"])
    if "markdown" in outputs:
        Path(outputs["markdown"]).write_text(markdown(results))
