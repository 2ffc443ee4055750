# SPDX-License-Identifier: BSD-3-Clause
"""Sparse upcycling: a dense feed-forward network becomes the experts of an MoE layer that computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from switchgear.complaints import check_module
from switchgear.convert.checks import check_moe, check_random, seed_of
from switchgear.convert.ffn import feed_forward, is_feed_forward
from switchgear.convert.modules import OURS, is_transformers, replaced
from switchgear.convert.plans import noise_of
from switchgear.convert.split import fill, initialize_router, layer_like
from switchgear.integrations.blocks import FeedForward
from switchgear.modules import MoE


def upcycle(
    mlp: nn.Module | FeedForward,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    layers: str | Sequence[int] = "all",
    router_init: float = 0.02,
    noise: float = 0.0,
    normalize: bool = True,
    seed: int = 0,
    family: str | None = None,
    **options: Any,
) -> Any:
    """Copies a dense feed-forward network into every expert of an MoE layer (Llama 3 Meets MoE, arXiv:2412.09952).

        moe = upcycle(layer.mlp, 8, 2)                     # an MoE with the same output
        done = upcycle(llama, 8, 2)                        # done.model is a MixtralForCausalLM with the same logits

    The output is the dense one for any router, since the weights of the chosen experts sum to 1: softmax over the
    chosen logits (Mixtral's; the same as a softmax over all that is normalised). normalize=False leaves the softmax
    over all experts, whose chosen weights sum to less than 1: the layer starts as a scaled copy.

    Args:
        mlp: a feed-forward module (returns an MoE), a Hugging Face model of a dense family (returns a Conversion with a
            new model of an MoE family; the old one is unchanged), or another model (its feed-forward modules are
            replaced in place; returns a Conversion, whose notes name dropout, which experts do not have).
        layers: "all", or the indices of the feed-forward layers that become experts; negative ones count from the end.
        router_init: standard deviation of the router's normal initial weights.
        noise: standard deviation of normal noise on each expert's weights; 0 for exact copies.
        seed: of the router and of the noise.
        family: model type of a Hugging Face result: "mixtral", "qwen2_moe" or "qwen3_moe". By default Mixtral for Llama
            and Mistral, Qwen2-MoE for Qwen2 (and for chosen layers of Llama), Qwen3-MoE for Qwen3. "switchgear"
            replaces the feed-forward modules of any model in place, by layers that only switchgear loads.
        options: of MoE, such as balance=[SwitchLoss(1e-2)] or capacity; none that the network decides, such as dtype or
            null_experts, and none for Hugging Face models.

    Raises:
        TypeError, ValueError: no feed-forward network is found, an option is out of range, or the family cannot express
            the result. Nothing is changed.
    """
    check_moe(num_experts, top_k)
    check_random(seed, router_init=router_init, noise=noise)
    made: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": top_k,
        "router_init": router_init,
        "noise": noise,
        "seed": seed,
    }
    if isinstance(mlp, FeedForward):
        return _layer(mlp, normalize=normalize, **made, **options)
    check_module("mlp", mlp)
    if is_feed_forward(mlp):
        return _layer(feed_forward(mlp), normalize=normalize, **made, **options)
    if is_transformers(mlp) and family != OURS:
        from switchgear.convert.models import upcycle_model  # imports transformers

        if options or not normalize:
            raise ValueError(
                f"{next(iter(options), 'normalize')}: expected none for a Hugging Face model, whose family decides it"
            )
        return upcycle_model(mlp, layers=layers, family=family, **made)
    if family not in (None, OURS):
        raise ValueError(f"family: expected None for a {type(mlp).__name__}, which is no model of transformers")
    return replaced(mlp, layers, lambda dense, index: _layer(
        dense, normalize=normalize, **{**made, "seed": seed_of(seed, index)}, **options
    ))  # fmt: skip


def _layer(
    dense: FeedForward, num_experts: int, top_k: int, router_init: float, noise: float, seed: int, normalize: bool,
    **options: Any,
) -> MoE:  # fmt: skip
    if "select" not in options:
        options |= {"top_k": top_k, "normalize": normalize}
    moe = layer_like(dense, dense.intermediate_size, num_experts, options)
    fill(moe.experts, [dense] * num_experts)
    initialize_router(moe, router_init, seed)
    if noise:
        with torch.no_grad():
            for name, parameter in moe.experts.named_parameters():
                if not name.endswith("bias"):
                    parameter.add_((noise_of(seed, name, parameter.shape) * noise).to(parameter))
    return moe
