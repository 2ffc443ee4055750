# SPDX-License-Identifier: BSD-3-Clause
"""What `switchgear bench` prints and writes: tables, JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import json
from typing import Any

from .bench_case import Case
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
        extra = "" if peer.default else "  [only if named, or with --peers all]"
        print(f"  {name:<17} {peer.about} {'/'.join(peer.dtypes)}, {'/'.join(peer.modes)}{extra}")


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
    lines += [f"ceiling of reading: {ceilings['read'] / 1e9:,.1f} GB/s ({named(ceilings['candidates']['read'])})"]
    return lines + ([ceilings["remark"]] if ceilings["remark"] else [])  # fmt: skip


def ratio_to_ours(rows: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """How many times as long as switchgear this row took."""
    ours = next((r["ms"] for r in rows if r["peer"] == OURS), None)
    return row["ms"] / ours if ours and row["ms"] else None


def print_case(console: Any, case: Case, rows: list[dict[str, Any]], skipped: list[dict[str, str]]) -> None:
    """One table, the fastest first. "x ours" is the time in multiples of switchgear's."""
    shape = case.shape
    console.print(f"\n[bold]{case.name}[/]", highlight=False)
    console.print(
        f"[dim]H {shape.hidden_size}, I {shape.intermediate_size}, E {shape.num_experts}, K {shape.top_k}; "
        f"{case.touched_experts:.0f} experts touched"
        + (f"; at best {rows[0]['floor_ms']:.3f} ms, by {rows[0]['bound']}" if rows else "") + "[/]",
        highlight=False,
    )  # fmt: skip
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("peer", no_wrap=True)
    for name in ("ms", "GFLOP/s", "GB/s", "ceiling", "x ours", "error", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row["ms"] or float("inf")):
        error = f"{row['relative_error']:.0e}"
        if row["wrong"]:
            table.add_row(row["peer"], "not timed", "", "", "", "", f"[red]{error} > {row['error_limit']:.0e}[/]", "")
            continue
        ratio = ratio_to_ours(rows, row)
        table.add_row(
            row["peer"], f"{row['ms']:.3f}", f"{row['gflops']:,.0f}", f"{row['gbytes_per_s']:.1f}",
            f"{row['percent_of_ceiling']:.0f} %", f"{ratio:.2f}" if ratio else "", error, str(row["repetitions"]),
            style="bold" if row["peer"] == OURS else None,
        )  # fmt: skip
    console.print(table)
    print_skipped(console, skipped)


def print_skipped(console: Any, skipped: list[dict[str, str]]) -> None:
    for entry in skipped:
        what = entry["case"] if entry["peer"] == "all" else entry["peer"]
        console.print(f"  [dim]{what}: {entry['reason']}[/]", highlight=False)


def cases_of(results: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows, case by case, in the order of the run."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["results"]:
        groups.setdefault((row["shape"], row["dtype"], row["mode"], row["tokens"]), []).append(row)
    return list(groups.values())


def markdown(results: dict[str, Any]) -> str:
    """A table with a row per case: switchgear, the best of transformers, the best of all others."""
    machine, lines = results["machine"], []
    for rows in cases_of(results):
        timed = {row["peer"]: row for row in rows if row["ms"]}
        ours = timed.get(OURS)
        hugging_face = min(
            (timed[name] for name in BASELINES if name in timed), key=lambda row: row["ms"], default=None
        )
        packed = timed.get(f"{OURS}_packed")
        rest = (row for name, row in timed.items() if not name.startswith(OURS))
        others = min(rest, key=lambda row: row["ms"], default=None)
        cells = [rows[0]["shape"], f"{rows[0]['tokens']:,}", rows[0]["dtype"], rows[0]["mode"]]
        cells += [f"{ours['ms']:.2f}", f"{ours['percent_of_ceiling']:.0f} %"] if ours else ["-", "-"]
        cells += [f"{packed['ms']:.2f}, {packed['percent_of_ceiling']:.0f} %"] if packed else ["-"]
        for row in (hugging_face, others):
            ratio = row["ms"] / ours["ms"] if row and ours else None
            cells.append(f"{row['ms']:.2f} ({row['peer']})" + (f", {ratio:.1f}x" if ratio else "") if row else "-")
        lines.append("| " + " | ".join(cells) + " |")
    header = [
        "shape",
        "tokens",
        "dtype",
        "mode",
        "switchgear, ms",
        "of ceiling",
        "packed, ms",
        "best of transformers, ms",
        "best other, ms",
    ]
    rule = ["---", "---:", "---", "---", "---:", "---:", "---:", "---:", "---:"]
    head = ["| " + " | ".join(cells) + " |" for cells in (header, rule)]
    note = (
        f"{machine['model']}, {threads(machine['threads'])}, {machine['isa']}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, switchgear {machine['switchgear']}. "
        + "; ".join(ceiling_lines(results["ceilings"]))
        + ("; weights on huge pages." if results["settings"]["pages"] == "huge" else ".")
    )
    return "\n".join([*head, *lines, "", note, ""])


def write(results: dict[str, Any], outputs: dict[str, str]) -> None:
    """Write the files that were asked for: {"json" | "csv" | "markdown" | "plot": path}."""
    for kind, path in outputs.items():
        if kind == "plot":
            from .bench_plot import plot

            plot(results, path)
            continue
        with open(path, "w", newline="") as file:
            if kind == "json":
                json.dump(results, file, indent=1)
                file.write("\n")
            elif kind == "markdown":
                file.write(markdown(results))
            else:
                rows = results["results"]
                table = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["shape"])
                table.writeheader()
                table.writerows(rows)
        print(f"wrote {path}")
