# SPDX-License-Identifier: BSD-3-Clause
"""CartesianMoE: two consecutive layers of experts act as the product of their experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from switchgear.layers.common import check_returns_rows, losses_of


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
