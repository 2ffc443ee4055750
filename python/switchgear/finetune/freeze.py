# SPDX-License-Identifier: BSD-3-Clause
"""freeze_except and unfreeze: some experts of a model train, all else is frozen."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchgear.adapters.sites import Site, guard, sites_at, unguard
from switchgear.complaints import check_module, list_of_names
from switchgear.finetune.scores import Selected
from switchgear.layers.virtual import VirtualExperts
from switchgear.routing.router import Router
from switchgear.utils.sharded import is_sharded
from switchgear.weights import layout_of, stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.form import hint_for
from switchgear.weights.selected import select, selection_of, unselect


class Part(NamedTuple):
    """Experts of a module to train."""

    name: str  # of the module
    module: nn.Module
    parameters: tuple[str, ...]  # projections and biases
    experts: Tensor  # [n] int32, ascending
    site: Site | None  # of one of the projections; None in modules that add_lora does not know

    @property
    def paths(self) -> set[str]:
        """Of the parameters, in the model."""
        return {f"{self.name}.{parameter}" if self.name else parameter for parameter in self.parameters}


def freeze_except(model: nn.Module, selection: Selected, *, also: Collection[str] = ()) -> list[nn.Parameter]:
    """Freezes the model except the selected experts, and returns the parameters that train.

    The matrices and biases of a layer's selected experts become parameters <name>_selected [n,…] next to the frozen
    <name> [E,…]. Gradients, optimizer state and weight decay exist for them only, and no others are computed. Outputs
    do not change. State dicts keep their keys and hold the trained values; they load as before. torch.compile breaks
    its graph once per such layer. FSDP is refused at the first forward, DistributedDataParallel works.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).
        selection: experts by layer, as of select_experts: {"layers.0.gate": [3, 17]}. The name of a router, of an MoE
            or of the module of experts. Layers that are not named are frozen, and so are virtual experts.
        also: names of modules and parameters that train as before, for example routers. Of a module around selected
            experts, all else trains.

    `unfreeze` undoes it. A Hugging Face model must run on switchgear until then: other implementations of its experts
    raise RuntimeError.

    Raises:
        ValueError: an unknown name, experts out of range or listed twice; experts that are stored in another form,
            distributed over processes, sharded, or shared by two modules; a model with selected experts already; a name
            in `also` of selected experts alone. The message names the layer, and nothing is changed.
    """
    check_module("model", model)
    if not isinstance(selection, Mapping):
        raise TypeError(f"selection: expected a dict of experts by layer, got {type(selection).__name__}")
    if any(selection_of(module) is not None for module in model.modules()):
        raise ValueError("model: expected no experts that are trained alone already; call unfreeze(model) first")
    parts = [_part(model, name, experts) for name, experts in selection.items()]
    _check_disjoint(model, parts)
    parts = [part for part in parts if len(part.experts)]
    kept = _named(model, also, parts)
    flags = [(module, _flags(module)) for module in model.modules()]
    done: list[nn.Module] = []
    trained: list[nn.Parameter] = []
    try:
        for part in parts:
            trained += select(part.module, part.parameters, part.experts)  # allocates, so it may fail
            done.append(part.module)
    except BaseException:
        for module in done:
            unselect(module)
        for module, of_module in flags:
            _set_flags(module, of_module)
        raise
    for part in parts:
        if part.site is not None:
            guard(part.site)
    new = set(map(id, trained))
    for name, parameter in model.named_parameters():
        if id(parameter) not in new and name not in kept:
            parameter.requires_grad_(False)
            parameter.grad = None
    for module, of_module in flags:  # those of an earlier call, without experts, stay
        vars(module)["_switchgear_flags"] = {**of_module, **vars(module).get("_switchgear_flags", {})}
    return [*trained, *(p for name, p in model.named_parameters() if name in kept and p.requires_grad)]


def unfreeze(model: nn.Module) -> None:
    """Undoes freeze_except, of a whole model or of a part of it: the parameters keep the trained values, and require
    gradients as before. The optimizer's state of the selected experts belongs to parameters that are gone. Does nothing
    if nothing is frozen."""
    check_module("model", model)
    for module in model.modules():
        if selection_of(module) is not None:
            unselect(module)
            unguard(module)
    for module in model.modules():
        _set_flags(module, vars(module).pop("_switchgear_flags", {}))


def _flags(module: nn.Module) -> dict[str, bool]:
    """Which of a module's own parameters require gradients."""
    return {name: parameter.requires_grad for name, parameter in module.named_parameters(recurse=False)}


def _set_flags(module: nn.Module, flags: Mapping[str, bool]) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if name in flags:
            parameter.requires_grad_(flags[name])


def selected_experts(model: nn.Module) -> dict[str, list[int]]:
    """The experts that train alone, by name of their module."""
    check_module("model", model)
    found = {name: (module, selection_of(module)) for name, module in model.named_modules()}
    return {name: s.experts(module).tolist() for name, (module, s) in found.items() if s is not None}


# ---- what a selection names ------------------------------------------------------------------------------------------


def _part(model: nn.Module, name: str, experts: Sequence[int]) -> Part:
    where, module, num_virtual = _experts_named(model, name)
    layout = layout_of(module)
    assert layout is not None
    if (stored := stored_of(module)) is not None:
        raise ValueError(f"selection: expected plain weights in {where}, got {stored.form}; {stored.form.remedy}")
    if (parallel := getattr(module, "parallel", None)) is not None:
        raise ValueError(f"selection: expected all experts of {where} in this process, got those of {parallel}")
    if adapters_of(module):
        raise ValueError(f"selection: expected experts without adapters in {where}")
    for projection in layout.names:
        if is_sharded(module, module._parameters.get(projection)):
            raise ValueError(f"selection: expected whole parameters, got {where}.{projection}, which FSDP shards")
        if type(module._parameters.get(projection)) is not nn.Parameter:
            raise ValueError(f"selection: expected a plain parameter {where}.{projection}, got none")
    count = module._parameters[layout.names[0]].shape[0]  # type: ignore[union-attr]
    ids = sorted(_ids(name, experts))
    if ids and not 0 <= ids[0] <= ids[-1] < count + num_virtual:
        raise ValueError(f"selection: expected experts 0 to {count + num_virtual - 1} of {name}, got {list(experts)}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"selection: expected each expert of {name} once, got {list(experts)}")
    ids = [expert for expert in ids if expert < count]
    biases = (f"{projection}_bias" for projection in layout.names)
    names = (*layout.names, *(bias for bias in biases if module._parameters.get(bias) is not None))
    site = next(iter(sites_at(where, module)), None)
    return Part(where, module, names, torch.tensor(ids, dtype=torch.int32), site)


def _ids(name: str, experts: Sequence[int]) -> list[int]:
    try:
        return [operator.index(expert) for expert in experts]
    except TypeError:
        raise TypeError(f"selection: expected a list of integers for {name}, got {experts!r}") from None


def _experts_named(model: nn.Module, name: str) -> tuple[str, nn.Module, int]:
    """The module of experts that a name of a router, of an MoE or of the experts means, its name, and how many virtual
    experts follow them."""
    where = name
    try:
        if isinstance(model.get_submodule(name), Router):
            where = name.rpartition(".")[0]
        module = model.get_submodule(where)
    except AttributeError:
        raise ValueError(f"selection: expected names of layers with experts, got {name!r}") from None
    num_virtual = 0
    while layout_of(module) is None and isinstance(inner := getattr(module, "experts", None), nn.Module):
        num_virtual = module.num_experts - module.num_real if isinstance(module, VirtualExperts) else 0
        module, where = inner, f"{where}.experts" if where else "experts"
    if layout_of(module) is not None:
        return where, module, num_virtual
    hint = hint_for(model)
    raise ValueError(f"selection: expected layers whose experts run on the fused kernel, got {name!r} ({hint})")


def _check_disjoint(model: nn.Module, parts: list[Part]) -> None:
    owners: dict[int, str] = {}
    for part in parts:
        for name in part.parameters:
            other = owners.setdefault(id(getattr(part.module, name)), part.name)
            if other != part.name or [p.name for p in parts].count(part.name) > 1:
                raise ValueError(f"selection: expected each layer's experts once, got those of {part.name} twice")
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and owners.get(id(parameter), name) != name:
                raise ValueError(
                    f"selection: expected experts of one module, got {name} sharing those of {owners[id(parameter)]}"
                )


def _named(model: nn.Module, also: Collection[str], parts: Sequence[Part]) -> set[str]:
    """The parameters that `also` means."""
    if isinstance(also, str):
        raise TypeError(f"also: expected a list of names, got {also!r}")
    also = list_of_names("also", also)
    names = [name for name, _ in model.named_parameters()]
    selected: set[str] = set().union(*(part.paths for part in parts))
    kept: set[str] = set()
    for prefix in also:
        found = {name for name in names if name == prefix or name.startswith(f"{prefix}.")}
        if not found:
            raise ValueError(f"also: expected names of modules or parameters, got {prefix!r}")
        if found <= selected:
            raise ValueError(f"also: expected parameters other than selected experts, got those of {prefix!r}")
        kept |= found - selected
    return kept
