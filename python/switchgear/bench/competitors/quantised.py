# SPDX-License-Identifier: BSD-3-Clause
"""Weights in int8 as competitors want them."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [E,N,C] as int8, and a float32 scale [E,N] for each row: weight ≈ scale · int8, symmetric."""
    scales = weight.abs().amax(-1).float().clamp_min(1e-8) / 127
    rows = torch.empty(weight.shape, dtype=torch.int8)
    for expert, matrix in enumerate(weight):  # one by one: a float32 copy of all would be twice the memory
        rows[expert] = (matrix.float() / scales[expert, :, None]).round().to(torch.int8)
    return rows, scales
