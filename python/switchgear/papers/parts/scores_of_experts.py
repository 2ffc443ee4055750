# SPDX-License-Identifier: BSD-3-Clause
"""Scores from properties of each expert: its first activation, weights, cluster, domain, or gate."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.backends import without_autocast
from switchgear.checks import Size, checked
from switchgear.functional import gate
from switchgear.reference import weight_dtype, wide
from switchgear.routing.context import Context
from switchgear.routing.scores import init_uniform


class ActivationNorm(nn.Module):
    """‖W_e x‖₂: each expert's own first activation decides, without a router (Autonomy-of-Experts, arXiv:2501.13074).

    d_low: rows of each expert's projection. Parameters: down [E,d_low,H], the low-rank factor of the experts' gates.
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        d_low: Size,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.down = nn.Parameter(torch.empty(num_experts, d_low, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projection like torch.nn.Linear."""
        init_uniform(self.down, self.hidden_size)

    def activations(self, x: Tensor) -> Tensor:
        """x [T,H] -> [T,E,d_low]."""
        return gate(x, self.down.flatten(0, 1)).view(x.shape[0], *self.down.shape[:2])

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        return norms(self.activations(x))


def norms(activations: Tensor) -> Tensor:
    """The norm over the last dimension, in float32, with a gradient of zero (not NaN) at zero."""
    norm: Tensor = torch.linalg.vector_norm(wide(activations), dim=-1)
    return norm


class SparsityAware(nn.Module):
    """Prefers experts whose hidden activations will be sparse (MoE-X, arXiv:2503.07639). If the columns of an expert's
    first projection are Gaussian, a pre-activation is N(mu, sigma²), mu = Σ_d x_d·mean_d and sigma² = Σ_d x_d²·var_d.
    Biases are one more column, whose x_d is 1. The logit is scale · Φ(-mu/sigma), the fraction of neurons that a ReLU
    silences (sign and normalisation are unverified).

    The MoE layer binds it to its experts. It reads their weights at each call, and gradients reach them. No parameters.
    With distributed experts each rank computes mean and var of its own, and sends them to the others: 8·H bytes each.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, scale: float = 1.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self._experts: tuple[Any, ...] = ()  # a tuple, so that they do not become a submodule

    def bind(self, experts: Any) -> None:
        """From now on, reads the first projection of `experts` (switchgear.Experts; the gate if they are gated).

        Raises ValueError for other experts."""
        if not hasattr(experts, "down_proj"):
            raise ValueError(f"score: SparsityAware reads the weights of Experts, got {type(experts).__name__}")
        self._experts = (experts,)

    def _first_projection(self) -> list[Tensor]:
        """[E,I,H], and [E,I,1] of the biases if the experts have some."""
        if not self._experts:
            raise ValueError("score: SparsityAware must be bound to experts; see SparsityAware.bind")
        experts = self._experts[0]
        name = "gate_up_proj" if experts.gated else "up_proj"
        weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
        parts = [weight.mT if experts.transposed else weight, *([] if bias is None else [bias[..., None]])]
        if experts.gated:
            parts = [part[:, 0::2] if experts.interleaved else part[:, : part.shape[1] // 2] for part in parts]
        return parts

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E] float32."""
        dtype = weight_dtype(x.dtype)
        parts = [part.to(dtype) for part in self._first_projection()]
        with without_autocast(x.device.type):
            mean = torch.cat([part.mean(1) for part in parts], -1)
            variance = torch.cat([part.var(1, correction=0) for part in parts], -1)
            if (gathered := getattr(self._experts[0], "gathered", None)) is not None:  # experts of other ranks
                mean, variance = gathered(torch.stack((mean, variance), 1)).unbind(1)
            x = x.to(dtype)
            if len(parts) > 1:
                x = F.pad(x, (0, 1), value=1.0)
            mu = gate(x, mean)
            sigma = (gate(x.square(), variance) + torch.finfo(dtype).tiny).sqrt()
            silent: Tensor = torch.special.ndtr(-mu / sigma)
            return self.scale * silent


class Gaussian(nn.Module):
    """log N(x; mean_e, L_e L_eᵀ): experts as clusters (Gaussian-gated mixtures, arXiv:2104.02640).

    covariance: "diagonal" or "full". Parameters: mean [E,H]; log_std [E,H]; if full, lower [E,H,H], of which only the
    strictly lower triangle is used.
    """

    lower: nn.Parameter | None

    @checked
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        covariance: Literal["diagonal", "full"] = "diagonal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.mean, self.log_std = parameter(hidden_size), parameter(hidden_size)
        self.lower = parameter(hidden_size, hidden_size) if covariance == "full" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the means and sets the standard deviations to 1."""
        nn.init.normal_(self.mean)
        nn.init.zeros_(self.log_std)
        if self.lower is not None:
            nn.init.zeros_(self.lower)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E] float32."""
        dtype = weight_dtype(x.dtype)
        with without_autocast(x.device.type):
            x, mean, log_std = x.to(dtype), self.mean.to(dtype), self.log_std.to(dtype)
            constant = -log_std.sum(-1) - 0.5 * self.hidden_size * math.log(2 * math.pi)
            if self.lower is not None:
                factor = self.lower.to(dtype).tril(-1) + torch.diag_embed(log_std.exp())
                centred = (x[None] - mean[:, None]).mT  # [E,H,T]
                squares = torch.linalg.solve_triangular(factor, centred, upper=False).square().sum(1).T
            else:  # Σ (x - m)² / s² as three products, without a [T,E,H] tensor
                origin = mean.detach().mean(0)  # any will do; a far one costs digits, which cancel
                x, mean, precision = x - origin, mean - origin, (-2 * log_std).exp()
                squares = gate(x.square(), precision) - 2 * gate(x, precision * mean)
                squares = squares + (precision * mean.square()).sum(-1)
            logits: Tensor = constant - 0.5 * squares
            return logits


class Domain(nn.Module):
    """x · e with e = P_r(d): a small SwiGLU network projects domain embeddings d [E,D] to expert embeddings, so that a
    new expert needs no new router (Nexus, arXiv:2408.15901).

    Parameters: gate [I,D], up [I,D], down [H,I]. Buffer: domain_embeddings [E,D].
    """

    domain_embeddings: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        domain_embeddings: Tensor,
        intermediate_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if domain_embeddings.shape[0] != num_experts:
            raise ValueError(f"domain_embeddings: expected {num_experts} rows, got {domain_embeddings.shape[0]}")
        size, width = domain_embeddings.shape[1], intermediate_size or hidden_size
        self.register_buffer("domain_embeddings", domain_embeddings.to(device=device, dtype=dtype or torch.float32))

        def linear(size_in: int, size_out: int) -> nn.Linear:
            return nn.Linear(size_in, size_out, bias=False, device=device, dtype=dtype)

        self.gate, self.up, self.down = linear(size, width), linear(size, width), linear(width, hidden_size)

    def expert_embeddings(self) -> Tensor:
        """[E,H]"""
        d = self.domain_embeddings
        e: Tensor = self.down(F.silu(self.gate(d)) * self.up(d))
        return e

    def add_expert(self, domain_embedding: Tensor) -> None:
        """Appends an expert; the logits of the others do not change."""
        row = domain_embedding.reshape(1, -1).to(self.domain_embeddings)
        self.domain_embeddings = torch.cat((self.domain_embeddings, row))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        return gate(x, self.expert_embeddings())


class PosthocGate(nn.Module):
    """LN(gate) · LN(x) / √H, with parameter-free layer norms: makes the gates of separately trained adapters comparable
    (PHATGOOSE, arXiv:2402.05859). Parameters: gates [E,H]."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(num_experts, hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        size = x.shape[-1:]
        return gate(F.layer_norm(x, size), F.layer_norm(self.gates, size)) / math.sqrt(size[0])
