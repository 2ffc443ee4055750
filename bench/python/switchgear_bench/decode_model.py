# SPDX-License-Identifier: BSD-3-Clause
"""Predicted time of a layer's products for a few tokens, on the kernels of sm_80: PREDICTIONS, never measurements.

Weights are read once, so memory bounds these products if enough of them is in flight and enough warps decode them:

    memory   bytes / the lesser of the bandwidth and (bytes in flight / latency)
    issue    instructions of the busiest scheduler: one a cycle, and of each warp one in DEPENDENT cycles

Plain weights (gemm_decode.cuh): a warp owns 16 columns of an expert and has 4 KB in flight. Stored weights
(stored_gemm.cuh): tiles of four warps with 16 columns each or, where tiles are few, with eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .cost_model import ITEM, LAUNCH_SECONDS, Gpu, routed
from .shapes import SHAPES, Shape

LATENCY = 0.8e-6  # of memory that is nearly saturated
WARP_IN_FLIGHT = 16 * 4 * 64  # columns, loads of each, bytes
RESIDENT_WARPS = 16  # on a multiprocessor: registers allow no more
SCHEDULERS = 4
DEPENDENT = 3  # cycles between instructions of a warp, which mostly wait for the last but one
WARPS, BLOCKS, STEP = 4, 4, 32  # of a tile of stored weights; resident tiles on a multiprocessor; depths of a step

# Columns of a tile: instructions of a warp for a step of mxfp4, counted in the machine code of sm_80.
STEP_INSTRUCTIONS = {64: 143, 32: 101}

DECODE_SHAPES = {
    "olmoe": SHAPES["olmoe"],
    "qwen3-30b-a3b": SHAPES["qwen3-30b-a3b"],
    "mixtral-8x7b": Shape(4096, 14336, 8, 2, "Mixtral-8x7B"),
}
DECODE_TOKENS = (1, 4, 16)


class Decoded(NamedTuple):
    seconds: float
    bound: str  # "memory", "in flight" or "issue"


def _memory(gpu: Gpu, moved: float, in_flight: float) -> Decoded:
    bandwidth = gpu.bandwidth * gpu.sustained_bandwidth
    if in_flight / LATENCY < bandwidth:
        return Decoded(moved * LATENCY / in_flight, "in flight")
    return Decoded(moved / bandwidth, "memory")


def plain(gpu: Gpu, hit: int, columns: int, depth: int) -> Decoded:
    """16-bit weights of `hit` experts with rows."""
    warps = min(hit * math.ceil(columns / 16), RESIDENT_WARPS * gpu.multiprocessors)
    return _memory(gpu, float(ITEM * hit * columns * depth), float(warps * WARP_IN_FLIGHT))


def tile_columns(gpu: Gpu, most_hit: int, columns: int) -> int:
    """`spreads` of stored_gemm.cuh: narrow tiles, if all of them run at once."""
    return 32 if most_hit * math.ceil(columns / 32) <= BLOCKS * gpu.multiprocessors else 64


def stored(gpu: Gpu, hit: int, columns: int, depth: int, tile: int, bits: float = 4.25) -> Decoded:
    """Weights of about 4 bits, scales included, in tiles of `tile` columns."""
    tiles = hit * math.ceil(columns / tile)
    left = math.ceil(tiles / gpu.multiprocessors)  # of the busiest multiprocessor
    cycles = 0.0
    while left > 0:
        resident = min(left, BLOCKS)
        per_instruction = max(resident * WARPS / SCHEDULERS, DEPENDENT)
        cycles += math.ceil(depth / STEP) * STEP_INSTRUCTIONS[tile] * per_instruction
        left -= resident
    issue = Decoded(cycles / gpu.clock, "issue")
    # A ring keeps three stages of 64 depths in flight.
    in_flight = min(tiles, BLOCKS * gpu.multiprocessors) * 3 * 64 * tile * bits / 8
    return max(issue, _memory(gpu, hit * columns * depth * bits / 8, in_flight))


def layer(gpu: Gpu, shape: Shape, counts: Sequence[int], is_stored: bool = False, tile: int | None = None) -> Decoded:
    """gate_up and down of the experts with rows. `tile`: its columns, instead of what the launcher picks."""
    hit, most_hit = sum(count > 0 for count in counts), min(sum(counts), len(counts))
    total, bounds = 0.0, []
    for columns, depth in (
        (2 * shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    ):
        picked = tile or tile_columns(gpu, most_hit, columns)
        product = stored(gpu, hit, columns, depth, picked) if is_stored else plain(gpu, hit, columns, depth)
        total += LAUNCH_SECONDS + product.seconds
        bounds.append(product.bound)
    return Decoded(total, ", ".join(dict.fromkeys(bounds)))


class DecodeRow(NamedTuple):
    shape: str
    tokens: int
    plain: Decoded
    before: Decoded  # stored, in tiles of 64 columns alone
    now: Decoded


def decode_rows(gpu: Gpu) -> list[DecodeRow]:
    rows = []
    for name, shape in DECODE_SHAPES.items():
        for tokens in DECODE_TOKENS:
            counts = routed(shape, tokens)
            before, now = (layer(gpu, shape, counts, True, tile) for tile in (64, None))
            rows.append(DecodeRow(name, tokens, layer(gpu, shape, counts), before, now))
    return rows
