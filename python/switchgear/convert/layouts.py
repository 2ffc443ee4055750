# SPDX-License-Identifier: BSD-3-Clause
"""Layouts of experts in checkpoints: one tensor per expert and projection, fused tensors, and Megatron-Core's three."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from switchgear.checks import checked
from switchgear.convert.directory import ConversionError
from switchgear.convert.families import FAMILIES, PARTS, Family, read_model_type, read_num_experts
from switchgear.convert.plans import ConversionPlan, Item, Source, copy_item
from switchgear.utils.packages import failed_import

Layout = Literal["per_expert", "fused", "megatron", "megatron_te", "megatron_grouped"]
LAYOUTS = get_args(Layout)
EXPERTS = r"(?:model|decoder)\.layers\.\d+\..*\.experts\."
MEGATRON = r"decoder\.layers\.(\d+)\.mlp\.experts\."
NAMINGS = (FAMILIES["qwen3_moe"], FAMILIES["mixtral"])  # Single experts are named so; most types have the first.

CORRECTION = "e_score_correction_bias"
# Routers that are not called gate.weight, with CORRECTION beside it: in transformers, as published, in Megatron-Core
ROUTERS = {
    "afmoe": [
        ("mlp.router.gate.weight", "mlp.router.gate.weight", "mlp.router.weight"),
        ("mlp.expert_bias", "mlp.expert_bias", "mlp.router.expert_bias"),
    ],
    "bailing_hybrid": [(f"mlp.gate.{CORRECTION}", "mlp.gate.expert_bias", "mlp.router.expert_bias")],
    "ernie4_5_moe": [
        (f"mlp.gate.moe_statics.{CORRECTION}", f"mlp.moe_statics.{CORRECTION}", "mlp.router.expert_bias"),
    ],
    "exaone_moe": [(f"mlp.gate.{CORRECTION}", f"mlp.{CORRECTION}", "mlp.router.expert_bias")],
    "hunyuan_v1_moe": [("mlp.gate.wg.weight", "mlp.gate.wg.weight", "mlp.router.weight")],
    "hy_v3": [
        ("mlp.gate.weight", "mlp.router.gate.weight", "mlp.router.weight"),
        (f"mlp.{CORRECTION}", "mlp.expert_bias", "mlp.router.expert_bias"),
    ],
    "kolibri1": [(f"mlp.gate.{CORRECTION}", "moe.router.expert_bias", "mlp.router.expert_bias")],
    "laguna": [(f"mlp.gate.{CORRECTION}", f"mlp.experts.{CORRECTION}", "mlp.router.expert_bias")],
    "longcat_flash": [
        ("mlp.router.classifier.weight", "mlp.router.classifier.weight", "mlp.router.weight"),
        (f"mlp.router.{CORRECTION}", f"mlp.router.{CORRECTION}", "mlp.router.expert_bias"),
    ],
    "minimax_m2": [(f"mlp.{CORRECTION}", f"block_sparse_moe.{CORRECTION}", "mlp.router.expert_bias")],
    "phimoe": [("mlp.router.weight", "block_sparse_moe.gate.weight", "mlp.router.weight")],
}


@dataclass(frozen=True)
class Found:
    """The experts of a checkpoint: the layout, their number in each layer, the keys that hold them, and their naming if
    the layout is per_expert."""

    layout: str
    experts: Mapping[int, int]
    keys: frozenset[str]
    naming: Family


@checked
def plan_layout(config: Mapping[str, Any], source: Source, to: Layout) -> ConversionPlan:
    """Rearranges the experts of an MoE checkpoint, and renames routers; all values stay.

    per_expert        model.layers.0.mlp.experts.3.gate_proj.weight [I,H], …   (as published; Mixtral: w1, w3, w2)
    fused             model.layers.0.mlp.experts.gate_up_proj [E,2I,H], down_proj [E,H,I]   (as in transformers)
    megatron          decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight [2I,H], linear_fc2.weight [H,I]
    megatron_te       decoder.layers.0.mlp.experts.linear_fc1.weight3 [2I,H], linear_fc2.weight3 [H,I]
    megatron_grouped  decoder.layers.0.mlp.experts.weight1 [H,E·2I], weight2 [E·I,H]

    Megatron's routers are decoder.layers.0.mlp.router.weight, and expert_bias [E] for e_score_correction_bias. Other
    tensors keep their names.

    Raises ValueError for experts that no layout holds: quantized, with biases or other tensors, of other shapes
    (gpt-oss has [E,H,2I]), and of several dtypes in a layer. Also for per_expert where transformers reads fused experts
    alone.
    """
    model_type = read_model_type(config)
    found = find_experts(source, config)
    read = _Reader(source, found)
    _check(source, model_type, found, read, config.get("hidden_size"))
    family = _choose_naming(config, found, to)
    items = [
        _keep_item(source, key, _rename_router(key, model_type, family, to))
        for key in source.keys()  # noqa: SIM118  (not a mapping)
        if key not in found.keys
    ]
    for layer, count in sorted(found.experts.items()):
        hidden, width, dtype = read.sizes(layer)
        items += _plan_experts(to, family, layer, count, hidden, width, dtype, read)
    done = tuple((f"model.layers.{layer}", found.layout, count, to) for layer, count in sorted(found.experts.items()))
    return ConversionPlan(dict(config), tuple(items), done)


def find_experts(source: Source, config: Mapping[str, Any]) -> Found:
    """Finds the experts. Raises ValueError if there are none, or in more than one layout."""
    keys = list(source.keys())
    patterns = [
        ("fused", NAMINGS[0], r"model\.layers\.(\d+)\.mlp\.experts\.(?:gate_up_proj|down_proj)"),
        ("megatron", NAMINGS[0], MEGATRON + r"local_experts\.(\d+)\.linear_fc[12]\.weight"),
        ("megatron_te", NAMINGS[0], MEGATRON + r"linear_fc[12]\.weight(\d+)"),
        ("megatron_grouped", NAMINGS[0], MEGATRON + r"weight[12]"),
    ]
    for naming in NAMINGS:
        names = "|".join(naming.names)
        pattern = rf"model\.layers\.(\d+)\.{naming.block}\.experts\.(\d+)\.(?:{names})\.weight"
        patterns.append(("per_expert", naming, pattern))
    by_layout = []
    for layout, naming, pattern in patterns:
        matches = {key: match for key in keys if (match := re.fullmatch(pattern, key))}
        if matches:
            by_layout.append((layout, naming, matches))
    if len(by_layout) != 1:
        got = ", ".join(layout for layout, *_ in by_layout) or "none"
        raise ValueError(f"source: expected experts in one layout ({', '.join(LAYOUTS)}), got {got}")
    ((layout, naming, matches),) = by_layout
    experts: dict[int, set[int]] = {}
    for match in matches.values():
        layer = int(match.group(1))
        numbers = {int(match.group(2))} if match.re.groups == 2 else set()
        experts.setdefault(layer, set()).update(numbers)
    counts = {layer: max(numbers) + 1 if numbers else 0 for layer, numbers in experts.items()}
    for layer in counts:
        if layout == "fused":
            counts[layer] = source.shape(f"model.layers.{layer}.mlp.experts.down_proj")[0]
        elif layout == "megatron_grouped":
            counts[layer] = read_num_experts(config, NAMINGS[0])  # routers may have more rows (LongCat)
        elif len(experts[layer]) != counts[layer]:
            raise ValueError(
                f"source: expected experts 0 to {counts[layer] - 1} of layer {layer}, got {len(experts[layer])} of them"
            )
    return Found(layout, counts, frozenset(matches), naming)


def _check(source: Source, model_type: str, found: Found, read: _Reader, hidden_size: int | None) -> None:
    """Raises ValueError unless the layout says all about the experts: every tensor, with its shape, in one dtype."""
    others = sorted(key for key in set(source.keys()) - found.keys if re.match(EXPERTS, key))
    others = [
        key for key in others if _match_router(key, model_type, found.naming) is None
    ]  # Laguna's are among experts
    if others:
        raise ValueError(f"source: expected no tensors of experts outside the layout {found.layout}, got {others[0]}")
    for layer, count in sorted(found.experts.items()):
        hidden, width, dtype = read.sizes(layer)
        for item in _plan_experts(found.layout, found.naming, layer, count, hidden_size or hidden, width, dtype, read):
            shape, own = source.shape(item.key), source.dtype(item.key)
            if (shape, own) != (item.shape, dtype):
                expected = f"{item.key} of shape {list(item.shape)} in {dtype}, as layout {found.layout} has it"
                raise ValueError(f"source: expected {expected}, got {list(shape)} in {own}")


class _Reader:
    """Reads the projection `part` of an expert from any layout, as [out,in]."""

    def __init__(self, source: Source, found: Found) -> None:
        self._source, self._found = source, found

    def sizes(self, layer: int) -> tuple[int, int, torch.dtype]:
        """H, I and the dtype."""
        key = _name_key(self._found.layout, self._found.naming, layer, 0, "down_proj")
        *_, rows, columns = self._source.shape(key)
        if self._found.layout == "megatron_grouped":  # [E·I,H]
            rows, columns = columns, rows // self._found.experts[layer]
        return rows, columns, self._source.dtype(key)

    def __call__(self, layer: int, expert: int, part: str) -> Tensor:
        layout = self._found.layout
        rows = self._source.read(_name_key(layout, self._found.naming, layer, expert, part))
        if layout == "fused":
            rows = rows[expert]
        elif layout == "megatron_grouped":  # weight1 is the memory of [E,H,2I], as Megatron views it
            hidden, width, _ = self.sizes(layer)
            rows = rows.reshape(-1, *((width, hidden) if part == "down_proj" else (hidden, 2 * width)))[expert].T
        if layout == "per_expert" or part == "down_proj":
            return rows
        gate, up = rows.chunk(2)
        return gate if part == "gate_proj" else up


def _name_key(layout: str, family: Family, layer: int, expert: int, part: str) -> str:
    number = 2 if part == "down_proj" else 1
    if layout == "per_expert":
        return family.expert(layer, expert, part)
    if layout == "fused":
        return f"model.layers.{layer}.mlp.experts.{part if number == 2 else 'gate_up_proj'}"
    name = {
        "megatron": f"local_experts.{expert}.linear_fc{number}.weight",
        "megatron_te": f"linear_fc{number}.weight{expert}",
        "megatron_grouped": f"weight{number}",
    }[layout]
    return f"decoder.layers.{layer}.mlp.experts.{name}"


def _plan_experts(
    to: str, family: Family, layer: int, count: int, hidden: int, width: int, dtype: torch.dtype,
    read: Callable[[int, int, str], Tensor],
) -> list[Item]:  # fmt: skip
    """The tensors of a layer's experts in the layout `to`."""
    shapes = {"gate_proj": (2 * width, hidden), "down_proj": (hidden, width)}  # gate_proj stands for both
    if to == "per_expert":
        shapes |= {"gate_proj": (width, hidden), "up_proj": (width, hidden)}

    def make(part: str, expert: int) -> Tensor:
        if to == "per_expert" or part == "down_proj":
            return read(layer, expert, part)
        return torch.cat([read(layer, expert, each) for each in PARTS[:2]])

    def item(part: str, expert: int, make: Callable[[], Tensor], *shape: int) -> Item:
        return Item(_name_key(to, family, layer, expert, part), shape, dtype, make)

    if to == "fused":
        return [
            item(part, 0, partial(_stack, count, partial(make, part)), count, *shape) for part, shape in shapes.items()
        ]
    if to == "megatron_grouped":

        def transpose(part: str, *shape: int) -> Item:
            return item(part, 0, lambda: _stack(count, lambda expert: make(part, expert).T).reshape(shape), *shape)

        return [transpose("gate_proj", hidden, count * 2 * width), transpose("down_proj", count * width, hidden)]
    parts = PARTS if to == "per_expert" else ("gate_proj", "down_proj")
    return [item(part, expert, partial(make, part, expert), *shapes[part]) for expert in range(count) for part in parts]


def _stack(count: int, make: Callable[[int], Tensor]) -> Tensor:
    """[E,…], one expert at a time."""
    first = make(0)
    made = torch.empty(count, *first.shape, dtype=first.dtype)
    made[0] = first
    for expert in range(1, count):
        made[expert] = make(expert)
    return made


def _choose_naming(config: Mapping[str, Any], found: Found, to: str) -> Family:
    """The names of single experts: the source's, or the ones of published checkpoints of the type."""
    model_type = str(config.get("model_type"))
    if found.layout == "per_expert" or to != "per_expert":
        return found.naming
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reads = _make_key_reader(config)
    layer = min(found.experts)
    for naming in NAMINGS:
        if reads([naming.expert(layer, 0, part) for part in PARTS]):
            return naming
    others = ", ".join(LAYOUTS[1:])
    raise ValueError(f"to: expected {others} for {model_type}, whose single experts transformers cannot read, got {to}")


def _make_key_reader(config: Mapping[str, Any]) -> Callable[[list[str]], bool]:
    """Tells whether transformers has a place for all of some keys in a model of the config."""
    try:
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

        from switchgear.integrations.checkpoint_files import pieces_of
        from switchgear.integrations.published_matrices import SUFFIXES
    except ImportError as error:
        raise ConversionError(failed_import(error, "transformers")) from error
    if config.get("model_type") not in CONFIG_MAPPING:
        return lambda keys: False
    unnamed = ("_attn_implementation", "attn_implementation", "dtype", "torch_dtype")  # names do not depend on these
    options = {key: copy.deepcopy(value) for key, value in config.items() if key not in unnamed}  # for_model changes it
    try:
        made = AutoConfig.for_model(**options)
        if type(made) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return lambda keys: False
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                made, attn_implementation="eager"
            )
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"config: expected one that transformers builds a model of, got {got}") from error
    state = model.state_dict()
    return lambda keys: all(target in state for target in pieces_of(model, keys, state, SUFFIXES))


def _rename_router(key: str, model_type: str, family: Family, to: str) -> str:
    """The name of a router in the new layout; other keys stay."""
    found = _match_router(key, model_type, family)
    if found is None:
        return key
    layer, names = found
    prefix = "decoder" if to.startswith("megatron") else "model"
    return f"{prefix}.layers.{layer}.{names[{'fused': 0, 'per_expert': 1}.get(to, 2)]}"


def _match_router(key: str, model_type: str, family: Family) -> tuple[str, tuple[str, str, str]] | None:
    """The layer and the names of a router's tensor, as in ROUTERS."""
    match = re.fullmatch(r"(?:model|decoder)\.layers\.(\d+)\.(.+)", key)
    if match is None:
        return None
    layer, name = match.groups()
    names = next((names for names in ROUTERS.get(model_type, ()) if name in names), None)
    if names is None and (usual := re.fullmatch(r"(?:mlp|block_sparse_moe)\.(?:gate|router)\.(\w+)", name)):
        ours = CORRECTION if usual[1] == "expert_bias" else usual[1]
        megatron = "expert_bias" if ours == CORRECTION else ours
        names = f"mlp.gate.{ours}", f"{family.block}.gate.{ours}", f"mlp.router.{megatron}"
    return None if names is None else (layer, names)


def _keep_item(source: Source, key: str, name: str) -> Item:
    """The tensor under its new name. Ernie's correction is [1,E], Megatron's [E]."""
    item = copy_item(source, key)
    shape, made = item.shape, item.make
    if name.endswith(".mlp.router.expert_bias"):
        shape = (math.prod(shape),)
    elif name.endswith(f".moe_statics.{CORRECTION}"):
        shape = (1, math.prod(shape))
    return Item(name, shape, item.dtype, lambda: made().reshape(shape))
