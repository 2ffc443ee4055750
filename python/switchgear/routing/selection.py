# SPDX-License-Identifier: BSD-3-Clause
"""Selections that treat each token separately: the best k, by mass, by threshold, in groups, by rank, all.

Each is called as (router_logits [T,E], context, bias) and returns a Routing; see `Select` in context.py. Common
options: score_function "softmax", "sigmoid" or "sqrt_softplus"; normalize divides the chosen weights by their sum;
scale multiplies the weights last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from switchgear.checks import Count, Finite, NotNegativeOrInf, Number, Size, checked
from switchgear.functional import Routing, route, route_dynamic
from switchgear.reference.routing import GROUP_SCORES
from switchgear.routing.context import NOTHING_KNOWN, Context
from switchgear.routing.ranking import (
    ScoreFunction,
    choose,
    finite,
    keep_choices,
    left_aligned,
    scores_of,
    trim,
    weighed,
)


def as_rows(router_logits: Tensor) -> Tensor:
    return router_logits if router_logits.dim() == 2 else router_logits.reshape(-1, router_logits.shape[-1])


def take(
    router_logits: Tensor, scores: Tensor, topk_ids: Tensor, *, normalize: bool = False, scale: float = 1.0
) -> Routing:
    """The Routing with experts topk_ids [T,K], weighted by their scores [T,E]."""
    weights = weighed(scores.gather(1, topk_ids.long()), normalize, scale)
    return Routing(topk_ids, weights, router_logits, router_logits.shape[1], scores)


@checked
@dataclass(frozen=True)
class TopK:
    """The top_k best experts. Softmax and sigmoid are one native call with the options of `switchgear.route`; for
    "sqrt_softplus", and for other ranks of groups, see Grouped."""

    top_k: Size
    score_function: ScoreFunction = "softmax"
    normalize: bool = False
    scale: Finite = 1.0
    num_groups: Size = 1
    topk_groups: Size = 1
    group_score: Literal["max", "top2_sum"] = "max"

    def __post_init__(self) -> None:
        _check_groups(self.num_groups, self.topk_groups)

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        return _choose_best(
            router_logits, self.top_k, self.score_function, bias, normalize=self.normalize, scale=self.scale,
            num_groups=self.num_groups, topk_groups=self.topk_groups, group_score=self.group_score,
        )  # fmt: skip


def _choose_best(
    router_logits: Tensor,
    top_k: int,
    score_function: ScoreFunction,
    bias: Tensor | None,
    normalize: bool = False,
    scale: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str | int = "max",
) -> Routing:
    """What TopK and Grouped choose, for parts that build on it in each call, where their checks would take longer."""
    if score_function != "sqrt_softplus" and group_score in GROUP_SCORES:
        return route(
            router_logits, top_k, score_function=score_function, normalize=normalize, scale=scale,
            selection_bias=bias, num_groups=num_groups, topk_groups=topk_groups, group_score=str(group_score),
        )  # fmt: skip
    router_logits = as_rows(router_logits)
    if num_groups != 1 or group_score not in GROUP_SCORES:
        scores = scores_of(router_logits, score_function)
        ids = _choose_in_groups(scores.detach(), top_k, bias, num_groups, topk_groups, group_score)
        return take(router_logits, scores, ids, normalize=normalize, scale=scale)
    scores = scores_of(router_logits, score_function)
    ids = choose(finite(router_logits) if bias is None else scores + finite(bias), top_k)
    return take(router_logits, scores, ids, normalize=normalize, scale=scale)


@checked
@dataclass(frozen=True)
class Dense:
    """Every expert, in ascending order, weighted by its score. The bias has no effect."""

    score_function: ScoreFunction = "softmax"
    normalize: bool = False
    scale: Finite = 1.0
    uses_bias: ClassVar[bool] = False

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = as_rows(router_logits)
        scores = scores_of(router_logits, self.score_function)
        weights = weighed(scores, self.normalize, self.scale)
        num_tokens, num_experts = router_logits.shape
        ids = torch.arange(num_experts, dtype=torch.int32, device=router_logits.device)
        return Routing(ids.expand(num_tokens, -1), weights, router_logits, num_experts, scores)


@checked
@dataclass(frozen=True)
class RankK:
    """The experts of the given ranks, 0 for the best. RankK((2,)) takes only the third one (Self-Contrast,
    arXiv:2405.14507, for the weak forward pass). RankK((0, 1)) is TopK(2)."""

    ranks: Sequence[int]
    score_function: ScoreFunction = "softmax"
    normalize: bool = False
    scale: Finite = 1.0

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"ranks: expected different ones, from 0 on, got {list(self.ranks)}")

    @property
    def top_k(self) -> int:
        """How many of the best ranks are given without a gap: as many experts can be forced."""
        return next(k for k in range(len(self.ranks) + 1) if k not in self.ranks)

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        best = _choose_best(router_logits, max(self.ranks) + 1, self.score_function, bias)
        columns = torch.tensor(list(self.ranks), device=best.topk_ids.device)
        weights = weighed(best.topk_weights.index_select(1, columns), self.normalize, self.scale)
        return best._replace(topk_ids=best.topk_ids.index_select(1, columns), topk_weights=weights)


@checked
@dataclass(frozen=True)
class TopP:
    """The fewest experts whose probabilities sum to at least p. The weights are the probabilities themselves
    (arXiv:2403.07652, p = 0.4). p = 0 is top-1, p >= 1 all experts.

    max_experts: an upper limit, K of the result. Without it K is E; on the CPU unused trailing columns are removed.
    """

    p: NotNegativeOrInf = 0.4
    max_experts: Size | None = None
    normalize: bool = False
    scale: Finite = 1.0

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        num_experts = router_logits.shape[-1]
        return trim(
            route_dynamic(
                router_logits, top_p=self.p, max_experts=min(self.max_experts or num_experts, num_experts),
                normalize=self.normalize, scale=self.scale, selection_bias=bias,
            )
        )  # fmt: skip


@checked
@dataclass(frozen=True)
class Threshold:
    """The experts whose score is at least `threshold`, at least min_experts and at most max_experts of them (LaDiMo,
    arXiv:2408.04278; the choice of the threshold is unverified; `calibrate` achieves a given average number)."""

    threshold: Number
    min_experts: Count = 1
    max_experts: Size | None = None
    score_function: ScoreFunction = "softmax"
    normalize: bool = False
    scale: Finite = 1.0

    def __post_init__(self) -> None:
        if self.max_experts is not None and self.max_experts < self.min_experts:
            raise ValueError(f"max_experts: expected at least {self.min_experts}, got {self.max_experts}")

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        num_experts = router_logits.shape[-1]
        if self.min_experts > num_experts:
            raise ValueError(f"min_experts: expected 0 to {num_experts}, got {self.min_experts}")
        count = min(self.max_experts or num_experts, num_experts)
        if self.score_function != "sqrt_softplus":
            return trim(
                route_dynamic(
                    router_logits, threshold=self.threshold, min_experts=self.min_experts, max_experts=count,
                    score_function=self.score_function, normalize=self.normalize, scale=self.scale, selection_bias=bias,
                )
            )  # fmt: skip
        best = _choose_best(router_logits, count, self.score_function, bias)
        keep = best.topk_weights.detach() >= self.threshold
        keep[:, : self.min_experts] = True
        kept = keep_choices(best, keep)
        weights = weighed(kept.topk_weights, self.normalize, self.scale)
        return trim(left_aligned(kept._replace(topk_weights=weights)))

    @staticmethod
    @checked
    def calibrate(
        router_logits: Tensor,
        experts_per_token: Finite,
        *,
        min_experts: int = 1,
        score_function: ScoreFunction = "softmax",
    ) -> float:
        """The threshold at which these tokens [T,E] use experts_per_token experts on average. Raises ValueError for no
        tokens, or a number of experts that they cannot use."""
        scores = scores_of(as_rows(router_logits.detach()), score_function)
        if not len(scores):
            raise ValueError("router_logits: expected at least 1 token, got 0")
        free = scores.sort(-1, descending=True).values[:, min_experts:].flatten().sort(descending=True).values
        wanted = round(scores.shape[0] * (experts_per_token - min_experts))
        if not 0 <= wanted <= free.numel():
            raise ValueError(f"experts_per_token: expected {min_experts} to {scores.shape[1]}, got {experts_per_token}")
        return float(free[wanted - 1]) if wanted else math.inf


@checked
@dataclass(frozen=True)
class Grouped:
    """The top_k best experts within the best topk_groups of num_groups equal groups of consecutive experts.

    Groups are ranked by "sum", the probability of the group (the switch router of SAM, arXiv:2110.07431: the softmax
    over all experts is that of the group times that inside it); by a number m, the sum of the m best scores; or by
    "max" or "top2_sum", 1 and 2 of them (DeepSeek-V2 and -V3), which are native except for sqrt_softplus. An expert
    that a bias of -Inf closes counts 0. With topk_groups = 1 each token uses one device only.
    """

    top_k: Size
    num_groups: Size
    topk_groups: Size = 1
    group_score: Literal["sum", "max", "top2_sum"] | Size = "sum"
    score_function: ScoreFunction = "softmax"
    normalize: bool = False
    scale: Finite = 1.0

    def __post_init__(self) -> None:
        _check_groups(self.num_groups, self.topk_groups)

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        return _choose_best(
            router_logits, self.top_k, self.score_function, bias, self.normalize, self.scale,
            self.num_groups, self.topk_groups, self.group_score,
        )  # fmt: skip


def _check_groups(num_groups: int, topk_groups: int) -> None:
    if topk_groups > num_groups:
        raise ValueError(f"topk_groups: expected 1 to {num_groups} (num_groups), got {topk_groups}")


def _choose_in_groups(
    scores: Tensor, top_k: int, bias: Tensor | None, num_groups: int, topk_groups: int, group_score: str | int
) -> Tensor:
    """The ids [T,K] int32 of the best of scores [T,E] plus the bias within the best groups."""
    num_tokens, num_experts = scores.shape
    if num_experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {num_experts} experts, got {num_groups}")
    size = num_experts // num_groups
    if top_k > topk_groups * size:
        raise ValueError(f"top_k: expected 1 to {topk_groups * size} (eligible experts), got {top_k}")
    values = in_sums = scores
    if bias is not None:  # an expert with a bias of -Inf adds nothing to its group, which stays open for the others
        closed = bias == -math.inf
        values = in_sums = values + finite(bias)
        in_sums = in_sums.masked_fill(closed, -math.inf if group_score != "sum" else 0)
        in_sums = in_sums.masked_fill(closed.view(-1, size).all(1).repeat_interleave(size), -math.inf)
        # Above the experts of other groups: if too few are left, choices are to stay empty rather than go there.
        values = values.masked_fill(closed, torch.finfo(values.dtype).min / 2)
    in_groups = in_sums.view(num_tokens, num_groups, size)
    if group_score != "sum":
        count = {"max": 1, "top2_sum": 2}.get(str(group_score)) or int(group_score)
        in_groups = in_groups.topk(min(count, size)).values
        in_groups[..., 1:].masked_fill_(in_groups[..., 1:] == -math.inf, 0)
    groups = choose(in_groups.sum(-1), topk_groups)
    kept = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=values.device)
    kept = kept.scatter(1, groups.long(), True).repeat_interleave(size, 1)
    return choose(values.masked_fill(~kept, -math.inf), top_k)
