# SPDX-License-Identifier: BSD-3-Clause
"""Prints the results of `switchgear bench layers` and writes its files."""

from __future__ import annotations

from typing import Any

from switchgear.cli.common import table, threads

from . import markdown
from .competitors import COMPETITORS
from .results import save, undisturbed, write_csv
from .shapes import SHAPES
from .targets import is_ours, judge, ours_in


def print_choices() -> None:
    print("shapes (H hidden size, I intermediate size, E experts, K per token)")
    for name, shape in SHAPES.items():
        print(f"  {name:<17} {shape.sizes}: {shape.model}")
    print("competitors")
    for name, competitor in COMPETITORS.items():
        extra = "" if competitor.default else "  [only if named, or with --competitors]"
        kinds = f"{'/'.join(competitor.dtypes)}, {'/'.join(competitor.modes)}"
        print(f"  {name:<18} {competitor.about} {kinds}{extra}")


def print_machine(console: Any, machine: dict[str, Any], ceilings: dict[str, Any]) -> None:
    console.print(
        f"[bold]{machine['model']}[/], {threads(machine['threads'])}; torch {machine['torch']}, "
        f"transformers {machine['transformers'] or 'none'}, switchgear {machine['switchgear']} ({machine['isa']})"
    )
    for line in markdown.ceiling_lines(ceilings):
        console.print(line)


def print_case(console: Any, title: str, rows: list[dict[str, Any]], skipped: list[dict[str, str]]) -> None:
    """One table, the fastest first. "x ours" is the time relative to switchgear's, for bf16 and fp32 on plain
    weights."""
    console.print(f"\n[bold]{title}[/]")
    if rows:
        row = rows[0]
        console.print(
            f"[dim]{SHAPES[row['shape']].sizes}; {row['touched_experts']:.0f} experts touched, read in "
            f"{row['read_ms']:.3f} ms; registers {row['multiply_rate'] / 1e9:,.0f} GFLOP/s; at best "
            f"{row['floor_ms']:.3f} ms, by {row['bound']}[/]"
        )
    ours = next((row["ms"] for row in rows if row["competitor"] in ours_in(row["dtype"])), None)
    shown = table("competitor", "ms", "GFLOP/s", "GB/s", "floor", "x ours", "error", "calls", "quiet")
    for row in sorted(rows, key=lambda row: row["ms"] or float("inf")):
        error = f"{row['relative_error']:.0e}"
        if row["wrong"]:
            wrong = f"[red]{error} > {row['error_limit']:.0e}[/]"
            shown.add_row(row["competitor"], "wrong", "", "", "", "", wrong)
            continue
        shown.add_row(
            row["competitor"], f"{row['ms']:.3f}", f"{row['gflops']:,.0f}", f"{row['gbytes_per_s']:.1f}",
            f"{row['percent_of_floor']:.0f} %", f"{row['ms'] / ours:.2f}" if ours else "", error,
            str(row["repetitions"]), f"{row['quiet_turns']}/{row['turns']}",
            style="bold" if is_ours(row["competitor"]) else None,
        )  # fmt: skip
    console.print(shown)
    print_skipped(console, skipped)


def print_skipped(console: Any, skipped: list[dict[str, str]]) -> None:
    for entry in skipped:
        what = entry["case"] if entry["competitor"] == "all" else entry["competitor"]
        console.print(f"  [dim]{what}: {entry['reason']}[/]")


def print_verdicts(console: Any, results: dict[str, Any]) -> None:
    """The targets of the measured cases, missed ones last."""
    verdicts = judge(undisturbed(results))
    shown = table("case", "at least", "reached", "holds", wrap=True)
    for verdict in sorted(verdicts, key=lambda verdict: not verdict.holds):
        shown.add_row(*verdict[:3], "yes" if verdict.holds else "[red]no[/]")
    if verdicts:
        console.print("\n[bold]targets[/]", shown)


def write(results: dict[str, Any], outputs: dict[str, str]) -> None:
    """Writes the requested files: {"json" | "csv" | "markdown" | "plot": path}."""
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
            write_csv(results["results"], path)
        print(f"wrote {path}")
