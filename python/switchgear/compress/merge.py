# SPDX-License-Identifier: BSD-3-Clause
"""merge_experts: groups of similar experts become one expert each, the average weighted by frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.complaints import check_module, check_switch
from switchgear.compress.calibration import Calibration, check_calibration
from switchgear.compress.choose import count_of, per_group_of
from switchgear.compress.clusters import around_dominant, hierarchical, rows_in_order
from switchgear.compress.layer import ExpertLayer, expert_layers
from switchgear.compress.sums import Domains, LayerCalibration
from switchgear.compress.surgery import (
    STEP_COUNTS,
    Cut,
    Place,
    check_config,
    check_cuttable,
    check_unshared,
    commit,
    expert_places,
    gate_places,
    places_of,
)
from switchgear.diagnostics.similarity import compute_product_cosines, match_rows, neurons
from switchgear.experts import Experts
from switchgear.integrations.gates import find_gate
from switchgear.reference import check_choice

SIMILARITIES = ("outputs", "logits", "weights")
CLUSTERS = ("hierarchical", "dominant")
ROUTERS = ("average", "dominant", "keep")


@dataclass(frozen=True)
class MergedLayer:
    """What was done to a layer. Ids are those before; groups are in the order of the new experts."""

    name: str
    groups: list[list[int]]
    weights: list[list[float]]  # of the experts of each group in the average; they sum to 1


@dataclass(frozen=True)
class Merged:
    """The result of `merge_experts`."""

    layers: dict[str, MergedLayer]
    router: str
    parameters_before: int
    parameters_after: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        share = 1 - self.parameters_after / self.parameters_before
        groups = [len(layer.groups) for layer in self.layers.values()]
        every = [sum(map(len, layer.groups)) for layer in self.layers.values()]
        layers = f"{len(groups)} layer{'s' * (len(groups) != 1)}"
        return f"{layers}: {max(every)} experts merged into {max(groups)}, {share:.1%} fewer parameters"


@torch.no_grad()
def merge_experts(
    model: nn.Module,
    keep: int | float,
    *,
    calibration: Calibration,
    similarity: str = "outputs",
    cluster: str = "hierarchical",
    align: bool = False,
    router: str = "average",
    domains: Domains = None,
) -> Merged:
    """Merges the experts of each layer into `keep` ones, in place; on failure nothing is changed. A group's expert is
    the average of its experts, weighted by their numbers of tokens.

    The defaults are HC-SMoE's (arXiv:2410.08589), except for the router. M-SMoE (arXiv:2310.01334) is
    similarity="logits", cluster="dominant", align=True; its dominant experts are the most frequent of the whole model,
    so the number that a layer keeps varies, while here it is the same for all layers.

    Args:
        model: has switchgear's MoE layers or those of Hugging Face. Give the whole model, not a part of it: the config
            and the balance loss are those of the whole.
        keep: experts per layer that remain: a number, or a fraction in (0, 1). At least top_k. Grouped routers merge
            within their groups.
        calibration: of this model, with a sample of tokens for similarity="outputs".
        similarity: which experts are alike. "outputs": their mean outputs over all tokens of the sample. "logits": the
            router's logits over all tokens (cosine). "weights": all weights (cosine).
        cluster: "hierarchical" joins the two closest clusters, again and again (average linkage); "dominant" adds each
            expert to the most similar of the `keep` most frequent ones.
        align: first permute the neurons of each expert to match those of the most frequent of its group; what an expert
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
    check_module("model", model)
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("cluster", cluster, CLUSTERS)
    check_choice("router", router, ROUTERS)
    check_switch("align", align)
    layers = expert_layers(model)
    for layer in layers.values():
        check_cuttable(layer)
    check_unshared(model, places_of(layers.values()))
    check_calibration(calibration, model, domains=domains)
    counts = {name: count_of(layer, keep) for name, layer in layers.items()}
    if router != "keep":
        check_config(model, [layer.block for layer in layers.values()], list(counts.values()))
    done, cuts = {}, []
    for name, layer in layers.items():
        known = calibration.layers[name]
        frequency = known.sums(domains).counts.double()
        groups = _groups(layer, known, frequency, counts[name], similarity, cluster, domains)
        weights = [_shares(frequency[group]) for group in groups]
        done[name] = MergedLayer(name, groups, [share.tolist() for share in weights])
        cuts.append(_cut(layer, groups, weights, align, router))
    before = sum(parameter.numel() for parameter in model.parameters())
    commit(model, cuts)
    after = sum(parameter.numel() for parameter in model.parameters())
    return Merged(done, router, before, after)


# ---- groups ----------------------------------------------------------------------------------------------------------


def _groups(
    layer: ExpertLayer,
    known: LayerCalibration,
    frequency: Tensor,
    count: int,
    similarity: str,
    cluster: str,
    domains: Domains,
) -> list[list[int]]:
    """Of each group of a grouped router by itself."""
    distances = _distances(layer, known, similarity, domains)
    if not bool(distances.isfinite().all()):
        raise ValueError(f"{layer.name}: expected finite {similarity}, got NaN or infinities")
    per_group = per_group_of(layer, count)
    parts = 1 if per_group is None else count // per_group
    size = layer.num_experts // parts
    found = []
    for first in range(0, layer.num_experts, size):
        mine = slice(first, first + size)
        inside = distances[mine, mine]
        if cluster == "hierarchical":
            groups = hierarchical(inside, count // parts)
        else:
            groups = around_dominant(-inside, frequency[mine], count // parts)
        found += [[first + expert for expert in group] for group in groups]
    return found


def _distances(layer: ExpertLayer, known: LayerCalibration, similarity: str, domains: Domains) -> Tensor:
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


def _shares(frequency: Tensor) -> Tensor:
    """Equal ones if no expert of the group has tokens."""
    total = frequency.sum()
    return frequency / total if total > 0 else torch.full_like(frequency, 1 / len(frequency))


# ---- averages --------------------------------------------------------------------------------------------------------


def _cut(
    layer: ExpertLayer, groups: Sequence[Sequence[int]], weights: Sequence[Tensor], align: bool, router: str
) -> Cut:
    orders = _orders(layer, groups, weights) if align else {}
    keeps = router == "keep"
    owner = {expert: index for index, group in enumerate(groups) for expert in group}
    experts = []
    for place in expert_places(layer):
        merged = torch.stack(
            [_average(layer, place, group, share, orders) for group, share in zip(groups, weights, strict=True)]
        )
        if keeps:
            merged = merged[[owner[expert] for expert in range(layer.num_experts)]]
        experts.append((place, merged))
    if keeps:
        return Cut(layer, layer.num_experts, [], experts)
    gate = [(place, _of_router(place, groups, weights, router)) for place in gate_places(layer.block)]
    return Cut(layer, len(groups), gate, experts)


def _average(
    layer: ExpertLayer, place: Place, group: Sequence[int], share: Tensor, orders: Mapping[int, list[int]]
) -> Tensor:
    tensor = place.tensor
    total = torch.zeros(tensor.shape[1:], dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
    for expert, weight in zip(group, share.tolist(), strict=True):
        total += weight * _reordered(layer, place, tensor[expert], orders.get(expert))
    return total.to(tensor.dtype)


def _of_router(place: Place, groups: Sequence[Sequence[int]], weights: Sequence[Tensor], router: str) -> Tensor:
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


def _layout(layer: ExpertLayer) -> tuple[int, bool]:
    """(projections in the first one, whether their rows alternate). Raises ValueError if the gate hides it."""
    parts = layer.projection(0).shape[1] // layer.intermediate_size
    if parts == 1:
        return 1, False
    gate = layer.experts if isinstance(layer.experts, Experts) else find_gate(layer.experts)
    if gate is None:
        raise ValueError(f"align: expected False for {layer.name}, since the order of its gate's rows is not known")
    return parts, bool(gate.interleaved)


def _orders(layer: ExpertLayer, groups: Sequence[Sequence[int]], weights: Sequence[Tensor]) -> dict[int, list[int]]:
    """For each expert, its neurons in the order of those of the most frequent expert of its group."""
    _, interleaved = _layout(layer)
    first, second = layer.projection(0), layer.projection(1)
    orders = {}
    for group, share in zip(groups, weights, strict=True):
        best = group[int(share.argmax())]
        wanted = _neurons(first[best], second[best], interleaved)
        for expert in group:
            if expert != best:
                orders[expert] = match_rows(wanted @ _neurons(first[expert], second[expert], interleaved).mT)
    return orders


def _neurons(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """[I,D] float32, of one expert."""
    return neurons(first[None], second[None], interleaved=interleaved)[0].float()


def _reordered(layer: ExpertLayer, place: Place, tensor: Tensor, order: list[int] | None) -> Tensor:
    """An expert's tensor with its neurons in another order."""
    if order is None:
        return tensor
    parts, interleaved = _layout(layer)
    rows = rows_in_order(order, parts, interleaved).to(tensor.device)
    if place.module is layer.owner(0) and place.name == layer.key(0):
        return tensor.index_select(1 if layer.transposed else 0, rows)
    if place.module is layer.owner(0) and place.name == f"{layer.key(0)}_bias":
        return tensor[rows]
    if place.module is layer.owner(1) and place.name == layer.key(1):
        return tensor.index_select(0 if layer.transposed else 1, torch.tensor(order, device=tensor.device))
    return tensor
