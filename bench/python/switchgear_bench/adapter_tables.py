# SPDX-License-Identifier: BSD-3-Clause
"""Tables of `switchgear bench adapters`."""

from __future__ import annotations

from typing import Any

from switchgear.cli.common import console, markdown_table, table

from .adapted_layers import BASE, OURS
from .adapter_floors import floor
from .report import threads
from .results import Row
from .shapes import SHAPES
from .timing import FEWEST_QUIET

DTYPES = ("bf16", "fp32", "int4", "mxfp4")  # of the base; adapters and activations are bf16, or fp32
HEADER = ("shape", "base", "rank", "tokens", "frozen base, ms", "switchgear, ms", "of the base", "floor",
          "others / ours", "memory of a step, MB: ours; others")  # fmt: skip


def show(case: Row) -> None:
    shown = table("layer", "ms", "of the base", "error", "peak, MB", "quiet")
    base = next(row["ms"] for row in case["results"] if row["layer"] == BASE)
    for row in case["results"]:
        ms = "wrong" if row["ms"] is None else f"{row['ms']:.3g}"
        ratio = "" if row["ms"] is None else f"{row['ms'] / base:.2f}"
        shown.add_row(row["layer"], ms, ratio, f"{row['error']:.1e}", _megabytes(row), str(row["quiet_turns"]))
    title = f"{case['shape']}, {case['dtype']} base, rank {case['rank']}, T = {case['tokens']}"
    console().print(title, shown, *(f"{entry['layer']}: {entry['reason']}" for entry in case["skipped"]), sep="\n")


def _megabytes(row: Row) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"


def markdown(results: dict[str, Any]) -> str:
    def place(case: Row) -> tuple[int, int, int, int]:
        return list(SHAPES).index(case["shape"]), DTYPES.index(case["dtype"]), case["rank"], case["tokens"]

    lines = []
    for case in sorted(results["cases"], key=place):
        rows = {row["layer"]: row for row in case["results"] if row["ms"] is not None}
        base, ours = rows[BASE], rows.get(OURS)
        if ours is None:
            continue
        before = {row["layer"]: row for row in case.get("before", case["results"]) if row["ms"] is not None}
        others = {name: row for name, row in before.items() if name not in (BASE, OURS)}
        mark = "" if min(row["quiet_turns"] for row in rows.values()) >= FEWEST_QUIET else " (disturbed)"
        lines.append([
            case["shape"], case["dtype"], str(case["rank"]), f"{case['tokens']}{mark}", f"{base['ms']:.3g}",
            f"{ours['ms']:.3g}", f"{ours['ms'] / base['ms']:.2f}",
            f"{floor(SHAPES[case['shape']], case['dtype'], case['rank'], case['tokens']):.2f}",
            ", ".join(f"{name} {row['ms'] / before[OURS]['ms']:.1f}" for name, row in others.items()),
            "; ".join([_megabytes(before[OURS]), *(_megabytes(row) for row in others.values())]),
        ])  # fmt: skip
    about = results["machine"]
    note = f"{about['model']}, {threads(about['threads'])}, {about['isa']}; torch {about['torch']}.\n"
    return f"{markdown_table(HEADER, lines, left=(0, 1, 8, 9))}\n{note}"
