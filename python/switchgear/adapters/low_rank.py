# SPDX-License-Identifier: BSD-3-Clause
"""LowRankExperts: E pairs of narrow matrices, each an adapter (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.adapters.linear_adapters import LowRank
from switchgear.backends import in_autocast
from switchgear.functional import as_number, combine, grouped_gemm, plan
from switchgear.reference import check_finite, check_fraction, check_range, check_size, weight_dtype
from switchgear.routing.context import can_be_read
from switchgear.routing.scores import init_uniform
from switchgear.utils.buffers import FillsBuffers

# The columns of A per choice, E·r / K, up to which the product with all experts takes less time than that with chosen
# ones. Measured with 512 tokens, H = 2048, ranks of 4 to 32, bfloat16 and float32, two cores: 50 to 120.
FEW_COLUMNS = 64


class LowRankExperts(FillsBuffers):
    """y = Σ_k w_k · alpha_e / r_e · B_e A_e x, where e is the expert topk_ids[k]. Same interface as Experts.

    Args:
        in_features, out_features: sizes of x and y.
        num_experts: E.
        rank: r, or the rank of each expert.
        alpha: an expert's output is multiplied by alpha / rank; one for all, or one for each; rank if None.
        dropout: probability of zeroing an element of x, in training; one draw for all experts.

    Parameters: lora_A [E,r,in] (uniform like torch.nn.Linear) and lora_B [E,r,out], which is B transposed (zeros, so
    the output is zero at first). r is the largest rank; an expert of a lower one has zeros in its last rows, and their
    gradients are zero.

    Two products take all experts, their columns scaled by the weights, if a token uses many of them or if they have few
    columns in all; they read every expert, so one that is NaN or infinite reaches all tokens. Otherwise each token is
    multiplied by its own experts only.
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        rank: int | Sequence[int],
        *,
        alpha: float | Sequence[float] | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, out_features = check_size("in_features", in_features), check_size("out_features", out_features)
        num_experts = check_size("num_experts", num_experts)
        self.hidden_size, self.out_features, self.num_experts = in_features, out_features, num_experts
        self.ranks: tuple[int, ...] = _per_expert("rank", rank, num_experts)
        for size in self.ranks:
            check_size("rank", size)
        alphas = self.ranks if alpha is None else _per_expert("alpha", alpha, num_experts)
        self.alphas = tuple(as_number("alpha", one) for one in alphas)
        for one in self.alphas:
            check_finite("alpha", one)
        check_fraction("dropout", as_number("dropout", dropout))
        self.dropout = dropout
        largest = max(self.ranks)
        self.lora_A = nn.Parameter(torch.empty(num_experts, largest, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(num_experts, largest, out_features, device=device, dtype=dtype))
        self.register_buffer("scale", torch.empty(num_experts, device=device), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A is uniform within ±1/√in, B is zero."""
        init_uniform(self.lora_A, self.hidden_size)
        nn.init.zeros_(self.lora_B)
        if min(self.ranks) < max(self.ranks):
            rows = torch.arange(self.lora_A.shape[1], device=self.lora_A.device)
            ranks = torch.tensor(self.ranks, device=self.lora_A.device)
            self.lora_A.masked_fill_((rows >= ranks[:, None])[..., None], 0)
        self.fill_buffers(self.scale.device)

    def fill_buffers(self, device: torch.device) -> None:
        """The scale of each expert."""
        values = [alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True)]
        self.scale = torch.tensor(values, dtype=weight_dtype(self.lora_A.dtype), device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankExperts:
        super()._apply(fn, recurse)
        self.fill_buffers(self.scale.device)  # not in the dtype of the module, which would round it
        return self

    @torch.no_grad()
    def load(self, pairs: Sequence[LowRank]) -> None:
        """Copies adapters of these experts' ranks."""
        self.lora_A.zero_()
        self.lora_B.zero_()
        for expert, pair in enumerate(pairs):
            self.lora_A[expert, : pair.rank].copy_(pair.a)
            self.lora_B[expert, : pair.rank].copy_(pair.b.T)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [..., in], topk_ids [..., K] (-1 for none) and topk_weights [..., K] -> [..., out]."""
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states: expected shape [..., {self.hidden_size}], got {list(hidden_states.shape)}"
            )
        x = hidden_states.reshape(-1, self.hidden_size)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        has_autocast = in_autocast(x.device.type)
        if not has_autocast:
            x = x.to(self.lora_A.dtype)
        top_k = topk_ids.shape[-1]
        topk_ids, topk_weights = topk_ids.reshape(len(x), top_k), topk_weights.reshape(len(x), top_k)
        self.fill_on(x.device)
        product = self._all if self._is_dense(top_k) else self._chosen
        y = product(x, topk_ids, topk_weights)
        y = y.view(*hidden_states.shape[:-1], self.out_features)
        return y if has_autocast else y.to(hidden_states.dtype)

    def _is_dense(self, top_k: int) -> bool:
        """Whether the product with all experts is at most twice the work, or takes less time."""
        rank = self.lora_A.shape[1]
        return 2 * top_k >= self.num_experts or self.num_experts * rank <= FEW_COLUMNS * top_k

    def _all(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        if can_be_read(topk_ids):
            check_range("topk_ids", topk_ids, -1, self.num_experts)
        gates = topk_weights.new_zeros(len(x), self.num_experts + 1)
        gates = gates.scatter_add(1, topk_ids.long() + 1, topk_weights)[:, 1:] * self.scale
        h = _product(x, self.lora_A.flatten(0, 1))
        h = (h.view(len(x), self.num_experts, h.shape[1] // self.num_experts) * gates[..., None]).to(h.dtype).flatten(1)
        return _product(h, self.lora_B.flatten(0, 1).mT)

    def _chosen(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        slots = plan(topk_ids, self.num_experts)
        weights = topk_weights * self.scale[topk_ids.clamp(min=0).long()]
        h = grouped_gemm(x, self.lora_A, slots.expert_offsets, token_indices=slots.token_indices)
        return combine(grouped_gemm(h, self.lora_B.mT, slots.expert_offsets), slots, weights)

    def extra_repr(self) -> str:
        ranks = sorted(set(self.ranks))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        text = f"{self.hidden_size}, {self.out_features}, num_experts={self.num_experts}, rank={rank}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, whose bits do not depend on the other rows."""
    offsets = torch.arange(2, dtype=torch.int32, device=x.device) * len(x)
    return grouped_gemm(x, weight[None], offsets)


def _per_expert(name: str, values: Any, num_experts: int) -> tuple[Any, ...]:
    if not isinstance(values, Sequence):
        return (values,) * num_experts
    if len(values) != num_experts:
        raise ValueError(f"{name}: expected {num_experts} (num_experts), got {len(values)}")
    return tuple(values)
