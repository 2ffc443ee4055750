# SPDX-License-Identifier: BSD-3-Clause
"""The levels of a layer's projections, each expert with its own number of bits, the checks of what they need, and
expert_errors: what each layer's output loses if one expert alone is quantized."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import NotEmpty, Range, checked
from switchgear.compress.bits import ExpertErrors
from switchgear.compress.calibration import Calibration, check_finite
from switchgear.compress.gptq import Levels, decode, gptq, round_to_nearest
from switchgear.compress.sums import Domains, Hessians
from switchgear.integrations.blocks import ExpertLayer, expert_layers
from switchgear.weights.groups import Groups

Method = Literal["rtn", "gptq"]
Width = Annotated[int, Range(1, 8)]
Widths = Annotated[Sequence[Width], NotEmpty]
Bits = Width | Mapping[str, Width | Sequence[Width]] | Sequence[Width]
_TOGETHER = 8  # experts: bounds the memory of float32 copies and factors


def choose_form(bits: Bits, group_size: int, symmetric: bool, store: bool) -> Groups:
    """The form of the levels. Raises ValueError for a group size that it does not have, and for more bits than it has
    if they are to be stored."""
    given = list(bits.values()) if isinstance(bits, Mapping) else [bits]
    most = max((width for each in given for width in (each if isinstance(each, Sequence) else [each])), default=0)
    if store and most > 4:
        more = "up to 8 with store=False, or switchgear.store(model, 'int8')"
        raise ValueError(f"bits: expected 1 to 4, got {most}; {more}")
    return Groups(4, group_size, symmetric)


def read_widths(layer: ExpertLayer, bits: Bits) -> list[int]:
    """Bits of each expert of a layer."""
    given = bits[layer.name] if isinstance(bits, Mapping) else bits
    widths = list(given) if isinstance(given, Sequence) else [given] * layer.num_experts
    if len(widths) != layer.num_experts:
        raise ValueError(f"bits: expected {layer.num_experts} numbers for {layer.name}, got {len(widths)}")
    return [int(width) for width in widths]


def find_hessians(
    model: nn.Module, layers: Mapping[str, ExpertLayer], method: str, calibration: Calibration | None
) -> dict[str, Hessians]:
    if calibration is None:
        if method == "gptq":
            raise ValueError("calibration: expected one with hessians=True for method='gptq', got None")
        return {}
    calibration.check(model, layers)
    found = {}
    for name in layers:
        hessians = calibration.layers[name].hessians
        if hessians is not None:
            check_finite(name, hessians.inputs, hessians.hidden)
            found[name] = hessians
        elif method == "gptq":
            raise ValueError(f"calibration: expected one with hessians=True, got none of {name}")
    return found


def find_starved(layer: ExpertLayer, calibration: Calibration | None, min_tokens: int) -> list[int]:
    assert calibration is not None
    counts = calibration.layers[layer.name].sums().counts
    return (counts < max(min_tokens, 1)).nonzero().flatten().tolist()


def quantize_projection(
    layer: ExpertLayer,
    index: int,
    widths: Sequence[int],
    form: Groups,
    hessians: Hessians | None,
    method: str,
    few: Collection[int],
    damping: float = 0.01,
    act_order: bool = False,
) -> list[tuple[int, Levels]]:
    """(bits, levels [1,N,C]) of each expert. Experts of one width are quantized together, a few at a time."""
    weight = layer.projection(index)
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{layer.name}: expected finite weights, got NaN or infinities")
    found: dict[int, tuple[int, Levels]] = {}
    for width in sorted(set(widths)):
        mine = [expert for expert, bits in enumerate(widths) if bits == width]
        for expert in mine if method == "rtn" else [e for e in mine if e in few]:
            one = weight[expert : expert + 1].contiguous()
            found[expert] = width, round_to_nearest(one, width, form.group_size, form.symmetric)
        rest = [expert for expert in mine if expert not in found]
        for some in (rest[at : at + _TOGETHER] for at in range(0, len(rest), _TOGETHER)):
            assert hessians is not None
            matrices = (hessians.inputs, hessians.hidden)[index][some].to(weight.device)
            levels = gptq(
                weight[some], matrices, width, form.group_size,
                symmetric=form.symmetric, damping=damping, act_order=act_order,
            )  # fmt: skip
            for at, expert in enumerate(some):
                found[expert] = width, Levels(*(tensor[at : at + 1] for tensor in levels))
    return [found[expert] for expert in range(len(widths))]


def decode_projection(layer: ExpertLayer, index: int, found: Sequence[tuple[int, Levels]], form: Groups) -> Tensor:
    values = [decode(levels, width, form.group_size) for width, levels in found]
    return torch.cat(values).to(layer.projection(index).dtype)


# ---- expert_errors ---------------------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def expert_errors(
    model: nn.Module,
    calibration: Calibration,
    bits: Widths = (1, 2, 3),
    *,
    group_size: int = 128,
    method: Method = "rtn",
    symmetric: bool = True,
    domains: Domains = None,
    layers: Collection[str] | None = None,
) -> ExpertErrors:
    """What each layer's output loses if one expert alone is quantized: ‖F(x) − F'(x)‖ over the calibration's sample,
    for each expert and width (MC-MoE, arXiv:2410.06270, eq. 3). For `allocate_bits`.

    Args:
        bits: the widths to try, each 1 to 8, in any order.
        group_size, method, symmetric: as for `quantize`. The paper's code rounds asymmetrically by default.
        domains: where the calibration's sample is taken from; by default all.
        layers: names of blocks; by default all.

    Returns:
        ExpertErrors, whose errors [E,B] float64, by layer, have a column per width, ascending.

    Raises ValueError for a calibration of another model, or without a sample (or Hessians, for method="gptq").
    """
    bits = sorted(set(bits))
    form = Groups(4, group_size, symmetric)
    parts = expert_layers(model, layers)
    calibration.check(model, parts, domains)
    hessians = find_hessians(model, parts, method, calibration)
    result = ExpertErrors(tuple(bits), {}, {}, {})
    for name, layer in parts.items():
        known = calibration.layers[name]
        sample, sums = known.sample(domains), known.sums(domains)
        if sample is None:
            raise ValueError(f"calibration: expected a sample of tokens of {name}, got none (samples=0)")
        check_finite(name, sample.x, sample.topk_weights, sums.weights)
        device = layer.projection(0).device
        rows = layer.rows(sample.x.to(device), sample.topk_ids.to(device), sample.topk_weights.to(device))
        few = find_starved(layer, calibration, 1) if method == "gptq" else []
        columns = []
        for width in bits:
            widths = [width] * layer.num_experts
            weights = []
            for index in (0, 1):
                levels = quantize_projection(layer, index, widths, form, hessians.get(name), method, few)
                weights.append(decode_projection(layer, index, levels, form))
            _, outputs = layer.apply(rows.inputs, rows.offsets, *weights)
            change = ((outputs.double() - rows.outputs.double()) * rows.weights[:, None]).square().sum(1)
            total = change.new_zeros(layer.num_experts).index_add_(0, rows.experts, change)
            columns.append(total.sqrt().cpu())
        tokens = sums.tokens.clamp(min=1).double()
        result.errors[name] = torch.stack(columns, 1)
        result.frequencies[name] = sums.counts.double() / tokens
        result.weights[name] = sums.weights / tokens
    return result
