# SPDX-License-Identifier: BSD-3-Clause
"""Table and plot of `switchgear bench compress`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

from switchgear.cli.common import FAINT, colors, markdown_table, pyplot, save

from .compress_variants import BASE
from .report import Blocks, section, threads
from .results import Row

FAR = 3.0  # standard deviations of the random prunings by which a criterion must beat their mean
INFORMED = ("reap", "reconstruction")


def blocks(results: dict[str, Any]) -> Blocks:
    return {"compression": partial(whole, results)}


def whole(results: dict[str, Any]) -> str:
    return section(note(results), table(results), verdicts(results))


def text(results: dict[str, Any]) -> str:
    lines = [table(results), *verdicts(results)]
    lines += [f"left out: {entry['variant']}: {entry['reason']}" for entry in results["skipped"]]
    return "\n".join(lines)


def note(results: dict[str, Any]) -> str:
    about, model = results["machine"], results["model"]
    recipe, domains = model["recipe"], ", ".join(f"{name} ({source})" for name, source in model["domains"].items())
    read = recipe["steps"] * recipe["sequences"] * recipe["length"] * len(model["domains"])
    return (
        f"The model of `switchgear train-tiny`: {read / 1e6:.1f} million bytes of {domains}. Weights in "
        f"{results['dtype']}; the loss on held-out text grows from {_mean(_base(results)):.3f} nats per byte. "
        f"{about['model']}, {threads(about['threads'])}, {about['isa']}; torch {about['torch']}, switchgear "
        f"{about['switchgear']}.\n"
    )


def growth(results: dict[str, Any], row: Row) -> float:
    """Of the mean loss over that of the trained model."""
    return _mean(row) - _mean(_base(results))


def table(results: dict[str, Any]) -> str:
    """A row per variant: the growth of the mean loss over the domains, bytes of the experts, ms of a step."""
    header = ["experts", "growth of the loss", "bytes", "ms, 1 token", "ms, 256 tokens"]
    base = _base(results)["bytes"]
    lines = []
    for row in results["results"]:
        grown = "" if row["variant"] == BASE else f"{growth(results, row):+.3f}"
        if len(row["seeds"]) > 1:
            grown += f" (±{spread(row):.3f})"
        lines.append([
            row["variant"], grown, f"{row['bytes'] / base:.0%}", f"{row['decode_ms']:.2f}", f"{row['prefill_ms']:.2f}",
        ])  # fmt: skip
    return markdown_table(header, lines)


def verdicts(results: dict[str, Any]) -> list[str]:
    """For each pruning: by how many standard deviations of the random ones the informed criteria beat their mean."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in results["results"]):
        rows = {row["method"]: row for row in results["results"] if row["group"] == group}
        if "random" not in rows:
            continue
        seeds = rows["random"]["seeds"]
        for method in INFORMED:
            if method in rows:
                better = growth(results, rows["random"]) - growth(results, rows[method])
                factor = better / max(spread(rows["random"]), 1e-9)
                lines.append(
                    f"{group}: {method} is {factor:.1f} standard deviations of {len(seeds)} seeds better than random"
                    + ("" if factor > FAR else f", fewer than {FAR:.0f}")
                )
    return lines


def spread(row: Row) -> float:
    """Standard deviation of the seeds."""
    return stdev(row["seeds"]) if len(row["seeds"]) > 1 else 0.0


def _mean(row: Row) -> float:
    return float(sum(row["losses"].values())) / len(row["losses"])


def _base(results: dict[str, Any]) -> Row:
    found: Row = next(row for row in results["results"] if row["variant"] == BASE)
    return found


def plot(results: dict[str, Any], folder: Path) -> None:
    """Writes `folder`/compression.png: growth of the loss over bytes, a colour per method."""
    plt = pyplot()
    rows = [row for row in results["results"] if row["variant"] != BASE]
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    palette = colors(kinds)
    base = _base(results)["bytes"]
    figure, axis = plt.subplots(figsize=(8, 4.6))
    for kind in kinds:
        points = sorted((row["bytes"] / base, growth(results, row), spread(row)) for row in rows if _kind(row) == kind)
        share, grown, error = zip(*points, strict=True)
        marker = "o" if kind.startswith(("pruned", "merged")) else "s"  # squares: fewer bits
        axis.errorbar(
            share, grown, yerr=error, color=palette[kind], label=kind, marker=marker, linewidth=1.5, capsize=3
        )
    axis.axhline(0, color=FAINT, linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 0.75, 0.5, 0.25, 0.125], ["100 %", "75 %", "50 %", "25 %", "12.5 %"])
    axis.minorticks_off()
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(bottom=-0.002)
    axis.set_xlabel(f"bytes of the experts, of those in {results['dtype']}")
    axis.set_ylabel("growth of the loss, nats per byte")
    axis.set_title("Held-out loss over the bytes of the experts")
    axis.legend(fontsize=8)
    path = folder / "compression.png"
    save(figure, path)
    print(f"wrote {path}")


def _kind(row: Row) -> str:
    group = str(row["group"])
    if "pruned" in group:
        return f"pruned, {row['method']}"
    return "merged" if "merged" in group else str(row["method"])
