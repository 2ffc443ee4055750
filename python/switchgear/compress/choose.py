# SPDX-License-Identifier: BSD-3-Clause
"""Which experts prune_experts keeps: by scores, by the best subset, or those given."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from switchgear.compress.calibration import Calibration, check_finite
from switchgear.compress.layer import ExpertLayer
from switchgear.compress.subsets import best_subset
from switchgear.compress.sums import Domains, LayerCalibration

Keep = int | float | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class PrunedLayer:
    """What was done to a layer. Ids are those before."""

    name: str
    kept: list[int]
    removed: list[int]
    scores: list[float] | None = None  # of all experts by the criterion; None for "reconstruction" and given experts
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
        return {name: _given(layer, keep[name]) for name, layer in layers.items()}
    counts = {name: count_of(layer, keep) for name, layer in layers.items()}
    if criterion == "reconstruction":
        if scope == "global":
            raise ValueError("scope: expected layer for criterion='reconstruction', which compares subsets, got global")
        assert calibration is not None
        found = {}
        for name, layer in layers.items():
            known, per_group = calibration.layers[name], per_group_of(layer, counts[name])
            subset = best_subset(layer, known.sample(domains), counts[name], per_group, exact_subsets)
            found[name] = PrunedLayer(name, *split_experts(layer, subset.kept), None, subset.search, subset.error)
        return found
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, layer in layers.items():
        if criterion == "random":
            scores[name] = torch.rand(layer.num_experts, generator=generator, dtype=torch.float64)
        else:
            assert calibration is not None
            scores[name] = scores_of(calibration.layers[name], criterion, domains)
            check_finite(name, scores[name])
    if scope == "layer":
        kept = {name: _top(layers[name], score, counts[name]) for name, score in scores.items()}
        padding = dict.fromkeys(kept, 0)
    else:
        kept = _top_of_all(layers, scores, sum(counts.values()))
        most = max(map(len, kept.values()))
        ours = next(iter(layers.values())).block.is_ours
        padding = {name: 0 if ours else most - len(experts) for name, experts in kept.items()}
    return {
        name: PrunedLayer(name, *split_experts(layers[name], experts), scores[name].tolist(), padding=padding[name])
        for name, experts in kept.items()
    }


def scores_of(layer: LayerCalibration, criterion: str, domains: Domains = None) -> Tensor:
    """[E] float64: what each expert is worth. Experts without tokens are worth nothing."""
    sums = layer.sums(domains)
    counts = sums.counts.double()
    if criterion == "frequency":
        return counts
    return torch.where(counts > 0, sums.saliency / counts.clamp(min=1), 0)


def split_experts(layer: ExpertLayer, kept: Sequence[int]) -> tuple[list[int], list[int]]:
    return sorted(kept), [expert for expert in range(layer.num_experts) if expert not in set(kept)]


def _given(layer: ExpertLayer, experts: Sequence[int]) -> PrunedLayer:
    if isinstance(experts, (str, int, float)):
        raise TypeError(f"keep: expected a list of experts for {layer.name}, got {type(experts).__name__}")
    try:
        if any(isinstance(expert, bool) for expert in experts):  # Python takes them for 0 and 1
            raise TypeError
        ids = [operator.index(expert) for expert in experts]
    except TypeError:
        raise TypeError(f"keep: expected a list of experts for {layer.name}, got {experts!r}") from None
    if len(set(ids)) != len(ids) or not all(0 <= expert < layer.num_experts for expert in ids):
        raise ValueError(
            f"keep: expected different experts of 0 to {layer.num_experts - 1} for {layer.name}, got {ids}"
        )
    per_group = per_group_of(layer, count_of(layer, len(ids)))
    if per_group is not None:
        size = layer.num_experts // (len(ids) // per_group)
        if any(sum(expert // size == group for expert in ids) != per_group for group in range(len(ids) // per_group)):
            raise ValueError(f"keep: expected {per_group} experts of each group of {layer.name}, got {sorted(ids)}")
    return PrunedLayer(layer.name, *split_experts(layer, ids))


def count_of(layer: ExpertLayer, keep: int | float) -> int:
    """The number of experts to keep. Raises ValueError if it is too small or too large."""
    if isinstance(keep, float):
        if not 0 < keep < 1:
            raise ValueError(f"keep: expected a fraction in (0, 1), or a number of experts, got {keep}")
        count = max(round(keep * layer.num_experts), 1)
    elif isinstance(keep, Integral) and not isinstance(keep, bool):
        count = int(keep)
    else:
        raise TypeError(f"keep: expected int, float or a dict of lists, got {type(keep).__name__}")
    least = layer.block.top_k or 1
    if not least <= count <= layer.num_experts:
        raise ValueError(f"keep: expected {least} (top_k) to {layer.num_experts} experts in {layer.name}, got {count}")
    per_group_of(layer, count)
    return count


def per_group_of(layer: ExpertLayer, count: int) -> int | None:
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


def _top(layer: ExpertLayer, scores: Tensor, count: int) -> list[int]:
    """The best experts, of each group if there are groups; the lowest ids win ties."""
    per_group = per_group_of(layer, count)
    if per_group is None:
        best: list[int] = scores.argsort(descending=True, stable=True)[:count].tolist()
        return best
    size = layer.num_experts * per_group // count
    grouped = scores.view(-1, size).argsort(dim=1, descending=True, stable=True)[:, :per_group]
    return sorted((grouped + torch.arange(len(grouped))[:, None] * size).flatten().tolist())


def _top_of_all(layers: Mapping[str, ExpertLayer], scores: Mapping[str, Tensor], total: int) -> dict[str, list[int]]:
    """The best experts of all layers, but at least top_k of each."""
    for layer in layers.values():
        if layer.block.groups() is not None:
            raise ValueError(f"scope: expected layer for the grouped router of {layer.name}, got global")
    kept = {name: _top(layers[name], score, layers[name].block.top_k or 1) for name, score in scores.items()}
    rest = sorted(
        (-float(score), index, expert, name)
        for index, (name, layer_scores) in enumerate(scores.items())
        for expert, score in enumerate(layer_scores)
        if expert not in kept[name]
    )
    for _, _, expert, name in rest[: total - sum(map(len, kept.values()))]:
        kept[name].append(expert)
    return kept
