# SPDX-License-Identifier: BSD-3-Clause
"""prune_weights: zeros in the weights of experts, chosen by their inputs and by the router (MoE-Pruner, Wanda)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Range, checked
from switchgear.compress.calibration import Calibration, check_finite
from switchgear.compress.sums import Domains, ExpertSums
from switchgear.compress.surgery import check_unshared
from switchgear.integrations.blocks import expert_layers

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
