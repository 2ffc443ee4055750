# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a benchmark: how close each peer comes to the machine's ceiling in each case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bench_tables import OURS, cases_of, ceiling_lines
from .common import threads
from .plot_style import FAINT, GRID, colors, pyplot, save


def plot(results: dict[str, Any], path: str) -> None:
    """A row per case, a dot per peer on the scale from 0 to 100 % of the ceiling; panels by mode and dtype."""
    plt = pyplot()
    cases = [[row for row in rows if row["ms"]] for rows in cases_of(results)]
    cases = [rows for rows in cases if rows]
    peers = list(dict.fromkeys(row["peer"] for rows in cases for row in rows))
    palette = colors(peers)
    kinds = list(dict.fromkeys((rows[0]["mode"], rows[0]["dtype"]) for rows in cases)) or [("", "")]
    panels = {kind: [rows for rows in cases if (rows[0]["mode"], rows[0]["dtype"]) == kind] for kind in kinds}
    tallest = max(len(rows) for rows in panels.values())
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(1.5 + 4.6 * len(kinds), 1.9 + 0.34 * tallest), sharex=True, squeeze=False
    )
    for axis, ((mode, dtype), panel) in zip(axes[0], panels.items(), strict=True):
        heights = range(tallest - 1, tallest - 1 - len(panel), -1)  # from the top
        for y, rows in zip(heights, panel, strict=True):
            values = [row["percent_of_ceiling"] for row in rows]
            axis.plot([min(values), max(values)], [y, y], color=GRID, linewidth=3, zorder=1, solid_capstyle="round")
            for row in rows:
                ours = row["peer"] == OURS
                axis.scatter(row["percent_of_ceiling"], y, s=75 if ours else 40, color=palette[row["peer"]],
                             zorder=3 if ours else 2, edgecolor="white", linewidth=0.8)  # fmt: skip
        axis.set_yticks(heights, [f"{rows[0]['shape']}  T={rows[0]['tokens']:,}" for rows in panel])
        axis.set_ylim(-0.7, tallest - 0.3)
        axis.set_title(f"{mode}, {dtype}")
        axis.set_xlabel("% of the ceiling (memory or arithmetic)")
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.axvline(100, color=FAINT, linewidth=0.8, linestyle="--")
        axis.set_xlim(
            0, max(105, *(row["percent_of_ceiling"] * 1.05 for rows in cases for row in rows)) if cases else 105
        )
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=palette[name], label=name) for name in peers]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(peers), handletextpad=0.2, columnspacing=1.4)
    machine, lines = results["machine"], ceiling_lines(results["ceilings"])
    figure.supxlabel(
        " · ".join([f"{machine['model']}, {threads(machine['threads'])}", *(line.split(" (")[0] for line in lines)]),
        fontsize=8, color=FAINT, x=0.01, ha="left",
    )  # fmt: skip
    save(figure, Path(path))
    print(f"wrote {path}")
