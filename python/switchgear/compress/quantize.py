# SPDX-License-Identifier: BSD-3-Clause
"""quantize: experts of 1 to 4 bits, each with its own number, by rounding or GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Count, NotNegative, checked
from switchgear.compress.bits import BitAllocation, packed_bytes
from switchgear.compress.calibration import Calibration
from switchgear.compress.levels import (
    Bits,
    Levels,
    Method,
    choose_form,
    decode,
    find_hessians,
    find_starved,
    quantize_projection,
    read_widths,
    sum_row_errors,
)
from switchgear.compress.sums import Hessians
from switchgear.integrations.blocks import ExpertLayer, expert_layers
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.reference import groups
from switchgear.weights.form import hint_for, layout_of
from switchgear.weights.integers import Groups, weight_of
from switchgear.weights.module import Tie, stored_of
from switchgear.weights.store import StoredChange, Target, commit_all, memory_of
from switchgear.weights.weight import Weight


@dataclass(frozen=True)
class QuantizedLayer:
    """What was done to a layer."""

    name: str
    bits: list[int]  # each expert's
    rounded: list[int]  # experts that method="gptq" rounded to nearest, since they got too few tokens
    errors: list[float]  # ‖W − Q‖ / ‖W‖ of each expert
    output_errors: list[float] | None  # ‖X (W − Q)ᵀ‖ / ‖X Wᵀ‖ of each, if there are Hessians


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`."""

    method: str
    layers: dict[str, QuantizedLayer]
    stored: bool  # whether in the form "groups"; else the parameters have the rounded values
    bytes_before: int  # the projections'
    bytes_after: int  # packed, with scales

    @property
    def average_bits(self) -> float:
        """Bits per weight, scales not counted."""
        widths = [bits for layer in self.layers.values() for bits in layer.bits]
        return sum(widths) / len(widths)

    @property
    def starved(self) -> dict[str, list[int]]:
        """Experts by layer that GPTQ could not calibrate."""
        return {name: layer.rounded for name, layer in self.layers.items() if layer.rounded}

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        starved = sum(map(len, self.starved.values()))
        note = f"; {starved} experts got too few tokens and were rounded to nearest" if starved else ""
        sizes = f"{self.bytes_before / 1e6:,.1f} -> {self.bytes_after / 1e6:,.1f} MB"
        return f"{len(self.layers)} layers at {self.average_bits:.2f} bits by {self.method}: {sizes}{note}"


@checked
@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: Bits = 4,
    *,
    group_size: int = 128,
    method: Method = "rtn",
    calibration: Calibration | None = None,
    symmetric: bool = True,
    store: bool = True,
    damping: NotNegative = 0.01,
    act_order: bool = False,
    min_tokens: Count = 32,
) -> Quantized:
    """Quantizes the experts of a model to few bits, in place; on failure nothing is changed.

        calibration = compress.calibrate(model, batches, hessians=True)
        switchgear.accelerate(model)
        print(compress.quantize(model, 3, method="gptq", calibration=calibration))

    Args:
        model: has MoE layers of switchgear or Hugging Face.
        bits: 1 to 4, of all experts or by layer; or a list by layer, a number per expert (allocate_bits). Layers that
            are not named stay as they are.
        group_size: columns that share a float16 scale: a multiple of 32, or 0 for the whole row.
        method: "rtn" rounds to nearest. "gptq" rounds such that the outputs on the calibration data change least
            (arXiv:2210.17323); an expert's error there is never larger than with "rtn".
        calibration: of this model, with hessians=True, for "gptq".
        symmetric: levels around zero; otherwise each group has a zero point, too.
        store: store the experts in the form "groups", which the kernels read; switchgear.restore(model) decodes them.
            False: write the rounded values into the parameters, for a checkpoint as large as before. Up to 8 bits.
        damping, act_order: of GPTQ; see `gptq`.
        min_tokens: an expert with fewer tokens in the calibration is rounded to nearest; `starved` says which.

    Layers that share parameters still share them, by "rtn" and with the same bits.

    Raises:
        ValueError: an option out of range, a calibration of another model or without Hessians, experts that cannot be
            stored, or that share parameters and would get different values; the message names the layer.
    """
    form = choose_form(bits, group_size, symmetric, store)
    layers = expert_layers(model, bits if isinstance(bits, Mapping) else None, "bits")
    widths = {name: read_widths(layer, bits) for name, layer in layers.items()}
    _check_ties(model, layers, widths, method)
    hessians = find_hessians(model, layers, method, calibration)
    targets = _find_targets(model, layers) if store else {}
    done: dict[str, QuantizedLayer] = {}
    changes: list[StoredChange] = []
    values: list[tuple[Tensor, list[int], list[Levels]]] = []
    before: dict[tuple[object, ...], int] = {}
    after: dict[tuple[object, ...], int] = {}
    change_of = _make_changes(form)
    for name, layer in layers.items():
        few = find_starved(layer, calibration, min_tokens) if method == "gptq" else []
        found = [
            quantize_projection(layer, index, widths[name], form, hessians.get(name), method, few, damping, act_order)
            for index in (0, 1)
        ]
        done[name] = _report(layer, widths[name], few, found, hessians.get(name), form)
        projections = [layer.projection(index) for index in (0, 1)]
        before |= {memory_of(weight): weight.nbytes for weight in projections}
        if store:
            changes.append(change_of(targets[name], layer, widths[name], found))
            after |= changes[-1].bytes_after
        else:
            for weight in projections:
                _, rows, columns = weight.shape
                sizes = (packed_bytes(rows, columns, own, group_size, not symmetric) for own in widths[name])
                after[memory_of(weight)] = sum(sizes)
            values += [(weight, widths[name], levels) for weight, levels in zip(projections, found, strict=True)]
    commit_all(changes)
    for weight, each, experts in values:
        for expert, (width, levels) in enumerate(zip(each, experts, strict=True)):
            weight[expert] = decode(levels, width, group_size)[0].to(weight.dtype)
    return Quantized(method, done, store, sum(before.values()), sum(after.values()))


# ---- what is quantized -----------------------------------------------------------------------------------------------


def _find_targets(model: nn.Module, layers: Mapping[str, ExpertLayer]) -> dict[str, Target]:
    targets = {}
    for name, layer in layers.items():
        layout = layout_of(layer.experts)
        if layout is None:
            raise ValueError(
                f"store: expected False for {name}, whose experts do not run on the fused kernel ({hint_for(model)})"
            )
        targets[name] = Target(f"model.{name}", layer.experts, layout)
    return targets


def _check_ties(
    model: nn.Module, layers: Mapping[str, ExpertLayer], widths: Mapping[str, Sequence[int]], method: str
) -> None:
    """Raises ValueError for a parameter that is in several places and would get different values there."""
    places: list[tuple[str, nn.Module, str, Any]] = []  # (name of a module, the module, key, what its levels depend on)
    for name, layer in layers.items():
        levels = (widths[name], name if method == "gptq" else None)
        places += [(name, parameter.module, parameter.name, levels) for parameter in layer.parameters]
    mine = {(module, key) for _, module, key, _ in places}
    for name, module in model.named_modules():
        places += [(name, module, key, None) for key in module._parameters if (module, key) not in mine]
    seen: dict[tuple[object, ...], tuple[str, Any]] = {}
    for name, module, key, levels in places:
        parameter = module._parameters[key]
        if type(parameter) is not nn.Parameter:
            continue  # absent, or of another library and no expert
        first, wanted = seen.setdefault(memory_of(parameter), (name, levels))
        if wanted != levels:
            why = "method='gptq' rounds each layer for itself" if method == "gptq" else "give both the same bits"
            raise ValueError(f"model: expected {key} of its own for {name}, got one shared with {first}; {why}")


# ---- a layer ---------------------------------------------------------------------------------------------------------


def _report(
    layer: ExpertLayer,
    widths: list[int],
    few: list[int],
    found: Sequence[Sequence[Levels]],
    hessians: Hessians | None,
    form: Groups,
) -> QuantizedLayer:
    errors, outputs = [], []
    for expert in range(layer.num_experts):
        lost = whole = lost_output = whole_output = 0.0
        for index in (0, 1):
            weight = layer.projection(index)[expert].float()
            difference = weight - decode(found[index][expert], widths[expert], form.group_size)[0]
            lost, whole = lost + float(difference.square().sum()), whole + float(weight.square().sum())
            if hessians is not None:
                hessian = (hessians.inputs, hessians.hidden)[index][expert].to(weight.device)
                lost_output += float(sum_row_errors(difference[None], hessian[None]).sum())
                whole_output += float(sum_row_errors(weight[None], hessian[None]).sum())
        errors.append((lost / max(whole, 1e-30)) ** 0.5)
        outputs.append((max(lost_output, 0.0) / max(whole_output, 1e-30)) ** 0.5)
    return QuantizedLayer(layer.name, widths, few, errors, outputs if hessians is not None else None)


def _make_changes(form: Groups) -> Callable[..., StoredChange]:
    """Returns a function that makes the change of a layer. Layers that share parameters share their weights."""
    weights: dict[tuple[object, ...], Weight] = {}
    ties: dict[int, Tie] = {}

    def change_of(
        target: Target, layer: ExpertLayer, widths: Sequence[int], found: Sequence[Sequence[Levels]]
    ) -> StoredChange:
        chosen = []
        for index in (0, 1):
            plain, parts = layer.projection(index), target.layout.parts(index)
            key = (*memory_of(plain), parts)
            if key not in weights:
                q, scales, zeros = map(torch.cat, zip(*found[index], strict=True))
                levels = groups.Levels(q, scales, None if form.symmetric else zeros, tuple(widths))
                weights[key] = weight_of(levels, plain.dtype, form.group_size, parts=parts)
            chosen.append(weights[key])
        bits = widths[0] if len(set(widths)) == 1 else tuple(widths)
        own = Groups(bits, form.group_size, form.symmetric)
        return StoredChange(target, own, (chosen[0], chosen[1]), ties)

    return change_of


def bits_of(model: nn.Module) -> BitAllocation:
    """The bits of a model's experts that are stored as groups, by layer."""
    found = {}
    for name, block in moe_blocks(model).items():
        stored = stored_of(block.experts)
        if stored is not None and isinstance(stored.form, Groups):
            found[name] = list(stored.form.bits_of(block.num_experts))
    return BitAllocation(found)
