# SPDX-License-Identifier: BSD-3-Clause
"""MergedExperts: averages the weights of the chosen experts once per sequence, and runs one expert."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.checks import Count, checked
from switchgear.experts import Experts
from switchgear.functional import Routing, combine, glu, grouped_gemm, moe, plan
from switchgear.layers.common import WithLosses, check_rows
from switchgear.ops import GluOptions
from switchgear.reference import wide
from switchgear.routing.context import context_of, sequences
from switchgear.weights.adapted import has_adapters
from switchgear.weights.selected import selection_of


class _BiasFromZero(nn.Linear):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _FromZero(_BiasFromZero):
    """Starts at zero: attention as the mean, a bottleneck as nothing."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class MergedExperts(WithLosses):
    """y = act(x · (Σ_k g_k W_k)ᵀ + Σ_k g_k b_k) …, with one set of experts and weights g per sequence (MEO,
    arXiv:2310.09832).

        layer = MergedExperts(switchgear.Router(256, 16, top_k=4, normalize=True), switchgear.Experts(256, 128, 16))
        y = layer(x)                                    # x [B,L,H]: each row is a sequence

    The paper's g is a softmax over the chosen logits, which is what normalize=True gives. Weights that sum to s < 1
    scale both projections, so a gated expert shrinks by up to s³.

    The router sees one vector per sequence: the mean of its tokens, as in the authors' code, or with pooling
    "attention" (ours) their average under a learned softmax. Each sequence costs one expert, and K experts' weights to
    read. A token's output depends on the tokens of its own sequence only.

    Args: router: a module [B,H] -> Routing of B sequences. experts: Experts. down_router: a router [B,I] of its own for
    down_proj, which sees the pooled input of that projection, as in the authors' code; if None, both projections use
    the same weights. pooling: "mean" or "attention". bottleneck: width of a bottleneck added to the input before the
    router, x + relu(x · Aᵀ + a) · Bᵀ + b, 0 for none: the token-level attention of the authors' code, of width
    H / 64, which has another before down_proj.

    Parameters: attention.weight [1,H] with "attention"; bottleneck_in.weight [width,H] and bias [width],
    bottleneck_out.weight [H,width] and bias [H], all but bottleneck_in.weight initially zero; those of router,
    down_router and experts.
    """

    @checked
    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        *,
        down_router: nn.Module | None = None,
        pooling: Literal["mean", "attention"] = "mean",
        bottleneck: Count = 0,
    ) -> None:
        super().__init__()
        for name, module, width in (
            ("router", router, experts.hidden_size),
            ("down_router", down_router, experts.intermediate_size),
        ):
            seen = getattr(module, "hidden_size", width)
            if seen != width:
                raise ValueError(f"{name}: expected a router of {width} features, got {seen}")
        self.router, self.experts, self.down_router, self.pooling = router, experts, down_router, pooling
        like = experts.down_proj

        def linear(kind: type[nn.Linear], size_in: int, size_out: int, bias: bool = True) -> nn.Linear:
            return kind(size_in, size_out, bias=bias, device=like.device, dtype=like.dtype)

        self.attention = linear(_FromZero, experts.hidden_size, 1, bias=False) if pooling == "attention" else None
        self.bottleneck_in = linear(_BiasFromZero, experts.hidden_size, bottleneck) if bottleneck else None
        self.bottleneck_out = linear(_FromZero, bottleneck, experts.hidden_size) if bottleneck else None

    def merge(self, parameter: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Σ_k topk_weights[b,k] · parameter[topk_ids[b,k]], [B, …]; one of zeros if there are no sequences."""
        weights = topk_weights.masked_fill(topk_ids < 0, 0).to(parameter.dtype)
        rows = parameter.flatten(1)
        merged = F.embedding_bag(topk_ids.clamp(min=0).long(), rows, per_sample_weights=weights, mode="sum")
        if not len(topk_ids):
            merged = torch.cat((merged, merged.new_zeros(1, rows.shape[1])))
        return merged.view(len(merged), *parameter.shape[1:])

    def forward(
        self, hidden_states: Tensor, sequence_ids: Tensor | None = None, num_sequences: int | None = None
    ) -> Tensor:
        """hidden_states [B,L,H] -> [B,L,H]; or [T,H] with sequence_ids [T] of sequences or tasks. Experts are merged
        once for each. num_sequences: as in `Context`."""
        experts = self.experts
        check_rows(hidden_states, experts.hidden_size)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if sequence_ids is None:
            if hidden_states.dim() != 3:
                raise ValueError(
                    f"hidden_states: expected [B,L,H] without sequence_ids, got {list(hidden_states.shape)}"
                )
            num_sequences, length, _ = hidden_states.shape
            ids = torch.arange(num_sequences, device=rows.device).repeat_interleave(length)
        else:
            known = context_of(sequence_ids=sequence_ids, num_sequences=num_sequences)
            ids, num_sequences = sequences(known, len(rows), rows.device)
        if self.bottleneck_in is not None and self.bottleneck_out is not None:
            rows = rows + self.bottleneck_out(self.bottleneck_in(rows).relu())
        share = self.shares(rows, ids, num_sequences)
        first = self.router(pooled(rows, share, ids, num_sequences))
        gate_up, gate_up_bias = self._merged(experts._first, first)
        options: dict[str, Any] = {name: getattr(experts, name) for name in GluOptions._fields}
        if self.down_router is None:
            down, down_bias = self._merged("down_proj", first)
            self.losses = first.losses
            ones = rows.new_ones(len(rows), 1, dtype=torch.float32)
            options |= {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
            y = moe(rows, gate_up, down, ids.int()[:, None], ones, **options)
            return y.view(hidden_states.shape)
        layout = plan(ids.int()[:, None], len(gate_up))  # the second router needs the hidden activations
        h = grouped_gemm(rows, gate_up, layout.expert_offsets, bias=gate_up_bias, token_indices=layout.token_indices)
        a = glu(h, **options)
        at = layout.token_indices.long()
        second = self.down_router(pooled(a, share[at], ids[at], num_sequences))
        down, down_bias = self._merged("down_proj", second)
        self.losses = {**first.losses, **{f"down_{name}": loss for name, loss in second.losses.items()}}
        y = combine(grouped_gemm(a, down, layout.expert_offsets, bias=down_bias), layout)
        return y.view(hidden_states.shape)

    def _merged(self, name: str, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """The merged weights [B,out,in] and bias [B,out] of a projection."""
        if has_adapters(self.experts):
            raise ValueError("experts: expected none with adapters, whose weights cannot be averaged; merge them first")
        if selection_of(self.experts) is not None:
            raise ValueError("experts: expected none that train alone; call finetune.unfreeze(model) first")
        ids, weights = routing.topk_ids, routing.topk_weights
        bias = getattr(self.experts, f"{name}_bias")
        merged = self.merge(getattr(self.experts, name), ids, weights)
        merged = merged.mT if self.experts.transposed else merged
        return merged, None if bias is None else self.merge(bias, ids, weights)

    def shares(self, rows: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
        """[T,1]: the share of each token in the average of its sequence."""
        # In 16 bits, sums of many tokens lose digits, and those of ones end at 256.
        weight = wide(torch.ones_like(rows[:, :1]))
        if self.attention is not None:
            score = wide(self.attention(rows))
            highest = score.new_full((num_sequences, 1), -torch.inf)
            highest = highest.scatter_reduce(0, sequence_ids[:, None], score.detach(), "amax")
            weight = (score - highest[sequence_ids]).exp()
        total = weight.new_zeros(num_sequences, 1).index_add(0, sequence_ids, weight)
        return weight / total[sequence_ids]


def pooled(rows: Tensor, share: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """[B,…]: Σ share · rows over the tokens of each sequence; zeros for sequences without tokens."""
    parts = share * rows
    return parts.new_zeros(num_sequences, rows.shape[1]).index_add(0, sequence_ids, parts).to(rows.dtype)
