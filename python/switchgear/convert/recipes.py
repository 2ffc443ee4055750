# SPDX-License-Identifier: BSD-3-Clause
"""Plans of whole models from their configs and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from switchgear.convert.families import Size, check_dense, dense_key, family_for, layers_of, moe_config
from switchgear.convert.plans import Plan, Source, Split, check_moe, split, upcycled

PADDED = 8  # neurons; transformers' grouped_mm reads rows of multiples of 16 bytes


def upcycle_plan(
    config: Mapping[str, Any], source: Source, *, num_experts: int = 8, top_k: int = 2,
    layers: str | Sequence[int] = "all", router_init: float = 0.02, noise: float = 0.0, seed: int = 0,
    family: str | None = None,
) -> Plan:  # fmt: skip
    """See upcycle."""
    check_dense(config)
    check_moe(num_experts, top_k)
    size = Size(num_experts, top_k, int(config["intermediate_size"]), layers_of(config, layers))
    found = family_for(config, size, family)
    items = upcycled(source, found, size, router_init=router_init, noise=noise, seed=seed)
    how = f"{found.model_type}, copies" + (f" with noise {noise}" if noise else "")
    done = tuple((f"model.layers.{layer}.mlp", "dense", num_experts, how) for layer in size.layers)
    return Plan(moe_config(config, found, size), tuple(items), done)


def split_plan(
    config: Mapping[str, Any], source: Source, *, num_experts: int, top_k: int, layers: str | Sequence[int] = "all",
    method: str = "random", shared: int | float = 0, importance: Mapping[int, Tensor] | None = None, keep: float = 0.5,
    rescale: bool = True, router_init: float = 0.02, seed: int = 0, family: str | None = None,
) -> Plan:  # fmt: skip
    """See split_dense. Each expert is E times its neurons (K times without rescale), since weights sum to 1."""
    check_dense(config)
    check_moe(num_experts, top_k)
    chosen = layers_of(config, layers)
    how = Split(num_experts, method, shared, importance, keep, seed)
    for layer in chosen:
        if dense_key(layer, "gate_proj") not in set(source.keys()):
            raise ValueError(f"model: expected {dense_key(layer, 'gate_proj')} among its tensors, got none")
    widths = [how.widths(source, layer) for layer in chosen]
    width, shared_width = (-(-max(sizes) // PADDED) * PADDED for sizes in zip(*widths, strict=True))
    size = Size(num_experts, top_k, width, chosen, shared_width)
    found = family_for(config, size, family)
    if method == "interleave" and shared:
        scale = 1.0  # whole networks, not parts of a sum
    elif method == "domain_masks":
        scale = float(top_k)
    else:
        scale = float(num_experts if rescale else top_k)
    items = split(source, found, size, how, scale=scale, router_init=router_init)
    notes = [f"down projections of experts are multiplied by {scale:g}, since {found.model_type}'s weights sum to 1"]
    if size.shared_width:
        notes.append("the shared expert is doubled, since its gate starts at sigmoid(0) = 1/2")
    if set(widths) != {(width, shared_width)} or method == "domain_masks":
        notes.append(f"experts are padded with zeros to {size.width} neurons, the shared one to {size.shared_width}")
    text = f"{found.model_type}, split by {method}, {size.width} neurons each"
    done = tuple((f"model.layers.{layer}.mlp", "dense", num_experts, text) for layer in chosen)
    return Plan(moe_config(config, found, size), tuple(items), done, tuple(notes))
