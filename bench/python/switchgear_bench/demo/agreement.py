# SPDX-License-Identifier: BSD-3-Clause
"""Do two implementations of the same arithmetic agree, when training amplifies every rounding?

Two correct implementations add in different orders. Their results differ by roundings, and training amplifies the
difference. No fixed tolerance fits that. So we measure the sensitivity. A *twin* of the reference starts from weights
that were each moved by one rounding (one unit in the last place) and trains in the same way. The distance between the
twin and its reference is the effect of rounding only. An implementation agrees if it stays within

    ALLOWED * (largest distance of the twin so far) + floor

ALLOWED is one order of magnitude: other orders of summation differ from the twin's perturbation by a small factor, and
growth preserves that factor. A wrong formula is off by many orders in float32. In bfloat16 a loss curve can hide it,
but the gradients at the common start show it. The floor covers a twin that happens to coincide with its reference.

That holds while every token has the same experts in both runs. Sooner or later two experts of a token are so close that
a rounding decides, in float32 after some ten or twenty steps, at another step in each run. From then on the runs train
different functions, and how fast they part no longer measures roundings. So losses are compared step by step up to the
first choice that differs, and after it only their mean, as two runs of the same training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALLOWED = 10.0
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
ROUNDINGS_PER_LAYER = 10  # two norms, attention in four products, router, experts in three: the order of magnitude
SAFETY = 8.0  # roundings are random, their sum is Gaussian: 8 sigma
Load = list[list[float]]  # [layers][experts]: each expert's share of the choices in one step


class Gradient(NamedTuple):
    """What is compared of one tensor's gradient."""

    norm: float
    projection: float  # on a random direction, times sqrt(number of elements): as large as the norm


class Check(NamedTuple):
    what: str
    difference: float  # from the reference, at the point where it is largest relative to its bound
    noise: float  # of the twin, at that point
    bound: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.bound


def _worst(what: str, difference: np.ndarray, noise: np.ndarray, bound: np.ndarray) -> Check:
    """The entry with the largest difference / bound; a difference that is not finite is the worst."""
    ratio = np.where(np.isfinite(difference) & np.isfinite(bound), difference / bound, np.inf)
    i = int(np.argmax(ratio))
    return Check(what, float(difference[i]), float(noise[i]), float(bound[i]))


def equal_choices(loads: Sequence[Load], reference: Sequence[Load]) -> int:
    """The number of first steps in which all experts have as many tokens as in the reference."""
    pairs = zip(loads, reference, strict=True)
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(loads))


def loss_floor(first_loss: float, *, dtype: str, layers: int, tokens: int) -> float:
    """The rounding of a loss, in nats: the mean over `tokens`, each with layers * ROUNDINGS_PER_LAYER random roundings.

    The mean divides their sum by sqrt(tokens); it is itself a float32 number.
    """
    scale = max(abs(first_loss), 1.0)
    per_token = UNIT_ROUNDOFF[dtype] * math.sqrt(layers * ROUNDINGS_PER_LAYER) * scale
    return SAFETY * (per_token / math.sqrt(tokens) + UNIT_ROUNDOFF["float32"] * scale)


def loss_bounds(reference: Sequence[float], twin: Sequence[float], *, floor: float) -> np.ndarray:
    """The allowed difference of a loss from the reference's at each step with equal choices, in nats."""
    noise = np.abs(np.asarray(twin, float) - np.asarray(reference, float))
    return np.asarray(ALLOWED * np.maximum.accumulate(noise) + floor)


def check_losses(
    losses: Sequence[float], reference: Sequence[float], twin: Sequence[float], *, equal: int, floor: float, tokens: int
) -> list[Check]:
    """Compares the losses of the first `equal` steps one by one, by loss_bounds, and those of the others by their mean.

    The mean of the others may differ by as much as the reference's loss changes from one batch to the next; with one
    step, by as much as one token that has another expert may change the mean over `tokens`: a nat of it.
    """
    ours, theirs, twins = (np.asarray(values, float) for values in (losses, reference, twin))
    checks = []
    if equal:
        noise = np.maximum.accumulate(np.abs(twins - theirs))
        bounds = loss_bounds(reference, twin, floor=floor)
        first = slice(equal)
        what = f"losses of steps 1 to {equal}, equal choices"
        checks.append(_worst(what, np.abs(ours - theirs)[first], noise[first], bounds[first]))
    if equal < len(ours):
        between_batches = np.sqrt(np.mean(np.diff(theirs) ** 2) / 2) if len(theirs) > 1 else 0.0
        difference, noise = (np.asarray([abs(np.mean((run - theirs)[equal:]))]) for run in (ours, twins))
        what = f"mean loss of steps {equal + 1} to {len(ours)}"
        checks.append(_worst(what, difference, noise, np.asarray([between_batches + floor + 1.0 / tokens])))
    return checks


def check_gradients(
    gradients: Sequence[Gradient], reference: Sequence[Gradient], twin: Sequence[Gradient], *, dtype: str
) -> Check:
    """The experts' gradients at the common start, relative to the reference's norms: length and direction."""
    ours, theirs, twins = (np.asarray(values, float) for values in (gradients, reference, twin))
    scale = np.maximum(theirs[:, :1], np.finfo(np.float32).tiny)
    largest = np.full(theirs.shape, np.max(np.abs(twins - theirs) / scale))  # two numbers a tensor: use the worst one
    bound = ALLOWED * largest + SAFETY * UNIT_ROUNDOFF[dtype]
    difference = np.abs(ours - theirs) / scale
    return _worst("gradients at the start", difference.ravel(), largest.ravel(), bound.ravel())


def check_logits(logits: np.ndarray, reference: np.ndarray, twin: np.ndarray, *, dtype: str, layers: int) -> Check:
    """Logits [tokens, vocabulary] of one prompt at the same trained weights: root mean square, relative."""
    scale = float(np.sqrt(np.mean(np.square(reference)))) or 1.0

    def distance(other: np.ndarray) -> np.ndarray:
        return np.asarray([np.sqrt(np.mean(np.square(other - reference))) / scale])

    floor = SAFETY * UNIT_ROUNDOFF[dtype] * math.sqrt(layers * ROUNDINGS_PER_LAYER)
    return _worst("logits of the trained model", distance(logits), distance(twin), ALLOWED * distance(twin) + floor)
