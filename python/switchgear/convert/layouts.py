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
        if self._found.layout == "megatron_grouped":
            key = f"decoder.layers.{layer}.mlp.experts.weight2"
            rows, hidden = self._source.shape(key)
            return hidden, rows // self._found.experts[layer], self._source.dtype(key)
        key = self._key(layer, 0, "down_proj")
        hidden, width = self._source.shape(key)[-2:]
        return hidden, width, self._source.dtype(key)

    def __call__(self, layer: int, expert: int, part: str) -> Tensor:
        layout = self._found.layout
        if layout == "per_expert":
            return self._source.read(self._found.naming.expert(layer, expert, part))
        hidden, width, _ = self.sizes(layer)
        if layout == "megatron_grouped":
            prefix = f"decoder.layers.{layer}.mlp.experts."
            if part == "down_proj":
                return self._source.read(prefix + "weight2")[expert * width : (expert + 1) * width].T
            # [H, E·2I] is the memory of [E,H,2I], as Megatron views it
            rows = self._source.read(prefix + "weight1").reshape(-1, hidden, 2 * width)[expert].T
            return _take_half(rows, part)
        weight = self._source.read(self._key(layer, expert, part))
        weight = weight[expert] if layout == "fused" else weight
        return weight if part == "down_proj" else _take_half(weight, part)

    def _key(self, layer: int, expert: int, part: str) -> str:
        layout, number = self._found.layout, 2 if part == "down_proj" else 1
        if layout == "per_expert":
            return self._found.naming.expert(layer, expert, part)
        if layout == "fused":
            return f"model.layers.{layer}.mlp.experts.{'down_proj' if number == 2 else 'gate_up_proj'}"
        return _megatron_key(layout, layer, expert, number)


def _take_half(rows: Tensor, part: str) -> Tensor:
    gate, up = rows.chunk(2)
    return gate if part == "gate_proj" else up


def _megatron_key(layout: str, layer: int, expert: int, number: int) -> str:
    prefix = f"decoder.layers.{layer}.mlp.experts."
    if layout == "megatron":
        return f"{prefix}local_experts.{expert}.linear_fc{number}.weight"
    return f"{prefix}linear_fc{number}.weight{expert}"


def _plan_experts(
    to: str, family: Family, layer: int, count: int, hidden: int, width: int, dtype: torch.dtype,
    read: Callable[[int, int, str], Tensor],
) -> list[Item]:  # fmt: skip
    """The tensors of a layer's experts in the layout `to`."""

    def first(expert: int) -> Tensor:
        return torch.cat([read(layer, expert, part) for part in PARTS[:2]])

    def second(expert: int) -> Tensor:
        return read(layer, expert, "down_proj")

    def item(key: str, make: Callable[[], Tensor], *shape: int) -> Item:
        return Item(key, shape, dtype, make)

    if to == "per_expert":
        shapes = [(width, hidden), (width, hidden), (hidden, width)]
        return [
            item(family.expert(layer, expert, part), partial(read, layer, expert, part), *shape)
            for expert in range(count)
            for part, shape in zip(PARTS, shapes, strict=True)
        ]
    if to == "fused":
        prefix = f"model.layers.{layer}.mlp.experts."
        return [
            item(prefix + "gate_up_proj", lambda: _stack(count, first), count, 2 * width, hidden),
            item(prefix + "down_proj", lambda: _stack(count, second), count, hidden, width),
        ]
    if to == "megatron_grouped":
        prefix = f"decoder.layers.{layer}.mlp.experts."

        def transposed(make: Callable[[int], Tensor], *shape: int) -> Callable[[], Tensor]:
            return lambda: _stack(count, lambda expert: make(expert).T).reshape(*shape)

        sizes = (hidden, count * 2 * width), (count * width, hidden)
        return [
            item(f"{prefix}weight{number}", transposed(make, *size), *size)
            for number, make, size in zip((1, 2), (first, second), sizes, strict=True)
        ]
    return [
        item(_megatron_key(to, layer, expert, number), partial(make, expert), *shape)
        for expert in range(count)
        for number, make, shape in ((1, first, (2 * width, hidden)), (2, second, (hidden, width)))
    ]


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

        from switchgear.integrations.published_keys import pieces_of
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
    return lambda keys: all(target in state for target in pieces_of(model, keys, state))


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
    names = next((names for names in ROUTERS.get(model_type, ()) if name in names), None) or _match_usual_router(
        name, family
    )
    return None if names is None else (layer, names)


def _match_usual_router(name: str, family: Family) -> tuple[str, str, str] | None:
    """The names of a router's tensor where they are the usual ones."""
    match = re.fullmatch(r"(?:mlp|block_sparse_moe)\.(?:gate|router)\.(\w+)", name)
    if match is None:
        return None
    ours = CORRECTION if match[1] == "expert_bias" else match[1]
    megatron = "expert_bias" if ours == CORRECTION else ours
    return f"mlp.gate.{ours}", f"{family.block}.gate.{ours}", f"mlp.router.{megatron}"


def _keep_item(source: Source, key: str, name: str) -> Item:
    """The tensor under its new name. Ernie's correction is [1,E], Megatron's [E]."""
    item = copy_item(source, key)
    shape, made = item.shape, item.make
    if name.endswith(".mlp.router.expert_bias"):
        shape = (math.prod(shape),)
    elif name.endswith(f".moe_statics.{CORRECTION}"):
        shape = (1, math.prod(shape))
    return Item(name, shape, item.dtype, lambda: made().reshape(shape))
