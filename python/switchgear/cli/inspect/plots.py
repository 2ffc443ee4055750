# SPDX-License-Identifier: BSD-3-Clause
"""The plots of an inspection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import colors, pyplot, save
from .measure import Inspection, Layer

MOST_MATRICES = 6  # layers whose matrices are shown: the first, the last and those between
MOST_TICKS = 24


def load(found: Inspection, path: Path) -> None:
    """Each expert's load by layer; 1 is an equal share."""
    rows = [np.asarray(layer.mean_load) * layer.num_experts for layer in found.layers]
    figure, axis = pyplot().subplots(figsize=(8, 1.6 + 0.28 * len(rows)))
    _draw_image(figure, axis, _pad(rows), "load, 1 = equal share", vmax=4.0)
    _label_layers(axis, found.layers)
    axis.set_title("Load of the experts")
    axis.set_xlabel("expert")
    save(figure, path)


def domains(found: Inspection, path: Path) -> None:
    """The experts that each domain uses: log2 of its share over the mean of all domains."""
    names = list(found.domains)
    figure, axes = pyplot().subplots(
        len(names), 1, figsize=(8, 0.8 + (0.9 + 0.22 * len(found.layers)) * len(names)), sharex=True, squeeze=False
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        rows = []
        for layer in found.layers:
            share, mean = np.asarray(layer.load[name]), np.asarray(layer.mean_load)
            rows.append(np.log2((share + 1e-4) / (mean + 1e-4)))
        _draw_image(figure, axis, _pad(rows), "", vmin=-2.0, vmax=2.0, cmap="RdBu_r")
        _label_layers(axis, found.layers)
        axis.set_title(f"{name}: used more (red) or less (blue) than by all, factors of 1/4 to 4")
    axes[-1, 0].set_xlabel("expert")
    save(figure, path)


def entropy(found: Inspection, path: Path) -> None:
    """Entropy of the routers and of the load, by layer."""
    figure, axis = pyplot().subplots(figsize=(8, 3.4))
    palette = colors(["load", "router"])
    places = np.arange(len(found.layers))
    axis.plot(places, [layer.load_entropy for layer in found.layers], marker="o", color=palette["load"], label="load")
    axis.plot(
        places, [layer.router_entropy for layer in found.layers], marker="o", color=palette["router"],
        label="router, mean over tokens",
    )  # fmt: skip
    _number(axis, found.layers)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("entropy / log E")
    axis.set_title("Entropy: 1 is uniform")
    axis.legend()
    save(figure, path)


def cacheability(found: Inspection, path: Path) -> None:
    """Hits of a cache of experts, by layer and slots."""
    figure, axis = pyplot().subplots(figsize=(8, 3.4))
    sizes = sorted({slots for layer in found.layers for slots in layer.hits})
    palette = colors([f"{slots} slots" for slots in sizes])
    for slots in sizes:
        points = [(i, layer.hits[slots]) for i, layer in enumerate(found.layers) if slots in layer.hits]
        axis.plot(*zip(*points, strict=True), marker="o", color=palette[f"{slots} slots"], label=f"{slots} slots")
    _number(axis, found.layers)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("best hit rate")
    axis.set_title(f"A cache of experts that is refilled every {found.segment} tokens")
    axis.legend()
    save(figure, path)


def similarity(found: Inspection, path: Path) -> None:
    """Cosine similarity of the experts' weights."""
    pairs = [(layer, layer.similarity) for layer in found.layers]
    _draw_matrices(pairs, "Similarity of the experts' weights", "cosine", path)


def coactivation(found: Inspection, path: Path) -> None:
    """Which experts serve the same tokens."""
    _draw_matrices(
        [(layer, layer.coactivation) for layer in found.layers], "Tokens of an expert (row) that choose another, too",
        "fraction", path,
    )  # fmt: skip


PLOTS: dict[str, Callable[[Inspection, Path], None]] = {
    "load.png": load, "entropy.png": entropy, "domains.png": domains, "similarity.png": similarity,
    "coactivation.png": coactivation, "cacheability.png": cacheability,
}  # fmt: skip


def _draw_matrices(pairs: Sequence[tuple[Layer, Any]], title: str, label: str, path: Path) -> None:
    """Some layers' matrices, without their diagonals."""
    shown = [(layer, np.asarray(matrix, float)) for layer, matrix in pairs if matrix is not None]
    places = sorted({round(i * (len(shown) - 1) / max(MOST_MATRICES - 1, 1)) for i in range(MOST_MATRICES)})
    shown = [shown[i] for i in places] if shown else []
    across = min(max(len(shown), 1), 3)
    down = max(1, -(-len(shown) // across))
    figure, axes = pyplot().subplots(down, across, figsize=(3.6 * across, 0.6 + 3.3 * down), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    highest = max((float(np.abs(_mask_diagonal(matrix)).max()) for _, matrix in shown), default=1.0)
    for axis, (layer, matrix) in zip(axes.flat, shown, strict=False):
        axis.axis("on")
        matrix = matrix.copy()
        np.fill_diagonal(matrix, np.nan)
        _draw_image(figure, axis, matrix, label, vmin=min(0.0, float(_mask_diagonal(matrix).min())), vmax=highest)
        axis.set_title(layer.name, fontsize=8)
    figure.suptitle(title if shown else f"{title}: not available", x=0.01, ha="left", fontsize=10)
    save(figure, path)


def _mask_diagonal(matrix: Any) -> Any:
    return matrix[~np.eye(len(matrix), dtype=bool)] if len(matrix) > 1 else np.ones(1)


def _pad(rows: Sequence[Any]) -> Any:
    image = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        image[i, : len(row)] = row
    return image


def _draw_image(
    figure: Any, axis: Any, values: Any, label: str, vmin: float = 0.0, vmax: float = 1.0, cmap: str = "YlGnBu"
) -> None:
    image = axis.imshow(
        values, aspect="auto", interpolation="nearest", vmin=vmin, vmax=max(vmax, vmin + 1e-9), cmap=cmap
    )
    axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _label_layers(axis: Any, layers: Sequence[Layer]) -> None:
    step = -(-len(layers) // MOST_TICKS)
    axis.set_yticks(range(0, len(layers), step), [layer.name for layer in layers[::step]], fontsize=7)


def _number(axis: Any, layers: Sequence[Layer]) -> None:
    step = -(-len(layers) // MOST_TICKS)
    axis.set_xticks(range(0, len(layers), step))
    axis.set_xlabel("MoE layer")
