# SPDX-License-Identifier: BSD-3-Clause
"""merge_experts: groups of similar experts become one expert each, the average weighted by frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Size, checked
from switchgear.compress.calibration import Calibration
from switchgear.compress.choose import OpenShare, count_kept, count_per_group
from switchgear.compress.sums import Domains, LayerCalibration
from switchgear.compress.surgery import Cut, commit, find_layers
from switchgear.diagnostics.similarity import compute_product_cosines, match_rows, neurons
from switchgear.experts import Experts
from switchgear.integrations.blocks import (
    STEP_COUNTS,
    ExpertLayer,
    ExpertTensor,
    join_gate,
    router_tensors,
    split_gate,
)
from switchgear.integrations.gates import find_gate


@dataclass(frozen=True)
class MergedLayer:
    """What was done to a layer. Ids are those before; groups are in the order of the new experts."""

    name: str
    groups: list[list[int]]
    weights: list[list[float]]  # each expert's in the average of its group; they sum to 1


@dataclass(frozen=True)
class Merged:
    """The result of `merge_experts`."""

    layers: dict[str, MergedLayer]
    router: str
    parameters_before: int
    parameters_after: int

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        share = 1 - self.parameters_after / self.parameters_before
        groups = [len(layer.groups) for layer in self.layers.values()]
        every = [sum(map(len, layer.groups)) for layer in self.layers.values()]
        layers = f"{len(groups)} layer{'s' * (len(groups) != 1)}"
        return f"{layers}: {max(every)} experts merged into {max(groups)}, {share:.1%} fewer parameters"


@checked
@torch.no_grad()
def merge_experts(
    model: nn.Module,
    keep: Size | OpenShare,
    *,
    calibration: Calibration,
    similarity: Literal["outputs", "logits", "weights"] = "outputs",
    cluster: Literal["hierarchical", "dominant"] = "hierarchical",
    align: bool = False,
    router: Literal["average", "dominant", "keep"] = "average",
    domains: Domains = None,
) -> Merged:
    """Merges the experts of each layer into `keep` ones, in place; on failure nothing is changed. A group's expert is
    the average of its experts, weighted by their numbers of tokens.

    The defaults are HC-SMoE's (arXiv:2410.08589), except for the router. M-SMoE (arXiv:2310.01334) is
    similarity="logits", cluster="dominant", align=True; its dominant experts are the most frequent of the whole model,
    so the number that a layer keeps varies, while here it is the same for all layers.

    Args:
        model: has MoE layers of switchgear or Hugging Face. Give the whole model, not a part of it: the config and the
            balance loss count the experts of the whole.
        keep: experts per layer that remain: a number, or a fraction in (0, 1). At least top_k. Grouped routers merge
            within their groups.
        calibration: of this model, with a sample of tokens for similarity="outputs".
        similarity: which experts are alike. "outputs": their mean outputs over all tokens of the sample. "logits": the
            router's logits over all tokens (cosine). "weights": all weights (cosine).
        cluster: "hierarchical" joins the two closest clusters, again and again (average linkage); "dominant" adds each
            expert to the most similar of the `keep` most frequent ones.
        align: first permute the neurons of each expert to match the most frequent one of its group; what an expert
            computes does not depend on their order.
        router: "average": a group has one row of the router, the average with the same weights, so the model is smaller
            and chooses top_k different experts. "dominant": the row of its most frequent expert. "keep", as in both
            papers: all rows stay, and the experts of a group are copies of one; a token may choose it twice, and the
            checkpoint is as large as before.
        domains: the domains of the calibration to use; all by default.

    Raises:
        ValueError: an option out of range, a calibration of another model, or a layer that cannot be merged, which the
            message names.
    """
    layers = find_layers(model)
    calibration.check(model, domains=domains)
    counts = {name: count_kept(layer, keep) for name, layer in layers.items()}
    done, cuts = {}, []
    for name, layer in layers.items():
        known = calibration.layers[name]
        frequency = known.sums(domains).counts.double()
        groups = _group_experts(layer, known, frequency, counts[name], similarity, cluster, domains)
        weights = [_weigh(frequency[group]) for group in groups]
        done[name] = MergedLayer(name, groups, [share.tolist() for share in weights])
        cuts.append(_cut_layer(layer, groups, weights, align, router))
    before = sum(parameter.numel() for parameter in model.parameters())
    commit(model, cuts)
    after = sum(parameter.numel() for parameter in model.parameters())
    return Merged(done, router, before, after)


# ---- groups ----------------------------------------------------------------------------------------------------------


def _group_experts(
    layer: ExpertLayer,
    known: LayerCalibration,
    frequency: Tensor,
    count: int,
    similarity: str,
    cluster: str,
    domains: Domains,
) -> list[list[int]]:
    """The experts to merge into each new one. A grouped router's groups are divided one by one."""
    distances = _measure_distances(layer, known, similarity, domains)
    if not bool(distances.isfinite().all()):
        raise ValueError(f"{layer.name}: expected finite {similarity}, got NaN or infinities")
    per_group = count_per_group(layer, count)
    parts = 1 if per_group is None else count // per_group
    size = layer.num_experts // parts
    found = []
    for first in range(0, layer.num_experts, size):
        mine = slice(first, first + size)
        inside = distances[mine, mine]
        if cluster == "hierarchical":
            groups = cluster_hierarchically(inside, count // parts)
        else:
            groups = cluster_around_dominant(-inside, frequency[mine], count // parts)
        found += [[first + expert for expert in group] for group in groups]
    return found


def _measure_distances(layer: ExpertLayer, known: LayerCalibration, similarity: str, domains: Domains) -> Tensor:
    if similarity == "logits":
        products = known.sums(domains).logits
        if not bool(products.any()):
            raise ValueError(f"similarity: expected another than logits for {layer.name}, whose router shows none")
        return 1 - compute_product_cosines(products)
    if similarity == "weights":
        first, second = layer.projection(0), layer.projection(1)
        count = layer.num_experts
        products = torch.zeros(count, count, dtype=torch.float64)
        for weight in (first, second):
            rows = weight.reshape(count, -1).float()
            products += (rows @ rows.mT).double().cpu()
        return 1 - compute_product_cosines(products)
    sample = known.sample(domains)
    if sample is None:
        raise ValueError(f"calibration: expected a sample of tokens of {layer.name}, got none (samples=0)")
    mean = torch.zeros(layer.num_experts, layer.hidden_size, dtype=torch.float64)
    for x in torch.split(sample.x.to(layer.projection(0).device), 64):  # bounds [T,E,H]
        mean += layer.every_expert(x).sum(0, dtype=torch.float64).cpu() / len(sample.x)
    return torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")


def _weigh(frequency: Tensor) -> Tensor:
    """Equal ones if no expert of the group has tokens."""
    total = frequency.sum()
    return frequency / total if total > 0 else torch.full_like(frequency, 1 / len(frequency))


# ---- averages --------------------------------------------------------------------------------------------------------


def _cut_layer(
    layer: ExpertLayer, groups: Sequence[Sequence[int]], weights: Sequence[Tensor], align: bool, router: str
) -> Cut:
    orders = _match_neurons(layer, groups, weights) if align else {}
    keeps = router == "keep"
    owner = {expert: index for index, group in enumerate(groups) for expert in group}
    experts = []
    for place in layer.tensors():
        merged = torch.stack(
            [_average(layer, place, group, share, orders) for group, share in zip(groups, weights, strict=True)]
        )
        if keeps:
            merged = merged[[owner[expert] for expert in range(layer.num_experts)]]
        experts.append((place, merged))
    if keeps:
        return Cut(layer, layer.num_experts, experts)
    gate = [(place, _merge_router(place, groups, weights, router)) for place in router_tensors(layer.block)]
    return Cut(layer, len(groups), [*gate, *experts])


def _average(
    layer: ExpertLayer, place: ExpertTensor, group: Sequence[int], share: Tensor, orders: Mapping[int, list[int]]
) -> Tensor:
    tensor = place.tensor
    total = torch.zeros(tensor.shape[1:], dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
    for expert, weight in zip(group, share.tolist(), strict=True):
        total += weight * _reorder_neurons(layer, place, tensor[expert], orders.get(expert))
    return total.to(tensor.dtype)


def _merge_router(
    place: ExpertTensor, groups: Sequence[Sequence[int]], weights: Sequence[Tensor], router: str
) -> Tensor:
    tensor = place.tensor.movedim(place.dim, 0)
    rows = []
    for group, share in zip(groups, weights, strict=True):
        best = group[int(share.argmax())]
        if place.name == STEP_COUNTS:
            rows.append(tensor[list(group)].sum(0))
        elif router == "dominant" or not tensor.is_floating_point() or len(group) == 1:
            rows.append(tensor[best])
        else:
            average = torch.tensordot(share.to(tensor.device), tensor[list(group)].double(), 1)
            rows.append(average.to(tensor.dtype))
    return torch.stack(rows).movedim(0, place.dim).contiguous()


# ---- the order of neurons --------------------------------------------------------------------------------------------


def _find_layout(layer: ExpertLayer) -> tuple[int, bool]:
    """(projections in the first one, whether their rows alternate). Raises ValueError if the gate hides it."""
    parts = layer.projection(0).shape[1] // layer.intermediate_size
    if parts == 1:
        return 1, False
    gate = layer.experts if isinstance(layer.experts, Experts) else find_gate(layer.experts)
    if gate is None:
        raise ValueError(f"align: expected False for {layer.name}, since the order of its gate's rows is not known")
    return parts, bool(gate.interleaved)


def _match_neurons(
    layer: ExpertLayer, groups: Sequence[Sequence[int]], weights: Sequence[Tensor]
) -> dict[int, list[int]]:
    """The order of each expert's neurons that matches the most frequent expert of its group best."""
    _, interleaved = _find_layout(layer)
    first, second = layer.projection(0), layer.projection(1)
    orders = {}
    for group, share in zip(groups, weights, strict=True):
        best = group[int(share.argmax())]
        wanted = _list_neurons(first[best], second[best], interleaved)
        for expert in group:
            if expert != best:
                orders[expert] = match_rows(wanted @ _list_neurons(first[expert], second[expert], interleaved).mT)
    return orders


def _list_neurons(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """[I,D] float32, of one expert."""
    return neurons(first[None], second[None], interleaved=interleaved)[0].float()


def _reorder_neurons(layer: ExpertLayer, place: ExpertTensor, tensor: Tensor, order: list[int] | None) -> Tensor:
    if order is None:
        return tensor
    index = torch.tensor(order, device=tensor.device)
    (first, name, _), second = layer.parameters
    if place == second:
        return tensor.index_select(0 if layer.transposed else 1, index)
    if place.module is not first or place.name not in (name, f"{name}_bias"):
        return tensor
    turns = layer.transposed and place.name == name
    parts, interleaved = _find_layout(layer)
    gate, up = split_gate(tensor.mT if turns else tensor, parts == 2, interleaved)
    rows = join_gate(None if gate is None else gate[index], up[index], interleaved)
    return rows.mT if turns else rows


# ---- clusters --------------------------------------------------------------------------------------------------------


def cluster_hierarchically(distances: Tensor, count: int) -> list[list[int]]:
    """Agglomerative clustering of distances [E,E] with average linkage: the two closest clusters are joined until
    `count` are left (HC-SMoE, arXiv:2410.08589). Ascending lists, by their first item."""
    mean = distances.double().clone()
    mean.fill_diagonal_(torch.inf)
    clusters = {index: [index] for index in range(len(mean))}
    while len(clusters) > count:
        one, other = divmod(int(mean.argmin()), len(mean))
        one, other = min(one, other), max(one, other)
        a, b = len(clusters[one]), len(clusters[other])
        row = (a * mean[one] + b * mean[other]) / (a + b)  # inf for clusters that are gone, and for both
        mean[one], mean[:, one] = row, row
        mean[one, one] = torch.inf
        mean[other], mean[:, other] = torch.inf, torch.inf
        clusters[one] = sorted(clusters[one] + clusters.pop(other))
    return sorted(clusters.values())


def cluster_around_dominant(similarity: Tensor, frequency: Tensor, count: int) -> list[list[int]]:
    """The `count` most frequent experts, each with the others that are most similar to it (M-SMoE, arXiv:2310.01334).
    Ascending lists, by their first item."""
    dominant = frequency.argsort(descending=True, stable=True)[:count].tolist()
    groups = {expert: [expert] for expert in dominant}
    for expert in range(len(frequency)):
        if expert not in groups:
            nearest = dominant[int(similarity[expert, dominant].argmax())]
            groups[nearest].append(expert)
    return sorted(sorted(group) for group in groups.values())
