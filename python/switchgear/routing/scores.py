# SPDX-License-Identifier: BSD-3-Clause
"""Scores: modules that compute router_logits [T,E] from x [T,H]. Most take (hidden_size, num_experts), then keyword
options; `Router(score=partial(Cosine, dim=16))` builds one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.backends import without_autocast
from switchgear.checks import PositiveOrInf, Share, checked
from switchgear.functional import gate
from switchgear.reference import weight_dtype, wide
from switchgear.routing.context import Context, Noise, made
from switchgear.routing.ranking import jittered, sigmoid
from switchgear.utils.modules import LoadsScalars

Transform = Literal["tanh", "sigmoid", "normalize", "layer_norm"]
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": lambda x: sigmoid(wide(x)).to(x.dtype),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
}


def zscore(router_logits: Tensor, lam: float = 1.0, eps: float = 1e-6) -> Tensor:
    """lam · (z - mean z) / std z over the experts, in float32; population std, with eps² added to the variance."""
    logits = wide(router_logits)
    centred = logits - logits.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps**2).sqrt()
    return lam * centred / deviation


def init_uniform(parameter: Tensor, fan_in: int) -> None:
    """Draws from ±1/√fan_in, as torch.nn.Linear initialises its weight and bias."""
    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class Linear(nn.Module):
    """router_logits = M(x) · weightᵀ + bias, the score of most models.

    Args:
        bias: a learned bias [E]. float32: compute in float32, whatever the dtype of model and autocast.
        jitter: in training the input is multiplied by uniform noise in [1 - jitter, 1 + jitter] (arXiv:2101.03961); in
            float32 with float32, else in the dtype of x (see Router).
        noise: learned Gaussian noise on the logits in training, randn · softplus(x · noise_weightᵀ) (arXiv:1701.06538).
            ImportanceLoad counts with its deviation.
        normalize: "zscore" normalises the logits of each token to mean 0 and standard deviation lam (Skywork-MoE,
            arXiv:2406.06563, lam = 1).
        input_transform: M, a function or "tanh", "sigmoid", "normalize", "layer_norm" (bounded, as the theory of
            softmax gates requires, arXiv:2310.14188); the identity if None.
        equal_rows: scale the rows of the initial weight to their mean norm, so that no expert is favoured (sigma-MoE,
            arXiv:2310.10837).
        init_std: standard deviation of the initial weight; if None, that of torch.nn.Linear.
        orthogonal: use an orthogonal initial weight with this gain instead (BASE Layers, arXiv:2103.16716: 0.1).

    Parameters: weight [E,H], bias [E], noise_weight [E,H].
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    noise_weight: nn.Parameter | None

    @checked
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        bias: bool = False,
        float32: bool = False,
        jitter: Share = 0.0,
        noise: bool = False,
        normalize: Literal["zscore"] | None = None,
        lam: float = 1.0,
        input_transform: Transform | Callable[[Tensor], Tensor] | None = None,
        equal_rows: bool = False,
        init_std: float | None = None,
        orthogonal: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.float32, self.jitter, self.normalize, self.lam = float32, jitter, normalize, lam
        self.input_transform, self.equal_rows = input_transform, equal_rows
        self.init_std, self.orthogonal = init_std, orthogonal
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight)) if noise else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the weight as torch.nn.Linear does, normal, or orthogonal; noise_weight starts at zero."""
        if self.orthogonal is not None:
            if not self.weight.is_meta:
                dtype = weight_dtype(self.weight.dtype)  # QR does not support half precision
                initial = torch.empty(self.weight.shape, device=self.weight.device, dtype=dtype)
                with torch.no_grad():
                    self.weight.copy_(nn.init.orthogonal_(initial, self.orthogonal))
        elif self.init_std is not None:
            nn.init.normal_(self.weight, std=self.init_std)
        else:
            init_uniform(self.weight, self.hidden_size)
        if self.equal_rows:
            with torch.no_grad():
                norms = self.weight.norm(dim=1, keepdim=True)
                self.weight.mul_(norms.mean() / norms.clamp(min=torch.finfo(norms.dtype).tiny))
        if self.bias is not None:
            init_uniform(self.bias, self.hidden_size)
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        if isinstance(self.input_transform, str):
            x = TRANSFORMS[self.input_transform](x)
        elif self.input_transform is not None:
            x = self.input_transform(x)
        if self.jitter and self.training:
            x = jittered(x, self.jitter, context, self.float32)
        logits = gate(x, self.weight, self.bias, float32=self.float32)
        if self.noise_weight is not None and self.training:
            deviation = F.softplus(gate(x, self.noise_weight)).to(logits.dtype)
            clean, logits = logits, logits + deviation * torch.empty_like(logits).normal_(generator=context.source())
            if context.noise is not None:
                context.noise.append(Noise(clean, logits, deviation))
        return logits if self.normalize is None else zscore(logits, self.lam)

    def extra_repr(self) -> str:
        flags = [name for name in ("float32", "jitter", "normalize", "equal_rows") if getattr(self, name)]
        return ", ".join([f"{self.hidden_size}, num_experts={self.num_experts}", *flags])


class Cosine(LoadsScalars):
    """cos(P x, e) / tau with expert embeddings e in `dim` dimensions, so that tokens do not collapse onto the experts
    (X-MoE, arXiv:2204.09179).

    Args:
        dim: E/2 if None, as in the paper; its published code uses 16.
        tau: the temperature, at least min_tau; if learn_tau, its logarithm is learned.
        normalize_input: False divides by the norm of e only, as the published code does.
        perturb: added to both norms (perturbed cosine of LibMoE, arXiv:2411.00918).

    Parameters: projection [dim,H], embeddings [E,dim], log_tau [1].
    """

    once_scalars = ("log_tau",)

    @checked
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        dim: int | None = None,
        tau: PositiveOrInf = 0.07,
        learn_tau: bool = True,
        min_tau: float = 0.01,
        normalize_input: bool = True,
        perturb: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts, self.dim = hidden_size, num_experts, dim or max(num_experts // 2, 1)
        self.tau, self.min_tau, self.normalize_input, self.perturb = tau, min_tau, normalize_input, perturb
        self.projection = nn.Parameter(torch.empty(self.dim, hidden_size, device=device, dtype=dtype))
        self.embeddings = nn.Parameter(torch.empty(num_experts, self.dim, device=device, dtype=dtype))
        self.log_tau = nn.Parameter(torch.empty(1, device=device, dtype=torch.float32), requires_grad=learn_tau)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projection like torch.nn.Linear and draws the embeddings."""
        init_uniform(self.projection, self.hidden_size)
        nn.init.normal_(self.embeddings, std=self.dim**-0.5)
        nn.init.constant_(self.log_tau, math.log(self.tau))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E] float32."""
        low, embeddings = wide(gate(x, self.projection)), wide(self.embeddings)
        with without_autocast(x.device.type):
            embeddings = embeddings / (embeddings.norm(dim=-1, keepdim=True) + self.perturb).clamp(min=1e-12)
            if self.normalize_input:
                low = low / (low.norm(dim=-1, keepdim=True) + self.perturb).clamp(min=1e-12)
            return gate(low, embeddings, float32=True) / self.log_tau.exp().clamp(min=self.min_tau).to(low.dtype)


class Uniform(nn.Module):
    """Zeros that take no memory, for selections that ignore the logits (Lookup, Random). No parameters."""

    def __init__(self, hidden_size: int, num_experts: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E], a single 0 expanded."""
        return x.new_zeros(1, 1).expand(x.shape[0], self.num_experts)


class Sum(nn.Module):
    """The sum of several scores.

        Router(64, 8, 2, score=partial(Sum, Linear, partial(Cosine, dim=4)))

    Args: scores: modules; or classes and partials, then hidden_size and num_experts, which the router passes.
    """

    def __init__(
        self, *scores: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        sizes = [score for score in scores if isinstance(score, int)]
        parts = [score for score in scores if not isinstance(score, int)]
        self.scores = nn.ModuleList(made(part, *sizes, device=device, dtype=dtype) for part in parts)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        context = replace(context, noise=None)  # that of one part is not that of the sum
        first, *others = (score(x, context) for score in self.scores)
        total: Tensor = sum(others, first)
        return total
