# SPDX-License-Identifier: BSD-3-Clause
"""Scores of single papers. Those of something larger than a token, a task, an instance or a sequence, give all of its
tokens the same experts. Some are properties of each expert: its first activation, weights, cluster, domain, or gate.
Initial values of papers, for the option `initialize` of MoE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.backends import without_autocast
from switchgear.checks import Divides, Finite, PositiveOrInf, Size, checked
from switchgear.functional import gate
from switchgear.reference import weight_dtype, wide
from switchgear.routing.context import Context, Score, made, sequences
from switchgear.routing.ranking import is_open
from switchgear.routing.scores import init_uniform


class GroupedAvgPool(nn.Module):
    """The mean of x over each of E slices of its features: orthogonal, fixed, no matrix product (LocMoE,
    arXiv:2401.13920). hidden_size must be a multiple of num_experts. No parameters."""

    def __init__(self, hidden_size: int, num_experts: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if hidden_size % num_experts:
            raise ValueError(f"hidden_size: expected a multiple of {num_experts} experts, got {hidden_size}")
        self.num_experts = num_experts

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        return x.view(x.shape[0], self.num_experts, x.shape[1] // self.num_experts).mean(-1)


class SwitchMixture(nn.Module):
    """log softmax over groups + log softmax inside each group, from two linear routers. Its softmax is the product of
    both; a Grouped selection with group_score = "sum" separates them again (SAM, arXiv:2110.07431).

    Parameters: switch.weight [G,H], mixture.weight [E,H].
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        num_groups: Annotated[Size, Divides("num_experts")],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.switch = nn.Linear(hidden_size, num_groups, bias=False, device=device, dtype=dtype)
        self.mixture = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E], float32."""
        group = wide(gate(x, self.switch.weight)).log_softmax(-1)
        size = self.mixture.out_features // self.num_groups
        inside = wide(gate(x, self.mixture.weight)).view(x.shape[0], self.num_groups, size).log_softmax(-1)
        logits: Tensor = (group[:, :, None] + inside).flatten(1)
        return logits


class GatingResidual(nn.Module):
    """router_logits = W x + R z, with the logits z of the layer before: a pathway-aware router (MoE++,
    arXiv:2410.07348). z is the field "previous_logits" [T,E] of the context; without it, as in the first layer, the
    score is linear. Experts that a mask closed there add nothing.

        logits = None
        for moe in layers:                              # each with return_routing=True
            y, routing = moe(x, fields={"previous_logits": logits})
            logits = routing.router_logits

    Parameters: weight [E,H]; residual [E,E], initially zero (a choice of ours).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.residual = nn.Parameter(torch.empty(num_experts, num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the weight like torch.nn.Linear; the residual starts at zero."""
        init_uniform(self.weight, self.hidden_size)
        nn.init.zeros_(self.residual)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        logits = gate(x, self.weight)
        before = (context.fields or {}).get("previous_logits")
        if before is None:
            return logits + 0 * self.residual.sum()  # so that it has a gradient, of zeros
        if before.shape != logits.shape:
            raise ValueError(f"previous_logits: expected shape {list(logits.shape)}, got {list(before.shape)}")
        before = before.masked_fill(~is_open(before), 0)
        return logits + gate(before.to(x.dtype), self.residual)


class FromEmbedding(nn.Module):
    """Logits from the embedding of a task or instance, one row per token or sequence (Context.embedding), so that all
    of its tokens get the same experts (task-level MoE, arXiv:2205.12701).

    dim: D of the embedding. Parameters: weight [E,D], bias [E] if bias.
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        num_experts: Size,
        *,
        dim: Size,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
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

    @checked
    def __init__(
        self,
        centroids: Tensor,
        hidden_size: int | None = None,
        num_experts: int | None = None,
        *,
        weight: Finite = 1.0,
        tau: PositiveOrInf = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if centroids.dim() != 2:
            raise ValueError(f"centroids: expected shape [E,D], got {list(centroids.shape)}")
        if num_experts not in (None, len(centroids)):
            raise ValueError(f"centroids: expected {num_experts} rows, got {len(centroids)}")
        self.register_buffer("centroids", centroids.to(device=device, dtype=dtype, copy=True))
        self.weight, self.tau = weight, tau

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        embedding = context.require("embedding", "ClusterPrior")
        near = gate(F.normalize(embedding, dim=-1), F.normalize(self.centroids, dim=-1).to(embedding.dtype))
        return per_token(self.weight / self.tau * near, context, x)


@torch.no_grad()
def sigma_moe_values(moe: Any, scale: float = 1.0) -> None:
    """Those of σ-MoE (arXiv:2310.10837) for an MoE of plain experts: standard deviation 1/√H for the router and the
    first projection (keys), 1/√(E·I) for the second one (values), all times `scale`. The rows of the router keep their
    directions and all get their root mean square norm. Biases start at zero. The scale of the paper's models is
    √(2 / layers)."""
    experts = moe.experts
    hidden_size, values = experts.hidden_size, experts.num_experts * experts.intermediate_size
    router: Tensor = moe.gate.weight if moe.gate.score is None else moe.gate.score.weight
    for name, parameter in experts.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=scale * (values if name == "down_proj" else hidden_size) ** -0.5)
    nn.init.normal_(router, std=scale * hidden_size**-0.5)
    norms = router.norm(dim=1, keepdim=True)
    router.mul_(norms.square().mean().sqrt() / norms.clamp(min=torch.finfo(norms.dtype).tiny))


# ---- properties of each expert ---------------------------------------------------------------------------------------


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
