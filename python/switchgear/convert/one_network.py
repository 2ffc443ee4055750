# SPDX-License-Identifier: BSD-3-Clause
"""The networks of a layer's experts, combined into one (OneS, arXiv:2201.10890)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from switchgear.convert.checks import finite_numbers
from switchgear.convert.ffn import FeedForward
from switchgear.reference import check_choice, check_size, wide

METHODS = ("sum", "mean", "topk", "svd")


def check_options(method: str, weights: Any, rank: Any, num_experts: int) -> tuple[float, ...] | None:
    """The weights as numbers. Raises TypeError or ValueError for an option of to_dense that is wrong, or not used by
    the method."""
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
    return shares


def one_network(
    networks: Sequence[FeedForward], method: str, weights: Sequence[float] | None = None, rank: int | None = None
) -> FeedForward:
    """The network that a method of to_dense makes of those of the experts.

    Raises ValueError for networks of different widths unless the method is "topk".
    """
    widths = {network.intermediate_size for network in networks}
    if method != "topk" and len(widths) > 1:
        raise ValueError(f"moe: expected experts of one width for method={method!r}, got {sorted(widths)}")
    if method == "topk":
        return _best_neurons(networks)
    if method == "svd":
        smaller = min(networks[0].hidden_size, networks[0].intermediate_size)
        kept = -(-smaller // len(networks)) if rank is None else rank
        return _weighted_sum([_low_rank(network, kept) for network in networks], [1.0] * len(networks))
    each = weights or (1.0,) * len(networks)
    total = sum(each) if method == "mean" else 1.0
    return _weighted_sum(networks, [share / total for share in each])


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


def _weighted_sum(networks: Sequence[FeedForward], shares: Sequence[float]) -> FeedForward:
    def combined(name: str) -> Any:
        parts = [getattr(network, name) for network in networks]
        if parts[0] is None:
            return None
        total: Any = sum(share * wide(part) for share, part in zip(shares, parts, strict=True))
        return total.to(parts[0].dtype)

    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    return replace(networks[0], **{name: combined(name) for name in names})


def _low_rank(network: FeedForward, rank: int) -> FeedForward:
    def best(matrix: Tensor | None) -> Any:
        if matrix is None:
            return None
        u, s, v = torch.linalg.svd(wide(matrix), full_matrices=False)
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
