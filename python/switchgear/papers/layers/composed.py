# SPDX-License-Identifier: BSD-3-Clause
"""Layers around layers: CartesianMoE, two that act as the product of their experts; MultiHeadMoE, which routes each
piece of a token separately; and SoftMoE, whose experts see mixtures of tokens, so that nothing is discrete."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.backends import without_autocast
from switchgear.checks import Divides, Size, checked, convert
from switchgear.layers.common import check_rows
from switchgear.reference import wide
from switchgear.utils.modules import LoadsScalars


def _losses_of(*layers: nn.Module) -> dict[str, Tensor]:
    """The balance losses of the layers' last forward; losses with the same name are added."""
    losses: dict[str, Tensor] = {}
    for layer in layers:
        for name, loss in getattr(layer, "losses", {}).items():
            losses[name] = losses[name] + loss if name in losses else loss
    return losses


def _check_returns_rows(name: str, layer: nn.Module) -> None:
    """Raises TypeError for what is no module, and ValueError for a layer whose forward returns the routing, too."""
    convert(name, layer, nn.Module)
    if getattr(layer, "return_routing", False):
        raise ValueError(f"{name}: expected a layer that returns y alone, got one with return_routing=True")


def _repeat_context(context: dict[str, object], num_tokens: int, times: int) -> dict[str, object]:
    """The context if each token is split into `times` pieces, in the order of the tokens."""
    repeated = dict(context)
    for name in ("token_ids", "sequence_ids", "importance"):
        value = context.get(name)
        if isinstance(value, Tensor):
            repeated[name] = value.flatten().repeat_interleave(times)
    if isinstance(context.get("sequence_length"), int):
        repeated["sequence_length"] = context["sequence_length"] * times  # type: ignore[operator]
    embedding = context.get("embedding")
    if isinstance(embedding, Tensor) and embedding.dim() > 1 and embedding.shape[:-1].numel() == num_tokens:
        repeated["embedding"] = embedding.flatten(0, -2).repeat_interleave(times, 0)  # one per token
    return repeated


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
        _check_returns_rows("first", first)
        _check_returns_rows("second", second)
        self.first, self.second = first, second
        self.norm = nn.LayerNorm(hidden_size, eps=eps, device=device, dtype=dtype)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The balance losses of both layers in the last forward."""
        return _losses_of(self.first, self.second)

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
        heads: Annotated[Size, Divides("hidden_size")],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_returns_rows("moe", moe)
        self.heads = heads
        self.head_proj = nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.moe = moe
        self.merge_proj = nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The balance losses of the last forward."""
        return _losses_of(self.moe)

    def forward(self, hidden_states: Tensor, **context: object) -> Tensor:
        """[..., H] -> [..., H]. token_ids and sequence_ids, if given, refer to whole tokens."""
        check_rows(hidden_states, self.head_proj.in_features, self.head_proj.weight.dtype, of_sequences=True)
        pieces = self.head_proj(hidden_states).unflatten(-1, (self.heads, -1))
        pieces = pieces.flatten(-3, -2)  # [..., S·heads, H/heads]: the pieces of a sequence stay one sequence
        num_tokens = hidden_states.shape[:-1].numel()
        y: Tensor = self.moe(pieces, **_repeat_context(context, num_tokens, self.heads))
        merged: Tensor = self.merge_proj(y.reshape(hidden_states.shape))
        return merged


def per_conv_tokens(features: Tensor) -> Tensor:
    """Tokens [B, height·width, C] of a feature map [B,C,height,width], one per position. This tokenisation makes
    SoftMoE work in reinforcement learning (PerConv of arXiv:2410.01930)."""
    return features.flatten(2).mT


class SoftMoE(LoadsScalars):
    """Y = C · experts(Dᵀ · X): D is a softmax over the tokens, C over the slots of all experts, of the same logits.

    Soft MoE, arXiv:2308.00951; arXiv:2410.01930 for reinforcement learning.

        layer = SoftMoE(switchgear.Experts(256, 128, num_experts=8), slots=4)

    Args:
        experts: a module with the interface of Experts, hidden_size and num_experts. Each expert processes exactly
            `slots` rows per sequence, in one grouped GEMM. Its outputs may have another width than its inputs.
        slots: rows per expert and sequence.
        normalize: logits = (x / |x|) · (scale · φ / |φ|) with a learned scale, instead of x · φ.

    Parameters: phi [E·slots,H]; scale [1] if normalize (FSDP2 shards no scalars). Sequences are independent, but within
    one every token affects every other, so the layer is not suitable for causal models.
    """

    not_matrices = ("phi",)  # for optim.muon_groups
    once_scalars = ("scale",)

    @checked
    def __init__(
        self,
        experts: nn.Module,
        *,
        slots: Size = 1,
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.slots, self.normalize = experts, slots, normalize
        self.hidden_size, self.num_experts = int(experts.hidden_size), int(experts.num_experts)  # type: ignore[arg-type]
        rows = self.num_experts * slots
        self.phi = nn.Parameter(torch.empty(rows, self.hidden_size, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """φ is normal with variance 1/H, scale is 1."""
        nn.init.normal_(self.phi, std=1 / math.sqrt(self.hidden_size))
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[..., T, E·slots], at least float32."""
        with without_autocast(hidden_states.device.type):
            x = wide(hidden_states)
            phi = self.phi.to(x.dtype)
            if self.scale is not None:
                x, phi = F.normalize(x, dim=-1), F.normalize(phi, dim=-1) * self.scale
            return F.linear(x, phi)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden_states [..., T, H] -> [..., T, H]; leading dimensions are sequences.

        mask [..., T]: False for padding, which adds nothing to the slots and gets zeros.
        """
        check_rows(hidden_states, self.hidden_size, of_sequences=True)
        if mask is not None:
            mask = mask.bool()[..., None]
            hidden_states = hidden_states.masked_fill(~mask, 0)  # padding may hold anything
        logits = self.logits(hidden_states)
        if mask is not None:
            dispatch = logits.masked_fill(~mask, -torch.inf).softmax(-2).nan_to_num()  # nan: a sequence of padding only
        else:
            dispatch = logits.softmax(-2)
        combine = logits.softmax(-1)
        dtype = hidden_states.dtype
        slots = dispatch.to(dtype).mT @ hidden_states  # [..., E·slots, H]
        ids = torch.arange(self.num_experts, dtype=torch.int32, device=slots.device).repeat_interleave(self.slots)
        ids = ids.expand(slots.shape[:-1]).reshape(-1, 1)
        y: Tensor = self.experts(slots.reshape(-1, self.hidden_size), ids, torch.ones_like(ids, dtype=torch.float32))
        y = combine.to(y.dtype) @ y.view(*slots.shape[:-1], y.shape[-1])
        return y if mask is None else y * mask
