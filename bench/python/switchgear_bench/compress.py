# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench compress`: what each way of compressing experts costs in loss, and saves in bytes and time.

The model is that of `switchgear train-tiny`. Each variant is made from the same checkpoint and the same calibration,
judged on text of four domains that neither has seen, and timed in turns with all others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.cli.common import CommandError, progress, require
from switchgear.compress import Calibration, calibrate
from switchgear.integrations.moe_blocks import moe_blocks

from . import compress_tables as tables
from . import machine
from .compress_variants import BASE, VARIANTS, Variant
from .options import add_files, add_quick, add_threads, begin
from .report import write_outputs
from .results import Row, read_json, rounded
from .timing import interleave
from .tiny import cache
from .tiny.sensitivity import held_out_losses
from .tiny.text import evenly
from .tiny.train import FULL

LENGTH = FULL.length  # bytes of a window: the model has not learned longer ones
CALIBRATION_WINDOWS, HELD_OUT_WINDOWS = 64, 96  # of each domain
QUICK_WINDOWS = 4
SECONDS, QUICK_SECONDS = 1.0, 0.01  # of timing for each variant
STEPS = {"decode": 1, "prefill": 256}  # tokens of the timed calls
SCHEMA = "switchgear-bench-compress/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="folder of train-tiny (default: the one in the cache)")
    add_quick(parser, "few windows of text, and short timings")
    add_threads(parser)
    add_files(parser, "source json markdown plot")


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    if args.plot:
        require("matplotlib")
    if args.source:
        results = read_json(args.source, "--from", SCHEMA)
    else:
        require("transformers")
        torch.set_num_threads(args.threads)
        tiny = cache.load(args.checkpoint) if args.checkpoint else cache.newest()
        results = {"schema": SCHEMA, "machine": about, **measure(tiny, quick=args.quick)}
    print(tables.text(results))
    write_outputs(args, results, tables.blocks(results))
    if args.plot:
        tables.plot(results, Path(args.plot))
    return 0


def measure(tiny: cache.Tiny, *, quick: bool = False) -> dict[str, Any]:
    """All variants: {"model", "dtype", "results", "skipped"}."""
    dtype = torch.bfloat16 if machine.has_fast_bfloat16() else torch.float32
    windows, held_out = (QUICK_WINDOWS, QUICK_WINDOWS) if quick else (CALIBRATION_WINDOWS, HELD_OUT_WINDOWS)
    batches = {domain.name: evenly(domain.held_out, held_out, LENGTH) for domain in tiny.domains}
    calibration = calibrate(tiny.model().to(dtype), calibration_batches(tiny, windows), hessians=True)
    rows: list[Row] = []
    models: dict[str, nn.Module] = {}
    skipped = []
    with progress("compressing") as advance:
        for i, variant in enumerate(VARIANTS):
            try:
                row, models[variant.name] = judge(variant, tiny, dtype, calibration, batches)
                rows.append(row)
            except ValueError as error:  # a refusal says why
                skipped.append({"variant": variant.name, "reason": str(error)})
            advance(i + 1, len(VARIANTS), variant.name)
    if BASE not in models:
        raise CommandError(f"the model cannot be judged: {skipped[0]['reason']}")
    times = timed(models, QUICK_SECONDS if quick else SECONDS)
    for row in rows:
        row.update(times[row["variant"]])
    return {
        "model": tiny.about | {"bytes": rows[0]["bytes"]}, "dtype": str(dtype).removeprefix("torch."),
        "results": [rounded(row) for row in rows], "skipped": skipped,
    }  # fmt: skip


def calibration_batches(tiny: cache.Tiny, windows: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": rows, "domain": domain.name, "use_cache": False}
        for domain in tiny.domains
        for rows in torch.split(evenly(domain.train, windows, LENGTH), 8)
    ]


def judge(
    variant: Variant, tiny: cache.Tiny, dtype: torch.dtype, calibration: Calibration, batches: dict[str, Tensor]
) -> tuple[Row, nn.Module]:
    """The variant's losses, for each seed, and the model of the first seed."""
    first: nn.Module | None = None
    found = []
    for seed in range(variant.seeds):
        model = tiny.model().to(dtype)
        variant.apply(model, calibration, seed)
        found.append(held_out_losses(model, batches))
        first = model if first is None else first
    assert first is not None
    means = [sum(losses.values()) / len(losses) for losses in found]
    losses = {name: sum(each[name] for each in found) / len(found) for name in batches}
    row = {
        "variant": variant.name, "group": variant.group, "method": variant.method, "losses": losses, "seeds": means,
        "bytes": expert_bytes(first),
    }  # fmt: skip
    return row, first


def expert_bytes(model: nn.Module) -> int:
    """Of the experts' weights, as they are stored, with scales."""
    tensors = {
        (tensor.data_ptr(), tensor.nbytes)
        for block in moe_blocks(model).values()
        for tensor in (*block.experts.parameters(), *block.experts.buffers())
    }
    return sum(size for _, size in tensors)


@torch.no_grad()
def timed(models: dict[str, nn.Module], seconds: float) -> dict[str, dict[str, float]]:
    """Median milliseconds of a forward of the whole model by variant, for each of STEPS."""
    result: dict[str, dict[str, float]] = {name: {} for name in models}
    for what, tokens in STEPS.items():
        ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))

        def call(model: Any, ids: Tensor = ids) -> Any:
            return lambda number: model(input_ids=ids, use_cache=False)

        times = interleave({name: call(model) for name, model in models.items()}, seconds * len(models))
        for name, found in times.items():
            result[name][f"{what}_ms"] = 1e3 * median(found.seconds)
    return result
