# SPDX-License-Identifier: BSD-3-Clause
"""Weights in int8, fp8 and mxfp4 in the layouts that competitors need."""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear.weights import Fp8, Mxfp4

from ..case import Case


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [E,N,C] as int8, and a float32 scale [E,N] for each row: weight ≈ scale · int8, symmetric."""
    scales = weight.abs().amax(-1).float().clamp_min(1e-8) / 127
    rows = torch.empty(weight.shape, dtype=torch.int8)
    for expert, matrix in enumerate(weight):  # one by one: a float32 copy of all would double the memory
        rows[expert] = (matrix.float() / scales[expert, :, None]).round().to(torch.int8)
    return rows, scales


def published(case: Case) -> list[tuple[Tensor, Tensor]]:
    """gate_up_proj and down_proj in the checkpoint's layout: float8_e4m3fn [E,N,C] with float32 scales of 128 x 128, or
    mxfp4's blocks [E,N,C/32,16] with scales [E,N,C/32]."""
    form = Fp8() if case.dtype_name == "fp8" else Mxfp4()
    assert case.stored is not None
    pairs = []
    for weight in case.stored:
        values, scales = form.save(weight).values()
        pairs.append((values, scales.contiguous()))
    return pairs


def ggml_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Published mxfp4 as ggml's block_mxfp4 [E,N,C/32,17]: the scale, then 16 bytes whose lower halves are the first 16
    columns. A checkpoint's bytes hold adjacent columns. ggml doubles values and halves scales: the same numbers."""
    columns = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)  # [E,N,C/32,32]
    return torch.cat((scales[..., None], columns[..., :16] | columns[..., 16:] << 4), -1)
