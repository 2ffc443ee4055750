# SPDX-License-Identifier: BSD-3-Clause
"""The plots of the demo's report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from switchgear.cli.common import FAINT, colors, pyplot, save

from ..report import threads


def losses(results: dict[str, Any], path: Path) -> None:
    """Loss curves; below them the distance of each to the reference, and that of the twin."""
    plt = pyplot()
    runs, reference = results["implementations"], results["reference"]
    palette = colors(list(runs))
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2))
    # Equal curves hide one another, so the widest line is drawn first.
    widths = np.linspace(5, 1.5, len(runs)) if len(runs) > 1 else [2]
    steps = np.arange(1, results["settings"]["steps"] + 1)
    for (name, run), width in zip(runs.items(), widths, strict=True):
        label = f"{name} (held-out text: {run['held_out_loss']:.3f})"
        above.plot(steps, run["losses"], color=palette[name], linewidth=width, label=label, solid_capstyle="round")
    above.set_title("Training loss: equal initial weights, equal batches")
    above.set_ylabel("nats per byte")
    above.legend()

    base = np.asarray(runs[reference]["losses"])
    smallest = np.spacing(np.float32(base[0]))  # one ulp of a loss: the smallest difference on a log axis
    twin = np.maximum(np.abs(np.asarray(results["twin"]["losses"]) - base), smallest)
    equal = max((run["equal_choices"] for name, run in runs.items() if name != reference), default=0)
    below.fill_between(
        steps[:equal], smallest / 2, results["loss_bounds"][:equal], color=FAINT, alpha=0.15, linewidth=0,
        label="may be as far as this",
    )  # fmt: skip
    below.plot(
        steps, twin, color=FAINT, linewidth=1, linestyle="--", label=f"{reference} from weights moved by one rounding"
    )
    for name, run in runs.items():
        if name != reference:
            distance = np.maximum(np.abs(np.asarray(run["losses"]) - base), smallest)
            below.plot(steps, distance, color=palette[name], linewidth=1.5, label=name)
            first = slice(run["equal_choices"], run["equal_choices"] + 1)
            below.plot(steps[first], distance[first], "o", color=palette[name])  # a token has another expert
    below.set_yscale("log")
    below.set_title(f"Distance to {reference}")
    below.set_ylabel("|Δ loss|")
    below.set_xlabel("step")
    below.set_xlim(1, max(2, len(steps)))
    below.legend(loc="lower right", fontsize=8)
    save(figure, path)


PARTS = {"experts_forward": "experts, forward", "experts_backward": "experts, backward", "optimizer": "optimizer",
         "other": "everything else"}  # fmt: skip
NEUTRAL = {"optimizer": "#e7ebee", "other": "#d3dadf"}  # parts that do not depend on the implementation


def speed(summary: dict[str, dict[str, float]], results: dict[str, Any], path: Path) -> None:
    """Time per part of a training step; memory; generation."""
    plt = pyplot()
    names, reference = list(summary), results["reference"]
    palette = colors(names)
    rows = np.arange(len(names))[::-1]
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 2.2 + 0.85 * len(names)), width_ratios=(3, 2))
    step, memory = axes[:, 0]
    left = np.zeros(len(names))
    for part in PARTS:
        values = np.array([summary[name][part] for name in names])
        for row, name, start, value in zip(rows, names, left, values, strict=True):
            shade = 0.6 if part == "experts_backward" else 1.0
            step.barh(row, value, left=start, color=NEUTRAL.get(part, palette[name]), alpha=shade, height=0.62)
            if value > 0.05 * max(s["step"] for s in summary.values()):
                step.text(start + value / 2, row, f"{value:.0f}", ha="center", va="center", fontsize=8.5)
        left += values
    for row, name, total in zip(rows, names, left, strict=True):
        ratio = summary[reference]["step"] / summary[name]["step"]
        step.text(total, row, f"  {total:.0f} ms · {ratio:.2f}x", va="center", fontweight="bold", fontsize=9)
    step.set_xlim(0, left.max() * 1.3)
    step.set_title("One training step, ms", fontsize=9.5, pad=26)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=NEUTRAL.get(part, FAINT), alpha=0.5 if part == "experts_backward" else 1.0)
        for part in PARTS
    ]
    step.legend(
        handles, PARTS.values(), ncols=4, loc="lower left", bbox_to_anchor=(-0.02, 0.98), fontsize=8.5,
        handlelength=1, handleheight=0.8, columnspacing=1.2,
    )  # fmt: skip

    def bars(axis: Any, key: str, unit: float, title: str, label: Callable[[float, float], str]) -> None:
        values = [summary[name][key] / unit for name in names]
        axis.barh(rows, values, color=[palette[name] for name in names], height=0.62)
        for row, value in zip(rows, values, strict=True):
            axis.text(value, row, "  " + label(value, summary[reference][key] / unit), va="center", fontsize=9)
        axis.set_xlim(0, max(values) * 1.6 or 1)
        axis.set_title(title, fontsize=9.5)

    def times(value: float, base: float) -> str:
        return f"{value:,.0f} · {value / base:.2f}x"

    def share(value: float, base: float) -> str:
        return f"{value:,.0f} · {value / base:.0%}" if base else "unknown"

    bars(memory, "peak_memory", 2.0**20, "Peak memory of the training process, MiB", share)
    bars(axes[0, 1], "decode_tokens_per_second", 1, "Decode, tokens/s", times)
    bars(axes[1, 1], "prefill_tokens_per_second", 1, "Prefill, tokens/s", times)
    for axis in axes.flat:
        axis.set_yticks(rows, names)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
    model, settings = results["model"], results["settings"]
    figure.suptitle(
        f"{settings['family']}, {model['parameters'] / 1e6:.0f} M parameters, {settings['dtype']}, "
        f"{threads(settings['threads'])} · against {reference}",
        x=0.01, ha="left", fontsize=10, color=FAINT,
    )  # fmt: skip
    save(figure, path)


def expert_load(results: dict[str, Any], path: Path) -> None:
    """A heat map per MoE layer: steps on the x axis, experts on the y axis, 1 is an equal share."""
    plt = pyplot()
    run = list(results["implementations"].values())[-1]
    load = np.array([step["load"] for step in run["steps"]])  # [steps, layers, experts]
    relative = load * load.shape[2]
    count = load.shape[1]
    columns = 2 if count > 1 else 1
    size = (9, 0.6 + 2.6 * -(-count // columns))
    figure, axes = plt.subplots(-(-count // columns), columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    highest = min(4.0, max(2.0, float(np.quantile(relative, 0.99))))
    image = None
    for layer, axis in enumerate(axes.flat):
        if layer >= count:
            axis.axis("off")
            continue
        image = axis.imshow(
            relative[:, layer].T, aspect="auto", origin="lower", interpolation="nearest", cmap="YlGnBu", vmin=0,
            vmax=highest, extent=(0.5, load.shape[0] + 0.5, -0.5, load.shape[2] - 0.5),
        )  # fmt: skip
        axis.grid(visible=False)
        axis.set_title(f"MoE layer {layer + 1}")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("expert")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, extend="max")
    bar.set_label("load, 1 = equal share")
    bar.outline.set_visible(False)
    save(figure, path)
