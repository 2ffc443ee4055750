# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench model`: predicted cost of the CUDA kernels (cost_model.py), beside published figures."""

from __future__ import annotations

import argparse
from typing import Any

from switchgear.cli.common import console, table

from .cost_model import EXPECTED, GPUS, Gpu, Kernel, Prediction, predict
from .cost_model_stored import HOPPER, stored_rows
from .decode_model import DecodeRow, decode_rows
from .options import add_files, add_routing, add_shapes, choose
from .published import FIGURES, Figure
from .results import Row, open_outputs, write_json
from .shapes import GPU_SHAPES, GPU_TOKENS

MODES = ("forward", "backward")
NOTICE = (
    "PREDICTIONS of a model, not measurements: no GPU was used. The model is optimistic, since it lets every kernel "
    "overlap its copies, products and stores perfectly; tuned kernels of this structure reach "
    f"{EXPECTED:.0%} of such predictions, which is what is expected. Published figures are other projects' own, as "
    "they printed them; none was measured again."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, GPU_SHAPES)
    add_routing(parser)
    add_files(parser, "json")


def run(args: argparse.Namespace) -> int:
    names = choose("shapes", args.shapes or ",".join(GPU_SHAPES), GPU_SHAPES)
    open_outputs(args)
    out = console()
    out.print(f"[bold]{NOTICE}[/]")
    cases = {
        (name, mode): [predict(gpu, GPU_SHAPES[name], GPU_TOKENS[name], mode, args.routing) for gpu in GPUS]
        for name in names
        for mode in MODES
    }
    for (name, mode), predictions in cases.items():
        print_case(out, name, mode, predictions)
    print_summary(out, cases)
    decoded = {gpu: decode_rows(gpu) for gpu in GPUS}
    for gpu, decode in decoded.items():
        print_decode(out, gpu, decode)
    print_stored(out, names)
    if args.json:
        rows = [row_of(*case, prediction) for case, predictions in cases.items() for prediction in predictions]
        figures = [figure._asdict() for figure in FIGURES if figure.shape in names]
        schema = {"schema": "switchgear-model/1", "notice": NOTICE}
        few = [decode_row_of(gpu, row) for gpu, decode in decoded.items() for row in decode]
        write_json(schema | {"predictions": rows, "published": figures, "decode": few}, args.json)
    return 0


def print_case(out: Any, name: str, mode: str, predictions: list[Prediction]) -> None:
    out.print(f"\n[bold]{name}, T={GPU_TOKENS[name]}, bf16, {mode} ({GPU_SHAPES[name].sizes})[/]")
    for prediction in predictions:
        shown = table(prediction.gpu, "GFLOP", "MB", "L2 MB", "tiles", "waves", "launches", "ms", "bound by")
        for kernel in prediction.kernels:
            shown.add_row(*cells(kernel))
        out.print(shown)
        time = f"{1e3 * prediction.seconds:.2f} ms, {prediction.tflops:.0f} TFLOP/s"
        expected = f"expected: {EXPECTED} of it, {prediction.expected_tflops:.0f} TFLOP/s"
        out.print(f"  predicted for {prediction.gpu}: {time}; {expected}", soft_wrap=True)
    for figure in published(name, mode):
        speed = f"{figure.who} {figure.tflops:.0f} TFLOP/s ({figure.source})"
        out.print(f"  published, {figure.gpu}: {speed}", soft_wrap=True)


def published(name: str, mode: str) -> list[Figure]:
    return [figure for figure in FIGURES if (figure.shape, figure.mode) == (name, mode)]


def best_published(name: str, mode: str) -> Figure | None:
    """The fastest published figure for a shape and mode, on any card."""
    return max(published(name, mode), key=lambda figure: figure.tflops, default=None)


def print_summary(out: Any, cases: dict[tuple[str, str], list[Prediction]]) -> None:
    """All shapes on one page: predicted and expected speeds, and the best published figures."""
    shown = table("TFLOP/s: predicted, expected", *(gpu.name for gpu in GPUS), "best published")
    for (name, mode), predictions in cases.items():
        best = best_published(name, mode)
        figure = f"{best.tflops:.0f} ({best.who}, {best.gpu})" if best else ""
        shown.add_row(f"{name}, {mode}", *(speeds(prediction) for prediction in predictions), figure)
    out.print(shown)


def print_decode(out: Any, gpu: Gpu, rows: list[DecodeRow]) -> None:
    """A few tokens, on the kernels of sm_80: both products of a layer."""
    shown = table(f"{gpu.name}, sm_80's kernels: us", "tokens", "bf16", "4 bits, wide tiles", "4 bits", "bound by")
    for row in rows:
        times = (f"{1e6 * decoded.seconds:.0f}" for decoded in (row.plain, row.before, row.now))
        shown.add_row(row.shape, f"{row.tokens}", *times, row.now.bound)
    out.print(shown)


def decode_row_of(gpu: Gpu, row: DecodeRow) -> Row:
    return {
        "shape": row.shape, "tokens": row.tokens, "gpu": gpu.name, "bf16_us": 1e6 * row.plain.seconds,
        "wide_tiles_4_bits_us": 1e6 * row.before.seconds, "4_bits_us": 1e6 * row.now.seconds, "bound": row.now.bound,
    }  # fmt: skip


def print_stored(out: Any, names: list[str]) -> None:
    """Stored weights on Hopper: mma.sync before, wgmma now."""
    for name in names:
        title = f"{name}, T={GPU_TOKENS[name]}, forward, {HOPPER.name}: predicted, expected TFLOP/s"
        shown = table(title, "stored_gemm", "stored_sm90", "bound by")
        for row in stored_rows(GPU_SHAPES[name], GPU_TOKENS[name]):
            shown.add_row(*row)
        out.print(shown)


def speeds(prediction: Prediction) -> str:
    return f"{prediction.tflops:.0f}, {prediction.expected_tflops:.0f}"


def cells(kernel: Kernel) -> tuple[str, ...]:
    work = (
        f"{kernel.flops / 1e9:,.0f}" if kernel.flops else "",
        f"{kernel.bytes / 1e6:,.0f}",
        f"{kernel.l2_bytes / 1e6:,.0f}" if kernel.l2_bytes else "",
    )
    tiles = (f"{kernel.tiles:,}", f"{kernel.waves:.1f}") if kernel.tiles else ("", "")
    return kernel.name, *work, *tiles, f"{kernel.launches}", f"{1e3 * kernel.seconds:.3f}", kernel.bound


def row_of(name: str, mode: str, prediction: Prediction) -> Row:
    return {
        "shape": name, "tokens": GPU_TOKENS[name], "mode": mode, "gpu": prediction.gpu,
        "predicted_ms": 1e3 * prediction.seconds, "predicted_tflops": prediction.tflops,
        "expected_tflops": prediction.expected_tflops,
        "kernels": [kernel._asdict() for kernel in prediction.kernels],
    }  # fmt: skip
