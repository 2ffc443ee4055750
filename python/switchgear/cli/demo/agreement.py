# SPDX-License-Identifier: BSD-3-Clause
"""Do two implementations of the same arithmetic agree, when training amplifies every rounding?

Two correct implementations add in different orders. Their results differ by roundings, and training amplifies the
difference: one rounding can change a token's expert, and the curves separate. No fixed tolerance fits that. So we
measure the sensitivity. A *twin* of the reference starts from weights that were each moved by one rounding (one unit in
the last place) and trains in the same way. The distance between the twin and its reference is the effect of rounding
only, at every step. An implementation agrees if it stays within

    ALLOWED * (largest distance of the twin so far) + floor

ALLOWED is one order of magnitude: other orders of summation differ from the twin's perturbation by a small factor, and
growth preserves that factor. A wrong formula is off by many orders in float32. In bfloat16 a loss curve can hide it,
but the gradients at the common start show it. The floor covers a twin that happens to coincide with its reference.
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


def loss_bounds(
    reference: Sequence[float], twin: Sequence[float], *, dtype: str, layers: int, tokens: int
) -> np.ndarray:
    """The allowed difference of a loss from the reference's at each step, in nats. A loss is the mean over `tokens`.

    Floor: a token's loss carries layers * ROUNDINGS_PER_LAYER random roundings, and the mean divides their sum by
    sqrt(tokens); the mean itself is a float32 number. Also, even in float32 some token eventually has two experts so
    close that a rounding decides, in this run but not in the twin. Then one token's loss may change by a nat.
    """
    scale = max(abs(float(reference[0])), 1.0)
    per_token = UNIT_ROUNDOFF[dtype] * math.sqrt(layers * ROUNDINGS_PER_LAYER) * scale
    floor = SAFETY * (per_token / math.sqrt(tokens) + UNIT_ROUNDOFF["float32"] * scale) + 1.0 / tokens
    noise = np.abs(np.asarray(twin, float) - np.asarray(reference, float))
    return np.asarray(ALLOWED * np.maximum.accumulate(noise) + floor)


def check_losses(
    losses: Sequence[float], reference: Sequence[float], twin: Sequence[float], bounds: np.ndarray
) -> Check:
    """Compares the losses of all steps, by loss_bounds."""
    ours, theirs = np.asarray(losses, float), np.asarray(reference, float)
    noise = np.maximum.accumulate(np.abs(np.asarray(twin, float) - theirs))
    return _worst("losses", np.abs(ours - theirs), noise, bounds)


def check_gradients(norms: Sequence[float], reference: Sequence[float], twin: Sequence[float], *, dtype: str) -> Check:
    """Norms of the experts' gradients at the common start, relative to the reference's."""
    ours, theirs, noise = (np.asarray(values, float) for values in (norms, reference, twin))
    scale = np.maximum(np.abs(theirs), np.finfo(np.float32).tiny)
    largest = np.full(len(theirs), np.max(np.abs(noise - theirs) / scale))  # a norm is one number: use the worst layer
    bound = ALLOWED * largest + SAFETY * UNIT_ROUNDOFF[dtype]
    return _worst("gradients at the start", np.abs(ours - theirs) / scale, largest, bound)


def check_logits(logits: np.ndarray, reference: np.ndarray, twin: np.ndarray, *, dtype: str, layers: int) -> Check:
    """Logits [tokens, vocabulary] of one prompt at the same trained weights: root mean square, relative."""
    scale = float(np.sqrt(np.mean(np.square(reference)))) or 1.0

    def distance(other: np.ndarray) -> np.ndarray:
        return np.asarray([np.sqrt(np.mean(np.square(other - reference))) / scale])

    floor = SAFETY * UNIT_ROUNDOFF[dtype] * math.sqrt(layers * ROUNDINGS_PER_LAYER)
    return _worst("logits of the trained model", distance(logits), distance(twin), ALLOWED * distance(twin) + floor)
