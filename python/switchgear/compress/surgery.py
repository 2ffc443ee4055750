# SPDX-License-Identifier: BSD-3-Clause
"""Changes the number of experts of a model's blocks: their weights, the router, attributes and the config."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.experts import Experts
from switchgear.integrations.blocks import ExpertLayer, ExpertTensor, expert_layers, expert_tensors, router_tensors
from switchgear.integrations.choices import watch_choices
from switchgear.integrations.hook_points import Choice
from switchgear.integrations.moe_blocks import MoeBlock
from switchgear.routing.router import Router
from switchgear.utils.modules import set_eval
from switchgear.weights import advise_huge_pages
from switchgear.weights.store import memory_of

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
NO_EXPERT = -1  # stands among the experts to keep for a place that no token gets


NewTensors = list[tuple[ExpertTensor, Tensor]]  # what `put` will replace, and by what


class Cut(NamedTuple):
    """New tensors of a block with `num_experts` experts. Nothing of the model is changed before `commit`."""

    layer: ExpertLayer
    num_experts: int
    tensors: NewTensors


# ---- layers ----------------------------------------------------------------------------------------------------------


def find_layers(
    model: nn.Module, names: Collection[str] | None = None, argument: str = "layers"
) -> dict[str, ExpertLayer]:
    """As `expert_layers`. Raises ValueError for experts or routers whose number cannot change; it names the block."""
    layers = expert_layers(model, names, argument)
    for layer in layers.values():
        if layer.block.is_ours and type(layer.block.experts) is not Experts:
            raise ValueError(f"{layer.name}: expected switchgear.Experts, got {type(layer.block.experts).__name__}")
    check_unshared(model, expert_tensors(layers.values()))
    return layers


def check_unshared(model: nn.Module, tensors: Iterable[ExpertTensor]) -> None:
    """Raises ValueError for parameters that are elsewhere, too: blocks may lose different experts or weights."""
    mine = {_identify_memory(tensor.value) for tensor in tensors}
    seen: dict[object, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(_identify_memory(parameter), name)
        if first != name and _identify_memory(parameter) in mine:
            raise ValueError(f"model: expected parameters of one block, got {name} shared with {first}")


def _identify_memory(tensor: Tensor) -> object:
    return id(tensor) if tensor.is_meta or type(tensor) is not nn.Parameter else memory_of(tensor)


# ---- changes ---------------------------------------------------------------------------------------------------------


def select_experts(tensor: Tensor, dim: int, keep: Sequence[int], fill: float = 0.0) -> Tensor:
    """The entries `keep` of a dimension, with `fill` for NO_EXPERT."""
    index = torch.tensor([max(expert, 0) for expert in keep], device=tensor.device)
    result = tensor.index_select(dim, index)
    missing = torch.tensor([expert == NO_EXPERT for expert in keep], device=tensor.device)
    if bool(missing.any()):
        shape = [1] * tensor.dim()
        shape[dim] = len(keep)
        result = result.masked_fill(missing.view(shape), fill)
    return result


def cut_router(block: MoeBlock, keep: Sequence[int]) -> NewTensors:
    """The router's tensors for the experts `keep`."""
    places = router_tensors(block)
    if NO_EXPERT not in keep:
        return [(place, select_experts(place.tensor, place.dim, keep)) for place in places]
    biases = [place for place in places if place.name == "bias" or place.name.endswith(("_bias", "_biases"))]
    if not biases:
        raise ValueError(
            f"{block.name or 'model'}: expected equal numbers of experts in all layers, since a "
            f"{type(block.gate).__name__} without a bias cannot leave places empty; use scope='layer'"
        )
    return [
        (place, select_experts(place.tensor, place.dim, keep, _never(place.tensor) if place in biases else 0.0))
        for place in places
    ]


def _never(bias: Tensor) -> float:
    """A bias so low that no score outweighs it, and finite, in its dtype."""
    return -3e4 if bias.dtype is torch.float16 else -1e30


def cut_experts(layer: ExpertLayer, keep: Sequence[int]) -> NewTensors:
    """The experts' tensors for the experts `keep`, with zeros for NO_EXPERT."""

    def rows(tensor: Tensor) -> Tensor:
        result = tensor.new_empty(len(keep), *tensor.shape[1:])
        advise_huge_pages(result)
        for index, expert in enumerate(keep):
            result[index] = 0 if expert == NO_EXPERT else tensor[expert]
        return result

    return [(place, rows(place.tensor)) for place in layer.tensors()]


def commit(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Applies the cuts to a model; they have all been computed. Configs of Hugging Face follow. Raises ValueError, and
    nothing is changed, if they cannot."""
    old, count = cuts[0].layer.block.num_experts, cuts[0].num_experts
    is_changed = any(cut.num_experts != cut.layer.num_experts for cut in cuts)
    fields = _find_config_fields(model, cuts) if is_changed and not cuts[0].layer.block.is_ours else []
    for cut in cuts:
        for place, tensor in cut.tensors:
            place.put(tensor)
        _set_counts(cut.layer.block, cut.num_experts)
    for config, name in fields:
        value = getattr(config, name)
        setattr(config, name, [count] * len(value) if isinstance(value, (list, tuple)) else count)
    for module in model.modules() if fields else ():  # the number in a balance loss of the whole model, for one
        for name in _COUNTS:
            if vars(module).get(name) == old:
                setattr(module, name, count)


def _find_config_fields(model: nn.Module, cuts: Sequence[Cut]) -> list[tuple[Any, str]]:
    """(config, field) of all fields that say the number of experts. Raises ValueError unless they can say the new one:
    one number for all layers."""
    blocks, counts = [cut.layer.block for cut in cuts], {cut.num_experts for cut in cuts}
    if not any(hasattr(module, "save_pretrained") for module in model.modules()):
        kind = type(model).__name__
        raise ValueError(f"model: expected the whole model, whose config has the number of experts, got {kind}")
    found: dict[tuple[int, str], tuple[Any, str]] = {}
    for block in blocks:
        config = block.config
        for name in _COUNTS:
            value = vars(config).get(name)
            values = set(value) if isinstance(value, (list, tuple)) else {value}
            if block.num_experts not in values:
                continue
            if len(values) > 1:
                raise ValueError(f"{block.name}: expected one number of experts in the config, got {name}={value}")
            found[id(config), name] = (config, name)
    if len(counts) > 1 or len({block.num_experts for block in blocks}) > 1:
        raise ValueError(
            f"keep: expected equal numbers of experts, since one number in the config holds for all layers of "
            f"{type(blocks[0].block).__name__}, got {sorted(counts)}"
        )
    old, inside = blocks[0].num_experts, {module for block in blocks for module in block.block.modules()}
    for name, module in model.named_modules():
        has_experts = any(p.dim() > 1 and p.shape[0] == old for p in module.parameters(recurse=False))
        if module not in inside and has_experts and any(vars(module).get(count) == old for count in _COUNTS):
            raise ValueError(f"model: expected experts in MoE blocks alone, got some in {name}, of the same config")
    return list(found.values())


def _set_counts(block: MoeBlock, count: int) -> None:
    old = block.num_experts
    parts = [] if block.gate is None else list(block.gate.modules())
    for module in parts:
        if isinstance(module, nn.Linear) and module.out_features == old:
            module.out_features = count
    if block.experts is not block.block:
        parts += list(block.experts.modules())
    else:
        parts += [module for module in block.block.modules() if module not in parts]
    for module in (*parts, block.block):
        for name in _COUNTS:
            if vars(module).get(name) == old:
                setattr(module, name, count)


# ---- what a router chooses -------------------------------------------------------------------------------------------


class _Chosen(Exception):
    pass


@torch.no_grad()
def compute_choice(block: MoeBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """(topk_ids [T,K] int64, topk_weights [T,K] float64) that the experts of a block get for its input x [T,H], in eval
    mode. Raises ValueError for a block that needs more than x."""
    with set_eval(block.block):
        if isinstance(block.gate, Router):
            routing = block.gate(x)
            return routing.topk_ids.long(), routing.topk_weights.double()
        return _watch_choice(block, x)


def _watch_choice(block: MoeBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    found: list[Choice] = []

    def stop(choice: Choice) -> None:
        found.append(choice)
        raise _Chosen

    try:
        with watch_choices(block, stop):
            block.block(x[None])
    except _Chosen:
        pass
    except (TypeError, RuntimeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{block.name}: expected a block that routes by its input alone, got {type(block.block).__name__} ({error})"
        ) from error
    if not found:
        raise ValueError(f"{block.name}: expected a block that calls its experts, got {type(block.block).__name__}")
    ids = found[0].topk_ids.long()
    ids = torch.where((ids < 0) | (ids >= block.num_experts), -1, ids)
    return ids, found[0].topk_weights.double().masked_fill(ids < 0, 0)


@contextmanager
def replace_gate(block: MoeBlock, gate: NewTensors, count: int) -> Iterator[MoeBlock]:
    """Inside the `with` block, the router has other tensors, for `count` experts."""
    old = [(place, place.value) for place, _ in gate]
    names = {module: {name: vars(module)[name] for name in (*_COUNTS, "out_features") if name in vars(module)}
             for module in block.block.modules()}  # fmt: skip
    try:
        for place, tensor in gate:
            place.put(tensor)
        _set_counts(block, count)
        yield replace(block, num_experts=count)
    finally:
        for place, tensor in old:
            place.put(tensor)
        for module, values in names.items():
            for name, value in values.items():
                setattr(module, name, value)


def compute_choice_among(block: MoeBlock, keep: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
    """What `compute_choice` returns if only the experts `keep` are left, with their ids in the whole block."""
    with replace_gate(block, cut_router(block, keep), len(keep)) as cut:
        ids, weights = compute_choice(cut, x)
    table = torch.tensor([*keep, -1], device=ids.device)
    return table[ids], weights
