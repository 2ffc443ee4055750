# SPDX-License-Identifier: BSD-3-Clause
"""Choices of different widths: selections may choose another number of experts per token in each call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(parts: Sequence[Tensor], fill: float = -1) -> Tensor:
    """Rows [n,K] of at least one part, one after the other, with `fill` up to the largest K: -1 for ids, 0 for
    weights."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
