# SPDX-License-Identifier: BSD-3-Clause
"""The ways of compressing a model that `switchgear bench compress` compares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import switchgear
from switchgear import compress
from switchgear.compress import Calibration

Apply = Callable[[Any, Calibration, int], object]
BASE = "as trained"
GROUP_SIZE = 64  # columns that share a scale


class Variant(NamedTuple):
    """A change of a model in place. Groups are lines of the plot."""

    group: str
    method: str
    apply: Apply
    seeds: int = 1

    @property
    def name(self) -> str:
        return f"{self.group}, {self.method}" if self.method else self.group


def nothing(model: Any, calibration: Calibration, seed: int) -> None:
    pass


def prune(model: Any, calibration: Calibration, seed: int, *, keep: float, criterion: Any) -> object:
    return compress.prune_experts(model, keep, criterion, calibration=calibration, seed=seed)


def merge(model: Any, calibration: Calibration, seed: int, *, keep: float) -> object:
    return compress.merge_experts(model, keep, calibration=calibration)


def stored(model: Any, calibration: Calibration, seed: int, *, form: str) -> object:
    return switchgear.store(model, form, group_size=GROUP_SIZE)


def quantize(model: Any, calibration: Calibration, seed: int, *, bits: int, method: Any) -> object:
    return compress.quantize(model, bits, group_size=GROUP_SIZE, method=method, calibration=calibration)


def mixed(model: Any, calibration: Calibration, seed: int, *, average: float) -> object:
    """Bits by expert, within the average: the experts whose quantization changes the layer most get the most."""
    errors = compress.expert_errors(model, calibration, bits=(1, 2, 3), group_size=GROUP_SIZE)
    bits = compress.allocate_bits(errors, average=average)
    return compress.quantize(model, bits, group_size=GROUP_SIZE, method="gptq", calibration=calibration)


def _pruned(percent: int) -> list[Variant]:
    keep = 1 - percent / 100
    criteria = {"random": 5, "frequency": 1, "reap": 1, "reconstruction": 1}
    return [
        Variant(f"{percent} % pruned", name, partial(prune, keep=keep, criterion=name), seeds)
        for name, seeds in criteria.items()
    ]


VARIANTS = [
    Variant(BASE, "", nothing),
    *_pruned(25),
    Variant("25 % merged", "", partial(merge, keep=0.75)),
    *_pruned(50),
    Variant("50 % merged", "", partial(merge, keep=0.5)),
    Variant("8 bits", "int8", partial(stored, form="int8")),
    *(
        Variant(f"{bits} bits", method, partial(quantize, bits=bits, method=method))
        for bits in (4, 3, 2)
        for method in ("rtn", "gptq")
    ),
    Variant("2.5 bits", "mixed 1 to 3, gptq", partial(mixed, average=2.5)),
]
