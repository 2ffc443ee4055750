# SPDX-License-Identifier: BSD-3-Clause
"""The common style of all plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import require

INK, FAINT, GRID = "#22303c", "#7a8791", "#e3e7ea"
_KNOWN = {"eager": "#a9b4bd", "grouped_mm": "#3f7cac", "batched_mm": "#95b8d1", "switchgear": "#e4572e"}
_OTHERS = ("#5b8e7d", "#8e6c8a", "#c9a227", "#2e4057", "#bc4b51", "#7f9172", "#6d597a")


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour per name. A name has the same colour in every plot."""
    unknown = [name for name in names if name.removeprefix("hf_") not in _KNOWN]
    spare = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(unknown)}
    return {name: _KNOWN.get(name.removeprefix("hf_"), "") or spare[name] for name in names}


def pyplot() -> Any:
    """matplotlib.pyplot without a display, in the common style."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    plt.rcParams.update({
        "font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK,
        "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
        "axes.edgecolor": FAINT, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
        "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 120, "figure.constrained_layout.use": True,
    })  # fmt: skip
    return plt


def save(figure: Any, path: Path) -> None:
    """Saves a PNG with a small palette. Lines and letters need no more colours, and the file is a third of the size."""
    figure.savefig(path, facecolor="white")
    pyplot().close(figure)
    image = require("PIL.Image")  # a dependency of matplotlib
    with image.open(path) as picture:
        few = picture.convert("RGB").quantize(64)
    few.save(path, optimize=True)
