# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench --model`: what the CUDA kernels should cost (cost_model.py), beside what others have published."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..common import CommandError, require
from .cost_model import GPUS, Kernel, Prediction, predict
from .published import FIGURES, Figure
from .shapes import GPU_SHAPES, GPU_TOKENS, Shape

MODES = ("forward", "backward")
NOTICE = (
    "PREDICTIONS of a model, not measurements: no GPU was used. The model is optimistic, since it lets every kernel "
    "overlap its copies, products and stores perfectly. Published figures are other projects' own, as they printed "
    "them; none was measured again."
)


def run(args: argparse.Namespace) -> int:
    names = [name.strip() for name in (args.shapes or ",".join(GPU_SHAPES)).split(",") if name.strip()]
    unknown = [name for name in names if name not in GPU_SHAPES]
    if unknown or not names:
        raise CommandError(f"--shapes: expected a list of {', '.join(GPU_SHAPES)}; got {args.shapes!r}")
    console = require("rich.console").Console()
    console.print(f"[bold]{NOTICE}[/]", highlight=False)
    rows = []
    for name in names:
        for mode in MODES:
            predictions = [predict(gpu, GPU_SHAPES[name], GPU_TOKENS[name], mode, args.routing) for gpu in GPUS]
            print_case(console, name, mode, predictions)
            rows += [row_of(name, mode, prediction) for prediction in predictions]
    print_summary(console, rows)
    if args.json:
        with open(args.json, "w") as file:
            figures = [figure._asdict() for figure in FIGURES if figure.shape in names]
            json.dump({"schema": "switchgear-model/1", "notice": NOTICE, "predictions": rows, "published": figures},
                      file, indent=2)  # fmt: skip
    return 0


def title(name: str, mode: str) -> str:
    shape: Shape = GPU_SHAPES[name]
    sizes = f"H {shape.hidden_size}, I {shape.intermediate_size}, E {shape.num_experts}, K {shape.top_k}"
    return f"{name}, T={GPU_TOKENS[name]}, bf16, {mode} ({sizes})"


def print_case(console: Any, name: str, mode: str, predictions: list[Prediction]) -> None:
    console.print(f"\n[bold]{title(name, mode)}[/]", highlight=False)
    for prediction in predictions:
        table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(prediction.gpu, no_wrap=True, min_width=18)
        for column in ("GFLOP", "MB", "tiles", "waves", "ms", "bound by"):
            table.add_column(column, justify="right", no_wrap=True)
        for kernel in prediction.kernels:
            table.add_row(*cells(kernel))
        console.print(table)
        console.print(f"  predicted for {prediction.gpu}: {1e3 * prediction.seconds:.2f} ms, "
                      f"{prediction.tflops:.0f} TFLOP/s", highlight=False)  # fmt: skip
    for figure in FIGURES:
        if (figure.shape, figure.mode) == (name, mode):
            console.print(f"  published, {figure.gpu}: {figure.who} {figure.tflops:.0f} TFLOP/s ({figure.source})",
                          highlight=False, soft_wrap=True)  # fmt: skip


def best_published(name: str, mode: str) -> Figure | None:
    """The fastest of the figures for a shape and mode, on whatever card."""
    figures = [figure for figure in FIGURES if (figure.shape, figure.mode) == (name, mode)]
    return max(figures, key=lambda figure: figure.tflops, default=None)


def print_summary(console: Any, rows: list[dict[str, Any]]) -> None:
    """All shapes on one page: predictions, and the best that somebody has published."""
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("predicted, TFLOP/s", no_wrap=True)
    for gpu in GPUS:
        table.add_column(gpu.name, justify="right", no_wrap=True)
    table.add_column("best published", no_wrap=True)
    for name, mode in dict.fromkeys((row["shape"], row["mode"]) for row in rows):
        predicted = [f"{row['predicted_tflops']:.0f}" for row in rows if (row["shape"], row["mode"]) == (name, mode)]
        best = best_published(name, mode)
        table.add_row(f"{name}, {mode}", *predicted, f"{best.tflops:.0f} ({best.who}, {best.gpu})" if best else "")
    console.print(table)


def cells(kernel: Kernel) -> tuple[str, ...]:
    work = (f"{kernel.flops / 1e9:,.0f}" if kernel.flops else "", f"{kernel.bytes / 1e6:,.0f}")
    tiles = (f"{kernel.tiles:,}", f"{kernel.waves:.1f}") if kernel.tiles else ("", "")
    return kernel.name, *work, *tiles, f"{1e3 * kernel.seconds:.3f}", kernel.bound


def row_of(name: str, mode: str, prediction: Prediction) -> dict[str, Any]:
    return {
        "shape": name, "tokens": GPU_TOKENS[name], "mode": mode, "gpu": prediction.gpu,
        "predicted_ms": 1e3 * prediction.seconds, "predicted_tflops": prediction.tflops,
        "kernels": [kernel._asdict() for kernel in prediction.kernels],
    }  # fmt: skip
