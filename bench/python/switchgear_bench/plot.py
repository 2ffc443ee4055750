# SPDX-License-Identifier: BSD-3-Clause
"""The plots of a benchmark: time per call over the number of tokens, one plot per shape, with the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchgear.cli.plots import FAINT, GRID, INK, colors, pyplot, save

from .report import threads
from .results import extras
from .targets import is_ours

PANEL = ("mode", "dtype", "allocator", "routing")


def plot(results: dict[str, Any], folder: str) -> None:
    """Write `folder`/<shape>.png for each shape of the results."""
    rows = [row for row in results["results"] if row["ms"]]
    palette = colors(list(dict.fromkeys(row["competitor"] for row in rows)))
    for shape in dict.fromkeys(row["shape"] for row in rows):
        _plot_shape(shape, [row for row in rows if row["shape"] == shape], palette, results["machine"], Path(folder))


def _plot_shape(
    shape: str, rows: list[dict[str, Any]], palette: dict[str, str], machine: dict[str, Any], folder: Path
) -> None:
    plt = pyplot()
    panels = list(dict.fromkeys(tuple(row[name] for name in PANEL) for row in rows))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.2 * across, 1.0 + 3.3 * down), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _plot_panel(axis, [row for row in rows if tuple(row[name] for name in PANEL) == panel], palette)
        mode, dtype, allocator, routing = panel
        axis.set_title(", ".join([mode, dtype, *extras(routing, allocator)]))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    present = [name for name in palette if any(row["competitor"] == name for row in rows)]
    handles = [_line(plt, name, palette) for name in sorted(present, key=lambda name: (not is_ours(name), name))]
    handles.append(plt.Line2D([], [], color=INK, linewidth=1, linestyle=":", label="floor"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * across), fontsize=8)
    about = f"{machine['model']}, {threads(machine['threads'])}, {machine['isa']}"
    figure.suptitle(f"{shape}: time of a call over tokens · {about}", x=0.01, ha="left", fontsize=9, color=FAINT)
    path = folder / f"{shape}.png"
    save(figure, path)
    print(f"wrote {path}")


def _line(plt: Any, name: str, palette: dict[str, str]) -> Any:
    return plt.Line2D([], [], color=palette[name], label=name, **_style(name))


def _style(name: str) -> dict[str, Any]:
    ours = is_ours(name)
    return {"marker": "o", "markersize": 5 if ours else 3.5, "linewidth": 2 if ours else 1.1}


def _plot_panel(axis: Any, rows: list[dict[str, Any]], palette: dict[str, str]) -> None:
    """Both axes are logarithmic; the area below the floor is grey."""
    floors = dict(sorted((row["tokens"], row["floor_ms"]) for row in rows))
    axis.plot(list(floors), list(floors.values()), color=INK, linewidth=1, linestyle=":", zorder=1)
    for name in dict.fromkeys(row["competitor"] for row in rows):
        points = sorted((row["tokens"], row["ms"]) for row in rows if row["competitor"] == name)
        axis.plot(*zip(*points, strict=True), color=palette[name], zorder=3 if is_ours(name) else 2, **_style(name))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    bottom = min(floors.values()) / 2
    axis.fill_between(list(floors), list(floors.values()), bottom, color=GRID, zorder=0)
    axis.set_ylim(bottom=bottom)
    axis.set_xticks(list(floors), [f"{tokens:,}" for tokens in floors], rotation=30, fontsize=8)
    axis.set_xlabel("tokens")
    axis.set_ylabel("ms")
    axis.minorticks_off()
