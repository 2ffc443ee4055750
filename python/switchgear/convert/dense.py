# SPDX-License-Identifier: BSD-3-Clause
"""An MoE layer becomes one dense network, to be trained further by distillation (OneS, arXiv:2201.10890)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.convert.checks import finite_numbers
from switchgear.convert.ffn import FeedForward, activation_of, feed_forward
from switchgear.convert.modules import is_transformers
from switchgear.experts import Experts
from switchgear.integrations.moe_blocks import SHARED
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.layers.shared import GatedSharedExperts
from switchgear.reference import check_choice, check_size
from switchgear.weights.checks import check_plain

METHODS = ("sum", "mean", "topk", "svd")


def to_dense(
    moe: Any, method: str = "mean", *, weights: Sequence[float] | Tensor | None = None, rank: int | None = None
) -> Any:
    """A dense network that gathers the knowledge of all experts of a layer.

    "sum", "mean": of each matrix. "topk": the I / E neurons of each expert with the largest ‖gate‖ · ‖up‖ · ‖down‖ (the
    measure is unverified), side by side. "svd": the sum over experts of each matrix's best approximation of rank
    `rank`.

    Args:
        moe: switchgear's MoE, or a block of a Hugging Face model (experts with gate_up_proj and down_proj): returns a
            SharedExperts. Or a whole Hugging Face model: Mixtral becomes Mistral and Qwen3-MoE Qwen3, in a Conversion.
        weights: [E], of the experts in "mean" and "sum", such as their share of tokens; "mean" divides by their sum.
        rank: of "svd"; by default that of the smaller dimension divided by E, rounded up.

    Shared experts of the layer are kept exactly: their neurons follow.

    Raises:
        ValueError: an unknown method or option, experts of different widths except for "topk", stored weights, adapters
            that are not merged, or experts that train alone.
    """
    check_choice("method", method, METHODS)
    shares = finite_numbers("weights", weights)
    if isinstance(moe, nn.Module) and is_transformers(moe):
        from switchgear.convert.models import dense_model  # imports transformers

        return dense_model(moe, method, weights=shares, rank=rank)
    networks, shared = experts_of(moe)
    widths = {network.intermediate_size for network in networks}
    if method != "topk" and len(widths) > 1:
        raise ValueError(f"moe: expected experts of one width for method={method!r}, got {sorted(widths)}")
    check_options(method, shares, rank, len(networks))
    if method == "topk":
        made = _best_neurons(networks)
    elif method == "svd":
        smaller = min(networks[0].hidden_size, networks[0].intermediate_size)
        kept = -(-smaller // len(networks)) if rank is None else rank
        made = _combined([_low_rank(network, kept) for network in networks], [1.0] * len(networks))
    else:
        each = shares or (1.0,) * len(networks)
        total = sum(each) if method == "mean" else 1.0
        made = _combined(networks, [share / total for share in each])
    return side_by_side([made, *([shared] if shared is not None else [])]).module()


def check_options(method: str, weights: Any, rank: Any, num_experts: int) -> None:
    """Raises TypeError or ValueError for an option of to_dense that is wrong, or not used by the method."""
    check_choice("method", method, METHODS)
    shares = finite_numbers("weights", weights)
    if shares is not None:
        if method not in ("sum", "mean"):
            raise ValueError(f"weights: expected None for method={method!r}, got {len(shares)} numbers")
        if len(shares) != num_experts:
            raise ValueError(f"weights: expected {num_experts}, one per expert, got {len(shares)}")
        if method == "mean" and not sum(shares) > 0:
            raise ValueError(f"weights: expected numbers with a positive sum, got {list(shares)}")
    if rank is not None:
        check_size("rank", rank)
        if method != "svd":
            raise ValueError(f"rank: expected None for method={method!r}, got {rank}")


class PlainExperts(NamedTuple):
    """Tensors with the layout of a Hugging Face experts module."""

    gate_up_proj: Tensor
    down_proj: Tensor
    activation: str


def experts_of(moe: Any) -> tuple[list[FeedForward], FeedForward | None]:
    """The networks of the experts of a layer, and of its shared experts. The tensors are those of the layer."""
    experts = getattr(moe, "experts", moe)
    if isinstance(experts, nn.Module):
        check_plain("moe", experts)
    shared_module = next((found for name in SHARED if (found := getattr(moe, name, None)) is not None), None)
    if isinstance(shared_module, GatedSharedExperts) or getattr(moe, "shared_expert_gate", None) is not None:
        raise ValueError("moe: expected plain shared experts or none, got gated ones, which no dense network contains")
    shared = None if shared_module is None else feed_forward(shared_module, "shared_experts")
    if isinstance(experts, HeterogeneousExperts):
        activation = experts.slices.activation
        return [_network(*experts.weights_of(e), activation=activation, gated=experts.slices.gated)
                for e in range(experts.num_experts)], shared  # fmt: skip
    if isinstance(experts, Experts):
        if experts.activation == "swiglu_oai" or experts.limit is not None:
            got = f"{experts.activation} with limit={experts.limit}"
            raise ValueError(f"moe: expected an activation without alpha and limit, got {got}")
        return [_of_ours(experts, expert) for expert in range(experts.num_experts)], shared
    first, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if isinstance(first, Tensor) and isinstance(down, Tensor) and (named := activation_of(experts)):
        gate_up, down = first.detach(), down.detach()
        if getattr(experts, "is_transposed", False):
            gate_up, down = gate_up.mT, down.mT
        if gate_up.shape[1] == 2 * down.shape[2]:
            networks = [_network(gate_up[e], down[e], activation=named) for e in range(len(gate_up))]
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
    ids = torch.full((4, 1), last, device=x.device)
    try:
        y: Any = experts(x, ids, torch.ones(4, 1, dtype=x.dtype, device=x.device))
    except Exception as error:  # another interface
        raise ValueError(f"moe: expected experts(x, ids, weights), got {type(experts).__name__} ({error})") from error
    expected = networks[last](x)
    tolerance = (1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2) * float(expected.abs().max()) + 1e-30
    if not isinstance(y, Tensor) or y.shape != expected.shape or float((y - expected).abs().max()) > tolerance:
        raise ValueError(
            f"moe: expected experts down(act(gate(x)) · up(x)), got {type(experts).__name__}, which computes another"
        )


def _of_ours(experts: Experts, expert: int) -> FeedForward:
    first, down = experts.get_parameter(experts._first)[expert].detach(), experts.down_proj[expert].detach()
    if experts.transposed:
        first, down = first.mT, down.mT
    bias = getattr(experts, f"{experts._first}_bias")
    rows = None if bias is None else bias[expert].detach()
    if experts.interleaved:
        first = torch.cat((first[0::2], first[1::2]))
        rows = None if rows is None else torch.cat((rows[0::2], rows[1::2]))
    made = _network(first, down, activation=experts.activation, gated=experts.gated)
    if rows is None:
        return made
    gate, up = rows.chunk(2) if experts.gated else (None, rows)
    assert experts.down_proj_bias is not None
    return replace(made, gate_bias=gate, up_bias=up, down_bias=experts.down_proj_bias[expert].detach())


def _network(first: Tensor, down: Tensor, *, activation: str, gated: bool = True) -> FeedForward:
    gate, up = first.detach().chunk(2) if gated else (None, first.detach())
    return FeedForward(gate, up, down.detach(), activation)


def side_by_side(networks: Sequence[FeedForward]) -> FeedForward:
    """The sum of networks as one: their neurons follow each other. Missing biases are zeros if there are others.

    Raises ValueError for networks with different activations, or of which some are gated.
    """
    for name in ("activation", "gated"):
        if len(kinds := list(dict.fromkeys(getattr(network, name) for network in networks))) > 1:
            raise ValueError(f"moe: expected experts and shared experts with {name}={kinds[0]}, got {kinds[1]}")
    if any(network.has_bias for network in networks):
        networks = [network.biased() for network in networks]

    def rows(name: str, dim: int = 0) -> Tensor | None:
        parts = [getattr(network, name) for network in networks]
        return None if parts[0] is None else torch.cat(parts, dim)

    up, down = rows("up"), rows("down", 1)
    assert up is not None
    assert down is not None
    biases = [network.down_bias for network in networks if network.down_bias is not None]
    total = torch.stack(biases).sum(0) if biases else None
    return replace(
        networks[0], gate=rows("gate"), up=up, down=down, gate_bias=rows("gate_bias"), up_bias=rows("up_bias"),
        down_bias=total,
    )  # fmt: skip


def _combined(networks: Sequence[FeedForward], shares: Sequence[float]) -> FeedForward:
    def total(name: str) -> Any:
        parts = [getattr(network, name) for network in networks]
        if parts[0] is None:
            return None
        wide = torch.float64 if parts[0].dtype is torch.float64 else torch.float32
        return sum(share * part.to(wide) for share, part in zip(shares, parts, strict=True)).to(parts[0].dtype)

    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    return replace(networks[0], **{name: total(name) for name in names})


def _low_rank(network: FeedForward, rank: int) -> FeedForward:
    def best(matrix: Tensor | None) -> Any:
        if matrix is None:
            return None
        u, s, v = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
        return ((u[:, :rank] * s[:rank]) @ v[:rank]).to(matrix.dtype)

    return replace(network, gate=best(network.gate), up=best(network.up), down=best(network.down))


def _best_neurons(networks: Sequence[FeedForward]) -> FeedForward:
    """I / E neurons of each expert, one more of the first I mod E."""
    width = max(network.intermediate_size for network in networks)
    parts = []
    for expert, network in enumerate(networks):
        count = width // len(networks) + (expert < width % len(networks))
        norm = network.up.float().norm(dim=1) * network.down.float().norm(dim=0)
        if network.gate is not None:
            norm = norm * network.gate.float().norm(dim=1)
        parts.append(network.neurons(norm.argsort(descending=True, stable=True)[:count].sort().values))
    made = side_by_side(parts)
    return made if made.down_bias is None else replace(made, down_bias=made.down_bias / len(networks))
