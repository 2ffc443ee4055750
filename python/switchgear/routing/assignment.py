# SPDX-License-Identifier: BSD-3-Clause
"""Balanced assignment: one expert for each token, equally many tokens for each expert, the largest total affinity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear.functional import Routing, route
from switchgear.reference import check_choice
from switchgear.routing.context import NOTHING_KNOWN, Context, check_at_least, check_scope, is_per_sequence, sequences
from switchgear.routing.ranking import SCORE_FUNCTIONS, choose, positions, scores_of


@dataclass(frozen=True)
class BalancedAssignment:
    """In training each expert gets exactly T/E tokens (of T, the first T mod E experts one more) and the total of the
    logits is near its maximum; in evaluation each token gets its best expert (BASE Layers, arXiv:2103.16716).

    The maximum comes from an auction with equal places (Bertsekas & Castañon 1989): a token without a place bids for
    the expert that is worth most to it at the present prices, by as much as the next best expert is worth less, plus
    eps; an expert keeps its best bids, and its price is the lowest of these. If the auction ends within max_iterations,
    the total is within T·eps of the maximum; if it does not, the tokens that are left get the places that are left, in
    order. (The authors' code lets experts bid for tokens, with the same eps, and waits for the device in each
    iteration; here a device other than the CPU always runs max_iterations and is never waited for.)

    Args:
        eps: "auto" is (max - min) / 50 of the logits, at least 1e-4, as in the paper.
        score_function: of the weight, a sigmoid in the paper. No gradient flows through the assignment.
        scope: "batch", or "sequence": one assignment for each sequence.
        balanced_in_evaluation: assign in evaluation too.
    """

    eps: float | str = "auto"
    max_iterations: int = 100
    score_function: str = "sigmoid"
    scope: str = "batch"
    balanced_in_evaluation: bool = False

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_choice("score_function", self.score_function, SCORE_FUNCTIONS)
        check_at_least("max_iterations", self.max_iterations, 1)
        if self.eps != "auto" and (isinstance(self.eps, str) or not self.eps > 0):
            raise ValueError(f"eps: expected a positive number or 'auto', got {self.eps!r}")

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        num_tokens, num_experts = router_logits.shape
        scores = scores_of(router_logits, self.score_function)
        if context.training or self.balanced_in_evaluation:
            values = router_logits.detach().to(scores.dtype)
            values = values if bias is None else values + bias
            if is_per_sequence(self.scope, context):
                sequence, count = sequences(context, num_tokens, values.device)
            else:
                sequence, count = torch.zeros(num_tokens, dtype=torch.int64, device=values.device), 1
            ids = assign(values, sequence, count, self.eps, self.max_iterations).to(torch.int32)[:, None]
        else:
            ids = route(router_logits.detach(), 1, selection_bias=bias).topk_ids
        return Routing(ids, scores.gather(1, ids.long()), router_logits, num_experts, scores)


def assign(
    values: Tensor, sequence: Tensor, num_sequences: int, eps: float | str = "auto", max_iterations: int = 100
) -> Tensor:
    """The expert of each token, [T] int64, so that the experts of a sequence have equally many of its tokens.

    values [T,E]; sequence [T] int64 in [0, num_sequences). NaN and infinities count as a little less, or more, than any
    finite number of their sequence.
    """
    num_tokens, num_experts = values.shape
    if num_tokens == 0:
        return sequence
    on_cpu = values.device.type == "cpu" and not torch.compiler.is_compiling()
    values, spread = _bounded(values, sequence, num_sequences)
    step = (spread / 50).clamp(min=1e-4) if eps == "auto" else torch.full_like(spread, float(eps))
    places = _places(sequence, num_sequences, num_experts).flatten()  # of (sequence, expert)
    highest = 1e4 * float(torch.finfo(values.dtype).max ** 0.5)  # above any price
    price = values.new_full(places.shape, highest).masked_fill(places > 0, 0)
    shop = torch.full_like(sequence, -1)  # the (sequence, expert) where a token has a place
    paid = torch.zeros_like(values[:, 0])
    for _ in range(max_iterations):
        waiting = (shop < 0).nonzero().flatten() if on_cpu else torch.arange(num_tokens, device=values.device)
        if on_cpu and waiting.numel() == 0:
            break
        group = sequence[waiting]
        worth = values[waiting] - price.view(num_sequences, num_experts)[group]
        best = choose(worth, min(2, num_experts)).long()
        both = worth.gather(1, best)
        lead = (both[:, 0] - both[:, -1]).minimum(4 * spread[group] + 1)  # there may be no second expert with a place
        target = group * num_experts + best[:, 0]
        bid = price[target] + lead + step[group]
        outside = shop[waiting] < 0
        shop = shop.scatter(0, waiting, torch.where(outside, target, shop[waiting]))
        paid = paid.scatter(0, waiting, torch.where(outside, bid, paid[waiting]))
        order = paid.sort(descending=True, stable=True).indices
        place, demand = positions(shop[order], places.shape[0])
        kept = torch.empty_like(place).scatter(0, order, place) < places[shop.clamp(min=0)]
        shop = shop.masked_fill(~kept | (shop < 0), -1)
        lowest = torch.full_like(price, highest).scatter_reduce(
            0, shop.clamp(min=0), paid.masked_fill(shop < 0, highest), "amin"
        )
        price = torch.where((demand >= places) & (places > 0), lowest, price)
    return _fill(shop, sequence, places.view(num_sequences, num_experts)) % num_experts


def _bounded(values: Tensor, sequence: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Finite values [T,E], and max - min of the finite ones of each sequence [B]."""
    is_finite = values.isfinite()
    huge = torch.finfo(values.dtype).max ** 0.5  # differences and prices stay finite
    values = values.clamp(-huge, huge)
    low = values.masked_fill(~is_finite, huge).amin(1)
    high = values.masked_fill(~is_finite, -huge).amax(1)
    low = torch.full_like(low[:1], huge).expand(num_sequences).scatter_reduce(0, sequence, low, "amin")
    high = torch.full_like(high[:1], -huge).expand(num_sequences).scatter_reduce(0, sequence, high, "amax")
    spread = (high - low).clamp(min=0)  # nothing finite: 0
    top = torch.where(high >= low, high + spread + 1, 1)[sequence][:, None]
    bottom = torch.where(high >= low, low - spread - 1, 0)[sequence][:, None]
    outside = torch.where(values > 0, top, bottom)
    return torch.where(is_finite, values, outside), spread


def _places(sequence: Tensor, num_sequences: int, num_experts: int) -> Tensor:
    """How many tokens each expert takes of each sequence, [B,E] int64."""
    sizes = torch.zeros(num_sequences, dtype=torch.int64, device=sequence.device)
    sizes = sizes.scatter_add(0, sequence, torch.ones_like(sequence))[:, None]
    expert = torch.arange(num_experts, device=sequence.device)
    return sizes // num_experts + (expert < sizes % num_experts)


def _fill(shop: Tensor, sequence: Tensor, places: Tensor) -> Tensor:
    """The tokens without a place get the free places of their sequence, both in ascending order."""
    num_sequences, num_experts = places.shape
    waiting = shop < 0
    taken = torch.zeros(places.numel() + 1, dtype=torch.int64, device=shop.device)
    taken = taken.scatter_add(0, torch.where(waiting, places.numel(), shop), torch.ones_like(shop))[:-1]
    free_before = (places - taken.view(num_sequences, num_experts)).cumsum(1)
    place, _ = positions(sequence.masked_fill(~waiting, -1), num_sequences)
    expert = (free_before[sequence] <= place[:, None]).sum(1)
    return torch.where(waiting, sequence * num_experts + expert.clamp(max=num_experts - 1), shop)
