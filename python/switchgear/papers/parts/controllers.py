# SPDX-License-Identifier: BSD-3-Clause
"""Controllers of single papers, which Router.after_step calls once per optimizer step; and limits: capacities by kind
of expert, and a lower bound on a capacity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Count, Finite, Fraction, NotNegativeOrInf, Positive, Range, Size, checked
from switchgear.functional import Routing
from switchgear.papers.parts.masks import AroundSelection
from switchgear.routing.balance import count_tokens, spans_processes, sum_over_processes, total_weights
from switchgear.routing.capacity import Capacity, count_choices, renormalize_weights
from switchgear.routing.context import Context, is_recomputing, made
from switchgear.routing.counting import aside, unseen
from switchgear.routing.ranking import finite, scores_of
from switchgear.utils.modules import KeepsFloat32

_Growth = Annotated[float, Range(1, math.inf, "low high")]
_LEAST_GROWTH, _MOST_GROWTH = 1e-6, 1e10  # of the λ of AdaptiveSparsity, which begins small


class _Coefficient(KeepsFloat32):
    """A coefficient that follows two counts of each step."""

    counted = ("_seen",)
    value: Tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.register_buffer("value", torch.tensor(initial, dtype=torch.float32))
        self._seen: Tensor | None = None  # [2], of this step

    def _add(self, seen: Tensor) -> None:
        self._seen = seen if self._seen is None else self._seen + seen

    def reset_parameters(self) -> None:
        """Resets to the first step."""
        nn.init.constant_(self.value, self.initial)

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor, router: nn.Module) -> None:
        """One step of the rule, over all processes; none if there was no call."""
        group, seen, self._seen = getattr(router, "_group", None), self._seen, None
        if seen is None and spans_processes(group):  # others wait for those of this process
            seen = torch.zeros(2, dtype=torch.int64, device=self.value.device)
        if seen is not None:
            self._follow(*sum_over_processes(seen, group))

    def _follow(self, first: Tensor, second: Tensor) -> None:
        raise NotImplementedError


class AdaptiveCoefficient(_Coefficient):
    """A loss coefficient that follows the fraction of dropped tokens (Skywork-MoE, arXiv:2406.06563).

    Per layer and step: α ← beta · α + (1 - beta) · min(xi · drop_rate, alpha_max).

        SwitchLoss(AdaptiveCoefficient())                # needs a capacity; otherwise nothing is dropped

    Args: xi, alpha_max, beta. initial: α of the first step (unverified).
    Buffers: value [] float32, also in a model of another dtype; in the state dict.
    """

    @checked
    def __init__(
        self, xi: Finite = 0.2, alpha_max: Finite = 0.01, beta: Fraction = 0.99, initial: Finite | None = None
    ) -> None:
        super().__init__(alpha_max if initial is None else initial)
        self.xi, self.alpha_max, self.beta = xi, alpha_max, beta

    def forward(self, routing: Routing) -> Tensor:
        """The current coefficient; also counts what `routing` dropped."""
        if not is_recomputing():
            aside(self._see, routing.topk_ids, routing.num_dropped)
        return self.value

    def _see(self, topk_ids: Tensor, num_dropped: Tensor | None) -> None:
        choices = (topk_ids >= 0).sum()  # what the router wanted
        dropped = torch.zeros_like(choices) if num_dropped is None else num_dropped.sum()
        self._add(torch.stack((dropped.to(choices.device), choices)))

    def _follow(self, dropped: Tensor, choices: Tensor) -> None:
        self.update(dropped / choices.clamp(min=1))

    @torch.no_grad()
    def update(self, drop_rate: Tensor | float) -> None:
        """One step of the rule. drop_rate: dropped choices as a fraction of all."""
        wanted = (self.xi * torch.as_tensor(drop_rate, dtype=torch.float32, device=self.value.device)).clamp(
            max=self.alpha_max
        )
        self.value.copy_(self.beta * self.value + (1 - self.beta) * wanted)

    def extra_repr(self) -> str:
        return f"xi={self.xi}, alpha_max={self.alpha_max}, beta={self.beta}"


class AdaptiveSparsity(_Coefficient):
    """λ · mean_t Σ_e f_e · relu(z_te), with λ that follows the sparsity of the choice (ReMoE, arXiv:2412.14711).

    f_e = E / (K·T) · tokens_per_expert[e]; it balances the load, and is 1 with balance=False. Per step, with the
    fraction S of pairs (token, expert) that were not chosen, λ ← λ · rate^sign((1 - K/E) - S). The paper shares one λ
    among all layers and divides by their number; here each layer has its own. λ stays within 1e-6 and 1e10 times
    `initial`, a bound of ours: it comes back from there in about 76 and 126 steps of 1.2, from 0 and infinity never.

    Args: top_k: K, the wanted average number of experts per token. initial, rate: of λ. balance. num_experts: E; the
    router passes it.
    Buffers: value [] float32, λ, also in a model of another dtype; in the state dict.
    """

    name = "sparsity"

    @checked
    def __init__(
        self, top_k: Positive, num_experts: int, *, initial: Finite = 1e-8, rate: _Growth = 1.2, balance: bool = True
    ) -> None:
        super().__init__(initial)
        if top_k > num_experts:
            raise ValueError(f"top_k: expected a number in (0, {num_experts}] (num_experts), got {top_k}")
        if not abs(initial) * _MOST_GROWTH < torch.finfo(torch.float32).max:
            raise ValueError(f"initial: expected a number that may grow by {_MOST_GROWTH:g} in float32, got {initial}")
        self.top_k, self.num_experts, self.rate, self.balance = top_k, num_experts, rate, balance

    def forward(self, routing: Routing, context: Context) -> Tensor:
        """The loss; also counts what was chosen."""
        positive = finite(routing.router_logits).relu()
        num_tokens = positive.shape[0]
        counts = count_tokens(routing.topk_ids, self.num_experts)
        if not is_recomputing():
            aside(self._see, counts, routing.router_logits)
        total = positive.sum(0) / max(num_tokens, 1)
        if self.balance:
            total = total * counts.to(total.dtype) * (self.num_experts / (self.top_k * max(num_tokens, 1)))
        return self.value * total.sum()

    def _see(self, counts: Tensor, router_logits: Tensor) -> None:
        self._add(torch.stack((counts.sum(), counts.new_full((), router_logits.numel() // self.num_experts))))

    def _follow(self, chosen: Tensor, tokens: Tensor) -> None:
        pairs = tokens.clamp(min=1) * self.num_experts
        too_dense = chosen / pairs - self.top_k / self.num_experts  # (1 - K/E) - S
        self.value.mul_(self.rate ** too_dense.sign())
        self.value.clamp_(*sorted((self.initial * _LEAST_GROWTH, self.initial * _MOST_GROWTH)))

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, rate={self.rate}"


class RunningThreshold(_Coefficient):
    """A threshold that `fraction` of all values of training exceed, whatever the number of tokens of a call: for
    Broadcast, whose largest share of a batch of ten tokens is none.

        switchgear.MoE(256, 128, 16, select=Broadcast(TopK(2), partial(RunningThreshold, 0.05), max_fraction=1.0))

    Per step, with the share s of the tokens that exceeded it, threshold ← threshold + rate · (s - fraction). It begins
    at ln E, the largest entropy, and stays within `rate` of [0, ln E]. So over n steps the mean of s is within
    (ln E + 2 · rate) / (rate · n) of `fraction`.

    Args: fraction. num_experts: E; the router passes it. rate: in nats.
    Buffers: value [] float32, also in a model of another dtype; in the state dict.
    """

    @checked
    def __init__(self, fraction: Fraction = 0.05, *, num_experts: Size, rate: Positive = 0.1) -> None:
        super().__init__(math.log(num_experts))
        self.fraction, self.rate = fraction, rate

    def forward(self, values: Tensor) -> Tensor:
        """Whether values [T] exceed the threshold, [T] bool; also counts them."""
        exceeds = values > self.value
        if not is_recomputing():
            aside(self._see, exceeds)
        return exceeds

    def _see(self, exceeds: Tensor) -> None:
        self._add(torch.stack((exceeds.sum(), exceeds.new_full((), exceeds.numel(), dtype=torch.int64))))

    def _follow(self, exceeding: Tensor, tokens: Tensor) -> None:
        self.value += self.rate * (exceeding / tokens.clamp(min=1) - self.fraction) * (tokens > 0)

    def extra_repr(self) -> str:
        return f"fraction={self.fraction}, rate={self.rate}"


class QuantileBias(KeepsFloat32):
    """Sets the selection bias after each step so that the step's tokens would have loaded all experts alike (quantile
    balancing, https://kexue.fm/archives/11619; Kimi K3).

    A token's cutoff is its largest score plus bias among the experts that it did not choose. An expert would have got
    the token with a bias of at least the cutoff minus its score. Its new bias is the quantile K/E of these numbers over
    the tokens of all calls and processes, from a histogram; then the mean of all biases is subtracted. There is neither
    a loss nor a rate.

        moe = switchgear.MoE(256, 128, 16, 4, score_function="sigmoid", balance=[QuantileBias])

    Args: num_experts: E; the router passes it. score_function: that of the selection, with scores in [0, 1]. bins: of
    the histogram, which spans the biases and 1 on both sides.
    Buffers: bias [E] float32, the router's since the last step, also in a model of another dtype; in the state dict.
    """

    needs_selection_bias, counted = True, ("_seen",)
    bias: Tensor

    @checked
    def __init__(
        self, num_experts: Size, *, score_function: Literal["softmax", "sigmoid"] = "sigmoid", bins: Size = 1000
    ) -> None:
        super().__init__()
        self.num_experts, self.score_function, self.bins = num_experts, score_function, bins
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        self._seen: Tensor | None = None  # [E,bins] int64, of this step

    def reset_parameters(self) -> None:
        """Resets to the first step."""
        nn.init.zeros_(self.bias)

    def _span(self) -> tuple[Tensor, Tensor]:
        """The least number of the histogram, and the width of a bin."""
        least = self.bias.min() - 1
        return least, (self.bias.max() + 1 - least) / self.bins

    def forward(self, routing: Routing, context: Context) -> None:
        """Counts what the tokens of a call ask for."""
        if not is_recomputing():
            aside(self._see, routing.topk_ids, routing.router_logits)

    @torch.no_grad()
    def _see(self, ids: Tensor, router_logits: Tensor) -> None:
        scores = scores_of(router_logits.reshape(-1, self.num_experts), self.score_function).float()
        ids = ids.reshape(-1, ids.shape[-1]).long() + 1  # empty choices are noted in the first column
        chosen = torch.zeros(len(scores), self.num_experts + 1, dtype=torch.bool, device=ids.device)
        chosen = chosen.scatter(1, ids, True)[:, 1:]
        cutoff = (scores + self.bias).masked_fill(chosen, -math.inf).amax(1, keepdim=True)
        least, width = self._span()
        bins = ((cutoff - scores - least) / width).clamp(0, self.bins - 1).long().T
        seen = torch.zeros(self.num_experts, self.bins, dtype=torch.int64, device=ids.device)
        seen.scatter_add_(1, bins, torch.ones_like(bins))
        self._seen = seen if self._seen is None else self._seen + seen

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor, router: Any) -> None:
        """tokens_per_expert [E]: of the step, over all processes. None of them: the bias stays."""
        group, seen, self._seen = getattr(router, "_group", None), self._seen, None
        if seen is None and not spans_processes(group):
            return
        if seen is None:  # others wait for those of this process
            seen = torch.zeros(self.num_experts, self.bins, dtype=torch.int64, device=self.bias.device)
        below = sum_over_processes(seen, group).double().cumsum(1)
        wanted = tokens_per_expert.sum().double() / self.num_experts
        place = (below < wanted).sum(1, keepdim=True).clamp(max=self.bins - 1)
        before = torch.where(place > 0, below.gather(1, (place - 1).clamp(min=0)), 0)
        inside = (wanted - before) / (below.gather(1, place) - before)
        least, width = self._span()
        bias = (least + (place + inside)[:, 0] * width).float()
        self.bias.copy_(torch.where(wanted > 0, bias - bias.mean(), self.bias))
        router.e_score_correction_bias.copy_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.score_function}, bins={self.bins}"


class RunningCap(AroundSelection, KeepsFloat32):
    """A selection that closes an expert while its running total of weights exceeds the mean by more than `margin` (Deep
    Mixture of Experts, arXiv:1312.4314).

        switchgear.MoE(256, 128, 16, select=partial(RunningCap, Dense(), margin=100.0))

    A closed expert gets the lowest logit, hence weight 0 under a softmax, and the others' weights sum to 1. Totals grow
    in training only, once per call: all tokens of a call see the totals from before it (the paper's include the token
    itself). Recomputation by activation checkpointing adds nothing, but sees the totals from after the call, so it may
    choose otherwise. It is meant for early training; set `margin` to infinity afterwards. The least total is subtracted
    from all before each addition: only differences matter, and large numbers would stop growing.

    Args: select: the wrapped selection. margin: in tokens. num_experts: E; the router passes it.

    Buffers: totals [E] float32, also in a model of another dtype; in the state dict.
    """

    counted = ("totals",)
    totals: Tensor

    @checked
    def __init__(self, select: Any, margin: NotNegativeOrInf, num_experts: int) -> None:
        super().__init__()
        self.select, self.margin = made(select, num_experts=num_experts), margin
        self.register_buffer("totals", torch.zeros(num_experts, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Zeroes the totals."""
        nn.init.zeros_(self.totals)

    def forward(self, router_logits: Tensor, context: Context, bias: Tensor | None = None) -> Routing:
        if not context.training:
            return self.select(router_logits, context, bias)  # type: ignore[no-any-return]
        closed = self.totals - self.totals.mean() > self.margin
        lowest = torch.finfo(router_logits.dtype).min
        if bias is not None:  # it must not lift a closed expert
            bias = bias.masked_fill(closed, -torch.inf)
        routing: Routing = self.select(router_logits.masked_fill(closed, lowest), context, bias)
        if not is_recomputing():
            with unseen(routing.topk_ids):
                self._add(routing.topk_ids, routing.topk_weights.detach())
        return routing

    def _add(self, ids: Tensor, weights: Tensor) -> None:
        added = total_weights(ids.long() + 1, weights, len(self.totals) + 1)[1:]
        self.totals -= self.totals.min()
        self.totals += added

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


def min_capacity(delta: float, hidden_size: int, num_experts: int) -> float:
    """1 / (E · erfc(√(H·δ² / (2 - δ²)))): LocMoE's lower bound on the capacity of an expert (arXiv:2401.13920).

    delta: the paper's δ, a threshold on the similarity of tokens and experts, measured there as about 0.03. The unit
    of the bound is unverified. ValueError unless 0 < δ < √2.
    """
    if not 0 < delta < math.sqrt(2):
        raise ValueError(f"delta: expected a number between 0 and √2, got {delta}")
    tail = math.erfc(math.sqrt(hidden_size * delta**2 / (2 - delta**2)))
    return 1 / (num_experts * tail) if tail else math.inf


@checked
@dataclass(frozen=True)
class CapacityByKind:
    """Two capacities: ⌈factor · τ·K·T / (τ·N + F)⌉ tokens for each of N real experts, ⌈factor · K·T / (τ·N + F)⌉ for
    each of the F = free_experts last ones, which cost nothing (MoE++, arXiv:2410.07348; constants unverified). K·T is
    the number of choices, without empty ones.

    limit: a Capacity that drops, whose factor is the formula's; evaluation_factor alike.
    """

    free_experts: Count
    tau: Positive = 0.75
    limit: Capacity = field(default_factory=partial(Capacity, 1.1))
    _of_kind: Capacity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.limit.overflow != "drop":
            raise ValueError(f"limit.overflow: expected drop, got {self.limit.overflow!r}")
        # A token's weights of both kinds have one sum.
        object.__setattr__(self, "_of_kind", replace(self.limit, renormalize=False))

    @property
    def needs_scores(self) -> bool:
        """Whether its limit does."""
        return self.limit.needs_scores

    def __call__(self, routing: Routing, context: Context) -> Routing:
        num_experts = routing.num_experts
        if self.free_experts > num_experts:
            raise ValueError(f"free_experts: expected at most {num_experts} (num_experts), got {self.free_experts}")
        real = num_experts - self.free_experts
        unit = num_experts / (self.tau * real + self.free_experts)  # factor 1 of a Capacity is choices / num_experts
        is_free = routing.topk_ids >= real
        limited = self._limited(routing, ~is_free, self.tau * unit, context)
        others = self._limited(routing, is_free, unit, context)
        topk_ids = torch.where(is_free, others.topk_ids, limited.topk_ids)
        topk_weights = torch.where(is_free, others.topk_weights, limited.topk_weights)
        assert limited.num_dropped is not None
        assert others.num_dropped is not None
        before = 0 if routing.num_dropped is None else routing.num_dropped
        num_dropped = limited.num_dropped + others.num_dropped - before
        kept = routing._replace(topk_ids=topk_ids, topk_weights=topk_weights, num_dropped=num_dropped)
        return kept._replace(topk_weights=renormalize_weights(kept, routing)) if self.limit.renormalize else kept

    def _limited(self, routing: Routing, kind: Tensor, scale: float, context: Context) -> Routing:
        """The choices of one kind, which only displace each other, within `scale` times the limit."""
        part = routing._replace(topk_ids=routing.topk_ids.masked_fill(~kind, -1))
        return self._of_kind.limited(part, context, count_choices(routing), scale)
