# SPDX-License-Identifier: BSD-3-Clause
"""Tables of `switchgear bench layers`: on the screen, and in documents (report.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from switchgear.cli.common import markdown_table, table

from .competitors import COMPETITORS
from .minifloats import STORED
from .plot import plot
from .report import Blocks, fill_blocks, threads, write_blocks
from .results import Row, cases_of, extras, is_undisturbed, save, undisturbed, write_csv
from .shapes import SHAPES
from .targets import BASELINES, is_ours, judge, ours_in

SUMMARY = (("forward", 1), ("forward", 512), ("train", 512))  # columns: mode and tokens
NEW = ("machine", "cases", "targets")  # tables of a new document


def write_document(results: dict[str, Any], path: str, source: str | None = None) -> None:
    """Fills in the tables of the document at `path`, or makes a new document. source: the file of the results."""
    write_blocks(path, _blocks(results), NEW, source)


def fill(text: str, results: dict[str, Any]) -> str:
    """The text with its tables regenerated. CommandError for an unknown table."""
    return fill_blocks(text, _blocks(results))


def _blocks(results: dict[str, Any]) -> Blocks:
    return {name: partial(make, results) for name, make in BLOCKS.items()}


def ceiling_lines(ceilings: dict[str, Any]) -> list[str]:
    """The ceilings and their sources, in words."""

    def best(rates: dict[str, float], unit: str) -> str:
        named = ", ".join(f"{name} {rates[name] / 1e9:,.1f}" for name in sorted(rates, key=rates.__getitem__)[::-1])
        return f"{max(rates.values()) / 1e9:,.1f} {unit} ({named})"

    lines = [f"ceiling {dtype}: {best(rates, 'GFLOP/s')}" for dtype, rates in ceilings["compute"].items()]
    return [*lines, f"ceiling of reading: {best(ceilings['read'], 'GB/s')}"]


def machine_note(results: dict[str, Any]) -> str:
    """The machine, in a sentence."""
    machine, rows = results["machine"], results["results"]
    # the rates of int8 and int4 are not measured but derived from bfloat16's
    rates = {dtype: [r["multiply_rate"] for r in rows if r["dtype"] == dtype] for dtype in ("bf16", "fp32")}
    ceilings = [f"{dtype} {max(found) / 1e9:,.0f} GFLOP/s" for dtype, found in rates.items() if found]
    read = max((r["weight_bytes"] / r["read_ms"] / 1e6 for r in rows if r["shape"] != "tiny"), default=0.0)
    return (
        f"{machine['model']}, {threads(machine['threads'])}, {machine['isa']}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, switchgear {machine['switchgear']}. The highest ceilings in the turns of a case: "
        f"{', '.join(ceilings)} in registers, {read:,.0f} GB/s of plain reading. Weights on "
        f"{' and '.join(sorted({row['pages'] for row in rows}))} pages.\n"
    )


def case_table(results: dict[str, Any]) -> str:
    """A row per case: switchgear; the times of transformers' default and of the best other over switchgear's."""
    header = ["shape", "tokens", "weights", "mode", "switchgear, ms", "of floor", "transformers", "best other"]
    lines = []
    for rows in cases_of(results):
        timed = _timed(rows)
        ours = _fastest([timed[name] for name in ours_in(rows[0]["dtype"]) if name in timed])
        lines.append([*_case_and_ours(rows, ours), _against_transformers(timed, ours), _against_others(timed, ours)])
    return markdown_table(header, lines, left=(0, 2, 3))


def decoded_table(results: dict[str, Any]) -> str:
    """A row per case of fp8, mxfp4 and groups: multiplied as stored, beside the same weights decoded to bfloat16 by
    switchgear and by transformers, and the best of all others."""
    header = ["shape", "tokens", "weights", "mode", "as stored, ms", "of floor"]
    header += ["decoded", "decoded, transformers", "best other"]
    lines = []
    for rows in cases_of(results):
        if rows[0]["dtype"] in STORED:
            timed = _timed(rows)
            ours = timed.get(f"switchgear_{rows[0]['dtype']}")
            against = [_against(timed.get("switchgear"), ours, ""), _against_transformers(timed, ours)]
            lines.append([*_case_and_ours(rows, ours), *against, _against_others(timed, ours)])
    return markdown_table(header, lines, left=(0, 2, 3))


def _timed(rows: list[Row]) -> dict[str, Row]:
    return {row["competitor"]: row for row in rows if row["ms"]}


def _case_and_ours(rows: list[Row], ours: Row | None) -> list[str]:
    """The first six cells of a case."""
    row = rows[0]
    mode = [row["mode"], *extras(row["routing"], row["allocator"])]
    mode += [] if is_undisturbed(rows) else ["disturbed"]
    cells = [row["shape"], f"{row['tokens']:,}", row["dtype"], ", ".join(mode)]
    return cells + ([_milliseconds(ours), f"{ours['percent_of_floor']:.0f} %"] if ours else ["", ""])


def _against_transformers(timed: dict[str, Row], ours: Row | None) -> str:
    return _against(_fastest([timed[name] for name in BASELINES if name in timed]), ours, "")


def _against_others(timed: dict[str, Row], ours: Row | None) -> str:
    other = _fastest([row for name, row in timed.items() if not is_ours(name) and not name.startswith("hf_")])
    return _against(other, ours, other["competitor"] if other else "")


def _milliseconds(row: Row) -> str:
    """At least three digits: 0.0297, 2.90, 1,307."""
    ms = float(row["ms"])
    return f"{ms:,.{max(2 - math.floor(math.log10(ms)), 0)}f}"


def _fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: float(row["ms"]), default=None)


def _against(theirs: Row | None, ours: Row | None, name: str) -> str:
    if theirs is None:
        return ""
    figure = f"{theirs['ms'] / ours['ms']:.2f}x" if ours else f"{_milliseconds(theirs)} ms"
    return figure + (f" {name}" if name else "")


def summary_table(results: dict[str, Any]) -> str:
    """A row per shape and dtype: milliseconds, share of the floor, speed-up over transformers' default."""
    found: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for rows in undisturbed(results):
        row, timed = rows[0], _timed(rows)
        own = ours_in(row["dtype"])[0]
        if (row["allocator"], row["routing"]) != ("default", "balanced") or not {own, BASELINES[0]} <= set(timed):
            continue
        ours, theirs = timed[own], timed[BASELINES[0]]
        cell = f"{_milliseconds(ours)} ms, {ours['percent_of_floor']:.0f} %, **{theirs['ms'] / ours['ms']:.1f}x**"
        found.setdefault((row["shape"], row["dtype"]), {})[row["mode"], row["tokens"]] = cell
    header = ["shape", "dtype", *(f"{mode}, {tokens} token{'s' if tokens > 1 else ''}" for mode, tokens in SUMMARY)]
    lines = [[*key, *(cells.get(column, "") for column in SUMMARY)] for key, cells in found.items()]
    lines = [line for line in lines if any(line[2:])]
    return markdown_table(header, lines, left=range(len(header)))


def target_table(results: dict[str, Any]) -> str:
    """A row per target and case, in the order of the targets."""
    verdicts = judge(undisturbed(results))
    lines = [[v.case, v.target, v.reached, "yes" if v.holds else "**no**"] for v in verdicts]
    return markdown_table(["case", "at least", "reached", "holds"], lines, left=range(4))


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "machine": machine_note,
    "cases": case_table,
    "decoded": decoded_table,
    "summary": summary_table,
    "targets": target_table,
}


# ---- on the screen, and files ----------------------------------------------------------------------------------------


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
    for line in ceiling_lines(ceilings):
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


def write(results: dict[str, Any], outputs: dict[str, str], source: str | None = None) -> None:
    """Writes the requested files: {"json" | "csv" | "markdown" | "plot": path}. source: the file of the results."""
    for kind, path in outputs.items():
        if kind == "plot":
            plot(results, path)
            continue
        if kind == "json":
            save(results, path)
        elif kind == "markdown":
            write_document(results, path, source or outputs.get("json"))
        else:
            write_csv(results["results"], path)
        print(f"wrote {path}")
