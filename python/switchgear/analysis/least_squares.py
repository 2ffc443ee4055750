# SPDX-License-Identifier: BSD-3-Clause
"""Nonlinear least squares for a few parameters: Levenberg and Marquardt's method in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def least_squares(residuals: Callable[[Tensor], Tensor], starts: Sequence[Tensor], steps: int = 400) -> Tensor:
    """The parameters [P] float64 with the smallest sum of squared residuals(parameters) [N], over all `starts`."""
    found = [_descend(residuals, start.double(), steps) for start in starts]
    best, value = min(found, key=lambda pair: pair[1])
    if not value < float("inf"):
        raise ValueError("losses: expected numbers that the law can be fitted to, got residuals that are not finite")
    return best


def _descend(residuals: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> tuple[Tensor, float]:
    jacobian = torch.func.jacfwd(residuals)  # type: ignore[no-untyped-call, unused-ignore]
    r = residuals(x)
    value, damping = _sum(r), 1e-2
    for _ in range(steps):
        j = jacobian(x)
        normal, slope = j.T @ j, j.T @ r
        if not torch.isfinite(normal).all() or slope.abs().max() < 1e-15:
            break
        moved = False
        for _ in range(12):
            scale = torch.diag(normal.diagonal().clamp(min=1e-12))
            step = torch.linalg.lstsq(normal + damping * scale, -slope[:, None]).solution[:, 0]
            trial = residuals(x + step)
            if _sum(trial) < value:
                gained = value - _sum(trial)
                x, r, value, damping, moved = x + step, trial, _sum(trial), damping / 5, True
                break
            damping *= 4
        if not moved or gained < 1e-15 * value:
            break
    return x, value


def _sum(r: Tensor) -> float:
    value = float(r.square().sum())
    return value if value == value else float("inf")
