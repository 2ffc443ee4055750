# SPDX-License-Identifier: BSD-3-Clause
"""expert_errors: what each layer's output loses if one expert alone is quantized."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from switchgear.complaints import check_module
from switchgear.compress.bits import ExpertErrors, as_widths
from switchgear.compress.calibration import Calibration, check_calibration, check_finite
from switchgear.compress.layer import expert_layers
from switchgear.compress.levels import (
    METHODS,
    hessians_of,
    plain_projection,
    quantized_projection,
    starved_experts,
    widths_of,
)
from switchgear.compress.sums import Domains
from switchgear.reference import check_choice
from switchgear.weights.groups import Groups


@torch.no_grad()
def expert_errors(
    model: nn.Module,
    calibration: Calibration,
    bits: Sequence[int] = (1, 2, 3),
    *,
    group_size: int = 128,
    method: str = "rtn",
    symmetric: bool = True,
    domains: Domains = None,
    layers: Collection[str] | None = None,
) -> ExpertErrors:
    """What each layer's output loses if one expert alone is quantized: ‖F(x) − F'(x)‖ over the calibration's sample,
    for each expert and width (MC-MoE, arXiv:2410.06270, eq. 3). For `allocate_bits`.

    Args:
        bits: the widths to try, each 1 to 8, in any order.
        group_size, method, symmetric: as for `quantize`. The paper's code rounds asymmetrically by default.
        domains: those of the calibration to take the sample from; by default all.
        layers: names of blocks; by default all.

    Returns:
        ExpertErrors, whose errors [E,B] float64, by layer, have a column per width, ascending.

    Raises ValueError for a calibration of another model, or without a sample (or Hessians, for method="gptq").
    """
    check_module("model", model)
    check_choice("method", method, METHODS)
    bits = sorted(set(as_widths(bits)))
    form = Groups(4, group_size, symmetric)
    parts = expert_layers(model, layers)
    check_calibration(calibration, model, parts, domains)
    hessians = hessians_of(model, parts, method, calibration)
    result = ExpertErrors(tuple(bits), {}, {}, {})
    for name, layer in parts.items():
        for width in bits:
            widths_of(layer, width, 8)
        known = calibration.layers[name]
        sample, sums = known.sample(domains), known.sums(domains)
        if sample is None:
            raise ValueError(f"calibration: expected a sample of tokens of {name}, got none (samples=0)")
        check_finite(name, sample.x, sample.topk_weights, sums.weights)
        device = layer.projection(0).device
        rows = layer.rows(sample.x.to(device), sample.topk_ids.to(device), sample.topk_weights.to(device))
        few = starved_experts(layer, calibration, 1) if method == "gptq" else []
        columns = []
        for width in bits:
            widths = [width] * layer.num_experts
            weights = []
            for index in (0, 1):
                levels = quantized_projection(layer, index, widths, form, hessians.get(name), method, few)
                weights.append(plain_projection(layer, index, levels, form))
            _, outputs = layer.apply(rows.inputs, rows.offsets, *weights)
            change = ((outputs.double() - rows.outputs.double()) * rows.weights[:, None]).square().sum(1)
            total = change.new_zeros(layer.num_experts).index_add_(0, rows.experts, change)
            columns.append(total.sqrt().cpu())
        tokens = sums.tokens.clamp(min=1).double()
        result.errors[name] = torch.stack(columns, 1)
        result.frequencies[name] = sums.counts.double() / tokens
        result.weights[name] = sums.weights / tokens
    return result
