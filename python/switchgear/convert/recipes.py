# SPDX-License-Identifier: BSD-3-Clause
"""Plans of whole models from their configs and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from switchgear.checks import Finite, NotNegative, Seed, Size, checked
from switchgear.convert.average import Merging, check_same, check_wide
from switchgear.convert.checks import check_top_k
from switchgear.convert.families import (
    FAMILIES,
    PARTS,
    Sizes,
    check_dense,
    check_unquantized,
    choose_family,
    dense_key,
    layers_of,
    make_dense_config,
    make_moe_config,
    read_num_experts,
)
from switchgear.convert.ffn import check_options, combine_networks
from switchgear.convert.partitions import Method
from switchgear.convert.plans import (
    ConversionPlan,
    Item,
    LayerCache,
    Source,
    Split,
    collect_networks,
    copy_item,
    copy_networks,
    split_networks,
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
    check_dense(config)
    check_top_k(num_experts, top_k)
    width, notes = _pad_width(int(config["intermediate_size"]))
    size = Sizes(num_experts, top_k, width, layers_of(config, layers))
    found = choose_family(config, size, family)
    items = copy_networks(source, found, size, router_init=router_init, noise=noise, seed=seed)
    how = f"{found.model_type}, copies" + (f" with noise {noise}" if noise else "")
    done = tuple((f"model.layers.{layer}.mlp", "dense", num_experts, how) for layer in size.layers)
    return ConversionPlan(make_moe_config(config, found, size), tuple(items), done, notes)


def _pad_width(width: int) -> tuple[int, tuple[str, ...]]:
    """The width of experts that transformers can multiply, and a note if it is another."""
    wide = -(-width // PADDED) * PADDED
    return wide, () if wide == width else (f"experts are padded with zeros to {wide} neurons",)


@checked
def plan_split(
    config: Mapping[str, Any], source: Source, *, num_experts: Size, top_k: Size, layers: str | Sequence[int] = "all",
    method: Method = "random", shared: int | float = 0, importance: Mapping[int, Tensor] | None = None,
    keep: Finite = 0.5, rescale: bool = True, router_init: NotNegative = 0.02, seed: Seed = 0,
    family: str | None = None,
) -> ConversionPlan:  # fmt: skip
    """See split_dense. Each expert is E times its neurons (K times without rescale), since weights sum to 1."""
    check_dense(config)
    check_top_k(num_experts, top_k)
    chosen = layers_of(config, layers)
    how = Split(num_experts, method, shared, importance, keep, seed)
    for layer in chosen:
        if dense_key(layer, "gate_proj") not in set(source.keys()):
            raise ValueError(f"model: expected {dense_key(layer, 'gate_proj')} among its tensors, got none")
    widths = [how.widths(source, layer) for layer in chosen]
    width, shared_width = (-(-max(sizes) // PADDED) * PADDED for sizes in zip(*widths, strict=True))
    size = Sizes(num_experts, top_k, width, chosen, shared_width)
    found = choose_family(config, size, family)
    if method == "interleave" and shared:
        scale = 1.0  # whole networks, not parts of a sum
    elif method == "domain_masks":
        scale = float(top_k)
    else:
        scale = float(num_experts if rescale else top_k)
    items = split_networks(source, found, size, how, scale=scale, router_init=router_init)
    notes = [f"down projections of experts are multiplied by {scale:g}, since {found.model_type}'s weights sum to 1"]
    if size.shared_width:
        notes.append("the shared expert is doubled, since its gate starts at sigmoid(0) = 1/2")
    if set(widths) != {(width, shared_width)} or method == "domain_masks":
        notes.append(f"experts are padded with zeros to {size.width} neurons, the shared one to {size.shared_width}")
    text = f"{found.model_type}, split by {method}, {size.width} neurons each"
    done = tuple((f"model.layers.{layer}.mlp", "dense", num_experts, text) for layer in chosen)
    return ConversionPlan(make_moe_config(config, found, size), tuple(items), done, tuple(notes))


@checked
def plan_experts(
    models: Sequence[tuple[Mapping[str, Any], Source]], base: tuple[Mapping[str, Any], Source] | None, *, top_k: Size,
    layers: str | Sequence[int] = "all", family: str | None = None, router: Mapping[int, Tensor] | None = None,
    router_init: NotNegative = 0.02, merging: Merging, seed: Seed = 0, noise: NotNegative = 0.0,
) -> ConversionPlan:  # fmt: skip
    """See from_dense_experts."""
    check_top_k(len(models), top_k)
    config, origin = models[0] if base is None else base
    merge = prepare_merge([source for _, source in models], None if base is None else base[1], merging)
    for index, (other, _) in enumerate(models):
        check_dense(other)
        for name in ("model_type", "hidden_act", "intermediate_size", "rms_norm_eps", "num_attention_heads"):
            if other.get(name) != config.get(name):
                raise ValueError(f"models[{index}]: expected {name} {config.get(name)}, got {other.get(name)}")
    width, notes = _pad_width(int(config["intermediate_size"]))
    size = Sizes(len(models), top_k, width, layers_of(config, layers))
    found = choose_family(config, size, family)
    if router is not None:
        _check_router(router, size, int(config["hidden_size"]))
    items = collect_networks(
        origin, [source for _, source in models], found, size, router=router, router_init=router_init, seed=seed,
        merge=merge, noise=noise,
    )  # fmt: skip
    how = f"{found.model_type}, one per model; other tensors by {merging.method}"
    done = tuple((f"model.layers.{layer}.mlp", "dense", size.num_experts, how) for layer in size.layers)
    return ConversionPlan(make_moe_config(config, found, size), tuple(items), done, notes)


def _check_router(router: Mapping[int, Tensor], size: Sizes, hidden: int) -> None:
    for layer in size.layers:
        if layer not in router:
            raise ValueError(f"router: expected rows of layer {layer}, got none")
        rows = router[layer]
        if tuple(rows.shape) != (size.num_experts, hidden):
            expected = f"[E={size.num_experts},H={hidden}] of layer {layer}"
            raise ValueError(f"router: expected {expected}, got {list(rows.shape)}")
        if not rows.isfinite().all():
            raise ValueError(f"router: expected finite rows of layer {layer}, got others")


def plan_merge(
    models: Sequence[tuple[Mapping[str, Any], Source]], base: tuple[Mapping[str, Any], Source] | None, merging: Merging
) -> ConversionPlan:
    """See merge_models."""
    for own, _ in [*models, *([base] if base is not None else [])]:
        check_unquantized(own)
    sources = [source for _, source in models]
    make = prepare_merge(sources, None if base is None else base[1], merging)
    config = dict(models[0][0] if base is None else base[0])
    return ConversionPlan(config, tuple(make(key) for key in sources[0].keys()))  # noqa: SIM118  (not a mapping)


def prepare_merge(sources: Sequence[Source], base: Source | None, merging: Merging) -> Callable[[str], Item]:
    """Makes the item of a key of all models. Raises ValueError if their tensors differ in name or shape, TypeError for
    float8."""
    merging.check(len(sources), base is not None)
    wanted = {key: sources[0].shape(key) for key in sources[0].keys()}  # noqa: SIM118
    named = [(f"models[{index}]", source) for index, source in enumerate(sources)]
    for name, source in [*named, *([("base", base)] if base is not None else [])]:
        check_same(name, {key: source.shape(key) for key in source.keys()}, wanted)  # noqa: SIM118
        check_wide(name, {key: source.dtype(key) for key in wanted})

    def item(key: str) -> Item:
        first = sources[0] if base is None else base

        def make() -> Tensor:
            return merging(key, [source.read(key) for source in sources], None if base is None else base.read(key))

        return Item(key, first.shape(key), first.dtype(key), make)

    return item


def plan_dense(
    config: Mapping[str, Any], source: Source, method: str = "mean", *,
    weights: Sequence[float] | Tensor | None = None, rank: int | None = None,
) -> ConversionPlan:  # fmt: skip
    """A dense model of an MoE one: mixtral -> mistral, qwen3_moe -> qwen3; see to_dense."""
    made, layers = make_dense_config(config)
    family = FAMILIES[str(config["model_type"])]
    count = read_num_experts(config, family)
    shares = check_options(method, weights, rank, count)
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
