# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a benchmark: time relative to the best other implementation, a group of bars per shape, the floor as a
line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchgear.cli.common import FAINT, INK, colors, pyplot, save

from .report import threads
from .results import cases_of
from .targets import BASELINES, is_ours, ours_in

LONGEST = 3.0  # Longer bars are cut and labelled.
NAMES = ("switchgear", "transformers", "best other")


def plot(results: dict[str, Any], folder: str) -> None:
    """Writes `folder`/relative.png: a panel per mode and number of tokens, for balanced routing and 16-bit weights (or
    the first dtype of the results). Cases with one implementation alone are left out."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in results["results"]))
    dtype = "bf16" if "bf16" in dtypes else dtypes[0]
    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for rows in cases_of(results):
        row = rows[0]
        is_shown = (row["dtype"], row["allocator"], row["routing"]) == (dtype, "default", "balanced")
        if is_shown and (bars := _find_bars(rows)):
            panels.setdefault((row["mode"], row["tokens"]), []).append({"shape": row["shape"], **bars})
    shown = sorted(
        key for key, cases in panels.items() if len(cases) == max(map(len, panels.values())) or len(cases) > 1
    )
    if not shown:
        print("no picture: no case has another implementation to compare with")
        return
    plt = pyplot()
    palette = colors(list(NAMES))
    figure, axes = plt.subplots(len(shown), 1, figsize=(8, 0.9 + 1.9 * len(shown)), squeeze=False)
    for axis, (mode, tokens) in zip(axes.flat, shown, strict=True):
        _plot_panel(axis, panels[mode, tokens], palette)
        axis.set_title(f"{mode}, {tokens:,} token{'s' if tokens > 1 else ''}, {dtype}", fontsize=9, loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=palette[name], label=name) for name in NAMES]
    handles.append(plt.Line2D([], [], color=INK, linewidth=1.5, label="floor of plain weights"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    machine = results["machine"]
    about = f"{machine['model']}, {threads(machine['threads'])}, {machine['isa']}"
    figure.suptitle(
        f"time relative to the best other implementation · {about}", x=0.01, ha="left", fontsize=9, color=FAINT
    )
    path = Path(folder) / "relative.png"
    save(figure, path)
    print(f"wrote {path}")


def _find_bars(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Times of a case over that of the best other: ours, transformers', the other's and the floor."""
    times = {row["competitor"]: row["ms"] for row in rows if row["ms"]}
    ours = [times[name] for name in ours_in(rows[0]["dtype"]) if name in times]
    hugging_face = [times[name] for name in BASELINES if name in times]
    others = [ms for name, ms in times.items() if not is_ours(name) and not name.startswith("hf_")] or hugging_face
    if not ours or not others:
        return {}
    found = {"switchgear": min(ours), "best other": min(others), "floor": rows[0]["floor_ms"]}
    if hugging_face:
        found["transformers"] = min(hugging_face)
    return {name: ms / min(others) for name, ms in found.items()}


def _plot_panel(axis: Any, cases: list[dict[str, Any]], palette: dict[str, str]) -> None:
    width = 0.26
    for place, case in enumerate(cases):
        for index, name in enumerate(NAMES):
            if name in case:
                x = place + (index - 1) * width
                axis.bar(x, min(case[name], LONGEST), width * 0.92, color=palette[name])
                axis.text(x, min(case[name], LONGEST), f"{case[name]:.2f}", ha="center", va="bottom", fontsize=6)
        axis.hlines(case["floor"], place - 1.5 * width, place + 1.5 * width, color=INK, linewidth=1.5)
    axis.set_xticks(range(len(cases)), [case["shape"] for case in cases], fontsize=8)
    axis.set_ylim(0, 1.15 * min(LONGEST, max(case[name] for case in cases for name in NAMES if name in case)))
    axis.set_ylabel("best other = 1", fontsize=8)
