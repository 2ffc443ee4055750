# SPDX-License-Identifier: BSD-3-Clause
"""Predicted time of products with stored weights on Hopper, as cost_model.py: PREDICTIONS, never measurements.

Two kernels: stored_gemm.cuh, on mma.sync, and stored_sm90.cuh, on wgmma. Both decode in registers, so beside the tensor
cores, L2 and memory their schedulers may bind: an instruction a cycle each. Instructions are counted in machine code of
sm_90a. Unit: a step of one warp, 16 x 32 weights, times the slots of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .cost_model import EXPECTED, GPUS, LAUNCH_SECONDS, Gpu, routed
from .shapes import Shape

HOPPER = next(gpu for gpu in GPUS if gpu.tiles == "sm90")
STEP = 16 * 32  # weights
SLOTS = 128  # of a tile of many rows


class StoredFormat(NamedTuple):
    name: str
    bytes_per_weight: float  # with scales
    group_steps: int  # of 32 columns, which share a scale
    decode: int  # instructions of stored_sm90.cuh to decode a step, multiply it and continue
    add: int  # … to add a group's sums of 128 slots


# int8 without groups, int4 of 32 columns, fp8 and groups (of 4 bits) of 128.
STORED_FORMATS = (
    StoredFormat("int8", 1.0, 64, 108, 153),
    StoredFormat("int4", 0.53, 1, 105, 153),
    StoredFormat("fp8", 1.03, 4, 88, 71),
    StoredFormat("mxfp4", 0.53, 1, 101, 77),
    StoredFormat("nf4", 0.56, 2, 122, 71),
    StoredFormat("groups", 0.52, 4, 125, 73),
)
MMA_SYNC_STEP = 400  # instructions of stored_gemm.cuh for two blocks and 64 slots, about the same for all formats
MMA_SYNC_RATE = 0.62  # of wgmma's, which mma.sync reaches on an H100


class StoredPrediction(NamedTuple):
    format: str
    seconds: float
    tflops: float
    bound: str


def cycles_of_step(gpu: Gpu, stored: StoredFormat, wgmma: bool) -> dict[str, float]:
    """Cycles of a multiprocessor for 128 weight rows x 32 columns x 128 slots, by what may bind."""
    flops = 2.0 * 8 * STEP * SLOTS
    if wgmma:  # a scheduler has one warp of each consumer, each with one of the eight blocks
        issue = 2 * (stored.decode + stored.add / stored.group_steps)
        tensor = flops / gpu.products_per_cycle
    else:  # four warps, each with two blocks, twice for 128 slots
        issue = 2.0 * MMA_SYNC_STEP
        tensor = flops / (MMA_SYNC_RATE * gpu.products_per_cycle)
    l2_bytes = 32 * SLOTS * 2 + 8 * STEP * stored.bytes_per_weight
    return {
        "arithmetic": tensor,
        "instructions": issue,
        "L2": l2_bytes / (gpu.l2_rate / gpu.clock / gpu.multiprocessors),
    }


def predict_stored(shape: Shape, tokens: int, stored: StoredFormat, wgmma: bool) -> StoredPrediction:
    """Both projections of a layer's forward, without its small kernels."""
    counts = routed(shape, tokens)
    seconds, bound = 0.0, ""
    for columns, depth in (
        (2 * shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    ):
        cycles = cycles_of_step(HOPPER, stored, wgmma)
        seconds_of = {name: value * _steps(counts, columns, depth) / HOPPER.clock for name, value in cycles.items()}
        hit = sum(count > 0 for count in counts)
        moved = hit * columns * depth * stored.bytes_per_weight + 2 * sum(counts) * (columns + depth)
        seconds_of["memory"] = moved / (HOPPER.bandwidth * HOPPER.sustained_bandwidth)
        bound = max(seconds_of, key=lambda name: seconds_of[name])
        seconds += LAUNCH_SECONDS + seconds_of[bound]
    flops = 6.0 * sum(counts) * shape.hidden_size * shape.intermediate_size
    return StoredPrediction(stored.name, seconds, flops / seconds / 1e12, bound)


def _steps(counts: Sequence[int], columns: int, depth: int) -> float:
    """Steps of 128 weight rows and slots that the busiest multiprocessor takes one after another."""
    tiles = sum(math.ceil(count / SLOTS) for count in counts) * math.ceil(columns / 128)
    return math.ceil(tiles / HOPPER.multiprocessors) * math.ceil(depth / 32)


def stored_rows(shape: Shape, tokens: int) -> list[tuple[str, ...]]:
    """Format, predicted and expected TFLOP/s of both kernels, and what binds on wgmma."""

    def speeds(prediction: StoredPrediction) -> str:
        return f"{prediction.tflops:.0f}, {EXPECTED * prediction.tflops:.0f}"

    rows: list[tuple[str, ...]] = []
    for stored in STORED_FORMATS:
        before, now = (predict_stored(shape, tokens, stored, wgmma) for wgmma in (False, True))
        rows.append((stored.name, speeds(before), speeds(now), now.bound))
    return rows
