# SPDX-License-Identifier: BSD-3-Clause
"""Scaling laws of MoE models: in size, experts and tokens (arXiv:2404.02852), and of upcycling (arXiv:2502.03009).

A law has constants of one family of models and data: fit it to your own runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import torch
from torch import Tensor

from switchgear.checks import Positive, Range, Sizes, checked

Numbers = Tensor | Sequence[float] | float


@dataclass(frozen=True)
class Optimum:
    """The best model within the budgets."""

    size: float  # N: the parameters of the dense model, those that a token uses
    experts: int
    tokens: float
    loss: float
    cost: float


@dataclass(frozen=True)
class MoEScalingLaw:
    """log L = log(A/N^a + B/Ê^b + C/D^c + F) + d · log N · log Ê, the loss of a model of N parameters per token with E
    experts after D tokens (arXiv:2404.02852). Ê saturates with E (arXiv:2202.01169): it is E_start at E = 1 and tends
    to E_max:

        1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max
    """

    A: float
    a: float
    B: float
    b: float
    C: float
    c: float
    F: float
    d: float
    e_start: float = 1.0
    e_max: float = 300.0

    def effective_experts(self, experts: Numbers) -> Tensor:
        """Ê."""
        return _saturate(_read_positive("experts", experts), _to_float64(self.e_start), _to_float64(self.e_max))

    def loss(self, size: Numbers, experts: Numbers, tokens: Numbers) -> Tensor:
        """L for N, E and D, float64, broadcast."""
        positive = _to_float64([self.A, self.B, self.C, self.F, self.a, self.b, self.c, self.e_start, self.e_max])
        n, e, d = _read_positive("size", size), _read_positive("experts", experts), _read_positive("tokens", tokens)
        return _compute_log_loss(positive, _to_float64(self.d), n, e, d).exp()

    @classmethod
    @checked
    def fit(
        cls, size: Numbers, experts: Numbers, tokens: Numbers, losses: Numbers,
        *, e_start: Positive | None = None, e_max: Positive | None = None,
    ) -> MoEScalingLaw:  # fmt: skip
        """Fits the constants to runs by least squares of log L. E_start and E_max are fitted unless given; that needs
        runs with E close to saturation. Raises ValueError for too few runs, and for numbers that are not above 0."""
        n, e, d, target = (_to_float64(values).flatten() for values in (size, experts, tokens, losses))
        _check_runs(8 + (e_start is None) + (e_max is None), n, e, d, target)
        free = [at for at, given in ((7, e_start), (8, e_max)) if given is None]
        ends = {"e_start": 1.0 if e_start is None else e_start, "e_max": 300.0 if e_max is None else e_max}
        if not ends["e_start"] < ends["e_max"]:
            raise ValueError(f"e_start: expected less than e_max, {ends['e_max']}, got {ends['e_start']}")
        given = _to_float64(list(ends.values())).log()

        def unpacked(x: Tensor) -> tuple[Tensor, Tensor]:
            last_two = list(given)
            for place, at in enumerate(free):
                last_two[at - 7] = x[8 + place]
            return torch.cat([x[:7], torch.stack(last_two)]).exp(), x[7]

        def residuals(x: Tensor) -> Tensor:
            positive, slope = unpacked(x)
            return _compute_log_loss(positive, slope, n, e, d) - target.log()

        floor, middle = float(target.min()), float(target.max() - target.min()) / 3 + 1e-3
        starts = []
        for power, share in product((0.2, 0.4), (0.3, 0.9)):
            sides = [middle * float(values.median()) ** power for values in (n, e, d)]
            constants = [math.log(value) for value in (*sides, floor * share, power, power, power)]
            starts.append(torch.tensor([*constants, 0.0, *(float(given[at - 7]) for at in free)]))
        positive, slope = unpacked(fit_least_squares(residuals, starts))
        big_a, big_b, big_c, f, a, b, c, first, last = positive.tolist()
        first, last = (fitted if end is None else float(end) for end, fitted in ((e_start, first), (e_max, last)))
        return cls(big_a, a, big_b, b, big_c, c, f, float(slope), first, last)

    @checked
    def optimum(
        self,
        train_flops: Positive,
        experts: Sizes = (1, 4, 8, 16, 32),
        *,
        cost: Callable[[float, int], float] | None = None,
        budget: float = math.inf,
    ) -> Optimum:
        """The model with the lowest loss that train_flops = 6·N·D pay for, and whose cost(N, E) of serving is within
        the budget.

        cost: of a token served, growing with N; the parameters in memory, `moe_parameters`, if None.

        Raises ValueError if no size from 1e5 to 1e13 is within the budget, and for train_flops of no finite training.
        """
        of = moe_parameters if cost is None else cost
        best: Optimum | None = None
        for count in experts:
            grid = torch.logspace(5, 13, 1601, dtype=torch.float64)
            for _ in range(4):  # each round looks closer around the best
                sizes = grid[torch.tensor([of(float(n), count) <= budget for n in grid])]  # the first ones
                if not sizes.numel():
                    break
                losses = self.loss(sizes, count, train_flops / (6 * sizes))
                at = int(losses.argmin())
                n = float(sizes[at])
                if best is None or float(losses[at]) < best.loss:
                    best = Optimum(n, count, train_flops / (6 * n), float(losses[at]), of(n, count))
                low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, len(grid) - 1)])
                grid = torch.logspace(math.log10(low), math.log10(high), 41, dtype=torch.float64)
        if best is None:
            raise ValueError(f"budget: expected one that some size from 1e5 to 1e13 is within, got {budget}")
        return best


def moe_parameters(size: float, experts: int, share: float = 1 / 3) -> float:
    """N_MoE = (1 + (E - 1)·share)·N, the parameters of a dense model of N whose feed-forward networks became E experts;
    share is theirs of N. 1/3 where every second layer is MoE (arXiv:2404.02852), 2/3 where all are."""
    return (1 + (experts - 1) * share) * size


@dataclass(frozen=True)
class PowerLaw:
    """L = A·D^-a + E: a model trained from scratch on D tokens."""

    A: float
    a: float
    E: float

    def loss(self, tokens: Numbers) -> Tensor:
        """L for D tokens, float64."""
        return self.A * _read_positive("tokens", tokens) ** -self.a + self.E

    @classmethod
    def fit(cls, tokens: Numbers, losses: Numbers) -> PowerLaw:
        """Fits the constants to runs by least squares of log L. Raises ValueError for fewer than 3 runs."""
        d, target = (_to_float64(values).flatten() for values in (tokens, losses))
        _check_runs(3, d, target)

        def residuals(x: Tensor) -> Tensor:
            return (x[0].exp() * d ** -x[1].exp() + x[2].exp()).log() - target.log()

        spread = float(target.max() - target.min()) + 1e-3
        starts = [
            torch.tensor([math.log(spread * float(d.min()) ** power), math.log(power), math.log(share * target.min())])
            for power, share in product((0.1, 0.3, 0.6), (0.5, 0.95))
        ]
        x = fit_least_squares(residuals, starts)
        return cls(float(x[0].exp()), float(x[1].exp()), float(x[2].exp()))


@dataclass(frozen=True)
class UpcyclingLaw:
    """L(D1, D2) = A · D1^-a1 · D2^(-a2 + a3·log D1) + E, the loss of a model upcycled after D1 tokens of dense training
    and trained for D2 more (arXiv:2502.03009). a3 > 0: the more tokens went into the dense model, the less further ones
    help. Tokens in any unit, the same everywhere: log D1 depends on it.
    """

    A: float
    a1: float
    a2: float
    a3: float
    E: float

    def loss(self, dense_tokens: Numbers, tokens: Numbers) -> Tensor:
        """L for D1 and D2, float64, broadcast."""
        log1, log2 = _read_positive("dense_tokens", dense_tokens).log(), _read_positive("tokens", tokens).log()
        return self.A * (-self.a1 * log1 + (-self.a2 + self.a3 * log1) * log2).exp() + self.E

    @classmethod
    def fit(cls, dense_tokens: Numbers, tokens: Numbers, losses: Numbers) -> UpcyclingLaw:
        """Fits the constants to runs by least squares of log L."""
        d1, d2, target = (_to_float64(values).flatten() for values in (dense_tokens, tokens, losses))
        _check_runs(5, d1, d2, target)
        log1, log2, least = d1.log(), d2.log(), float(target.min())

        def residuals(x: Tensor) -> Tensor:
            power = x[0] - x[1] * log1 + (-x[2] + x[3] * log1) * log2
            return (power.exp() + x[4].exp()).log() - target.log()

        starts = []
        for share in (0.3, 0.6, 0.9):  # given E, the rest is linear in the logarithms
            rest = (target - share * least).log()
            columns = torch.stack([torch.ones_like(log1), -log1, -log2, log1 * log2], 1)
            linear = torch.linalg.lstsq(columns, rest[:, None]).solution[:, 0]
            starts.append(torch.cat([linear, torch.tensor([math.log(share * least)])]))
        x = fit_least_squares(residuals, starts)
        return cls(float(x[0].exp()), float(x[1]), float(x[2]), float(x[3]), float(x[4].exp()))

    @checked
    def crossover(
        self, dense_tokens: Positive, scratch: PowerLaw, most: Annotated[float, Range(1, math.inf, "low high")] = 1e9
    ) -> float | None:
        """D2*, the tokens from which a model trained from scratch on as many is as good as the upcycled one, from
        D1 / `most` to `most` times D1. None if it does not catch up; D1 / `most` if it is never behind."""

        def lead(log_tokens: float) -> float:
            tokens = math.exp(log_tokens)
            return float(scratch.loss(tokens) - self.loss(dense_tokens, tokens))

        low, high = math.log(dense_tokens) - math.log(most), math.log(dense_tokens) + math.log(most)
        grid = [low + (high - low) * step / 2000 for step in range(2001)]
        ahead = [lead(point) > 0 for point in grid]
        last = next((at for at in range(1, 2001) if ahead[at - 1] and not ahead[at]), None)
        if last is None:
            return None if any(ahead) else math.exp(low)
        low, high = grid[last - 1], grid[last]
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if lead(middle) > 0 else (low, middle)
        return math.exp(high)


def _saturate(experts: Tensor, start: Tensor, most: Tensor) -> Tensor:
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def _compute_log_loss(positive: Tensor, slope: Tensor, size: Tensor, experts: Tensor, tokens: Tensor) -> Tensor:
    big_a, big_b, big_c, f, a, b, c, start, most = positive
    effective = _saturate(experts, start, most)
    total = big_a / size**a + big_b / effective**b + big_c / tokens**c + f
    log_loss: Tensor = total.log() + slope * size.log() * effective.log()
    return log_loss


def _to_float64(values: Numbers) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _read_positive(name: str, values: Numbers) -> Tensor:
    found = _to_float64(values)
    if not (found > 0).all():
        raise ValueError(f"{name}: expected numbers above 0, got {float(found[~(found > 0)][0])}")
    return found


def _check_runs(constants: int, *columns: Tensor) -> None:
    sizes = {column.numel() for column in columns}
    if len(sizes) > 1 or min(sizes) < constants:
        raise ValueError(f"losses: expected one of each of {constants} runs or more, got {sorted(sizes)}")
    if not all(torch.isfinite(column).all() and (column > 0).all() for column in columns):
        raise ValueError("losses: expected positive numbers, got others")


# ---- nonlinear least squares for a few parameters, in float64 --------------------------------------------------------


def fit_least_squares(residuals: Callable[[Tensor], Tensor], starts: Sequence[Tensor], steps: int = 400) -> Tensor:
    """The parameters [P] float64 with the smallest sum of squared residuals(parameters) [N], over all `starts`, by the
    method of Levenberg and Marquardt."""
    found = [_descend(residuals, start.double(), steps) for start in starts]
    best, value = min(found, key=lambda pair: pair[1])
    if not value < float("inf"):
        raise ValueError("losses: expected numbers that the law can be fitted to, got residuals that are not finite")
    return best


def _descend(residuals: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> tuple[Tensor, float]:
    jacobian = torch.func.jacfwd(residuals)  # type: ignore[no-untyped-call, unused-ignore]
    r = residuals(x)
    value, damping = _sum_squares(r), 1e-2
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
            if _sum_squares(trial) < value:
                gained = value - _sum_squares(trial)
                x, r, value, damping, moved = x + step, trial, _sum_squares(trial), damping / 5, True
                break
            damping *= 4
        if not moved or gained < 1e-15 * value:
            break
    return x, value


def _sum_squares(r: Tensor) -> float:
    value = float(r.square().sum())
    return value if value == value else float("inf")
