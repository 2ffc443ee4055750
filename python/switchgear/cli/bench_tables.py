# SPDX-License-Identifier: BSD-3-Clause
"""What `switchgear bench` prints and writes: tables, JSON, CSV, Markdown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

from . import bench_results
from .bench_results import cases_of
from .bench_targets import Verdict, judge
from .common import require, threads
from .peers import PEERS
from .shapes import SHAPES

OURS = "switchgear"
BASELINES = ("hf_grouped_mm", "hf_eager", "hf_batched_mm")  # what a user of transformers has today


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
    for line in ceiling_lines(ceilings):
        console.print(line, highlight=False)


def ceiling_lines(ceilings: dict[str, Any]) -> list[str]:
    """The ceilings and where they come from, in words."""

    def named(rates: dict[str, float]) -> str:
        return ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in sorted(rates.items(), key=lambda item: -item[1]))

    lines = [
        f"ceiling {dtype}: {rate / 1e9:,.0f} GFLOP/s ({named(ceilings['candidates']['compute'][dtype])})"
        for dtype, rate in ceilings["compute"].items()
    ]
    return [*lines, f"ceiling of reading: {ceilings['read'] / 1e9:,.1f} GB/s ({named(ceilings['candidates']['read'])})"]


def is_ours(peer: str) -> bool:
    return peer.startswith(OURS)


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
    verdicts = judge(cases_of(results))
    if not verdicts:
        return
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("case", "at least", "reached", "holds"):
        table.add_column(name, no_wrap=name == "holds")
    for verdict in sorted(verdicts, key=lambda verdict: not verdict.holds):
        table.add_row(verdict.case, verdict.target, verdict.reached, "yes" if verdict.holds else "[red]no[/]")
    console.print("\n[bold]targets[/]", table)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """The cases, the machine, and the targets of those cases that have any."""
    parts = [case_table(cases_of(results)), note(results)]
    verdicts = judge(cases_of(results))
    if verdicts:
        parts.append(target_table(verdicts))
    return "\n".join(parts)


def _table(header: Sequence[str], rule: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


def case_table(cases: list[list[dict[str, Any]]]) -> str:
    """A row per case: switchgear on plain and on packed weights, the best of transformers, the best of all others."""
    header = ["shape", "tokens", "dtype", "mode", "switchgear, ms", "of floor", "packed, ms", "of floor",
              "transformers, ms", "best other, ms"]  # fmt: skip
    rule = ["---", "---:", "---", "---", "---:", "---:", "---:", "---:", "---:", "---:"]
    lines = []
    for rows in cases:
        timed = {row["peer"]: row for row in rows if row["ms"]}
        plain = next((timed[n] for n in (OURS, f"{OURS}_int8", f"{OURS}_int4") if n in timed), None)
        packed = timed.get(f"{OURS}_packed")
        best = min((row for row in (plain, packed) if row), key=lambda row: row["ms"], default=None)
        hugging_face = _fastest([timed[name] for name in BASELINES if name in timed])
        other = _fastest([row for name, row in timed.items() if not is_ours(name) and not name.startswith("hf_")])
        row = rows[0]
        extras = [row["mode"], row["routing"] if row["routing"] != "balanced" else "",
                  "tuned allocator" if row["allocator"] == "tuned" else ""]  # fmt: skip
        cells = [row["shape"], f"{row['tokens']:,}", row["dtype"], ", ".join(filter(None, extras))]
        for mine in (plain, packed):
            cells += [f"{mine['ms']:.2f}", f"{mine['percent_of_floor']:.0f} %"] if mine else ["", ""]
        cells += [_against(hugging_face, plain, ""), _against(other, best, other["peer"] if other else "")]
        lines.append(cells)
    return _table(header, rule, lines)


def _fastest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return min(rows, key=lambda row: row["ms"], default=None)


def _against(theirs: dict[str, Any] | None, ours: dict[str, Any] | None, name: str) -> str:
    if theirs is None:
        return ""
    ratio = f", {theirs['ms'] / ours['ms']:.2f}x" if ours else ""
    return f"{theirs['ms']:.2f}" + (f" ({name})" if name else "") + ratio


def target_table(verdicts: Sequence[Verdict]) -> str:
    lines = [[v.case, v.target, v.reached, "yes" if v.holds else "**no**"] for v in verdicts]
    return _table(["case", "at least", "reached", "holds"], ["---"] * 4, lines)


def note(results: dict[str, Any]) -> str:
    """The machine, in a sentence."""
    machine = results["machine"]
    pages = {row["pages"] for row in results["results"]}
    return (
        f"{machine['model']}, {threads(machine['threads'])}, {machine['isa']}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, switchgear {machine['switchgear']}. "
        + "; ".join(ceiling_lines(results["ceilings"]))
        + ("; weights on huge pages.\n" if pages == {"huge"} else ".\n")
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def write(results: dict[str, Any], outputs: dict[str, str]) -> None:
    """Write the files that were asked for: {"json" | "csv" | "markdown" | "plot": path}."""
    for kind, path in outputs.items():
        if kind == "plot":
            from .bench_plot import plot

            plot(results, path)
            continue
        if kind == "json":
            bench_results.save(results, path)
        elif kind == "markdown":
            with open(path, "w") as file:
                file.write(markdown(results))
        else:
            with open(path, "w", newline="") as file:
                rows = results["results"]
                table = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["shape"])
                table.writeheader()
                table.writerows(rows)
        print(f"wrote {path}")
