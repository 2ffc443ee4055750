# SPDX-License-Identifier: BSD-3-Clause
"""What `switchgear bench` prints, and the files that it writes."""

from __future__ import annotations

import csv
from typing import Any

from ..common import require, threads
from . import markdown
from .competitors import PEERS
from .results import save, undisturbed
from .shapes import SHAPES
from .targets import is_ours, judge


def print_choices() -> None:
    print("shapes (H hidden size, I intermediate size, E experts, K per token)")
    for name, shape in SHAPES.items():
        sizes = f"H {shape.hidden_size}, I {shape.intermediate_size}, E {shape.num_experts}, K {shape.top_k}"
        print(f"  {name:<17} {sizes}: {shape.model}")
    print("peers")
    for name, peer in PEERS.items():
        extra = "" if peer.default else "  [only if named, or with --peers]"
        print(f"  {name:<18} {peer.about} {'/'.join(peer.dtypes)}, {'/'.join(peer.modes)}{extra}")


def print_machine(console: Any, machine: dict[str, Any], ceilings: dict[str, Any]) -> None:
    console.print(
        f"[bold]{machine['model']}[/], {threads(machine['threads'])}; torch {machine['torch']}, "
        f"transformers {machine['transformers'] or 'none'}, switchgear {machine['switchgear']} ({machine['isa']})",
        highlight=False,
    )
    for line in markdown.ceiling_lines(ceilings):
        console.print(line, highlight=False)


def print_case(console: Any, title: str, rows: list[dict[str, Any]], skipped: list[dict[str, str]]) -> None:
    """One table, the fastest first. "x ours" is the time in multiples of that of switchgear on plain weights."""
    console.print(f"\n[bold]{title}[/]", highlight=False)
    if rows:
        row = rows[0]
        console.print(
            f"[dim]H {row['hidden_size']}, I {row['intermediate_size']}, E {row['num_experts']}, K {row['top_k']}; "
            f"{row['touched_experts']:.0f} experts touched, read in {row['read_ms']:.3f} ms; registers "
            f"{row['multiply_rate'] / 1e9:,.0f} GFLOP/s; at best {row['floor_ms']:.3f} ms, by {row['bound']}[/]",
            highlight=False,
        )  # fmt: skip
    ours = next((row["ms"] for row in rows if is_ours(row["peer"])), None)
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("peer", no_wrap=True)
    for name in ("ms", "GFLOP/s", "GB/s", "floor", "x ours", "error", "calls", "quiet"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row["ms"] or float("inf")):
        error = f"{row['relative_error']:.0e}"
        if row["wrong"]:
            table.add_row(row["peer"], "wrong", "", "", "", "", f"[red]{error} > {row['error_limit']:.0e}[/]", "", "")
            continue
        ratio = f"{row['ms'] / ours:.2f}" if ours else ""
        table.add_row(
            row["peer"], f"{row['ms']:.3f}", f"{row['gflops']:,.0f}", f"{row['gbytes_per_s']:.1f}",
            f"{row['percent_of_floor']:.0f} %", ratio, error, str(row["repetitions"]),
            f"{row['quiet_turns']}/{row['turns']}",
            style="bold" if is_ours(row["peer"]) else None,
        )  # fmt: skip
    console.print(table)
    print_skipped(console, skipped)


def print_skipped(console: Any, skipped: list[dict[str, str]]) -> None:
    for entry in skipped:
        what = entry["case"] if entry["peer"] == "all" else entry["peer"]
        console.print(f"  [dim]{what}: {entry['reason']}[/]", highlight=False)


def print_verdicts(console: Any, results: dict[str, Any]) -> None:
    """The targets of the cases that were measured, those that do not hold last."""
    verdicts = judge(undisturbed(results))
    if not verdicts:
        return
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("case", "at least", "reached", "holds"):
        table.add_column(name, no_wrap=name == "holds")
    for verdict in sorted(verdicts, key=lambda verdict: not verdict.holds):
        table.add_row(verdict.case, verdict.target, verdict.reached, "yes" if verdict.holds else "[red]no[/]")
    console.print("\n[bold]targets[/]", table)


# ---- files -----------------------------------------------------------------------------------------------------------


def write(results: dict[str, Any], outputs: dict[str, str]) -> None:
    """Write the files that were asked for: {"json" | "csv" | "markdown" | "plot": path}."""
    for kind, path in outputs.items():
        if kind == "plot":
            from .plot import plot

            plot(results, path)
            continue
        if kind == "json":
            save(results, path)
        elif kind == "markdown":
            markdown.write(results, path)
        else:
            with open(path, "w", newline="") as file:
                rows = results["results"]
                table = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["shape"])
                table.writeheader()
                table.writerows(rows)
        print(f"wrote {path}")
