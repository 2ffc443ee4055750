# SPDX-License-Identifier: BSD-3-Clause
"""prune_experts: removes experts of a model's MoE layers, or replaces them by constants. prune_weights: zeros in their
weights, chosen by their inputs and by the router (MoE-Pruner, Wanda)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Count, Range, Seed, checked
from switchgear.compress.calibration import Calibration, check_finite
from switchgear.compress.choose import Keep, PrunedLayer, choose
from switchgear.compress.sums import Domains, ExpertSums
from switchgear.compress.surgery import (
    NO_EXPERT,
    Cut,
    check_unshared,
    commit,
    compute_choice,
    cut_experts,
    cut_router,
    find_layers,
    replace_gate,
)
from switchgear.integrations.blocks import ExpertLayer, expert_layers
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.layers.virtual import VirtualExperts


@dataclass(frozen=True)
class Pruned:
    """The result of `prune_experts`."""

    criterion: str
    layers: dict[str, PrunedLayer]
    parameters_before: int
    parameters_after: int

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kept = [len(layer.kept) for layer in self.layers.values()]
        every = [len(layer.kept) + len(layer.removed) for layer in self.layers.values()]
        share = 1 - self.parameters_after / self.parameters_before
        many = f"{min(kept)}" if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
        layers = f"{len(kept)} layer{'s' * (len(kept) != 1)}"
        return f"{layers}: {many} of {max(every)} experts kept by {self.criterion}, {share:.1%} fewer parameters"


@checked
@torch.no_grad()
def prune_experts(
    model: nn.Module,
    keep: Keep,
    criterion: Literal["reap", "reconstruction", "frequency", "random"] = "reap",
    *,
    calibration: Calibration | None = None,
    scope: Literal["layer", "global"] = "layer",
    replace: Literal["none", "constant"] = "none",
    domains: Domains = None,
    seed: Seed = 0,
    exact_subsets: Count = 4096,
) -> Pruned:
    """Removes experts in place: their weights, their rows of the router and of its biases, and their number in the
    config. A pruned Hugging Face model can be saved, and loads in transformers. On failure nothing is changed.

        calibration = compress.calibrate(model, batches)
        print(compress.prune_experts(model, 0.5, "reap", calibration=calibration))
        model.save_pretrained(path)

    Args:
        model: has MoE layers of switchgear or Hugging Face. Give the whole model, not a part of it: the config and the
            balance loss count the experts of the whole.
        keep: experts per layer: a number, a fraction in (0, 1) of each layer, or the ids to keep by layer. At least
            top_k. Grouped routers keep equally many of each group.
        criterion: which experts to keep.
            "reap": the largest mean of weight · ‖output‖ over the expert's tokens (arXiv:2510.13999).
            "reconstruction": the subset that changes the layer's output least on the sample (NAEE, arXiv:2402.14800).
                All subsets are tried if there are at most `exact_subsets`; else experts are removed one by one
                (of grouped routers: swapped).
            "frequency": the most tokens. "random": by `seed`.
        calibration: of this model, for all but "random", with tokens in each layer.
        scope: "layer", or "global": keep so many on average, with the best scores of all layers. A Hugging Face config
            holds one number for all layers, so the others are padded with places that no token gets, if the router has
            a bias, and refused if not.
        replace: "none"; or "constant": the removed experts return their mean output, at no cost (MoNE,
            arXiv:2507.00390). For switchgear's layers; no class of transformers can express it.
        domains: the domains of the calibration to use; all by default.

    Raises:
        ValueError: an option out of range, a calibration of another model, or a layer that cannot be
            pruned, which the message names.
    """
    layers = find_layers(model, keep if isinstance(keep, Mapping) else None, "keep")
    if rest := [name for name, block in moe_blocks(model).items() if name not in layers and not block.is_ours]:
        raise ValueError(f"keep: expected all layers of a Hugging Face model, got none for {rest[0]}")
    needs = criterion != "random" and not isinstance(keep, Mapping)
    if (needs or replace == "constant") and calibration is None:
        raise ValueError(f"calibration: expected one for {criterion if needs else 'replace=constant'}, got None")
    if calibration is not None:
        calibration.check(model, layers, domains)
        for name in layers if needs or replace == "constant" else ():
            if not bool(calibration.layers[name].sums(domains).counts.any()):
                raise ValueError(f"calibration: expected tokens in all layers, got none in {name}")
    found = choose(layers, keep, criterion, calibration, scope, domains, seed, exact_subsets)
    before = sum(parameter.numel() for parameter in model.parameters())
    means = {}
    if replace == "constant":
        assert calibration is not None
        _check_constant(layers)
        for name in layers:
            sums, removed = calibration.layers[name].sums(domains), found[name].removed
            means[name] = sums.outputs[removed] / sums.counts[removed].clamp(min=1)[:, None]
            check_finite(name, means[name])
    commit(model, [_cut_layer(layer, found[name], replace == "constant") for name, layer in layers.items()])
    for name, mean in means.items():
        _put_constants(layers[name], found[name], mean)
    after = sum(parameter.numel() for parameter in model.parameters())
    return Pruned("the caller" if isinstance(keep, Mapping) else criterion, found, before, after)


# ---- the cuts --------------------------------------------------------------------------------------------------------


def _cut_layer(layer: ExpertLayer, pruned: PrunedLayer, has_constants: bool) -> Cut:
    """With constants, the router's rows of the removed experts follow those of the experts kept."""
    keep = [*pruned.kept, *[NO_EXPERT] * pruned.padding]
    gate = cut_router(layer.block, [*keep, *(pruned.removed if has_constants else ())])
    if pruned.padding:
        _check_padding(layer, pruned, gate)
    return Cut(layer, len(keep), [*gate, *cut_experts(layer, keep)])


def _check_padding(layer: ExpertLayer, pruned: PrunedLayer, gate: Any) -> None:
    """Raises ValueError unless the router chooses and weights as if the empty places did not exist."""
    generator = torch.Generator().manual_seed(0)
    weight = layer.block.gate_weight()
    assert weight is not None
    x = torch.randn(64, layer.hidden_size, generator=generator).to(weight.device, layer.projection(0).dtype)
    results = []
    for tensors, count in ((cut_router(layer.block, pruned.kept), len(pruned.kept)), (gate, gate[0][1].shape[0])):
        with replace_gate(layer.block, tensors, count) as block:
            results.append(compute_choice(block, x))
    (ids, weights), (padded_ids, padded_weights) = results
    if not torch.equal(ids, padded_ids) or not torch.allclose(weights, padded_weights, rtol=1e-5, atol=1e-7):
        raise ValueError(
            f"{layer.name}: expected equal numbers of experts in all layers, since empty places change the weights of "
            f"{type(layer.block.gate).__name__}; use scope='layer'"
        )


def _check_constant(layers: Mapping[str, ExpertLayer]) -> None:
    for layer in layers.values():
        if not layer.block.is_ours:
            kind = type(layer.block.block).__name__
            raise ValueError(f"replace: expected none for {layer.name}, since {kind} has no constant experts")
        if layer.block.groups() is not None or layer.scales_input:
            raise ValueError(f"replace: expected none for {layer.name}, whose router is grouped or scales its input")


def _put_constants(layer: ExpertLayer, pruned: PrunedLayer, means: Tensor) -> None:
    block: Any = layer.block.block
    virtual = VirtualExperts(block.experts, constant=len(pruned.removed))
    assert virtual.constants is not None or not pruned.removed
    if virtual.constants is not None:
        virtual.constants.copy_(means)
        block.experts = virtual.train(block.training)
    block.gate.num_experts = layer.block.num_experts


# ---- weights ---------------------------------------------------------------------------------------------------------


Sparsity = Annotated[float, Range(0, 1, "low high")] | Literal["2:4"]
_SQUARES = {"wanda": ("inputs", "hidden"), "router_wanda": ("gated_inputs", "gated_hidden")}  # fields of ExpertSums
_ROWS = 1024  # scored at once


@dataclass(frozen=True)
class SparsifiedLayer:
    """What was done to a layer."""

    name: str
    zeros: float  # their share of the weights
    starved: list[int]  # experts without tokens in the calibration: by magnitude


@dataclass(frozen=True)
class Sparsified:
    """The result of `prune_weights`."""

    metric: str
    layers: dict[str, SparsifiedLayer]

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        share = sum(layer.zeros for layer in self.layers.values()) / len(self.layers)
        starved = sum(len(layer.starved) for layer in self.layers.values())
        note = f"; {starved} experts without tokens by magnitude" if starved else ""
        count = len(self.layers)
        layers = f"{count} layer{'s' * (count != 1)}"
        return f"{layers}: {share:.1%} of the experts' weights are zero, by {self.metric}{note}"


@checked
@torch.no_grad()
def prune_weights(
    model: nn.Module,
    sparsity: Sparsity = 0.5,
    metric: Literal["router_wanda", "wanda", "magnitude"] = "router_wanda",
    *,
    calibration: Calibration | None = None,
    domains: Domains = None,
) -> Sparsified:
    """Sets the least important weights of each row of each expert to zero, in place. Both projections.

    Args:
        model: has MoE layers of switchgear or Hugging Face.
        sparsity: the share of zeros in each row, in (0, 1); or "2:4": two of each four consecutive columns.
        metric: the importance of a weight w_ij. "magnitude": |w_ij|. "wanda": |w_ij| · ‖x_j‖ over the expert's tokens
            (arXiv:2306.11695). "router_wanda": |w_ij| · ‖g x_j‖ with the router's weights g (MoE-Pruner,
            arXiv:2410.12013). For an expert without tokens: |w_ij|.
        calibration: of this model, for all but "magnitude".
        domains: the domains of the calibration to use; all by default.

    The zeros make no product faster: there is no kernel for them. Of equal weights the ones in the first columns go.

    Raises ValueError for an option out of range, a calibration of another model, or experts that are not plain or are
    shared. Nothing is changed then.
    """
    layers = expert_layers(model)
    for layer in layers.values():
        for index in (0, 1):
            count_zeros(sparsity, layer.projection(index).shape[2])  # checks
    check_unshared(model, [parameter for layer in layers.values() for parameter in layer.parameters])
    if calibration is None and metric != "magnitude":
        raise ValueError(f"calibration: expected one for {metric}, got None")
    if calibration is not None:
        calibration.check(model, domains=domains)
    known: dict[str, ExpertSums] = {}
    if calibration is not None and metric != "magnitude":
        known = {name: calibration.layers[name].sums(domains) for name in layers}
    for name, all_sums in known.items():
        check_finite(name, *(getattr(all_sums, squares) for squares in _SQUARES[metric]))
    done = {}
    for name, layer in layers.items():
        sums = known.get(name)
        starved = (sums.counts == 0).nonzero().flatten().tolist() if sums is not None else []
        zeros = total = 0
        for index in (0, 1):
            for expert, weight in enumerate(layer.projection(index)):
                norms = None  # ‖x_j‖ of the inputs, [C]
                if sums is not None and expert not in starved:
                    norms = getattr(sums, _SQUARES[metric][index])[expert].sqrt()
                for rows in weight.split(_ROWS):
                    rows.masked_fill_(choose_zeros(rows, norms, sparsity), 0)
                zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
        done[name] = SparsifiedLayer(name, zeros / total, starved)
    return Sparsified(metric, done)


def count_zeros(sparsity: float | str, columns: int) -> tuple[int, int]:
    """(zeros, of how many columns). Raises ValueError for a sparsity that such rows cannot have."""
    if sparsity == "2:4":
        if columns % 4:
            raise ValueError(f"sparsity: expected a share for rows of {columns} columns, no multiple of 4, got 2:4")
        return 2, 4
    return round(float(sparsity) * columns), columns


def choose_zeros(weight: Tensor, norms: Tensor | None, sparsity: float | str) -> Tensor:
    """Which weights of rows [N,C] become zero: those with the smallest |w| · norms [C]."""
    zeros, of = count_zeros(sparsity, weight.shape[1])
    score = weight.abs().float()
    if norms is not None:
        score = score * norms.to(score.device, score.dtype)
    groups = score.reshape(len(score), -1, of)
    order = groups.argsort(dim=-1, stable=True)[..., :zeros]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(1)
