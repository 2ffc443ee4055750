# SPDX-License-Identifier: BSD-3-Clause
"""The output of `switchgear bench cuda`: plain data in, tables and files out; needs no GPU."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from switchgear.cli.common import markdown_table, table

from .case import Case
from .published import FIGURES, OP_FIGURES
from .report import write_blocks
from .results import Row, write_csv, write_json
from .shapes import GPU_TOKENS

SCHEMA = "switchgear-bench-cuda/4"


def row_of(case: Case, name: str, error: float, limit: float, times: list[float], peak_bytes: float | None) -> Row:
    """One result; `times` are milliseconds, empty for a wrong competitor."""
    ms = median(times) if times else None
    return {
        "shape": case.shape_name, **case.shape._asdict(), "tokens": case.tokens, "dtype": "bf16", "mode": case.mode,
        "competitor": name, "ms": ms, "best_ms": min(times) if times else None, "repetitions": len(times),
        "flops": case.flops, "weight_bytes": case.weight_bytes, "tflops": ms and case.flops / ms / 1e9,
        "gbytes_per_s": ms and case.weight_bytes / ms / 1e6,
        "peak_MiB": None if peak_bytes is None else peak_bytes / 2**20,
        "relative_error": error, "error_limit": limit, "wrong": not error <= limit,
    }  # fmt: skip


def failure(case: str, error: Exception) -> dict[str, str]:
    """What is noted of a case that switchgear or the device ended."""
    return {"case": case, "competitor": "switchgear", "reason": f"failed: {type(error).__name__}: {str(error)[:300]}"}


def against_ceilings(ceilings: dict[str, float], row: Row) -> Row:
    """The row with the limit that binds it on this card, and the percentage of it that was reached."""
    compute, memory = row["flops"] / ceilings["compute"], row["weight_bytes"] / ceilings["memory"]
    floor = max(compute, memory)
    return row | {
        "bound": "compute" if compute >= memory else "memory",
        "floor_ms": 1e3 * floor,
        "percent_of_ceiling": row["ms"] and 1e5 * floor / row["ms"],
    }


def figures_beside(row: Row) -> list[str]:
    """Published figures for the row's shape, tokens and mode."""
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


OP_HEADER = ("op", "case", "competitor", "us", "TFLOP/s", "GB/s")


def op_cells(row: Row) -> list[str]:
    rate = f"{row['tflops']:.0f}" if row["tflops"] else ""
    return [row["op"], row["case"], row["competitor"], f"{row['us']:.1f}", rate, f"{row['gbytes_per_s']:,.0f}"]


# ---- on the terminal -------------------------------------------------------------------------------------------------


def print_line(console: Any, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def print_machine(console: Any, results: dict[str, Any]) -> None:
    print_line(console, machine_line(results))


def print_ops(console: Any, results: dict[str, Any]) -> None:
    shown = table(*OP_HEADER, "calls")
    for row in results["ops"]:
        shown.add_row(*op_cells(row), str(row["repetitions"]))
    console.print(shown)
    for f in OP_FIGURES:
        print_line(console, f"  published, {f.gpu}: {f.op} {f.case}: {f.who} {f.text} ({f.source})")


def print_case(console: Any, results: dict[str, Any], rows: list[Row], skipped: list[dict[str, str]]) -> None:
    for name in sorted({f"{row['shape']}, T={row['tokens']}, bf16, {row['mode']}" for row in rows}):
        console.print(f"\n[bold]{name}[/]")
    shown = table("competitor", "ms", "TFLOP/s", "of ceiling", "peak MiB", "error", "calls")
    rows = [against_ceilings(results["ceilings"], row) for row in rows]
    for row in sorted(rows, key=lambda row: row["ms"] or float("inf")):
        error = f"{row['relative_error']:.0e}"
        if row["wrong"]:
            wrong = f"[red]{error} > {row['error_limit']:.0e}[/]"
            shown.add_row(row["competitor"], "not timed", "", "", "", wrong)
            continue
        shown.add_row(row["competitor"], f"{row['ms']:.3f}", f"{row['tflops']:.0f}",
                      f"{row['percent_of_ceiling']:.0f} % ({row['bound']})", f"{row['peak_MiB']:,.0f}", error,
                      str(row["repetitions"]))  # fmt: skip
    console.print(shown)
    for entry in skipped:
        print_line(console, f"  {entry['competitor']}: left out ({entry['reason']})")
    for line in figures_beside(rows[0]) if rows else ():
        print_line(console, f"  {line}")


# ---- files -----------------------------------------------------------------------------------------------------------


def complete(results: dict[str, Any]) -> dict[str, Any]:
    """The results for a file: every row with its share of the ceiling."""
    return results | {"results": [against_ceilings(results["ceilings"], row) for row in results["results"]]}


def markdown(results: dict[str, Any]) -> str:
    header = ["shape", "tokens", "mode", "competitor", "ms", "TFLOP/s", "of ceiling", "peak MiB", "published"]
    text = f"{machine_line(results)}\n\n"
    text += markdown_table(header, map(_cells, complete(results)["results"]), left=(0, 2, 3, 8))
    if results["ops"]:
        text += "\n" + markdown_table(OP_HEADER, map(op_cells, results["ops"]), left=(0, 1, 2))
    if results["skipped"]:
        text += "\nLeft out:\n\n"
        text += "".join(f"- {skip['case']}, {skip['competitor']}: {skip['reason']}\n" for skip in results["skipped"])
    return text


def _cells(row: Row) -> list[str]:
    cells = [row["shape"], f"{row['tokens']:,}", row["mode"], row["competitor"]]
    if row["wrong"]:
        return [*cells, f"wrong: error {row['relative_error']:.0e}", "", "", "", ""]
    published = "; ".join(line.partition(": ")[2].partition(" (")[0] for line in figures_beside(row))
    return [
        *cells, f"{row['ms']:.3f}", f"{row['tflops']:.0f}", f"{row['percent_of_ceiling']:.0f} % {row['bound']}",
        f"{row['peak_MiB']:,.0f}", published if row["competitor"] == "switchgear" else "",
    ]  # fmt: skip


def write(results: dict[str, Any], outputs: dict[str, str]) -> None:
    if "json" in outputs:
        write_json(complete(results), outputs["json"])
    if "csv" in outputs:
        write_csv(complete(results)["results"], outputs["csv"])
    if "markdown" in outputs:
        write_blocks(outputs["markdown"], {"cuda": partial(markdown, results)})
