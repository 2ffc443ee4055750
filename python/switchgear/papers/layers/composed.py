# SPDX-License-Identifier: BSD-3-Clause
"""Layers around layers: CartesianMoE, two that act as the product of their experts, and MultiHeadMoE, which routes each
piece of a token separately."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from switchgear.checks import Size, checked
from switchgear.layers.common import check_returns_rows, check_rows, losses_of, repeat_context


class CartesianMoE(nn.Module):
    """y = second(norm(x + first(x))): E_A experts in the first layer times E_B in the second (arXiv:2410.16077).

        half = dict(hidden_size=256, intermediate_size=64, num_experts=8, top_k=2, shared_intermediate_size=64)
        layer = CartesianMoE(switchgear.MoE(**half), switchgear.MoE(**half), 256)

    Each pair (i, j) is an expert of the whole, and shares halves with its row and its column: parameters grow with
    E_A + E_B. Shared experts belong to the two layers. The caller adds the residual of the block, as for any layer.

    Args: first, second: modules [..., H] -> [..., H], such as MoE. hidden_size: H of the LayerNorm between them.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_returns_rows("first", first)
        check_returns_rows("second", second)
        self.first, self.second = first, second
        self.norm = nn.LayerNorm(hidden_size, eps=eps, device=device, dtype=dtype)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The balance losses of both layers in the last forward."""
        return losses_of(self.first, self.second)

    def forward(self, hidden_states: Tensor, **context: object) -> Tensor:
        """[..., H] -> [..., H]; `context` goes to both layers."""
        y: Tensor = self.second(self.norm(hidden_states + self.first(hidden_states, **context)), **context)
        return y


class MultiHeadMoE(nn.Module):
    """y = W_merge · concat_h moe(x_h), where x_1 … x_heads are the pieces of W_head · x (MH-MoE, arXiv:2411.16205).

        layer = MultiHeadMoE(switchgear.MoE(64, 96, num_experts=16, top_k=2), 256, heads=4)

    Args:
        moe: a layer of hidden size hidden_size / heads; it sees T · heads rows.
        hidden_size, heads: H and the number of pieces.

    Parameters: head_proj.weight [H,H], merge_proj.weight [H,H], and those of moe. For the FLOPs of a layer without
    heads, intermediate_size must be smaller by 2·H / (3·K) with gated experts: the two projections cost 4·H² per
    token, and one column of K experts costs 6·K·H. Experts of two matrices: by H / K (the paper's equation 8).
    ValueError: hidden_size is not a multiple of heads.
    """

    @checked
    def __init__(
        self,
        moe: nn.Module,
        hidden_size: Size,
        heads: Size,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % heads:
            raise ValueError(f"heads: expected a divisor of {hidden_size} (hidden_size), got {heads}")
        check_returns_rows("moe", moe)
        self.heads = heads
        self.head_proj = nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.moe = moe
        self.merge_proj = nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The balance losses of the last forward."""
        return losses_of(self.moe)

    def forward(self, hidden_states: Tensor, **context: object) -> Tensor:
        """[..., H] -> [..., H]. token_ids and sequence_ids, if given, refer to whole tokens."""
        check_rows(hidden_states, self.head_proj.in_features, self.head_proj.weight.dtype, of_sequences=True)
        pieces = self.head_proj(hidden_states).unflatten(-1, (self.heads, -1))
        pieces = pieces.flatten(-3, -2)  # [..., S·heads, H/heads]: the pieces of a sequence stay one sequence
        num_tokens = hidden_states.shape[:-1].numel()
        y: Tensor = self.moe(pieces, **repeat_context(context, num_tokens, self.heads))
        merged: Tensor = self.merge_proj(y.reshape(hidden_states.shape))
        return merged
