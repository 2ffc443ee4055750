# SPDX-License-Identifier: BSD-3-Clause
"""Training some experts of a model alone (expert-specialized fine-tuning, ESFT, arXiv:2407.01906).

with switchgear.RoutingTrace(model) as trace:
    for batch in sample:
        model(batch)
selection = finetune.select_experts(trace, mass=0.2)
optimizer = torch.optim.AdamW(finetune.freeze_except(model, selection))
…                                              # train as usual
finetune.save_selected(model, "experts.pt")    # these experts only
finetune.unfreeze(model)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.adapters.sites import Site, find_sites_at, guard, unguard
from switchgear.checks import Range, checked
from switchgear.files import AnyPath, load_saved, save_whole
from switchgear.layers.virtual import VirtualExperts
from switchgear.routing.router import Router
from switchgear.trace import LayerTrace, RoutingTrace
from switchgear.trace.layer import recorded
from switchgear.utils.modules import is_sharded
from switchgear.utils.packages import first_line
from switchgear.weights import Layout, layout_of, stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.form import hint_for
from switchgear.weights.selected import SUFFIX, select, selection_of, unselect
from switchgear.weights.state import get_state, set_state

__all__ = [
    "Selected",
    "freeze_except",
    "load_selected",
    "save_selected",
    "select_experts",
    "selected_experts",
    "unfreeze",
]

# ---- which experts a task uses most ----------------------------------------------------------------------------------


Selected = Mapping[str, Sequence[int]]
"""Experts by layer: the layer's name in a trace, or that of its experts module."""

MASS = {"gate": 0.1, "token": 0.2}  # the values of the paper


@checked
def select_experts(
    trace: RoutingTrace,
    mass: Annotated[float, Range(0, 1, "low")] | None = None,
    by: Literal["gate", "token"] = "token",
) -> dict[str, list[int]]:
    """For each layer the smallest set of experts whose scores add up to `mass` (ESFT, arXiv:2407.01906).

    Args:
        trace: a recording of a sample of the task; the paper uses 32 sequences of 4096 tokens.
        mass: the sum of scores to reach, in (0, 1]; by default the paper's: 0.1 by gate, 0.2 by token.
        by: the score of an expert. "token": the fraction of the choices that it serves. "gate": its mean weight over
            all tokens, 0 for those that do not choose it. Unless the router normalises, these add up to less than 1;
            a routed_scaling_factor multiplies them.

    Returns ids in ascending order, by layer; the lowest ids win ties. Where all scores add up to less than `mass`,
    these are all experts with a score.

    Raises:
        ValueError: an option out of range, an empty trace, or a layer without scores.
    """
    mass = MASS[by] if mass is None else mass
    if not trace.layers:
        raise ValueError("trace: expected one that has recorded something, got an empty one")
    return {name: _choose_fewest(name, _score_experts(layer, by), mass) for name, layer in trace.layers.items()}


def _score_experts(layer: LayerTrace, by: str) -> Tensor:
    """Each expert's share of the layer's choices, or its mean weight, [E] float64."""
    if by == "gate":
        return recorded(layer, "weight_per_expert").cpu().double() / max(layer.num_tokens, 1)
    counts = recorded(layer, "tokens_per_expert").cpu().double()
    return counts / counts.sum().clamp(min=1)


def _choose_fewest(name: str, scores: Tensor, mass: float) -> list[int]:
    if not scores.any():
        raise ValueError(f"trace: expected choices in every layer, got none in {name}")
    order = scores.argsort(descending=True, stable=True)
    reached = scores[order].cumsum(0) >= mass * (1 - 1e-12)  # the sum of all shares is 1 up to rounding
    count = int(reached.long().argmax()) + 1 if reached.any() else int((scores > 0).sum())
    return sorted(order[:count].tolist())


# ---- training them alone ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Experts of a module to train."""

    name: str  # the module's name
    module: nn.Module
    parameters: tuple[str, ...]  # projections and biases
    experts: Tensor  # [n] int32, ascending
    site: Site | None  # one of the projections; None in modules that add_lora does not know

    @property
    def paths(self) -> set[str]:
        """Of the parameters, in the model."""
        return {f"{self.name}.{parameter}" if self.name else parameter for parameter in self.parameters}


@checked
def freeze_except(model: nn.Module, selection: Selected, *, also: Iterable[str] = ()) -> list[nn.Parameter]:
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
    if any(selection_of(module) is not None for module in model.modules()):
        raise ValueError("model: expected no experts that are trained alone already; call unfreeze(model) first")
    parts = [_build_part(model, name, experts) for name, experts in selection.items()]
    _check_disjoint(model, parts)
    parts = [part for part in parts if len(part.experts)]
    kept = _find_named(model, also, parts)
    flags = [(module, _read_flags(module)) for module in model.modules()]
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
    for module, of_module in flags:  # flags of an earlier call without experts stay
        set_state(module, flags={**of_module, **get_state(module).flags})
    return [*trained, *(p for name, p in model.named_parameters() if name in kept and p.requires_grad)]


@checked
def unfreeze(model: nn.Module) -> None:
    """Undoes freeze_except, of a whole model or of a part of it: the parameters keep the trained values, and require
    gradients as before. The optimizer's state of the selected experts belongs to parameters that are gone. Does nothing
    if nothing is frozen."""
    for module in model.modules():
        if selection_of(module) is not None:
            unselect(module)
            unguard(module)
    for module in model.modules():
        _set_flags(module, get_state(module).flags)
        set_state(module, flags={})


def _read_flags(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters(recurse=False)}


def _set_flags(module: nn.Module, flags: Mapping[str, bool]) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if name in flags:
            parameter.requires_grad_(flags[name])


@checked
def selected_experts(model: nn.Module) -> dict[str, list[int]]:
    """The experts that train alone, by name of their module."""
    found = {name: (module, selection_of(module)) for name, module in model.named_modules()}
    return {name: s.experts(module).tolist() for name, (module, s) in found.items() if s is not None}


# ---- what a selection names ------------------------------------------------------------------------------------------


def _build_part(model: nn.Module, name: str, experts: Sequence[int]) -> Part:
    where, module, num_virtual = _find_experts(model, name)
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
    ids = sorted(map(operator.index, experts))
    if ids and not 0 <= ids[0] <= ids[-1] < count + num_virtual:
        raise ValueError(f"selection: expected experts 0 to {count + num_virtual - 1} of {name}, got {list(experts)}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"selection: expected each expert of {name} once, got {list(experts)}")
    ids = [expert for expert in ids if expert < count]
    biases = (f"{projection}_bias" for projection in layout.names)
    names = (*layout.names, *(bias for bias in biases if module._parameters.get(bias) is not None))
    site = next(iter(find_sites_at(where, module)), None)
    return Part(where, module, names, torch.tensor(ids, dtype=torch.int32), site)


def _find_experts(model: nn.Module, name: str) -> tuple[str, nn.Module, int]:
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


def _find_named(model: nn.Module, also: Iterable[str], parts: Sequence[Part]) -> set[str]:
    """The parameters that `also` means."""
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


_FORMAT = 1  # version of the file format


@checked
def save_selected(model: nn.Module, path: AnyPath) -> None:
    """Writes the experts that freeze_except lets train, and the parameters that train with them, with torch.save.

    Raises ValueError if no experts are trained alone.
    """
    experts: dict[str, dict[str, Tensor]] = {}
    layouts: dict[str, dict[str, bool]] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if (selection := selection_of(module)) is None:
            continue
        rows = {key: selection.trained(module, key).detach().cpu().contiguous() for key in selection.names}
        experts[name] = {"experts": selection.experts(module).cpu(), **rows}
        if (layout := layout_of(module)) is not None:
            layouts[name] = _describe_layout(layout)
        inside |= {f"{name}.{key}{SUFFIX}" if name else key + SUFFIX for key in selection.names}
    if not experts:
        raise ValueError("model: expected experts that are trained alone (freeze_except), got none")
    others = {
        name: parameter.detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in inside
    }
    save_whole(path, {"format": _FORMAT, "experts": experts, "others": others, "layouts": layouts})


@checked
def load_selected(model: nn.Module, path: AnyPath) -> dict[str, list[int]]:
    """Writes the experts of a file of save_selected into a model, whether or not it is frozen. Other experts keep their
    values. Returns the experts by name of their module.

    Raises ValueError for any other file, or one of a model of another shape or layout (transposed, interleaved), and
    OSError for none; nothing is changed.
    """
    data = _read(path)
    targets: list[tuple[nn.Parameter, Tensor | None, Tensor]] = []  # parameter, rows or None for all, values
    for name, rows in data["experts"].items():
        try:
            module, ids = model.get_submodule(name), rows["experts"]
        except AttributeError:
            raise ValueError(f"path: expected experts of this model, got those of {name}") from None
        _check_layout(module, name, data.get("layouts", {}).get(name))
        for key, values in rows.items():
            if key != "experts":
                targets.append((_find_parameter(module, name, key, ids, values), ids.long(), values))
    parameters = dict(model.named_parameters())
    for name, values in data["others"].items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise ValueError(f"path: expected parameters of this model, got {name} {list(values.shape)}")
        targets.append((parameters[name], None, values))
    chosen = [(module, selection) for module in model.modules() if (selection := selection_of(module)) is not None]
    for module, selection in chosen:
        selection.copy(module)
    with torch.no_grad():
        for parameter, index, values in targets:
            values = values.to(parameter.device, parameter.dtype)
            if index is None:
                parameter.copy_(values)
            else:
                parameter[index.to(parameter.device)] = values
    for module, selection in chosen:
        selection.reload(module)
    return {name: rows["experts"].tolist() for name, rows in data["experts"].items()}


def _describe_layout(layout: Layout) -> dict[str, bool]:
    """What shapes do not tell."""
    return {"transposed": layout.transposed, "split_gates": layout.split_gates}


def _check_layout(module: nn.Module, name: str, recorded: dict[str, bool] | None) -> None:
    """Files of earlier versions, and modules that do not run on switchgear, have no layout to compare."""
    layout = layout_of(module)
    if recorded is not None and layout is not None and recorded != _describe_layout(layout):
        raise ValueError(f"path: expected experts of {name} with {_describe_layout(layout)}, got {recorded}")


def _find_parameter(module: nn.Module, name: str, key: str, ids: Tensor, values: Tensor) -> nn.Parameter:
    """The module's parameter `key`, if it has these rows."""
    parameter = module._parameters.get(key)
    if parameter is None:
        raise ValueError(f"path: expected parameters of this model, got {name}.{key}")
    if values.shape != (len(ids), *parameter.shape[1:]) or (len(ids) and int(ids.max()) >= parameter.shape[0]):
        shape, got = list(parameter.shape), list(values.shape)
        raise ValueError(f"path: expected experts of {name}.{key} {shape}, got {got} for experts {ids.tolist()}")
    return parameter


def _read(path: AnyPath) -> Any:
    try:
        data = load_saved(path)
        if data["format"] != _FORMAT:
            raise ValueError("another format")
        weights = list(data["others"].values())
        for rows in data["experts"].values():
            ids = rows["experts"]
            if ids.dtype != torch.int32 or ids.dim() != 1 or bool((ids < 0).any()):
                raise ValueError("experts that are not ids")
            weights += [values for values in rows.values() if values is not ids]
        if not all(values.is_floating_point() for values in weights):
            raise ValueError("tensors that are no weights")
        if not all(isinstance(value, bool) for each in data.get("layouts", {}).values() for value in each.values()):
            raise ValueError("invalid layouts")
        return data
    except OSError:
        raise
    except Exception as error:  # entries may be of any type
        raise ValueError(f"path: expected a file of save_selected, got {path} ({first_line(error)})") from error
