# SPDX-License-Identifier: BSD-3-Clause
"""Predicted time of each CUDA kernel of a layer, from its tiles: PREDICTIONS, never measurements.

A kernel takes the longer of two times, plus a launch:

    arithmetic   ⌈tiles / places⌉ · (flop of a tile / rate of a place)     places = multiprocessors · blocks on each
    memory       bytes / bandwidth

csrc/cuda picks the tiles. They are padded, so small experts cost more than their flop. Bytes count each operand once:
repeated reads come from L2. How close an inner loop comes to its peak is unknown before it has run. `sustained` is what
well-tuned dense products of others reach; it is the largest source of error here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .case import make_inputs
from .shapes import Shape


class Gpu(NamedTuple):
    name: str
    multiprocessors: int
    tensor_rate: float  # flop/s of dense bfloat16 products, accumulated in float32
    sustained: float  # of tensor_rate, in the inner loop
    bandwidth: float  # bytes/s
    sustained_bandwidth: float  # of bandwidth, in copies of long rows
    tiles: str  # "sm80" or "sm90": the kernels used


# A100 SXM 80 GB: 108 · 2048 flop a cycle · 1.41 GHz; cuBLAS reaches 80 % of it. H100 SXM: 132 · 4096 · 1.83 GHz; with
# wgmma the power limit leaves 70 % to large dense products. Launch: the gap between two kernels of one stream.
GPUS = (
    Gpu("A100", 108, 312e12, 0.80, 2.039e12, 0.90, "sm80"),
    Gpu("H100", 132, 989e12, 0.70, 3.35e12, 0.90, "sm90"),
)
LAUNCH_SECONDS = 2e-6
ITEM = 2  # bytes of bfloat16


class Tile(NamedTuple):
    max_rows: int | None  # the largest mean number of rows per expert for which this tile is picked
    rows: int
    columns: int
    blocks: int  # resident on a multiprocessor, or tiles multiplied concurrently


# csrc/cuda/gemm.h (kTiles) and csrc/cuda/gemm_sm90.h (kConfigs; a block multiplies one tile while it stores the
# other).
TILES = {
    "sm80": (Tile(16, 16, 128, 2), Tile(80, 64, 128, 2), Tile(None, 128, 128, 2)),
    "sm90": (Tile(16, 16, 128, 1), Tile(64, 64, 128, 1), Tile(None, 128, 128, 1), Tile(None, 128, 192, 1)),
}


def cycles_per_column(width: int) -> float:
    """Cycles per column of the inner loop on sm90, at least 1. wgmma of a tile of 128 x width reads shared memory at
    128 bytes a cycle: two instructions read 64 + width rows of 32 bytes each, and TMA writes 128 + width."""
    return max(1.0, 32 * (2 * (64 + width) + 128 + width) / 128 / width)


def _columns_cost(columns: int, width: int) -> float:
    return -(-columns // width) * width * cycles_per_column(width)


def widest(columns: int) -> Tile:
    """The tile of sm90 for many rows, and for weight gradients: 192 columns if they cost less than 128."""
    narrow, wide = TILES["sm90"][2:]
    return wide if _columns_cost(columns, wide.columns) < _columns_cost(columns, narrow.columns) else narrow


def pick_tile(gpu: Gpu, mean_rows: float, columns: int) -> Tile:
    tile = next(tile for tile in TILES[gpu.tiles] if tile.max_rows is None or mean_rows <= tile.max_rows)
    return widest(columns) if gpu.tiles == "sm90" and tile.max_rows is None else tile


class Kernel(NamedTuple):
    name: str
    tiles: int
    waves: float
    flops: float  # useful flop, without padding
    bytes: float
    seconds: float
    bound: str  # "arithmetic" or "memory"


def _timed(
    gpu: Gpu, name: str, tiles: int, tile: Tile, depth: float, flops: float, moved: float
) -> Kernel:  # fmt: skip
    """`tiles` times the cost of a tile with inner dimension `depth`."""
    places = gpu.multiprocessors * tile.blocks
    rate = gpu.tensor_rate * gpu.sustained / places
    if gpu.tiles == "sm90" and tile.rows == 128:
        rate /= cycles_per_column(tile.columns)
    arithmetic = math.ceil(tiles / places) * 2.0 * tile.rows * tile.columns * depth / rate
    memory = moved / (gpu.bandwidth * gpu.sustained_bandwidth)
    bound = "arithmetic" if arithmetic > memory else "memory"
    return Kernel(name, tiles, tiles / places, flops, moved, LAUNCH_SECONDS + max(arithmetic, memory), bound)


def gemm(gpu: Gpu, name: str, counts: Sequence[int], columns: int, depth: int, stored: int) -> Kernel:
    """Rows of experts times [columns, depth]; `stored` bytes are moved beside the operands."""
    rows, hit = sum(counts), sum(count > 0 for count in counts)
    tile = pick_tile(gpu, rows / len(counts), columns)
    tiles = sum(-(-count // tile.rows) for count in counts) * -(-columns // tile.columns)
    moved = ITEM * (rows * depth + hit * columns * depth) + stored
    return _timed(gpu, name, tiles, tile, depth, 2.0 * rows * columns * depth, moved)


def wgrad(gpu: Gpu, name: str, counts: Sequence[int], m: int, n: int) -> Kernel:
    """[m, n] per expert, the sum over its rows. All experts' gradients are written; without rows they are zeros."""
    rows = sum(counts)
    tile = widest(n) if gpu.tiles == "sm90" else TILES[gpu.tiles][-1]
    tiles = -(-m // tile.rows) * -(-n // tile.columns) * len(counts)
    moved = ITEM * (rows * (m + n) + len(counts) * m * n)
    return _timed(gpu, name, tiles, tile, rows / len(counts), 2.0 * rows * m * n, moved)


def copy(gpu: Gpu, name: str, moved: float) -> Kernel:
    """A kernel that only moves rows."""
    return Kernel(
        name, 0, 0.0, 0.0, moved, LAUNCH_SECONDS + moved / (gpu.bandwidth * gpu.sustained_bandwidth), "memory"
    )


def forward_kernels(gpu: Gpu, shape: Shape, counts: Sequence[int], save_h: bool = False) -> list[Kernel]:
    """The launches of moe_forward: gathered rows times gate and up with the gate in the epilogue, the second
    projection, and the weighted sum of each token's rows."""
    slots = sum(counts)
    tokens = slots // shape.top_k
    hidden, width = shape.hidden_size, shape.intermediate_size
    h_bytes = ITEM * slots * 2 * width if save_h else 0
    return [
        copy(gpu, "plan", 4 * 4 * slots),
        gemm(gpu, "gate_up + glu", counts, 2 * width, hidden, ITEM * slots * width + h_bytes),
        gemm(gpu, "down", counts, hidden, width, ITEM * slots * hidden),
        copy(gpu, "combine", ITEM * (slots + tokens) * hidden),
    ]


def backward_kernels(gpu: Gpu, shape: Shape, counts: Sequence[int]) -> list[Kernel]:
    """The launches of moe_backward: the gradient of h in the epilogue of grad_y · W_d, the gradient of x in slot order
    and its sum over each token's rows, and the gradients of both projections."""
    slots = sum(counts)
    tokens = slots // shape.top_k
    hidden, width = shape.hidden_size, shape.intermediate_size
    return [
        copy(gpu, "plan", 4 * 4 * slots),
        gemm(gpu, "grad_h", counts, width, hidden, ITEM * slots * (2 * width + 2 * width + width)),  # h; grad_h and a
        gemm(gpu, "grad_x", counts, hidden, 2 * width, ITEM * slots * hidden),
        copy(gpu, "sum of grad_x", ITEM * (slots + tokens) * hidden),
        wgrad(gpu, "grad_gate_up_proj", counts, 2 * width, hidden),
        wgrad(gpu, "grad_down_proj", counts, hidden, width),
    ]


@functools.cache
def routed(shape: Shape, tokens: int, routing: str = "balanced") -> tuple[int, ...]:
    """Slots of each expert in one random routing, with a fixed seed."""
    small = shape._replace(hidden_size=1)
    ids = make_inputs(small, torch.bfloat16, tokens, routing, seed=0).topk_ids_int64
    return tuple(torch.bincount(ids.flatten(), minlength=shape.num_experts).tolist())


class Prediction(NamedTuple):
    gpu: str
    kernels: list[Kernel]
    seconds: float
    tflops: float  # of useful flop


def predict(gpu: Gpu, shape: Shape, tokens: int, mode: str, routing: str = "balanced") -> Prediction:
    """mode: "forward", "backward" or "train" (both, with h saved)."""
    counts = routed(shape, tokens, routing)
    kernels: list[Kernel] = []
    if mode in ("forward", "train"):
        kernels += forward_kernels(gpu, shape, counts, save_h=mode == "train")
    if mode in ("backward", "train"):
        kernels += backward_kernels(gpu, shape, counts)
    seconds = sum(kernel.seconds for kernel in kernels)
    return Prediction(gpu.name, kernels, seconds, sum(kernel.flops for kernel in kernels) / seconds / 1e12)
