# SPDX-License-Identifier: BSD-3-Clause
"""MoE blocks that add to a residual, with a common normalisation, as decoder layers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from switchgear import MoE


def normalized(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


class Residual(torch.nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = x + block(normalized(x))
        return x


def residual(num_layers: int = 3, hidden_size: int = 16, **options: Any) -> Residual:
    torch.manual_seed(0)
    return Residual(*(MoE(hidden_size, 8, 6, 2, **options) for _ in range(num_layers)))
