# SPDX-License-Identifier: BSD-3-Clause
"""The levels of a layer's projections, each expert with its own number of bits, and the checks of what they need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from switchgear.complaints import integer
from switchgear.compress.calibration import Calibration, check_calibration, check_finite
from switchgear.compress.gptq import Levels, decoded, gptq, rounded
from switchgear.compress.layer import ExpertLayer
from switchgear.compress.sums import Hessians
from switchgear.reference import check_size
from switchgear.weights.groups import Groups

METHODS = ("rtn", "gptq")
Bits = int | Mapping[str, int | Sequence[int]]
_TOGETHER = 8  # experts: bounds the memory of float32 copies and factors


def widths_of(layer: ExpertLayer, bits: Bits, most: int) -> list[int]:
    given = bits[layer.name] if isinstance(bits, Mapping) else bits
    if isinstance(given, str) or not isinstance(given, (Integral, Sequence)):
        raise TypeError(f"bits: expected int, or a list of them, got {type(given).__name__}")
    each = given if isinstance(given, Sequence) else [given] * layer.num_experts
    widths = [integer("bits", width) for width in each]
    if len(widths) != layer.num_experts:
        raise ValueError(f"bits: expected {layer.num_experts} numbers for {layer.name}, got {len(widths)}")
    for width in widths:
        check_size("bits", width)
        if width > most:
            more = "; up to 8 with store=False, or switchgear.store(model, 'int8')" if most == 4 else ""
            raise ValueError(f"bits: expected 1 to {most}, got {width}{more}")
    return widths


def hessians_of(
    model: nn.Module, layers: Mapping[str, ExpertLayer], method: str, calibration: Calibration | None
) -> dict[str, Hessians]:
    if calibration is None:
        if method == "gptq":
            raise ValueError("calibration: expected one with hessians=True for method='gptq', got None")
        return {}
    check_calibration(calibration, model, layers)
    found = {}
    for name in layers:
        hessians = calibration.layers[name].hessians
        if hessians is not None:
            check_finite(name, hessians.inputs, hessians.hidden)
            found[name] = hessians
        elif method == "gptq":
            raise ValueError(f"calibration: expected one with hessians=True, got none of {name}")
    return found


def starved_experts(layer: ExpertLayer, calibration: Calibration | None, min_tokens: int) -> list[int]:
    assert calibration is not None
    counts = calibration.layers[layer.name].sums().counts
    return (counts < max(min_tokens, 1)).nonzero().flatten().tolist()


def quantized_projection(
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
            found[expert] = width, rounded(one, width, form.group_size, form.symmetric)
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


def plain_projection(layer: ExpertLayer, index: int, found: Sequence[tuple[int, Levels]], form: Groups) -> Tensor:
    values = [decoded(levels, width, form.group_size) for width, levels in found]
    return torch.cat(values).to(layer.projection(index).dtype)
