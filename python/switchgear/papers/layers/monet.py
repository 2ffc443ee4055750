# SPDX-License-Identifier: BSD-3-Clause
"""Monet: n² experts from 2·n halves; every expert has a weight for every token."""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.checks import Shape, Size, checked
from switchgear.functional import gate
from switchgear.layers.common import check_rows
from switchgear.reference import check_range, wide
from switchgear.routing.context import is_recomputing
from switchgear.routing.counting import unseen
from switchgear.routing.scores import init_uniform
from switchgear.utils.modules import KeepsFloat32

Mode = Literal["horizontal", "vertical"]


class MonetRouting(NamedTuple):
    """Expert (i,j) has the weight Σ_h first[t,h,i] · second[t,h,j] for token t. Both [T,heads,n] float32."""

    first: Tensor
    second: Tensor


class MonetRouter(KeepsFloat32):
    """Two gates per head; each keeps about `top_k` of n experts, by a threshold instead of a sort (arXiv:2412.04139).

    The logits of each head and gate are normalised over tokens and experts (torch's batch norm without parameters, one
    channel per head). Logits whose normalised value exceeds Φ⁻¹(1 - top_k / n), or the largest if none does, go through
    a softmax; the others get weight 0. A group of layers may share one router.

    A token whose logits are not finite, or too large for their squares to be, is in no statistics: it changes no other
    token's gates, and its own are NaN if it has a NaN.

    Args: hidden_size, sqrt_n, heads: H, n and the number of heads. top_k: 32 of 512 in the paper.
    Parameters: weight [2·heads·n,H]. Buffers: running_mean, running_var [2·heads] float32, also
    in a model of another dtype; used in evaluation. In training a token's gates depend on the batch.
    """

    running_mean: Tensor
    running_var: Tensor

    @checked
    def __init__(
        self,
        hidden_size: Size,
        sqrt_n: Size = 512,
        heads: Size = 8,
        *,
        top_k: Size = 32,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if top_k >= sqrt_n:
            raise ValueError(f"top_k: expected 1 to {sqrt_n - 1} (below sqrt_n), got {top_k}")
        self.heads, self.sqrt_n, self.momentum, self.eps = heads, sqrt_n, momentum, eps
        self.threshold = NormalDist().inv_cdf(1 - top_k / sqrt_n)
        self.weight = nn.Parameter(torch.empty(2 * heads * sqrt_n, hidden_size, device=device, dtype=dtype))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(2 * heads, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises like torch.nn.Linear, with the statistics of a standard normal distribution."""
        init_uniform(self.weight, self.weight.shape[1])
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, hidden_states: Tensor) -> MonetRouting:
        """[..., H] -> MonetRouting of T tokens."""
        logits = gate(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
        logits = wide(logits).view(len(logits), 2 * self.heads, self.sqrt_n)
        normalized = self._normalize(logits.detach())
        cutoff = normalized.amax(-1, keepdim=True).clamp(max=self.threshold)
        gates = logits.masked_fill(normalized < cutoff, -torch.inf).softmax(-1)
        first, second = gates.view(len(logits), 2, self.heads, self.sqrt_n).unbind(1)
        return MonetRouting(first, second)

    def _normalize(self, logits: Tensor) -> Tensor:
        mean, var = self.running_mean.to(logits.dtype), self.running_var.to(logits.dtype)
        if self.training and len(logits):
            # A token whose squares are not finite would make the statistics of all so, and of all to come: the mean
            # stands in for it, which changes no bit where there is none.
            kept = logits.square().sum((1, 2), keepdim=True).isfinite()
            count = kept.sum().double() * self.sqrt_n  # of a channel
            average = torch.where(kept, logits, 0).sum((0, 2), keepdim=True) / count
            spread, average = torch.var_mean(torch.where(kept, logits, average), (0, 2), correction=0)
            spread, some = spread * (len(logits) * self.sqrt_n / count), count > 0
            mean, var = torch.where(some, average, mean), torch.where(some, spread, var)
            if not is_recomputing():
                with unseen(mean):
                    self._follow(mean, var * torch.where(some, count / (count - 1), 1))  # unbiased, as in torch
        return (logits - mean[:, None]) / (var + self.eps).sqrt()[:, None]

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


class MonetExperts(nn.Module):
    """n² experts of width m: y = Σ_ij g_ij · E_ij(x), g_ij = Σ_h first[h,i] · second[h,j] (Monet, arXiv:2412.04139).

    "horizontal": E_ij(x) = V_j · relu²(U_i · x + a_i) + b_j: i chooses the first layer, j the second.
    "vertical": E_ij(x) = V_ij · relu²([U1_i · x + a1_i, U2_j · x + a2_j]) + [b1_i, b2_j]; the upper half of V_ij
    depends on i, the lower on j: each chooses half of the hidden units and half of the outputs.

    Neither forms an expert explicitly: work and parameters are those of 2·n halves and grow with n, not n².

    Args:
        hidden_size, sqrt_n, dim: H, n and m. mode: one of the two.
        disabled: [P,2] pairs (i,j) of experts whose terms are exactly removed (knowledge editing); see `disable`.

    Parameters, horizontal: up [n,m,H], up_bias [n,m], down [n,m,H], down_bias [n,H]. Vertical: two of each, with m/2
    units: up1, up2 [n,m/2,H], up_bias1, up_bias2, down1, down2 [n,m,H/2], down_bias1, down_bias2 [n,H/2].
    """

    disabled: Tensor

    @checked
    def __init__(
        self,
        hidden_size: Size,
        sqrt_n: Size = 512,
        dim: Size = 8,
        *,
        mode: Mode = "vertical",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode == "vertical" and (dim % 2 or hidden_size % 2):
            raise ValueError(f"dim, hidden_size: expected even numbers for vertical experts, got {dim}, {hidden_size}")
        self.hidden_size, self.sqrt_n, self.dim, self.mode = hidden_size, sqrt_n, dim, mode

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sqrt_n, *shape, device=device, dtype=dtype))

        halves = ("",) if mode == "horizontal" else ("1", "2")
        for half in halves:
            self.register_parameter(f"up{half}", parameter(dim // len(halves), hidden_size))
            self.register_parameter(f"up_bias{half}", parameter(dim // len(halves)))
            self.register_parameter(f"down{half}", parameter(dim, hidden_size // len(halves)))
            self.register_parameter(f"down_bias{half}", parameter(hidden_size // len(halves)))
        self.register_buffer("disabled", torch.empty(0, 2, dtype=torch.int64, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises projections like torch.nn.Linear of one expert; biases are zero."""
        for name, value in self.named_parameters():
            fan_in = self.hidden_size if name.startswith("up") else self.dim
            if "bias" in name:
                nn.init.zeros_(value)
            else:
                init_uniform(value, fan_in)

    @checked
    def disable(self, pairs: Annotated[Tensor, Shape(None, 2)]) -> None:
        """Removes the experts (i,j) of pairs [P,2] from now on; an empty [0,2] restores all."""
        check_range("pairs", pairs, 0, self.sqrt_n)
        self.disabled = torch.unique(pairs.long().to(self.disabled.device), dim=0)

    def forward(self, hidden_states: Tensor, routing: MonetRouting) -> Tensor:
        """hidden_states [..., H] and the routing of its T tokens -> [..., H]."""
        x = hidden_states.reshape(-1, self.hidden_size)
        first, second = (part.to(x.dtype) for part in routing)
        y = self._horizontal(x, first, second) if self.mode == "horizontal" else self._vertical(x, first, second)
        return y.view(hidden_states.shape)

    def _units(self, x: Tensor, half: str) -> Tensor:
        """relu²(U · x + a) of every half expert, [T,n,m]."""
        up, bias = getattr(self, f"up{half}"), getattr(self, f"up_bias{half}")
        h = nn.functional.linear(x, up.flatten(0, 1), bias.flatten()).view(len(x), *up.shape[:2])
        return h.relu().square()

    def _weight(self, first: Tensor, second: Tensor) -> Tensor:
        """The weights of the disabled experts, [T,P]."""
        i, j = self.disabled.unbind(1)
        return (first[:, :, i] * second[:, :, j]).sum(1)

    def _horizontal(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        units = self._units(x, "")
        mixed = second.mT @ (first @ units)  # [T,n,m]: the units that reach each second layer
        bias = second.sum(1)
        if len(self.disabled):
            i, j = self.disabled.unbind(1)
            weight = self._weight(first, second)
            mixed = mixed.index_add(1, j, weight[..., None] * units[:, i], alpha=-1)
            bias = bias.index_add(1, j, weight, alpha=-1)
        return mixed.flatten(1) @ self.down.flatten(0, 1) + bias @ self.down_bias  # type: ignore[operator]

    def _vertical(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        units = self._units(x, "1"), self._units(x, "2")
        gates = first, second
        i_and_j = self.disabled.unbind(1)
        weight = self._weight(first, second) if len(self.disabled) else None
        outputs = []
        for half, (own, other) in enumerate(((0, 1), (1, 0))):  # output half 0 is i's, half 1 is j's
            mass = gates[own].sum(1)  # the other gate's weights sum to 1 in each head
            straight = mass[..., None] * units[own]
            crossed = gates[own].mT @ (gates[other] @ units[other])
            if weight is not None:
                to, come = i_and_j[own], i_and_j[other]
                mass = mass.index_add(1, to, weight, alpha=-1)
                straight = straight.index_add(1, to, weight[..., None] * units[own][:, to], alpha=-1)
                crossed = crossed.index_add(1, to, weight[..., None] * units[other][:, come], alpha=-1)
            mixed = torch.cat((straight, crossed) if half == 0 else (crossed, straight), -1)
            down, bias = getattr(self, f"down{half + 1}"), getattr(self, f"down_bias{half + 1}")
            outputs.append(mixed.flatten(1) @ down.flatten(0, 1) + mass @ bias)
        return torch.cat(outputs, -1)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, sqrt_n={self.sqrt_n}, dim={self.dim}, {self.mode}"


class Monet(nn.Module):
    """MonetRouter and MonetExperts as one layer.

    Args:
        hidden_size, sqrt_n, dim, heads, top_k, mode: as for MonetRouter and MonetExperts.
        router: another layer's, to share it (the paper: four layers).
    """

    def __init__(
        self,
        hidden_size: int,
        sqrt_n: int = 512,
        dim: int = 8,
        heads: int = 8,
        *,
        top_k: int = 32,
        mode: Mode = "vertical",
        router: MonetRouter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.router = router or MonetRouter(hidden_size, sqrt_n, heads, top_k=top_k, device=device, dtype=dtype)
        self.experts = MonetExperts(hidden_size, sqrt_n, dim, mode=mode, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        check_rows(hidden_states, self.experts.hidden_size, self.router.weight.dtype)
        y: Tensor = self.experts(hidden_states, self.router(hidden_states))
        return y
