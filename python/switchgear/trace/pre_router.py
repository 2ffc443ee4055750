# SPDX-License-Identifier: BSD-3-Clause
"""PreRouter: a small router outside the model that chooses the experts of all its layers from token embeddings
(Read-ME, arXiv:2410.19123), so that they are known before the first layer runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.checks import at_least, check_several, check_tensor, explain_rows, sizes
from switchgear.reference import check_size
from switchgear.routing.ranking import choose


class PreRouter(nn.Module):
    """Logits of all layers' experts from embeddings [B,S,H]: `layers` causal transformer layers and a linear head.

    The authors' router differs: one output of E experts for all layers, rotary positions and an embedding of its own,
    trained on soft labels and the overlap of masks.

        pre = PreRouter(hidden_size, [64] * 16)
        loss = pre.loss(embeddings, [layer.topk_ids() for layer in record.layers.values()])   # distillation

    Args:
        hidden_size: of the embeddings.
        num_experts: of each MoE layer, in their order.
        layers: transformer layers; the paper has one. 0: each token by itself.
        heads: of the attention; a divisor of hidden_size.
        window: tokens that the attention sees, the token itself included. It has no positions, and the choice of a
            token depends on the last `reach` tokens alone, so that decoding keeps few embeddings.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: Sequence[int],
        layers: int = 1,
        *,
        heads: int = 4,
        window: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("layers", layers, 0)
        check_size("heads", heads)
        window = check_size("window", window)
        num_experts = sizes("num_experts", num_experts)
        if hidden_size % heads:
            raise ValueError(f"heads: expected a divisor of {hidden_size} (hidden_size), got {heads}")
        self.num_experts, self.window = num_experts, window
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(_Layer(hidden_size, heads, **kwargs) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size, **kwargs)
        self.head = nn.Linear(hidden_size, sum(num_experts), **kwargs)

    @property
    def reach(self) -> int:
        """Tokens, itself included, that a token's choice depends on."""
        return len(self.layers) * (self.window - 1) + 1

    def forward(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        """Logits [T,E] of each MoE layer, for embeddings [B,S,H] or [S,H] of T tokens, in the dtype of the weights, or
        in 16 bits if that is float32."""
        size = self.norm.normalized_shape[0]
        check_tensor("embeddings", embeddings)
        if embeddings.dim() not in (2, 3) or embeddings.shape[-1] != size:
            raise ValueError(f"embeddings: expected [B,S,{size}] or [S,{size}], got {list(embeddings.shape)}")
        explain_rows("embeddings", embeddings, size, self.head.weight)
        x = (embeddings if embeddings.dim() == 3 else embeddings[None]).to(self.head.weight.dtype)
        distance = torch.arange(x.shape[1], device=x.device)
        distance = distance[:, None] - distance
        mask = (distance >= 0) & (distance < self.window)
        for layer in self.layers:
            x = layer(x, mask)
        logits: Tensor = self.head(self.norm(x)).flatten(0, 1)
        return torch.split(logits, list(self.num_experts), dim=1)

    @torch.no_grad()
    def choose(self, embeddings: Tensor, top_k: int) -> list[Tensor]:
        """The best top_k experts [T,K] int32 of each MoE layer, the best first; ties go to the lowest id."""
        check_top_k(top_k, self.num_experts)
        return [choose(logits.float(), top_k) for logits in self(embeddings)]

    def loss(self, embeddings: Tensor, topk_ids: Sequence[Tensor]) -> Tensor:
        """The cross-entropy to recorded choices [T,K] of each layer, -1 for none: the mean over layers and choices."""
        logits = self(embeddings)
        check_several("topk_ids", topk_ids, "tensors")
        topk_ids = list(topk_ids)
        if len(topk_ids) != len(logits):
            raise ValueError(f"topk_ids: expected the choices of {len(logits)} layers, got {len(topk_ids)}")
        losses = []
        for layer, (own, ids) in enumerate(zip(logits, topk_ids, strict=True)):
            check_tensor("topk_ids", ids)
            if len(ids) != len(own):
                raise ValueError(f"topk_ids: expected {len(own)} tokens in layer {layer}, got {len(ids)}")
            real = (ids >= 0).to(own.device)
            chosen = own.float().log_softmax(-1).gather(1, ids.to(own.device).long().clamp(min=0))
            losses.append(-(chosen * real).sum() / real.sum().clamp(min=1))
        return torch.stack(losses).mean()


def check_top_k(top_k: int, num_experts: Sequence[int]) -> None:
    """Raises for a number of choices that a layer does not have."""
    if at_least(1, "top_k", top_k) > min(num_experts):
        raise ValueError(f"top_k: expected 1 to {min(num_experts)}, got {top_k}")


class _Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, hidden_size: int, heads: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size, **kwargs) for _ in range(2))
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False, **kwargs)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False, **kwargs)
        self.up = nn.Linear(hidden_size, 4 * hidden_size, **kwargs)
        self.down = nn.Linear(4 * hidden_size, hidden_size, **kwargs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, size = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, size // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, size))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y
