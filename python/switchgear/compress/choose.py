# SPDX-License-Identifier: BSD-3-Clause
"""Which experts prune_experts keeps: by scores, by the subset that changes the layer's output least (NAEE,
arXiv:2402.14800), or those given."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from switchgear.checks import Count, Range, Size
from switchgear.compress.calibration import Calibration, check_finite
from switchgear.compress.sums import Domains, Samples
from switchgear.compress.surgery import compute_choice, compute_choice_among
from switchgear.integrations.blocks import ExpertLayer

OpenShare = Annotated[float, Range(0, 1, "low high")]
Keep = Size | OpenShare | Mapping[str, Sequence[Count]]


@dataclass(frozen=True)
class PrunedLayer:
    """What was done to a layer. Ids are those before."""

    name: str
    kept: list[int]
    removed: list[int]
    scores: list[float] | None = None  # all experts' by the criterion; None for "reconstruction" and given experts
    search: str = ""  # "exact", "greedy" or "swaps", for "reconstruction"
    error: float | None = None  # ‖F(x) − F_kept(x)‖ / ‖F(x)‖ on the sample, for "reconstruction"
    padding: int = 0  # empty places, which no token gets


def choose(
    layers: Mapping[str, ExpertLayer],
    keep: Keep,
    criterion: str,
    calibration: Calibration | None,
    scope: str,
    domains: Domains,
    seed: int,
    exact_subsets: int,
) -> dict[str, PrunedLayer]:
    if isinstance(keep, Mapping):
        return {name: _keep_given(layer, keep[name]) for name, layer in layers.items()}
    counts = {name: count_kept(layer, keep) for name, layer in layers.items()}
    if criterion == "reconstruction":
        if scope == "global":
            raise ValueError("scope: expected layer for criterion='reconstruction', which compares subsets, got global")
        assert calibration is not None
        found = {}
        for name, layer in layers.items():
            known, per_group = calibration.layers[name], count_per_group(layer, counts[name])
            sample = known.sample(domains)
            subset, search, error = find_subset(layer, sample, counts[name], per_group, exact_subsets)
            found[name] = PrunedLayer(name, *split_experts(layer, subset), None, search, error)
        return found
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, layer in layers.items():
        if criterion == "random":
            scores[name] = torch.rand(layer.num_experts, generator=generator, dtype=torch.float64)
        else:
            assert calibration is not None
            sums = calibration.layers[name].sums(domains)
            scores[name] = counted = sums.counts.double()
            if criterion == "reap":  # experts without tokens are worth nothing
                scores[name] = torch.where(counted > 0, sums.saliency / counted.clamp(min=1), 0)
            check_finite(name, scores[name])
    if scope == "layer":
        kept = {name: _choose_best(layers[name], score, counts[name]) for name, score in scores.items()}
        padding = dict.fromkeys(kept, 0)
    else:
        kept = _choose_best_of_all(layers, scores, sum(counts.values()))
        most = max(map(len, kept.values()))
        ours = next(iter(layers.values())).block.is_ours
        padding = {name: 0 if ours else most - len(experts) for name, experts in kept.items()}
    return {
        name: PrunedLayer(name, *split_experts(layers[name], experts), scores[name].tolist(), padding=padding[name])
        for name, experts in kept.items()
    }


def split_experts(layer: ExpertLayer, kept: Sequence[int]) -> tuple[list[int], list[int]]:
    return sorted(kept), [expert for expert in range(layer.num_experts) if expert not in set(kept)]


def _keep_given(layer: ExpertLayer, experts: Sequence[int]) -> PrunedLayer:
    ids = [operator.index(expert) for expert in experts]
    if len(set(ids)) != len(ids) or not all(0 <= expert < layer.num_experts for expert in ids):
        raise ValueError(
            f"keep: expected different experts of 0 to {layer.num_experts - 1} for {layer.name}, got {ids}"
        )
    per_group = count_per_group(layer, count_kept(layer, len(ids)))
    if per_group is not None:
        size = layer.num_experts // (len(ids) // per_group)
        if any(sum(expert // size == group for expert in ids) != per_group for group in range(len(ids) // per_group)):
            raise ValueError(f"keep: expected {per_group} experts of each group of {layer.name}, got {sorted(ids)}")
    return PrunedLayer(layer.name, *split_experts(layer, ids))


def count_kept(layer: ExpertLayer, keep: int | float) -> int:
    """The number of experts to keep. Raises ValueError if it is too small or too large."""
    count = keep if isinstance(keep, int) else max(round(keep * layer.num_experts), 1)
    least = layer.block.top_k or 1
    if not least <= count <= layer.num_experts:
        raise ValueError(f"keep: expected {least} (top_k) to {layer.num_experts} experts in {layer.name}, got {count}")
    count_per_group(layer, count)
    return count


def count_per_group(layer: ExpertLayer, count: int) -> int | None:
    """Experts to keep of each group of a grouped router; None for other routers."""
    groups = layer.block.groups()
    if groups is None:
        return None
    total, chosen = groups
    size = layer.num_experts // total
    # A group is ranked by its two best experts, and top_k experts come from the chosen groups.
    least = max(min(2, size), math.ceil((layer.block.top_k or 1) / chosen))
    if count % total or count // total < least:
        wanted = f"a multiple of {total} groups, with at least {least} experts of each"
        raise ValueError(f"keep: expected {wanted}, for {layer.name}, got {count}")
    return count // total


def _choose_best(layer: ExpertLayer, scores: Tensor, count: int) -> list[int]:
    """The best experts, of each group if there are groups; the lowest ids win ties."""
    per_group = count_per_group(layer, count)
    if per_group is None:
        best: list[int] = scores.argsort(descending=True, stable=True)[:count].tolist()
        return best
    size = layer.num_experts * per_group // count
    grouped = scores.view(-1, size).argsort(dim=1, descending=True, stable=True)[:, :per_group]
    return sorted((grouped + torch.arange(len(grouped))[:, None] * size).flatten().tolist())


def _choose_best_of_all(
    layers: Mapping[str, ExpertLayer], scores: Mapping[str, Tensor], total: int
) -> dict[str, list[int]]:
    for layer in layers.values():
        if layer.block.groups() is not None:
            raise ValueError(f"scope: expected layer for the grouped router of {layer.name}, got global")
    kept = {name: _choose_best(layers[name], score, layers[name].block.top_k or 1) for name, score in scores.items()}
    rest = sorted(
        (-float(score), index, expert, name)
        for index, (name, layer_scores) in enumerate(scores.items())
        for expert, score in enumerate(layer_scores)
        if expert not in kept[name]
    )
    for _, _, expert, name in rest[: total - sum(map(len, kept.values()))]:
        kept[name].append(expert)
    return kept


# ---- subsets ---------------------------------------------------------------------------------------------------------


Subset = tuple[list[int], str, float]  # experts; "exact", "greedy" or "swaps"; ‖F(x) − F_kept(x)‖ / ‖F(x)‖


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
        ids, weights = compute_choice(layer.block, self.x)
        if not torch.equal(ids.sort(-1).values.cpu(), sample.topk_ids.long().sort(-1).values):
            raise ValueError(
                f"{layer.name}: expected a router that reads the input of the experts, got other choices for it"
            )
        self.outputs = layer.every_expert(self.x)
        self.wanted = self.combined(ids, weights)
        self.norm = float(self.wanted.norm())
        if not math.isfinite(self.norm):  # 0 · NaN is NaN, even if no token chose the expert
            raise ValueError(f"calibration: expected finite outputs of the experts of {layer.name}, got others")

    def combined(self, ids: Tensor, weights: Tensor) -> Tensor:
        dense = weights.new_zeros(len(ids), self.layer.num_experts + 1).scatter_add(
            1, torch.where(ids < 0, self.layer.num_experts, ids), weights
        )
        return torch.bmm(dense[:, None, :-1].float(), self.outputs).squeeze(1).double()

    def error(self, keep: Sequence[int]) -> float:
        """‖F(x) − F_keep(x)‖ / ‖F(x)‖ over the sample."""
        difference = self.wanted - self.combined(*compute_choice_among(self.layer.block, keep, self.x))
        return float(difference.norm()) / max(self.norm, 1e-30)


def find_subset(
    layer: ExpertLayer, sample: Samples | None, count: int, per_group: int | None, exact_subsets: int
) -> Subset:
    """The best of all subsets if there are at most `exact_subsets`; else what remains when the expert whose removal
    costs least is removed, again and again. Of equal ones the first."""
    losses = Reconstruction(layer, sample)
    groups = 1 if per_group is None else count // per_group
    size = layer.num_experts // groups
    if math.comb(size, count // groups) ** groups <= exact_subsets:
        subsets = _list_subsets(groups, size, count // groups)
        error, kept = min((losses.error(subset), subset) for subset in subsets)
        return kept, "exact", error
    if per_group is not None:
        return _swap_experts(losses, groups, size, per_group)
    kept = list(range(layer.num_experts))
    while len(kept) > count:
        _, removed = min((losses.error([e for e in kept if e != expert]), expert) for expert in kept)
        kept.remove(removed)
    return kept, "greedy", losses.error(kept)


def _swap_experts(losses: Reconstruction, groups: int, size: int, per_group: int) -> Subset:
    """The subset for a grouped router, whose groups have one size: starts from the first experts of each group, and
    makes the best swap of two experts of a group while one lowers the error."""
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
            return kept, "swaps", error
        error, kept = best, following


def _list_subsets(groups: int, size: int, count: int) -> Iterator[list[int]]:
    per_group = [
        [[group * size + expert for expert in chosen] for chosen in itertools.combinations(range(size), count)]
        for group in range(groups)
    ]
    for parts in itertools.product(*per_group):
        yield [expert for part in parts for expert in part]
