# SPDX-License-Identifier: BSD-3-Clause
"""Plans of whole models from their configs and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from switchgear.checks import Finite, FiniteTensor, NotNegative, Seed, Size, checked
from switchgear.convert.average import Merging, prepare_merge
from switchgear.convert.families import (
    FAMILIES,
    PARTS,
    Family,
    Sizes,
    choose_family,
    dense_key,
    layers_of,
    make_dense_config,
    make_moe_config,
    read_dense_type,
    read_model_type,
    read_num_experts,
)
from switchgear.convert.modules import Combination, combine_networks, read_shares
from switchgear.convert.partitions import Method, Partition, partition
from switchgear.convert.plans import (
    ConversionPlan,
    Item,
    LayerCache,
    Source,
    copy_item,
    copy_neurons,
    copy_with_noise,
    derive_seed,
    list_items,
)
from switchgear.integrations.blocks import FeedForward

PADDED = 8  # neurons; transformers' grouped_mm reads rows of multiples of 16 bytes


@checked
def plan_upcycle(
    config: Mapping[str, Any], source: Source, *, num_experts: Size = 8, top_k: Size = 2,
    layers: str | Sequence[int] = "all", router_init: NotNegative = 0.02, noise: NotNegative = 0.0, seed: Seed = 0,
    family: str | None = None,
) -> ConversionPlan:  # fmt: skip
    """See upcycle."""
    size, notes = _pad_experts(config, num_experts, top_k, layers)
    found = choose_family(config, size, family)
    items = list_items(
        source, found, size,
        lambda layer, _, part, key: copy_with_noise(source, dense_key(layer, part), key, size.width, noise, seed),
        router_init=router_init, seed=seed,
    )  # fmt: skip
    return _plan_moe(config, found, size, items, "copies" + (f" with noise {noise}" if noise else ""), notes)


def _pad_experts(
    config: Mapping[str, Any], num_experts: int, top_k: int, layers: str | Sequence[int]
) -> tuple[Sizes, tuple[str, ...]]:
    """The sizes of experts as wide as the dense networks, which transformers can multiply, and a note if they are wider
    for that."""
    read_dense_type(config)
    width = int(config["intermediate_size"])
    wide = -(-width // PADDED) * PADDED
    notes = () if wide == width else (f"experts are padded with zeros to {wide} neurons",)
    return Sizes(num_experts, top_k, wide, layers_of(config, layers)), notes


def _plan_moe(
    config: Mapping[str, Any], family: Family, size: Sizes, items: tuple[Item, ...], how: str, notes: Sequence[str]
) -> ConversionPlan:
    how = f"{family.model_type}, {how}"
    done = tuple((f"model.layers.{layer}.mlp", "dense", size.num_experts, how) for layer in size.layers)
    return ConversionPlan(make_moe_config(config, family, size), items, done, tuple(notes))


@checked
def plan_split(
    config: Mapping[str, Any], source: Source, *, num_experts: Size, top_k: Size, layers: str | Sequence[int] = "all",
    method: Method = "random", shared: int | float = 0, importance: Mapping[int, Tensor] | None = None,
    keep: Finite = 0.5, rescale: bool = True, router_init: NotNegative = 0.02, seed: Seed = 0,
    family: str | None = None,
) -> ConversionPlan:  # fmt: skip
    """See split_dense. Each expert is E times its neurons (K times without rescale), since weights sum to 1. The shared
    one's are doubled, since its gate starts at sigmoid(0) = 1/2."""
    read_dense_type(config)
    chosen = layers_of(config, layers)

    def divide(layer: int, method: Method = method) -> Partition:
        own = None if importance is None else importance.get(layer)
        if importance is not None and own is None:
            raise ValueError(f"importance: expected one of layer {layer}, got none")
        if (gate := dense_key(layer, "gate_proj")) not in source.keys():  # noqa: SIM118  (not a mapping)
            raise ValueError(f"model: expected {gate} among its tensors, got none")
        weight = source.read(gate) if method == "cluster" else torch.empty(source.shape(gate), device="meta")
        dense, own_seed = FeedForward(weight, weight, weight.T), derive_seed(seed, layer)
        return partition(dense, num_experts, method, shared=shared, importance=own, keep=keep, seed=own_seed)

    # Clusters are as large as other parts, which sizes alone tell; domain masks need their importance.
    divided = (divide(layer, "contiguous" if method == "cluster" else method) for layer in chosen)
    widths = [(max(parts.widths), len(parts.shared)) for parts in divided]
    width, shared_width = (-(-max(sizes) // PADDED) * PADDED for sizes in zip(*widths, strict=True))
    size = Sizes(num_experts, top_k, width, chosen, shared_width)
    found = choose_family(config, size, family)
    if method == "interleave" and shared:
        scale = 1.0  # whole networks, not parts of a sum
    elif method == "domain_masks":
        scale = float(top_k)
    else:
        scale = float(num_experts if rescale else top_k)
    parts = LayerCache(divide)

    def make(layer: int, expert: int | None, part: str, key: str) -> Item:
        def find_neurons() -> Tensor:
            return parts(layer).shared if expert is None else parts(layer).experts[expert]

        sizes = (shared_width, 2.0) if expert is None else (width, scale)
        return copy_neurons(source, dense_key(layer, part), key, *sizes, find_neurons)

    items = list_items(source, found, size, make, router_init=router_init, seed=seed)
    notes = [f"down projections of experts are multiplied by {scale:g}, since {found.model_type}'s weights sum to 1"]
    if shared_width:
        notes.append("the shared expert is doubled, since its gate starts at sigmoid(0) = 1/2")
    if set(widths) != {(width, shared_width)} or method == "domain_masks":
        notes.append(f"experts are padded with zeros to {width} neurons, the shared one to {shared_width}")
    return _plan_moe(config, found, size, items, f"split by {method}, {width} neurons each", notes)


@checked
def plan_experts(
    models: Sequence[tuple[Mapping[str, Any], Source]], base: tuple[Mapping[str, Any], Source] | None, *, top_k: Size,
    layers: str | Sequence[int] = "all", family: str | None = None, router: Mapping[int, FiniteTensor] | None = None,
    router_init: NotNegative = 0.02, merging: Merging, seed: Seed = 0, noise: NotNegative = 0.0,
) -> ConversionPlan:  # fmt: skip
    """See from_dense_experts."""
    config, origin = models[0] if base is None else base
    merge = prepare_merge([source for _, source in models], None if base is None else base[1], merging)
    for index, (other, _) in enumerate(models):
        read_dense_type(other)
        for name in ("model_type", "hidden_act", "intermediate_size", "rms_norm_eps", "num_attention_heads"):
            if other.get(name) != config.get(name):
                raise ValueError(f"models[{index}]: expected {name} {config.get(name)}, got {other.get(name)}")
    size, notes = _pad_experts(config, len(models), top_k, layers)
    found = choose_family(config, size, family)
    if router is not None:
        _check_router(router, size, int(config["hidden_size"]))

    def make(layer: int, expert: int | None, part: str, key: str) -> Item:
        assert expert is not None  # no shared expert
        return copy_with_noise(models[expert][1], dense_key(layer, part), key, size.width, noise, seed)

    items = list_items(origin, found, size, make, router_init=router_init, seed=seed, router=router, keep=merge)
    return _plan_moe(config, found, size, items, f"one per model; other tensors by {merging.method}", notes)


def _check_router(router: Mapping[int, Tensor], size: Sizes, hidden: int) -> None:
    for layer in size.layers:
        if layer not in router:
            raise ValueError(f"router: expected rows of layer {layer}, got none")
        rows = router[layer]
        if tuple(rows.shape) != (size.num_experts, hidden):
            expected = f"[E={size.num_experts},H={hidden}] of layer {layer}"
            raise ValueError(f"router: expected {expected}, got {list(rows.shape)}")


def plan_merge(
    models: Sequence[tuple[Mapping[str, Any], Source]], base: tuple[Mapping[str, Any], Source] | None, merging: Merging
) -> ConversionPlan:
    """See merge_models."""
    for own, _ in [*models, *([base] if base is not None else [])]:
        read_model_type(own)  # checks
    sources = [source for _, source in models]
    make = prepare_merge(sources, None if base is None else base[1], merging)
    config = dict(models[0][0] if base is None else base[0])
    return ConversionPlan(config, tuple(make(key) for key in sources[0].keys()))  # noqa: SIM118  (not a mapping)


@checked
def plan_dense(
    config: Mapping[str, Any], source: Source, method: Combination = "mean", *,
    weights: Sequence[Finite] | FiniteTensor | None = None, rank: Size | None = None,
) -> ConversionPlan:  # fmt: skip
    """A dense model of an MoE one: mixtral -> mistral, qwen3_moe -> qwen3; see to_dense."""
    made, layers = make_dense_config(config)
    family = FAMILIES[str(config["model_type"])]
    count = read_num_experts(config, family)
    shares = read_shares(method, weights, rank, count)
    width, hidden = int(made["intermediate_size"]), int(made["hidden_size"])
    every = set(source.keys())

    def fused_keys(layer: int) -> list[str]:
        block = f"model.layers.{layer}.mlp."  # transformers' name
        return [f"{block}experts.gate_up_proj", f"{block}experts.down_proj"]

    def published_keys(layer: int, part: str) -> list[str]:
        return [family.expert(layer, expert, part) for expert in range(count)]

    def combine(layer: int) -> FeedForward:
        if fused_keys(layer)[0] in every:
            gate_up, downs = map(source.read, fused_keys(layer))
            gates, ups = gate_up.chunk(2, 1)
        else:
            gates, ups, downs = (torch.stack([*map(source.read, published_keys(layer, part))]) for part in PARTS)
        return combine_networks(list(map(FeedForward, gates, ups, downs)), method, shares, rank)

    networks = LayerCache(combine)

    def make(layer: int, part: str) -> Tensor:
        weight: Tensor = getattr(networks(layer), part.removesuffix("_proj"))
        return weight

    items, replaced = [], set[str]()
    for layer in layers:
        keys = fused_keys(layer)
        if keys[0] not in every:
            keys = [key for part in PARTS for key in published_keys(layer, part)]
        replaced |= {*keys, family.router(layer), f"model.layers.{layer}.mlp.gate.weight"}
        for part in PARTS:
            shape = (hidden, width) if part == "down_proj" else (width, hidden)
            items.append(Item(dense_key(layer, part), shape, source.dtype(keys[0]), partial(make, layer, part)))
    kept = [key for key in source.keys() if key not in replaced]  # noqa: SIM118
    done = tuple((f"model.layers.{layer}.mlp", f"{count} experts", 1, f"dense by {method}") for layer in layers)
    return ConversionPlan(made, (*(copy_item(source, key) for key in kept), *items), done)
