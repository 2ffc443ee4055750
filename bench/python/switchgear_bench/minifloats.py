# SPDX-License-Identifier: BSD-3-Clause
"""The weights of a case in fp8, mxfp4 or groups of 1 to 4 bits: stored bytes, and the values that they encode.

Some competitors read these bytes; others multiply the decoded weights in bfloat16. Both compute the same layer, so one
result, from the decoded weights, verifies both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear.reference import formats, groups, minifloat
from switchgear.weights import Weight, advise_huge_pages, use_huge_pages

from .shapes import Shape

SIGMAS = {"fp8": 4.0, "mxfp4": 2.0}  # the largest of the 16384, or 32, weights that share a scale, in sigmas
LARGEST = {"fp8": minifloat.FP8_MAX, "mxfp4": 4.0}  # its encoded value; for mxfp4 it is 4 or 6
STANDARD_DEVIATION = 0.02  # of the decoded weights, about
GROUPS = {f"groups{bits}": bits for bits in (4, 3, 2, 1)}  # bits by format
STORED = ("fp8", "mxfp4", *GROUPS)  # dtypes of cases that are made here
GROUP_SIZE = 128
APART = 1021  # bytes between the windows of two experts: odd, so that no two experts have the same bytes


def make_stored(format: str, shape: Shape, huge_pages: bool) -> tuple[Weight, Weight]:
    """gate_up_proj and down_proj; sizes are multiples of 32.

    Each expert is a window of one random pool, as in make_weights. Any bytes are valid weights in the kernels' layout,
    so nothing is encoded or moved.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    pool = _codes(format, 2 * inner * hidden, APART * shape.num_experts)
    gate_up = _weight(format, pool, shape.num_experts, 2 * inner, hidden, 2)
    down = _weight(format, pool, shape.num_experts, hidden, inner, 1)
    if huge_pages:
        use_huge_pages(tensor for weight in (gate_up, down) for tensor in weight.tensors)
    return gate_up, down


def decoded(weight: Weight, expert: int) -> Tensor:
    """The matrix [N,C] of an expert, in float32."""
    alone = weight.permuted(torch.tensor([expert]))
    return formats.decode(alone.tensors, alone.form, torch.float32)[0]


def in_bfloat16(weight: Weight, huge_pages: bool) -> torch.nn.Parameter:
    """For libraries without kernels for the format: mxfp4 exactly, otherwise the rounded value times scale."""
    plain = torch.empty(weight.shape, dtype=torch.bfloat16)
    if huge_pages:
        advise_huge_pages(plain)
    for expert, matrix in enumerate(plain):
        matrix.copy_(decoded(weight, expert))
    return torch.nn.Parameter(plain)


def _bytes(format: str, weights: int) -> int:
    return weights * GROUPS[format] // 8 if format in GROUPS else weights if format == "fp8" else weights // 2


def _codes(format: str, weights: int, more: int) -> Tensor:
    """Quantised Gaussian weights, or any codes of groups, as bytes, plus `more` bytes."""
    generator = torch.Generator().manual_seed(0)
    if format in GROUPS:
        return torch.randint(256, (_bytes(format, weights) + more,), dtype=torch.uint8, generator=generator)
    sigma = LARGEST[format] / SIGMAS[format]
    if format == "fp8":
        return minifloat.e4m3_codes(sigma * torch.randn(weights + more, generator=generator))
    codes = minifloat.e2m1_codes(sigma * torch.randn(weights + 2 * more, generator=generator))
    return codes[::2] | codes[1::2] << 4


def _weight(format: str, pool: Tensor, num_experts: int, rows: int, cols: int, parts: int) -> Weight:
    blocks, steps = rows // minifloat.ROWS, cols // minifloat.COLUMNS
    size = _bytes(format, rows * cols)
    data = torch.empty(num_experts, size, dtype=torch.uint8)
    for expert, matrix in enumerate(data):
        matrix.copy_(pool[APART * expert :][:size])
    if (bits := GROUPS.get(format)) is not None:
        return Weight(
            "groups", data.view(num_experts * bits, blocks, steps, groups.PLANE), rows, cols, torch.bfloat16,
            _group_scales(bits, num_experts, blocks, cols), records=groups.records_of((bits,) * num_experts),
            parts=parts, group_size=GROUP_SIZE,
        )  # fmt: skip
    if format == "fp8":
        scales, group_size = _fp8_scales(num_experts, blocks, cols, parts), minifloat.BLOCK[1]
    else:
        scales, group_size = _mxfp4_scales(num_experts, blocks, cols), minifloat.COLUMNS
    return Weight(
        format, data.view(num_experts, blocks, steps, -1), rows, cols, torch.bfloat16, scales,
        parts=parts, group_size=group_size,
    )  # fmt: skip


def _fp8_scales(num_experts: int, blocks: int, cols: int, parts: int) -> Tensor:
    """Scales within a factor of 2. 128 rows share one, and each part starts a new block."""
    height, width = minifloat.BLOCK
    height //= minifloat.ROWS
    each = blocks // parts
    scales = torch.rand(
        num_experts, parts, -(-each // height), -(-cols // width), 1, generator=torch.Generator().manual_seed(blocks)
    )
    scales = (0.7 + 0.7 * scales) * (STANDARD_DEVIATION * SIGMAS["fp8"] / LARGEST["fp8"])
    by_block = scales.repeat_interleave(height, 2)[:, :, :each].flatten(1, 2)
    return by_block.repeat_interleave(minifloat.ROWS, 3)


def _mxfp4_scales(num_experts: int, blocks: int, cols: int) -> Tensor:
    """2^-7 and 2^-6, for values with a standard deviation of 2."""
    shape = (num_experts, blocks, cols // minifloat.COLUMNS, minifloat.ROWS)
    return torch.randint(120, 122, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(blocks))


def _group_scales(bits: int, num_experts: int, blocks: int, cols: int) -> Tensor:
    """Scales within a factor of 2, for codes of which each is as frequent."""
    values = torch.tensor([-1.0, 1.0]) if bits == 1 else torch.arange(2.0**bits) - 2 ** (bits - 1)
    shape = (num_experts, blocks, -(-cols // GROUP_SIZE), minifloat.ROWS)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(blocks))
    return ((0.7 + 0.7 * scales) * (STANDARD_DEVIATION / values.square().mean().sqrt())).half()
