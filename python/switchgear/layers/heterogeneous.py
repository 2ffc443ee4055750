# SPDX-License-Identifier: BSD-3-Clause
"""HeterogeneousExperts: experts of different widths, without padding, on the kernels for equal widths."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switchgear.checks import Finite, FloatDtype, Size, Sizes, checked
from switchgear.functional.arguments import Limit
from switchgear.layers.common import experts_class, refuse_unknown_experts
from switchgear.reference.activations import Activation
from switchgear.utils.modules import FillsBuffers
from switchgear.weights.module import check_plain

if TYPE_CHECKING:
    from switchgear.parallel import ExpertParallel


class HeterogeneousExperts(FillsBuffers):
    """Experts of different intermediate sizes (HMoE, arXiv:2408.10681).

        experts = HeterogeneousExperts(256, [72, 88, 104, 120, 136, 152, 168, 184])
        y = experts(x, routing.topk_ids, routing.topk_weights)

    The units of an intermediate layer are summed, so an expert of width I_e is the sum of I_e / u slices of width u.
    All slices are in one packed tensor, and a token that chose expert e is sent to each of its slices. The work is
    Σ I_e over the chosen experts, without padding. With equal widths each expert is one slice, and the result equals
    that of Experts bit for bit.

    Args:
        hidden_size: H. intermediate_sizes: I_e of each expert.
        unit: u, a divisor of all widths; default: their greatest common divisor. At least 16 is best for the kernels.
        activation, gated, interleaved, transposed, alpha, limit: options of Experts (no bias: each slice would add it).
        parallel: distribute the experts over these ranks (switchgear.parallel.ExpertParallel). All slices of an expert
            are on one rank, so that a token is still sent once.

    Parameters: those of Experts(H, u, Σ I_e / u), in `slices`; `weights_of(e)` returns those of one expert.
    """

    first_slice: Tensor
    num_slices: Tensor

    @checked
    def __init__(
        self,
        hidden_size: Size,
        intermediate_sizes: Sizes,
        *,
        unit: Size | None = None,
        activation: Activation = "silu",
        gated: bool = True,
        interleaved: bool = False,
        transposed: bool = False,
        alpha: Finite = 1.702,
        limit: Limit | None = None,
        parallel: ExpertParallel | None = None,
        device: torch.device | str | None = None,
        dtype: FloatDtype | None = None,
    ) -> None:
        super().__init__()
        unit = math.gcd(*intermediate_sizes) if unit is None else unit
        if any(width % unit for width in intermediate_sizes):
            raise ValueError(f"unit: expected a divisor of {list(intermediate_sizes)}, got {unit}")
        self.hidden_size, self.intermediate_sizes, self.unit = hidden_size, tuple(intermediate_sizes), unit
        self.num_experts = len(self.intermediate_sizes)
        self._counts = [width // unit for width in self.intermediate_sizes]
        self.most_slices = max(self._counts)
        options: dict[str, Any] = {
            "activation": activation, "gated": gated, "interleaved": interleaved, "transposed": transposed,
            "alpha": alpha, "limit": limit, "device": device, "dtype": dtype,
        }  # fmt: skip
        self._local = list(range(sum(self._counts)))  # slices
        if parallel is not None:
            placement = parallel.placement(self.num_experts).repeat(self._counts)
            self._local = list(placement.experts_of_rank[parallel.rank])
            options |= {"parallel": parallel, "placement": placement}
        self.slices = experts_class(parallel)(hidden_size, unit, sum(self._counts), **options)
        counts = [count for count in self._counts for _ in range(count)]
        self.slices.slice_counts = [counts[at] for at in self._local]
        for name in ("first_slice", "num_slices"):
            self.register_buffer(
                name, torch.empty(self.num_experts, dtype=torch.int32, device=device), persistent=False
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises each expert like two torch.nn.Linear: within ±1/√H, then ±1/√I_e."""
        self.fill_buffers(self.num_slices.device)
        self.slices.reset_parameters()

    def fill_buffers(self, device: torch.device) -> None:
        """The slices of each expert."""
        first = [0, *accumulate(self._counts)][:-1]
        self.first_slice = torch.tensor(first, dtype=torch.int32, device=device)
        self.num_slices = torch.tensor(self._counts, dtype=torch.int32, device=device)

    def slice_ids(self, topk_ids: Tensor) -> Tensor:
        """[T, K·most_slices] int32: the slices of the chosen experts [T,K], padded with -1."""
        refuse_unknown_experts(topk_ids, self.num_experts)
        self.fill_on(topk_ids.device)
        chosen = topk_ids.clamp(min=0)
        place = torch.arange(self.most_slices, dtype=torch.int32, device=topk_ids.device)
        inside = (place < self.num_slices[chosen][..., None]) & (topk_ids >= 0)[..., None]
        return torch.where(inside, self.first_slice[chosen][..., None] + place, -1).flatten(-2)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [..., H], topk_ids and topk_weights [..., K] -> [..., H]."""
        weights = topk_weights[..., None].expand(*topk_weights.shape, self.most_slices).flatten(-2)
        y: Tensor = self.slices(hidden_states, self.slice_ids(topk_ids), weights)
        return y

    def weights_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """One expert's projections: gate and up [2·I_e,H] (gates first; [I_e,H] if not gated) and down [H,I_e].

        Raises:
            ValueError: if it is on another rank, or the parameters are not all: stored weights, adapters, slices that
                train alone.
        """
        check_plain("slices", self.slices)
        first, count = int(self.first_slice[expert]), int(self.num_slices[expert])
        if first not in self._local:
            raise ValueError(f"expert: expected one of this rank, got {expert}")
        first = self._local.index(first)
        slices = self.slices
        gate_up, down = (
            parameter[first : first + count].mT if slices.transposed else parameter[first : first + count]
            for parameter in (slices.get_parameter(slices._first), slices.down_proj)
        )
        if slices.gated:
            gate, up = (gate_up[:, 0::2], gate_up[:, 1::2]) if slices.interleaved else gate_up.chunk(2, 1)
            gate_up = torch.cat((gate.flatten(0, 1), up.flatten(0, 1)))
        else:
            gate_up = gate_up.flatten(0, 1)
        return gate_up, down.transpose(0, 1).flatten(1)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {list(self.intermediate_sizes)}, unit={self.unit}"
