# SPDX-License-Identifier: BSD-3-Clause
"""MergedExperts: averages the weights of the chosen experts once per sequence, and runs one expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.experts import Experts
from switchgear.functional import moe
from switchgear.reference import weight_dtype


class MergedExperts(nn.Module):
    """y = act(x · (Σ_k g_k W_k)ᵀ + Σ_k g_k b_k) …, with one set of experts and weights g per sequence (MEO,
    arXiv:2310.09832).

        layer = MergedExperts(switchgear.Router(256, 16, top_k=4), switchgear.Experts(256, 128, 16))
        y = layer(x)                                    # x [B,L,H]: each row is a sequence

    The router sees one vector per sequence: the mean of its tokens, or with pooling "attention" their average under a
    learned softmax (a token-level attention; its form is unverified). Each sequence costs one expert, and K experts'
    weights to read. A token's output depends on the tokens of its own sequence only.

    Args: router: a module [B,H] -> Routing of B sequences. experts: Experts. pooling: "mean" or "attention".

    Parameters: attention.weight [1,H] with "attention", and those of router and experts.
    """

    def __init__(self, router: nn.Module, experts: Experts, *, pooling: str = "mean") -> None:
        super().__init__()
        if pooling not in ("mean", "attention"):
            raise ValueError(f"pooling: expected 'mean' or 'attention', got {pooling!r}")
        self.router, self.experts, self.pooling = router, experts, pooling
        self.attention = None
        if pooling == "attention":
            like = experts.down_proj
            self.attention = nn.Linear(experts.hidden_size, 1, bias=False, device=like.device, dtype=like.dtype)
            nn.init.zeros_(self.attention.weight)  # starts as the mean

    def merge(self, parameter: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Σ_k topk_weights[b,k] · parameter[topk_ids[b,k]], [B, …]."""
        weights = topk_weights.masked_fill(topk_ids < 0, 0).to(parameter.dtype)
        rows = parameter.flatten(1)
        merged = F.embedding_bag(topk_ids.clamp(min=0).long(), rows, per_sample_weights=weights, mode="sum")
        return merged.view(len(topk_ids), *parameter.shape[1:])

    def forward(self, hidden_states: Tensor, sequence_ids: Tensor | None = None, num_sequences: int = 0) -> Tensor:
        """hidden_states [B,L,H] -> [B,L,H]; or [T,H] with sequence_ids [T] in [0, num_sequences), of sequences or
        tasks. Experts are merged once for each."""
        experts = self.experts
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if sequence_ids is None:
            if hidden_states.dim() != 3:
                raise ValueError(
                    f"hidden_states: expected [B,L,H] without sequence_ids, got {list(hidden_states.shape)}"
                )
            num_sequences, length, _ = hidden_states.shape
            sequence_ids = torch.arange(num_sequences, device=rows.device).repeat_interleave(length)
        else:
            sequence_ids = sequence_ids.reshape(-1)
        routing = self.router(self.pool(rows, sequence_ids.long(), num_sequences))
        ids, weights = routing.topk_ids, routing.topk_weights

        def merged(name: str) -> Tensor | None:
            parameter: Tensor | None = getattr(experts, name)
            return None if parameter is None else self.merge(parameter, ids, weights)

        gate_up, down = merged(experts._first), merged("down_proj")
        assert gate_up is not None
        assert down is not None
        y = moe(
            rows,
            gate_up.mT if experts.transposed else gate_up,
            down.mT if experts.transposed else down,
            sequence_ids.int()[:, None],
            rows.new_ones(len(rows), 1, dtype=torch.float32),
            activation=experts.activation,
            gated=experts.gated,
            interleaved=experts.interleaved,
            gate_up_bias=merged(f"{experts._first}_bias"),
            down_bias=merged("down_proj_bias"),
            alpha=experts.alpha,
            limit=experts.limit,
        )
        return y.view(hidden_states.shape)

    def pool(self, rows: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
        """[B,H], one vector per sequence; zeros for sequences without tokens."""
        weight = torch.ones_like(rows[:, :1])
        if self.attention is not None:
            score = self.attention(rows)
            score = score.to(weight_dtype(score.dtype))
            highest = score.new_full((num_sequences, 1), -torch.inf)
            highest = highest.scatter_reduce(0, sequence_ids[:, None], score.detach(), "amax")
            weight = (score - highest[sequence_ids]).exp().to(rows.dtype)
        total = weight.new_zeros(num_sequences, 1).index_add(0, sequence_ids, weight)
        pooled = rows.new_zeros(num_sequences, rows.shape[1]).index_add(0, sequence_ids, weight * rows)
        return pooled / torch.where(total == 0, torch.ones_like(total), total)
