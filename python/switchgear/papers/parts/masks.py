# SPDX-License-Identifier: BSD-3-Clause
"""Wrappers of selections: masks of the experts that a token may use, and temperatures; and lookup tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Finite, Fraction, PositiveOrInf, Share, Size, checked
from switchgear.functional import Routing
from switchgear.reference import check_range, wide
from switchgear.routing.context import NOTHING_KNOWN, Context, Select, can_be_read, groups_of, made, wrapped
from switchgear.routing.ranking import ScoreFunction, keep_choices, scores_of, uniform, weighed
from switchgear.utils.modules import FillsBuffers, LoadsScalars

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Mask = Callable[[Tensor, Context], Tensor | None]
"""(router_logits [T,E], context) -> bool, broadcastable to [T,E], true for allowed experts; None allows all."""


class AroundSelection(nn.Module):
    """Another selection, with more around it."""

    select: Any

    @property
    def top_k(self) -> int | None:
        """Of the selection inside; None if it varies."""
        return getattr(self.select, "top_k", None)


class Masked(AroundSelection):
    """Another selection restricted to the experts that a mask allows. The others get probability zero, no gradient and
    no tokens. A token with fewer than K allowed experts has empty choices. So has a token for which a selection bias
    lifts a masked expert above the others. In Routing.router_logits they have the lowest number of the dtype.

        switchgear.MoE(256, 128, 16, select=partial(Masked, TopK(2), partial(ClusterDropout, 4)))

    Args: select, mask: objects, or classes and partials, which are called with num_experts= if they take it.
    """

    def __init__(
        self, select: Select | Callable[..., Any], mask: Mask | Callable[..., Any], num_experts: int | None = None
    ) -> None:
        super().__init__()
        self.select = made(select, num_experts=num_experts)
        self.mask = made(mask, num_experts=num_experts)
        self._draws_blindly = any(not getattr(part, "uses_logits", True) for part in wrapped(self.select))

    def forward(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        allowed = self.mask(router_logits, context)
        if allowed is None:
            unmasked: Routing = self.select(router_logits, context, bias)
            return unmasked
        allowed = allowed.expand(router_logits.shape)
        # not -Inf: softmax stays finite if a whole row is masked
        masked = router_logits.masked_fill(~allowed, torch.finfo(router_logits.dtype).min)
        if self._draws_blindly:  # it ignores the logits, so the bias has to exclude experts
            bias = torch.where(allowed, 0.0 if bias is None else bias, -torch.inf)
        elif bias is not None:  # must not select an expert that is masked for all tokens
            bias = bias.masked_fill(~allowed.any(0), -torch.inf)
        routing = self.select(masked, context, bias)
        permitted = allowed.gather(1, routing.topk_ids.clamp(min=0).long())
        return keep_choices(routing, permitted & (routing.topk_ids >= 0))

    def extra_repr(self) -> str:
        return ", ".join(repr(part) for part in (self.select, self.mask) if not isinstance(part, nn.Module))


class Temperature(AroundSelection, LoadsScalars):
    """Another selection of router_logits / tau, with a learned tau. Losses see probabilities of the fixed temperature
    `fixed` (X-MoE, arXiv:2204.09179: 0.07 in the gate of MoEC's code; torchscale defines it and does not use it).

    Args: select: an object, class or partial. tau: the initial temperature, at least min_tau. fixed: of Routing.scores;
    if None, they are those of the selection. num_experts: E; the router passes it.
    Parameters: log_tau [1].
    """

    once_scalars = ("log_tau",)

    @checked
    def __init__(
        self,
        select: Select | Callable[..., Any],
        tau: PositiveOrInf = 1.0,
        *,
        fixed: PositiveOrInf | None = None,
        min_tau: PositiveOrInf = 0.01,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()
        if tau < min_tau:
            raise ValueError(f"tau: expected at least {min_tau} (min_tau), got {tau}")
        self.select, self.tau, self.fixed, self.min_tau = made(select, num_experts=num_experts), tau, fixed, min_tau
        self.log_tau = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets τ."""
        nn.init.constant_(self.log_tau, math.log(self.tau))

    def forward(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        logits = wide(router_logits)
        tau = self.log_tau.exp().clamp(min=self.min_tau).to(logits.dtype)
        routing: Routing = self.select(logits / tau, context, bias)
        return routing if self.fixed is None else routing._replace(scores=scores_of(logits / self.fixed, "softmax"))

    def extra_repr(self) -> str:
        return f"fixed={self.fixed}"


@checked
@dataclass(frozen=True)
class ExpertDropout:
    """A mask that in training hides each expert with probability `rate`: per token, or with level = "batch" from all
    tokens (sigma-MoE, arXiv:2310.10837: 0.05). A router's losses are of the logits of all experts, hidden ones too, as
    in the paper: the next call hides others."""

    rate: Fraction
    level: Literal["token", "batch"] = "token"
    hides_at_random: ClassVar[bool] = True

    def __call__(self, router_logits: Tensor, context: Context) -> Tensor | None:
        if not context.training or not self.rate:
            return None
        num_tokens, num_experts = router_logits.shape
        shape = (num_tokens if self.level == "token" else 1, num_experts)
        return uniform(shape, context, router_logits.device) >= self.rate


class ClusterDropout(FillsBuffers):
    """A mask that in training closes a random part of each cluster of experts. The part is redrawn every `interval`
    optimizer steps, which Router.after_step counts (MoEC, arXiv:2207.09094).

    Args:
        groups: the cluster of each expert [E], from 0; or the number of equal clusters of consecutive experts.
        rate: the fraction to close; ⌊(1 - rate) · n⌋ of n experts stay, at least one.
        interval: steps between draws, which use torch's default generator.
        num_experts: E, if groups is a number.

    Buffers: closed [E] bool, step [] int64, in the state dict; groups, kept [E].
    """

    groups: Tensor
    kept: Tensor
    closed: Tensor
    step: Tensor

    @checked
    def __init__(
        self,
        groups: int | Sequence[int] | Tensor,
        rate: Share = 0.5,
        interval: Size = 250,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()
        self.rate, self.interval = rate, interval
        self._groups = groups_of(groups, num_experts)
        for name in ("groups", "kept"):
            self.register_buffer(name, torch.empty(len(self._groups), dtype=torch.int64), persistent=False)
        self.register_buffer("closed", torch.empty(len(self._groups), dtype=torch.bool))
        self.register_buffer("step", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Restores the given groups and makes a first draw."""
        self.fill_buffers(self.closed.device)
        self.step.zero_()
        self.closed.copy_(self._draw())

    def fill_buffers(self, device: torch.device) -> None:
        """The given groups, and how many experts of each stay."""
        share = (1 - self.rate) * torch.bincount(self._groups).double()
        kept = (share + 1e-6).floor().long().clamp(min=1)  # (1 - 0.9) · 10 is less than 1
        self.groups, self.kept = self._groups.to(device, copy=True), kept[self._groups].to(device)

    def _draw(self) -> Tensor:
        noise = torch.rand(self.groups.shape, device=self.groups.device, dtype=torch.float32)
        same = self.groups[:, None] == self.groups
        rank = (same & (noise < noise[:, None])).sum(1)  # of the expert within its cluster
        return rank >= self.kept

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor, router: Any) -> None:
        """Redraws every `interval` steps."""
        self.fill_on(self.closed.device)
        self.step += 1
        self.closed.copy_(torch.where(self.step % self.interval == 0, self._draw(), self.closed))

    def forward(self, router_logits: Tensor, context: Context) -> Tensor | None:
        """[1,E] in training."""
        return ~self.closed[None] if context.training else None

    def extra_repr(self) -> str:
        return f"rate={self.rate}, interval={self.interval}"


def _rows_of(table: Tensor, context: Context, user: str, num_tokens: int) -> Tensor:
    """table[token_ids]: a row for each token."""
    token_ids = context.require("token_ids", user)
    if not isinstance(token_ids, Tensor) or token_ids.dtype not in _INTEGERS:
        got = getattr(token_ids, "dtype", type(token_ids).__name__)
        raise TypeError(f"token_ids: expected a tensor of integers, got {got}")
    token_ids = token_ids.reshape(-1)
    if len(token_ids) != num_tokens:
        raise ValueError(f"token_ids: expected {num_tokens} tokens, got {len(token_ids)}")
    if can_be_read(token_ids):
        check_range("token_ids", token_ids, 0, len(table))
    return table[token_ids.long()]  # an index of uint8 would be a mask


def _random_orders(rows: int, num_experts: int, generator: torch.Generator | None) -> Tensor:
    return torch.rand(rows, num_experts, generator=generator, dtype=torch.float32).argsort(1)


class TokenIdMask(nn.Module):
    """A mask by vocabulary id: `visible` [V,E] bool, a buffer. Needs Context.token_ids (MaskMoE, arXiv:2407.09816)."""

    visible: Tensor

    @checked
    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.register_buffer("visible", visible.bool())

    @classmethod
    def of_frequencies(
        cls,
        counts: Tensor,
        num_experts: int,
        *,
        frequent_from: float,
        rare_experts: int = 1,
        frequent_experts: int | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenIdMask:
        """Random experts for each id: rare_experts for ids that occur fewer than frequent_from times in the corpus (the
        paper's threshold is unverified), frequent_experts (all if None) for the others. counts [V]."""
        order = _random_orders(counts.shape[0], num_experts, generator)
        sizes = torch.where(counts.cpu() < frequent_from, rare_experts, frequent_experts or num_experts)
        return cls(order < sizes[:, None])

    def forward(self, router_logits: Tensor, context: Context) -> Tensor:
        return _rows_of(self.visible, context, "TokenIdMask", len(router_logits))


class Lookup(nn.Module):
    """Routing by a table: the experts table[token_ids] (-1 for none), all with equal weight (Mixture of Word Experts,
    arXiv:2311.10768; Hash Layers, arXiv:2106.04426), which uses only the shape of the logits: see scores.Uniform. With
    a score function the weights are the scores of the experts that the table chose (DeepSeek-V4, arXiv:2606.19348).

    Args:
        table: [V] or [V,K] integers, a buffer. Needs Context.token_ids.
        weight: of each expert; 1/K if None. Excludes score_function.
        score_function, normalize, scale: as for TopK.
    """

    table: Tensor
    uses_bias = False

    @checked
    def __init__(
        self,
        table: Tensor,
        weight: Finite | None = None,
        *,
        score_function: ScoreFunction | None = None,
        normalize: bool = False,
        scale: Finite = 1.0,
    ) -> None:
        super().__init__()
        if table.dim() not in (1, 2) or not table.numel():
            raise ValueError(f"table: expected shape [V] or [V,K], got {list(table.shape)}")
        if score_function is None and (normalize or scale != 1):
            raise ValueError("score_function: expected one with normalize or scale, got None")
        if score_function is not None and weight is not None:
            raise ValueError(f"weight: expected None with a score function, got {weight}")
        self.register_buffer("table", (table if table.dim() == 2 else table[:, None]).to(torch.int32))
        self.weight = 1 / self.table.shape[1] if weight is None else weight
        self._scored = None if score_function is None else (score_function, normalize, scale)

    @property
    def uses_logits(self) -> bool:
        """Whether it has a score function."""
        return self._scored is not None

    @classmethod
    def hashed(
        cls,
        vocabulary_size: int,
        num_experts: int,
        top_k: int = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Lookup:
        """A random table with top_k different experts for each id; options: of Lookup."""
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: expected 1 to {num_experts} (num_experts), got {top_k}")
        if top_k == 1:
            return cls(torch.randint(num_experts, (vocabulary_size,), generator=generator), **options)
        return cls(_random_orders(vocabulary_size, num_experts, generator)[:, :top_k], **options)

    def forward(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        num_experts = router_logits.shape[-1]
        ids = _rows_of(self.table, context, "Lookup", router_logits.numel() // num_experts)
        if self._scored is None:
            weights = torch.full_like(ids, self.weight, dtype=torch.float32).masked_fill(ids < 0, 0)
            return Routing(ids, weights, router_logits, num_experts)
        score_function, normalize, scale = self._scored
        router_logits = router_logits.reshape(-1, num_experts)
        scores = scores_of(router_logits, score_function)
        chosen = scores.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, 0)
        return Routing(ids, weighed(chosen, normalize, scale), router_logits, num_experts, scores)
