# SPDX-License-Identifier: BSD-3-Clause
"""Predicted time of each CUDA kernel of a layer, from its tiles: PREDICTIONS, never measurements.

A kernel takes the longest of four times, plus its launches:

    arithmetic   ⌈tiles / places⌉ · (flop of a tile / rate of a place)     places = multiprocessors · blocks on each
    epilogue     ⌈tiles / places⌉ · (product and epilogue of a tile), where one does not hide the other
    L2           bytes that blocks load / rate at which L2 delivers
    memory       bytes / bandwidth

The kernels pick the tiles (csrc/cuda/tiles_sm80.h, tiles_sm90.h). They are padded, so small experts cost more than
their flop. Bytes of memory count each operand once; repeated reads come from L2, whose bytes count every block's own.
How close an inner loop comes to its peak is unknown before it has run. `sustained` is what well-tuned dense products
of others reach; it is the largest source of error here. EXPECTED is the ratio of what such kernels reach to what a
model like this predicts for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from switchgear import _C

from .case import make_inputs
from .shapes import Shape


class Gpu(NamedTuple):
    name: str
    multiprocessors: int
    tensor_rate: float  # flop/s of dense bfloat16 products, accumulated in float32
    sustained: float  # of tensor_rate, in the inner loop
    bandwidth: float  # bytes/s
    sustained_bandwidth: float  # of bandwidth, in copies of long rows
    clock: float  # cycles/s under load
    l2_limit: int  # bytes a cycle that all of L2 delivers
    tiles: str  # "sm80" or "sm90": the kernels used

    @property
    def l2_rate(self) -> float:
        """Bytes/s: a multiprocessor takes 64 bytes a cycle, L2 delivers no more than its limit."""
        return min(64 * self.multiprocessors, self.l2_limit) * self.clock

    @property
    def products_per_cycle(self) -> float:
        """Flop of a multiprocessor in a cycle under load."""
        return self.tensor_rate * self.sustained / self.multiprocessors / self.clock


# A100 SXM 80 GB: 108 · 2048 flop a cycle · 1.41 GHz; cuBLAS reaches 80 % of it. H100 SXM: 132 · 4096 · 1.83 GHz; with
# wgmma the power limit leaves 70 % to large dense products, a clock near 1.3 GHz. L2: 80 slices of 64 bytes on an A100;
# measurements of others on an H100 are near 8 TB/s at that clock. Launch: the gap between two kernels of one stream.
GPUS = (
    Gpu("A100", 108, 312e12, 0.80, 2.039e12, 0.90, 1.41e9, 5120, "sm80"),
    Gpu("H100", 132, 989e12, 0.70, 3.35e12, 0.90, 1.3e9, 6154, "sm90"),
)
LAUNCH_SECONDS = 2e-6
DEPENDENT_LAUNCH_SECONDS = 1e-6  # of a product of sm90 after another: its blocks start before that one ends
ROUND_TRIP = 0.5e-6  # to L2 or memory: blocks of sm90 request their first tile, in a gemm after reading all offsets
ITEM = 2  # bytes of bfloat16
EXPECTED = 0.87  # of the predicted speed, from reviews of kernels of this structure against their measured speed

# Instructions of an epilogue per accumulator, counted in the machine code of sm_90a: of ping-pong tiles, which store
# line by line, and of cooperative ones, which stage boxes for TMA.
EPILOGUE = {"store": 5, "glu": 17, "glu_backward": 59, "wgrad": 4}
COOPERATIVE_EPILOGUE = {"store": 2, "glu": 9, "wgrad": 2}


class Tile(NamedTuple):
    rows: int
    columns: int
    blocks: int = 1  # resident on a multiprocessor
    cluster: int = 1  # blocks that share what they load of the weights
    cooperative: bool = False  # both consumers on one tile: its epilogue overlaps no product


STAGE = 64  # depths that are loaded and multiplied together


def cycles_per_column(width: int) -> float:
    """Cycles per column of the inner loop on sm90, at least 1. wgmma of a tile of 128 x width reads shared memory at
    128 bytes a cycle: two instructions read 64 + width rows of 32 bytes each, and TMA writes 128 + width."""
    return max(1.0, 32 * (2 * (64 + width) + 128 + width) / 128 / width)


def _sm90(rows: int, columns: int, cluster: int, cooperative: bool) -> Tile:
    return Tile(rows, columns, 1, cluster, cooperative)


def pick_tile(gpu: Gpu, mean_rows: float, columns: int, depth: float, epilogue: str = "store") -> Tile:
    """The tile that the kernels pick, for weights with a contiguous inner dimension."""
    if gpu.tiles == "sm80":
        return Tile(*_C.gemm_tile_sm80(int(mean_rows)))
    return _sm90(*_C.gemm_tile_sm90(math.ceil(mean_rows), columns, int(depth), epilogue))


def pick_wgrad_tile(gpu: Gpu, m: int, n: int, depth: float, shares_b: bool) -> Tile:
    """The same for weight gradients. A pair shares b, or a."""
    if gpu.tiles == "sm80":
        return Tile(*_C.gemm_tile_sm80(128))
    return _sm90(*_C.wgrad_tile_sm90(m, n, int(depth), shares_b))


class Kernel(NamedTuple):
    name: str
    tiles: int
    waves: float
    flops: float  # useful flop, without padding
    bytes: float
    l2_bytes: float  # loaded by blocks
    launches: int
    seconds: float
    bound: str  # "arithmetic", "epilogue", "L2" or "memory"


class Work(NamedTuple):
    """A product: `tiles` of inner dimension `depth`, and what they move."""

    tiles: int
    depth: float
    flops: float
    bytes: float
    l2_bytes: float
    epilogue: str


def cycles_of_tile(gpu: Gpu, tile: Tile, depth: float, epilogue: str) -> tuple[float, float]:
    """Cycles between two tiles of a place: for the products alone, and with the epilogue."""
    product = 2.0 * tile.rows * tile.columns * depth / (gpu.products_per_cycle / tile.blocks)
    if gpu.tiles != "sm90":
        return product, product  # the other block on the multiprocessor multiplies meanwhile
    if tile.rows == 128:
        product *= cycles_per_column(tile.columns)
    instructions = (COOPERATIVE_EPILOGUE if tile.cooperative else EPILOGUE)[epilogue]
    # Four schedulers, each an instruction of a warp a cycle.
    stored = instructions * tile.rows * tile.columns / (32 * 4)
    return product, product + stored if tile.cooperative else max(product, (product + stored) / 2)


def _timed(gpu: Gpu, name: str, tile: Tile, work: Work) -> Kernel:
    places = gpu.multiprocessors * tile.blocks
    rounds = math.ceil(work.tiles / places)
    product, period = cycles_of_tile(gpu, tile, work.depth, work.epilogue)
    times = {
        "arithmetic": rounds * product / gpu.clock,
        "L2": work.l2_bytes / gpu.l2_rate,
        "memory": work.bytes / (gpu.bandwidth * gpu.sustained_bandwidth),
        "epilogue": rounds * period / gpu.clock,
    }
    if period <= product:
        del times["epilogue"]
    bound = max(times, key=lambda name: times[name])
    seconds = LAUNCH_SECONDS + times[bound]
    return Kernel(name, work.tiles, work.tiles / places, work.flops, work.bytes, work.l2_bytes, 1, seconds, bound)


def gemm(
    gpu: Gpu, name: str, counts: Sequence[int], columns: int, depth: int, stored: int, epilogue: str = "store"
) -> Kernel:
    """Rows of experts times [columns, depth]; `stored` bytes are moved beside the operands."""
    rows, hit = sum(counts), sum(count > 0 for count in counts)
    tile = pick_tile(gpu, rows / len(counts), columns, depth, epilogue)
    row_tiles = [-(-count // tile.rows) for count in counts]
    column_tiles = -(-columns // tile.columns)
    groups = sum(-(-number // tile.cluster) for number in row_tiles)  # of row tiles that share weights
    # The last row tile of an odd number is alone: its cluster has two of its columns.
    last = sum(number % tile.cluster for number in row_tiles)
    clusters = (groups - last) * column_tiles + last * -(-column_tiles // tile.cluster)
    l2_bytes = ITEM * depth * (rows * column_tiles + groups * columns)
    moved = ITEM * (rows * depth + hit * columns * depth) + stored
    tiles = clusters * tile.cluster
    kernel = _timed(gpu, name, tile, Work(tiles, depth, 2.0 * rows * columns * depth, moved, l2_bytes, epilogue))
    return kernel._replace(seconds=kernel.seconds + 2 * ROUND_TRIP) if gpu.tiles == "sm90" else kernel


def wgrad(gpu: Gpu, name: str, counts: Sequence[int], m: int, n: int, shares_b: bool = True) -> Kernel:
    """[m, n] per expert, the sum over its rows. All experts' gradients are written; without rows they are zeros. Pairs
    share columns of b, or else of a."""
    rows = sum(counts)
    tile = pick_wgrad_tile(gpu, m, n, rows / len(counts), shares_b)
    down, across = (tile.cluster, 1) if shares_b else (1, tile.cluster)  # tiles of a pair
    row_tiles, column_tiles = -(-m // (tile.rows * down)) * down, -(-n // (tile.columns * across)) * across
    stored = ITEM * len(counts) * m * n
    l2_bytes = ITEM * rows * (m * column_tiles / across + n * row_tiles / down)
    moved = ITEM * rows * (m + n) + stored
    tiles = row_tiles * column_tiles * len(counts)
    depth = sum(-(-count // STAGE) * STAGE for count in counts) / len(counts)
    work = Work(tiles, depth, 2.0 * rows * m * n, moved, l2_bytes, "wgrad")
    kernel = _timed(gpu, name, tile, work)
    return kernel._replace(seconds=kernel.seconds + ROUND_TRIP) if gpu.tiles == "sm90" else kernel


def after_product(gpu: Gpu, product: Kernel) -> Kernel:
    """A product that follows another one in the stream."""
    saved = LAUNCH_SECONDS - DEPENDENT_LAUNCH_SECONDS if gpu.tiles == "sm90" else 0.0
    return product._replace(seconds=product.seconds - saved)


def copy(gpu: Gpu, name: str, moved: float, launches: int = 1) -> Kernel:
    """Kernels that only move rows."""
    seconds = launches * LAUNCH_SECONDS + moved / (gpu.bandwidth * gpu.sustained_bandwidth)
    return Kernel(name, 0, 0.0, 0.0, moved, 0.0, launches, seconds, "memory")


def plan(gpu: Gpu, slots: int, moved: int = 4) -> Kernel:
    """csrc/cuda/plan.cu: one launch for few slots, three for many. `moved`: words per slot."""
    return copy(gpu, "plan", 4 * moved * slots, 1 if slots <= 8192 else 3)


def forward_kernels(gpu: Gpu, shape: Shape, counts: Sequence[int], save_h: bool = False) -> list[Kernel]:
    """The launches of moe_forward: gathered rows times gate and up with the gate in the epilogue, the second
    projection, and the weighted sum of each token's rows."""
    slots = sum(counts)
    tokens = slots // shape.top_k
    hidden, width = shape.hidden_size, shape.intermediate_size
    h_bytes = ITEM * slots * 2 * width if save_h else 0
    return [
        plan(gpu, slots),
        gemm(gpu, "gate_up + glu", counts, 2 * width, hidden, ITEM * slots * width + h_bytes, "glu"),
        after_product(gpu, gemm(gpu, "down", counts, hidden, width, ITEM * slots * hidden)),
        copy(gpu, "combine", ITEM * (slots + tokens) * hidden),
    ]


def backward_kernels(gpu: Gpu, shape: Shape, counts: Sequence[int]) -> list[Kernel]:
    """The launches of moe_backward: the gradient of h in the epilogue of grad_y · W_d, the gradients of both
    projections, the gradient of x in slot order, that of topk_weights from its parts, and the sum of grad_x over each
    token's rows. The plan's also copy the weights in slot order."""
    slots = sum(counts)
    tokens = slots // shape.top_k
    hidden, width = shape.hidden_size, shape.intermediate_size
    h_bytes = ITEM * slots * (2 * width + 2 * width + width)  # h; grad_h and a
    return [
        plan(gpu, slots, 6),
        gemm(gpu, "grad_h", counts, width, hidden, h_bytes, "glu_backward"),
        after_product(gpu, wgrad(gpu, "grad_down_proj", counts, hidden, width)),
        # x is gathered
        after_product(gpu, wgrad(gpu, "grad_gate_up_proj", counts, 2 * width, hidden, shares_b=False)),
        after_product(gpu, gemm(gpu, "grad_x", counts, hidden, 2 * width, ITEM * slots * hidden)),
        copy(gpu, "grad_topk_weights", 4 * slots * (width // 32 + 2)),
        copy(gpu, "sum of grad_x", ITEM * (slots + tokens) * hidden),
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

    @property
    def expected_tflops(self) -> float:
        return EXPECTED * self.tflops


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
