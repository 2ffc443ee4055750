# SPDX-License-Identifier: BSD-3-Clause
"""Scores of something larger than a token: a task, an instance, a sequence. All of its tokens get the same experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.complaints import at_least, check_tensor
from switchgear.functional import as_number, gate
from switchgear.reference import check_finite, wide
from switchgear.routing.context import Context, Score, check_positive, made, sequences


class FromEmbedding(nn.Module):
    """Logits from the embedding of a task or instance, one row per token or sequence (Context.embedding), so that all
    of its tokens get the same experts (task-level MoE, arXiv:2205.12701).

    dim: D of the embedding. Parameters: weight [E,D], bias [E] if bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        dim: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at_least(1, "num_experts", num_experts)
        at_least(1, "dim", dim)
        self.linear = nn.Linear(dim, num_experts, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        embedding = context.require("embedding", "FromEmbedding")
        return per_token(gate(embedding, self.linear.weight, self.linear.bias), context, x)


def per_token(rows: Tensor, context: Context, x: Tensor) -> Tensor:
    """rows [B,E] or [T,E] -> [T,E]: the row of each token's sequence. A single row applies to all tokens."""
    if rows.dim() == 1 or rows.shape[0] == 1:
        return rows.reshape(1, -1).expand(x.shape[0], -1)
    if rows.shape[0] == x.shape[0]:
        return rows
    index, count = sequences(context, x.shape[0], x.device)
    if count != rows.shape[0]:
        raise ValueError(f"embedding: expected {x.shape[0]} rows (tokens) or {count} (sequences), got {rows.shape[0]}")
    return rows[index]


class PerSequence(nn.Module):
    """Applies another score to the mean of x over each sequence: one decision for all of its tokens.

    Args: score: an object; or a class or partial, with hidden_size and num_experts, which the router passes.
    """

    def __init__(
        self,
        score: Score | Callable[..., Any],
        hidden_size: int | None = None,
        num_experts: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.score = made(score, hidden_size, num_experts, device=device, dtype=dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        index, count = sequences(context, x.shape[0], x.device)
        rows = wide(x)
        total = rows.new_zeros(count, x.shape[1]).index_add(0, index, rows)
        size = rows.new_zeros(count).index_add(0, index, torch.ones_like(rows[:, 0]))
        mean = (total / size.clamp(min=1)[:, None]).to(x.dtype)
        logits: Tensor = self.score(mean, replace(context, noise=None))[index]  # whose rows are sequences
        return logits


class ClusterPrior(nn.Module):
    """weight · cos(embedding, centroid) / tau: similarity of the instance to clusters of the corpus, one per expert, to
    add to another score (Intuition-MoR1E, arXiv:2404.08985; its form is unverified). Needs Context.embedding.

    centroids: [E,D], a buffer. The router passes hidden_size and num_experts.
    """

    centroids: Tensor

    def __init__(
        self,
        centroids: Tensor,
        hidden_size: int | None = None,
        num_experts: int | None = None,
        *,
        weight: float = 1.0,
        tau: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_tensor("centroids", centroids)
        if centroids.dim() != 2:
            raise ValueError(f"centroids: expected shape [E,D], got {list(centroids.shape)}")
        check_finite("weight", as_number("weight", weight))
        if num_experts not in (None, len(centroids)):
            raise ValueError(f"centroids: expected {num_experts} rows, got {len(centroids)}")
        check_positive("tau", tau)
        self.register_buffer("centroids", centroids.to(device=device, dtype=dtype, copy=True))
        self.weight, self.tau = weight, tau

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        embedding = context.require("embedding", "ClusterPrior")
        near = gate(F.normalize(embedding, dim=-1), F.normalize(self.centroids, dim=-1).to(embedding.dtype))
        return per_token(self.weight / self.tau * near, context, x)
