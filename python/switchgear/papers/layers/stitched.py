# SPDX-License-Identifier: BSD-3-Clause
"""StitchLayer: gated linear maps between a hub and experts that are networks of their own; Stitched: layers of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import FloatDtype, Size, Sizes, checked
from switchgear.layers.common import check_rows
from switchgear.reference import wide


class StitchLayer(nn.Module):
    """Merges hidden states of experts into those of a hub, or those of the hub into the experts' (Branch-Train-Stitch,
    arXiv:2502.00075). Hub and experts are networks with an interface of their own, as frozen language models; stitch
    layers stand between their blocks, of either kind in turn, and are trained.

    Into the hub, with w the softmax of `gate` over hub and experts: hub ← w_0 · hub + Σ_i w_i · W_i · x_i.
    Into the experts, with g the sigmoid of `gate`: x_i ← (1 - g_i) · x_i + g_i · W_i · hub.

    Args:
        hub_size, expert_sizes: H, and D_i of each of N experts.
        into: "hub" or "experts".

    Parameters: gate.weight [1+N,H] into the hub, [N,H] into the experts; projections.{i}.weight [H,D_i], or [D_i,H].
    """

    @checked
    def __init__(
        self,
        hub_size: Size,
        expert_sizes: Sizes,
        into: Literal["hub", "experts"] = "hub",
        *,
        device: torch.device | str | None = None,
        dtype: FloatDtype | None = None,
    ) -> None:
        super().__init__()
        self.hub_size, self.expert_sizes, self.into = hub_size, list(expert_sizes), into

        def linear(size_in: int, size_out: int) -> nn.Linear:
            return nn.Linear(size_in, size_out, bias=False, device=device, dtype=dtype)

        into_hub = into == "hub"
        self.gate = linear(hub_size, len(self.expert_sizes) + into_hub)
        sizes = [(size, hub_size) if into_hub else (hub_size, size) for size in self.expert_sizes]
        self.projections = nn.ModuleList(linear(*pair) for pair in sizes)

    def forward(self, hub: Tensor, experts: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
        """The states of hub [...,H] and experts [...,D_i] after this layer; None is an expert that does not take part.

        Raises ValueError for another number of experts, or other sizes.
        """
        check_rows(hub, self.hub_size, self.gate.weight.dtype)
        given = [None if x is None else tuple(x.shape) for x in experts]
        wanted = [(*hub.shape[:-1], size) for size in self.expert_sizes]
        if len(given) != len(wanted) or any(x not in (None, size) for x, size in zip(given, wanted, strict=True)):
            raise ValueError(f"experts: expected shapes {wanted}, got {given}")
        logits = wide(self.gate(hub))
        if self.into == "experts":
            gates = logits.sigmoid().to(hub.dtype)[..., None].unbind(-2)
            parts = zip(experts, gates, self.projections, strict=True)
            return hub, [None if x is None else (1 - g) * x + g * project(hub) for x, g, project in parts]
        absent = torch.tensor([False, *(x is None for x in experts)], device=hub.device)
        own, *weights = logits.masked_fill(absent, -torch.inf).softmax(-1).to(hub.dtype)[..., None].unbind(-2)
        merged = own * hub
        for x, weight, project in zip(experts, weights, self.projections, strict=True):
            merged = merged if x is None else merged + weight * project(x)
        return merged, list(experts)

    def extra_repr(self) -> str:
        return f"into={self.into}"


class Stitched(nn.Module):
    """A hub and experts of equally many blocks, all of hidden size H, with a StitchLayer after each block, of either
    kind in turn; the last one merges into the hub, whose state is the output.

    Args:
        hidden_size: H.
        hub: its blocks, modules [...,H] -> [...,H]. experts: those of each expert.

    Parameters: those of blocks, under hub.{s} and experts.{i}.{s}, and stitches.{s}.
    """

    @checked
    def __init__(
        self,
        hidden_size: Size,
        hub: Sequence[nn.Module],
        experts: Sequence[Sequence[nn.Module]],
        *,
        device: torch.device | str | None = None,
        dtype: FloatDtype | None = None,
    ) -> None:
        super().__init__()
        if not experts or any(len(blocks) != len(hub) for blocks in experts):
            raise ValueError(f"experts: expected {len(hub)} blocks each, as the hub, got {[*map(len, experts)]}")
        self.hidden_size, self.hub = hidden_size, nn.ModuleList(hub)
        self.experts = nn.ModuleList(nn.ModuleList(blocks) for blocks in experts)
        kinds: tuple[Literal["hub", "experts"], ...] = ("hub", "experts")
        self.stitches = nn.ModuleList(
            StitchLayer(hidden_size, [hidden_size] * len(experts), kinds[left % 2], device=device, dtype=dtype)
            for left in reversed(range(len(hub)))
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[...,H] -> [...,H]"""
        check_rows(hidden_states, self.hidden_size)
        hub, states = hidden_states, [hidden_states] * len(self.experts)
        stages: Iterable[Any] = zip(self.hub, zip(*self.experts, strict=True), self.stitches, strict=True)
        for block, blocks, stitch in stages:
            hub, states = stitch(block(hub), [own(x) for own, x in zip(blocks, states, strict=True)])
        return hub
