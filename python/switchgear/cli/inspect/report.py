# SPDX-License-Identifier: BSD-3-Clause
"""The text, tables and plots of an inspection's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.packages import page
from ..common import colors, markdown_table, pyplot, save
from .measure import Inspection, Layer

FAVOURITE = 1.5  # an expert is a domain's own from this factor over the mean of all domains on
MOST_MATRICES = 6  # layers whose matrices are shown: the first, the last and those between
MOST_TICKS = 24


def summary(found: Inspection) -> str:
    worst = max(found.layers, key=lambda layer: layer.max_violation)
    unused = sum(layer.unused for layer in found.layers)
    slots, hits = _format_hits(found)
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in found.losses.items())
    return (
        f"{len(found.layers)} MoE layers; loss, nats per token: {losses}\n"
        f"least balanced: {worst.name}, its busiest expert has {worst.max_violation + 1:.1f} times the mean load; "
        f"{unused} experts without a token\n"
        f"a cache of {slots} experts per layer would hit {hits:.0%} at best"
    )


def report(found: Inspection) -> str:
    about = found.about
    read = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in found.domains.items())
    return f"""# switchgear inspect: {about.get("model", about["class"])}

{about["class"]}, {about["parameters"] / 1e6:,.1f} M parameters, {len(found.layers)} MoE layers. Text: {read}.

```
{summary(found)}
```

## Layers

{_write_layers(found)}
*Busiest* and *unused*: of all text together, each domain counted alike. *Load entropy* and *router entropy* are divided
by log E, 1 is uniform; a low load entropy with a low router entropy is a collapsed layer, a high one with a low one is
a router that is sure and balanced. *Alike*: mean cosine of the weights of two experts. *Experts in {found.segment}*:
distinct experts that {found.segment} consecutive tokens use.

![load](load.png)

![entropy](entropy.png)

{_write_domains(found)}## Experts that are alike, and experts that work together

{_write_pairs(found)}
Experts that are alike are candidates for merging (`switchgear compress`, {page("compression")}).

![similarity](similarity.png)

![coactivation](coactivation.png)

## Does it suit a cache of experts?

{_write_caches(found)}
The share of choices that hit a cache of so many experts, filled for each {found.segment} consecutive tokens with
those that they use most: a bound for a cache that is refilled as often (SCH of arXiv:2505.16056). *Locality* (SRP) is
the best F1 of one set of experts per {found.segment} tokens: 1 if they choose alike.

![cacheability](cacheability.png)
"""


def _write_layers(found: Inspection) -> str:
    header = ["layer", "experts", "per token", "busiest, of mean", "unused", "load entropy", "router entropy", "alike",
              f"experts in {found.segment}"]  # fmt: skip
    rows = [
        [layer.name, str(layer.num_experts), str(layer.top_k), f"{layer.max_violation + 1:.2f}", str(layer.unused),
         f"{layer.load_entropy:.3f}", _known(layer.router_entropy), _known(layer.mean_similarity),
         f"{layer.experts_per_segment:.1f}"]
        for layer in found.layers
    ]  # fmt: skip
    return markdown_table(header, rows)


def favourites(layer: Layer, domain: str) -> list[int]:
    """The experts that the domain uses much more often than all do, by share."""
    share, mean = layer.load[domain], layer.mean_load
    least = 1 / layer.num_experts / 4  # a quarter of an equal share: less is no use of an expert
    own = [e for e in range(layer.num_experts) if share[e] >= max(FAVOURITE * mean[e], least)]
    return sorted(own, key=lambda e: -share[e])


def _write_domains(found: Inspection) -> str:
    """The section that compares domains; empty if there is one."""
    if len(found.domains) == 1:
        return ""
    header = ["domain", "loss", *(layer.name for layer in found.layers)]
    rows = []
    for name in found.domains:
        own = [favourites(layer, name) for layer in found.layers]
        shown = [", ".join(map(str, experts[:6])) + (" …" if len(experts) > 6 else "") for experts in own]
        rows.append([name, f"{found.losses[name]:.3f}", *shown])
    return f"""## Domains

{markdown_table(header, rows, left=(0, *range(2, 2 + len(found.layers))))}
An expert is listed where a domain uses it at least {FAVOURITE} times as often as all domains do on average.

![domains](domains.png)

"""


def _write_pairs(found: Inspection) -> str:
    def words(pairs: list[tuple[int, int, float]]) -> str:
        return ", ".join(f"{i} and {j} ({value:.2f})" for i, j, value in pairs)

    rows = [[layer.name, words(layer.alike()), words(layer.together())] for layer in found.layers]
    return markdown_table(["layer", "most alike (cosine)", "most often together"], rows, left=(0, 1, 2))


def _write_caches(found: Inspection) -> str:
    sizes = sorted({slots for layer in found.layers for slots in layer.hits})
    rows = [
        [layer.name, *(f"{layer.hits[n]:.0%}" if n in layer.hits else "" for n in sizes), f"{layer.locality:.2f}"]
        for layer in found.layers
    ]
    return markdown_table(["layer", *(f"{n} slots" for n in sizes), "locality"], rows)


def _format_hits(found: Inspection) -> tuple[int, float]:
    """Twice the experts per token: the size that the paper finds good; the mean over the layers."""
    slots = min(2 * found.layers[0].top_k, found.layers[0].num_experts)
    hits = [layer.hits[slots] for layer in found.layers if slots in layer.hits]
    return slots, sum(hits) / len(hits)


def _known(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


# ---- plots -----------------------------------------------------------------------------------------------------------


def _draw_load(found: Inspection, path: Path) -> None:
    """Each expert's load by layer; 1 is an equal share."""
    rows = [np.asarray(layer.mean_load) * layer.num_experts for layer in found.layers]
    figure, axis = pyplot().subplots(figsize=(8, 1.6 + 0.28 * len(rows)))
    _draw_image(figure, axis, _pad(rows), "load, 1 = equal share", vmax=4.0)
    _label_layers(axis, found.layers)
    axis.set_title("Load of the experts")
    axis.set_xlabel("expert")
    save(figure, path)


def _draw_domains(found: Inspection, path: Path) -> None:
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


def _draw_entropy(found: Inspection, path: Path) -> None:
    lines = {
        "load": {i: layer.load_entropy for i, layer in enumerate(found.layers)},
        "router, mean over tokens": {i: layer.router_entropy for i, layer in enumerate(found.layers)},
    }
    _draw_lines(found, path, lines, "entropy / log E", "Entropy: 1 is uniform")


def _draw_cacheability(found: Inspection, path: Path) -> None:
    sizes = sorted({slots for layer in found.layers for slots in layer.hits})
    lines = {
        f"{slots} slots": {i: layer.hits[slots] for i, layer in enumerate(found.layers) if slots in layer.hits}
        for slots in sizes
    }
    title = f"A cache of experts that is refilled every {found.segment} tokens"
    _draw_lines(found, path, lines, "best hit rate", title)


def _draw_lines(
    found: Inspection, path: Path, lines: Mapping[str, Mapping[int, float]], label: str, title: str
) -> None:
    """Lines of points, from 0 to 1, by number of the layer."""
    figure, axis = pyplot().subplots(figsize=(8, 3.4))
    palette = colors(list(lines))
    for name, points in lines.items():
        axis.plot(*zip(*points.items(), strict=True), marker="o", color=palette[name], label=name)
    axis.set_xticks(range(0, len(found.layers), -(-len(found.layers) // MOST_TICKS)))
    axis.set_xlabel("MoE layer")
    axis.set_ylim(0, 1.05)
    axis.set_ylabel(label)
    axis.set_title(title)
    axis.legend()
    save(figure, path)


def _draw_matrices(attribute: str, title: str, label: str, found: Inspection, path: Path) -> None:
    """Some layers' matrices, without their diagonals."""
    pairs = [(layer, getattr(layer, attribute)) for layer in found.layers]
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


def draw(found: Inspection, folder: Path) -> None:
    """All plots. One of domains needs several: their shares are relative to the mean."""
    for name, plot in PLOTS.items():
        if name != "domains.png" or len(found.domains) > 1:
            plot(found, folder / name)


_TOGETHER = "Tokens of an expert (row) that choose another, too"
PLOTS: dict[str, Callable[[Inspection, Path], None]] = {
    "load.png": _draw_load,
    "entropy.png": _draw_entropy,
    "domains.png": _draw_domains,
    "similarity.png": partial(_draw_matrices, "similarity", "Similarity of the experts' weights", "cosine"),
    "coactivation.png": partial(_draw_matrices, "coactivation", _TOGETHER, "fraction"),
    "cacheability.png": _draw_cacheability,
}
