# SPDX-License-Identifier: BSD-3-Clause
"""The text and tables of an inspection's report."""

from __future__ import annotations

import math

from ..common import markdown_table
from .measure import Inspection, Layer

FAVOURITE = 1.5  # an expert is a domain's own from this factor over the mean of all domains on


def summary(found: Inspection) -> str:
    """A few lines for the terminal."""
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
    """The text of report.md."""
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

## Domains

{_write_domains(found)}
An expert is listed where a domain uses it at least {FAVOURITE} times as often as all domains do on average.

![domains](domains.png)

## Experts that are alike, and experts that work together

{_write_pairs(found)}
Experts that are alike are candidates for merging (`switchgear compress`, docs/compression.md).

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
    header = ["domain", "loss", *(layer.name for layer in found.layers)]
    rows = []
    for name in found.domains:
        own = [favourites(layer, name) for layer in found.layers]
        shown = [", ".join(map(str, experts[:6])) + (" …" if len(experts) > 6 else "") for experts in own]
        rows.append([name, f"{found.losses[name]:.3f}", *shown])
    return markdown_table(header, rows, left=(0, *range(2, 2 + len(found.layers))))


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
