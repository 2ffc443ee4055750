# SPDX-License-Identifier: BSD-3-Clause
"""An MoE layer becomes one dense network, to be trained further by distillation (OneS, arXiv:2201.10890)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Finite, FiniteTensor, Size, checked
from switchgear.convert.modules import (
    Combination,
    combine_networks,
    compare_outputs,
    feed_forward,
    find_activation,
    is_transformers,
    join_networks,
    read_shares,
)
from switchgear.convert.recipes import plan_dense
from switchgear.experts import Experts
from switchgear.integrations.blocks import FeedForward, read_network, split_gate
from switchgear.integrations.gates import PLAIN_ACTIVATIONS
from switchgear.integrations.moe_blocks import SHARED
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.layers.shared import GatedSharedExperts
from switchgear.weights.module import check_plain


@checked
def to_dense(
    moe: Any,
    method: Combination = "mean",
    *,
    weights: Sequence[Finite] | FiniteTensor | None = None,
    rank: Size | None = None,
) -> Any:
    """A dense network that gathers the knowledge of all experts of a layer.

    "sum", "mean": of each matrix. "topk": the I / E neurons of each expert with the largest ‖gate‖ · ‖up‖ · ‖down‖ (the
    measure is unverified), side by side. "svd": the sum over experts of each matrix's best approximation of rank
    `rank`.

    Args:
        moe: switchgear's MoE, or a block of a Hugging Face model (experts with gate_up_proj and down_proj): returns a
            SharedExperts. Or a whole Hugging Face model: Mixtral becomes Mistral and Qwen3-MoE Qwen3, in a Conversion.
        weights: [E], of the experts in "mean" and "sum", such as their share of tokens; "mean" divides by their sum.
        rank: of "svd"; by default the smaller dimension divided by E, rounded up.

    Shared experts of the layer are kept exactly: their neurons follow.

    Raises:
        ValueError: an unknown method or option, experts of different widths except for "topk", stored weights, adapters
            that are not merged, or experts that train alone.
    """
    if isinstance(moe, nn.Module) and is_transformers(moe):
        from switchgear.convert.models import convert_model  # imports transformers

        return convert_model(moe, plan_dense, method=method, weights=weights, rank=rank)
    networks, shared = read_networks(moe)
    made = combine_networks(networks, method, read_shares(method, weights, rank, len(networks)), rank)
    return join_networks([made, *([shared] if shared is not None else [])]).module()


def read_networks(moe: Any) -> tuple[list[FeedForward], FeedForward | None]:
    """The networks of the experts of a layer, and of its shared experts. They share the layer's memory."""
    experts = getattr(moe, "experts", moe)
    if isinstance(experts, nn.Module):
        check_plain("moe", experts)
    shared_module = next((found for name in SHARED if (found := getattr(moe, name, None)) is not None), None)
    if isinstance(shared_module, GatedSharedExperts) or getattr(moe, "shared_expert_gate", None) is not None:
        raise ValueError("moe: expected plain shared experts or none, got gated ones, which no dense network contains")
    shared = None if shared_module is None else feed_forward(shared_module, "shared_experts")
    if isinstance(experts, HeterogeneousExperts):
        activation = experts.slices.activation
        return [_make_network(*experts.weights_of(e), activation=activation, gated=experts.slices.gated)
                for e in range(experts.num_experts)], shared  # fmt: skip
    if isinstance(experts, Experts):
        if experts.activation not in PLAIN_ACTIVATIONS or experts.limit is not None:
            got = f"{experts.activation} with limit={experts.limit}"
            raise ValueError(f"moe: expected a named activation without alpha and limit, got {got}")
        return [read_network(experts, expert) for expert in range(experts.num_experts)], shared
    first, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if isinstance(first, Tensor) and isinstance(down, Tensor) and (named := find_activation(experts)):
        gate_up, down = first.detach(), down.detach()
        if getattr(experts, "is_transposed", False):
            gate_up, down = gate_up.mT, down.mT
        if gate_up.shape[1] == 2 * down.shape[2]:
            networks = [_make_network(gate_up[e], down[e], activation=named) for e in range(len(gate_up))]
            _check_same(experts, networks)
            return networks, shared
    raise ValueError(f"moe: expected MoE, or a block with experts gate_up_proj and down_proj, got {type(moe).__name__}")


@torch.no_grad()
def _check_same(experts: Any, networks: list[FeedForward]) -> None:
    """Compares the last network with the module on random rows: layouts and activations differ between models."""
    last = len(networks) - 1
    x = torch.randn(4, networks[last].hidden_size, generator=torch.Generator().manual_seed(0)).to(networks[last].up)
    if not isinstance(experts, nn.Module) or x.is_meta:
        return
    choice = torch.full((4, 1), last, device=x.device), torch.ones(4, 1, dtype=x.dtype, device=x.device)
    formula, tolerance = "experts down(act(gate(x)) · up(x))", 1e-4 if x.dtype.itemsize > 2 else 5e-2
    compare_outputs("moe", experts, formula, lambda: (experts(x, *choice), networks[last](x)), tolerance)


def _make_network(first: Tensor, down: Tensor, *, activation: str, gated: bool = True) -> FeedForward:
    return FeedForward(*split_gate(first.detach(), gated), down.detach(), activation)
