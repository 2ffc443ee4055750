# SPDX-License-Identifier: BSD-3-Clause
"""The subset of experts that reproduces a layer's output best (NAEE, arXiv:2402.14800)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear.compress.layer import ExpertLayer
from switchgear.compress.sums import Samples
from switchgear.compress.surgery import choice_of, kept_choice


@dataclass(frozen=True)
class Subset:
    kept: list[int]
    search: str  # "exact", "greedy" or "swaps"
    error: float  # ‖F(x) − F_kept(x)‖ / ‖F(x)‖


class Reconstruction:
    """The error of subsets on a sample. All experts are computed once for all tokens; the router is cut anew for each
    subset, so weights are renormalised, and groups chosen, as the pruned layer does it."""

    def __init__(self, layer: ExpertLayer, sample: Samples | None) -> None:
        if sample is None or not len(sample.x):
            raise ValueError(f"calibration: expected a sample of tokens of {layer.name}, got none (samples=0)")
        if layer.scales_input:
            raise ValueError(f"criterion: expected none of outputs for {layer.name}, which scales its input")
        self.layer = layer
        weight = layer.block.gate_weight()
        assert weight is not None
        self.x = sample.x.to(weight.device)
        ids, weights = choice_of(layer.block, self.x)
        if not torch.equal(ids.sort(-1).values.cpu(), sample.topk_ids.long().sort(-1).values):
            raise ValueError(
                f"{layer.name}: expected a router that reads the input of the experts, got other choices for it"
            )
        self.outputs = layer.every_expert(self.x)
        self.wanted = self.combined(ids, weights)
        self.norm = float(self.wanted.norm())
        if not math.isfinite(self.norm):  # also if no token chose the expert: 0 · NaN is NaN
            raise ValueError(f"calibration: expected finite outputs of the experts of {layer.name}, got others")

    def combined(self, ids: Tensor, weights: Tensor) -> Tensor:
        dense = weights.new_zeros(len(ids), self.layer.num_experts + 1).scatter_add(
            1, torch.where(ids < 0, self.layer.num_experts, ids), weights
        )
        return torch.bmm(dense[:, None, :-1].float(), self.outputs).squeeze(1).double()

    def error(self, keep: Sequence[int]) -> float:
        """‖F(x) − F_keep(x)‖ / ‖F(x)‖ over the sample."""
        difference = self.wanted - self.combined(*kept_choice(self.layer.block, keep, self.x))
        return float(difference.norm()) / max(self.norm, 1e-30)


def best_subset(
    layer: ExpertLayer, sample: Samples | None, count: int, per_group: int | None, exact_subsets: int
) -> Subset:
    """The best of all subsets if there are at most `exact_subsets`; else what remains when the expert whose removal
    costs least is removed, again and again. Of equal ones the first."""
    losses = Reconstruction(layer, sample)
    groups = 1 if per_group is None else count // per_group
    size = layer.num_experts // groups
    if math.comb(size, count // groups) ** groups <= exact_subsets:
        subsets = _subsets(groups, size, count // groups)
        error, kept = min((losses.error(subset), subset) for subset in subsets)
        return Subset(kept, "exact", error)
    if per_group is not None:
        return _swapped(losses, groups, size, per_group)
    kept = list(range(layer.num_experts))
    while len(kept) > count:
        _, removed = min((losses.error([e for e in kept if e != expert]), expert) for expert in kept)
        kept.remove(removed)
    return Subset(kept, "greedy", losses.error(kept))


def _swapped(losses: Reconstruction, groups: int, size: int, per_group: int) -> Subset:
    """For a grouped router, whose groups have one size: from the first experts of each group, the best swap of two
    experts of a group is made while one lowers the error."""
    kept = [group * size + expert for group in range(groups) for expert in range(per_group)]
    error = losses.error(kept)
    while True:
        swaps = [
            sorted([*(e for e in kept if e != old), new])
            for old in kept
            for new in range(old // size * size, (old // size + 1) * size)
            if new not in kept
        ]
        best, following = min(((losses.error(swap), swap) for swap in swaps), default=(error, kept))
        if not best < error:
            return Subset(kept, "swaps", error)
        error, kept = best, following


def _subsets(groups: int, size: int, count: int) -> Iterator[list[int]]:
    per_group = [
        [[group * size + expert for expert in chosen] for chosen in itertools.combinations(range(size), count)]
        for group in range(groups)
    ]
    for parts in itertools.product(*per_group):
        yield [expert for part in parts for expert in part]
