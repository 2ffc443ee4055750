# SPDX-License-Identifier: BSD-3-Clause
"""The ops of routing policies in plain torch: their specification, and their implementation on devices without kernels,
such as CUDA devices. Nothing is read back from a device. See switchgear.reference for the conventions.

Values can have any bits: NaN and -Inf rank last, +Inf first, ties go to the lowest index. Tokens compete only within
their sequence: sequence_ids [T] int32 in [0, B). If it is None, all tokens are one sequence.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pad

from switchgear.checks import Count, Finite, OneOf, Range, Size, checked
from switchgear.reference.checks import AnyFloats, Floats, Indices, TopkIds, check_range, wide
from switchgear.reference.routing import (
    NORMALIZE_EPSILON,
    Logits,
    ScoreFunction,
    SelectionBias,
    ordered_sum,
    sanitize,
    scores,
)

__all__ = ["DROPS", "assign_balanced", "assign_capped", "column_topk", "fit_capacity", "route_dynamic"]

DROPS = ("order", "reverse", "choice", "priority")
Values = Annotated[Tensor, Floats("T", "E")]
SequenceIds = Annotated[Tensor, Indices("T")]
Limits = Annotated[Tensor, Indices("B")]
AtLeast0 = Annotated[float, Range(0, math.inf)]


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _check_contents(name: str, indices: Tensor | None, low: int, high: int) -> None:
    """Checks that every index is in [low, high). Device memory is not read."""
    if indices is not None and indices.device.type == "cpu":
        check_range(name, indices, low, high)


def _sequences(sequence_ids: Tensor | None, num_tokens: int, device: torch.device) -> Tensor:
    """The sequence of each token, [T] int64."""
    if sequence_ids is None:
        return torch.zeros(num_tokens, dtype=torch.int64, device=device)
    return sequence_ids.long()


def _sizes(groups: Tensor, num_groups: int) -> Tensor:
    """The number of elements of each group, [num_groups] int64, for groups [P]. Group num_groups means none."""
    sizes = torch.zeros(num_groups + 1, dtype=torch.int64, device=groups.device)
    return sizes.scatter_add(0, groups, torch.ones_like(groups))[:-1]


def _places(groups: Tensor, order: Tensor, num_groups: int) -> Tensor:
    """For each element of groups [P], the number of elements of its group before it in `order` [P]. Valid for groups
    below num_groups."""
    order = order[groups[order].argsort(stable=True)]
    starts = pad(_sizes(groups, num_groups).cumsum(0), (1, 0))
    place = torch.arange(len(order), device=order.device) - starts[groups[order]]
    return torch.empty_like(place).scatter(0, order, place)


def _first_where(mask: Tensor) -> Tensor:
    """The index of the first true element in each row of mask [R,N]; N if there is none."""
    width = mask.shape[1]
    return torch.where(mask, torch.arange(width, device=mask.device), width).amin(1)


# ---- route_dynamic ---------------------------------------------------------------------------------------------------


@checked
def route_dynamic(
    router_logits: Logits,
    selection_bias: SelectionBias | None,
    max_experts: int,
    min_experts: int,
    score_function: ScoreFunction,
    top_p: AtLeast0,
    threshold: Annotated[float, Range(-math.inf, math.inf)],
    normalize: bool,
    scale: Finite,
) -> tuple[Tensor, Tensor]:
    """topk_ids [T,M] int32 and topk_weights [T,M] of router_logits [T,E], M = max_experts. From the M best experts, in
    the order of `route`, keeps those with a score of at least `threshold` for which the sum of the scores before them
    (in float64) is below top_p. Always keeps the first min_experts. The remaining entries are -1 and 0.
    """
    num_experts = router_logits.shape[1]
    if not 1 <= max_experts <= num_experts:
        raise ValueError(f"max_experts: expected 1 to {num_experts}, got {max_experts}")
    if not 0 <= min_experts <= max_experts:
        raise ValueError(f"min_experts: expected 0 to {max_experts} (max_experts), got {min_experts}")
    logits = sanitize(wide(router_logits))
    score = scores(logits, score_function)
    value = logits if selection_bias is None else score + sanitize(selection_bias.to(score.dtype))
    ids = value.sort(dim=-1, descending=True, stable=True).indices[:, :max_experts]
    weights = score.gather(1, ids)
    used_before = pad(weights.double().cumsum(-1), (1, -1))
    rank = torch.arange(max_experts, device=ids.device)
    keep = ((used_before < top_p) & (weights >= threshold)) | (rank < min_experts)
    order = (~keep).to(torch.int8).sort(dim=-1, stable=True).indices
    ids = ids.masked_fill(~keep, -1).gather(1, order)
    weights = weights.masked_fill(~keep, 0).gather(1, order)
    if normalize:
        weights = (weights.double() / (ordered_sum(weights) + NORMALIZE_EPSILON)).to(score.dtype)
    return ids.to(torch.int32), weights * scale


# ---- column_topk -----------------------------------------------------------------------------------------------------


@checked
def column_topk(values: Values, sequence_ids: SequenceIds | None, limits: Limits) -> Tensor:
    """topk_ids [T,E] int32: for each token the columns e, ascending, in which values[t,e] is among the limits[b]
    largest of its sequence b; then -1. values [T,E], limits [B] int32."""
    num_tokens, num_experts = values.shape
    _check_contents("sequence_ids", sequence_ids, 0, limits.shape[0])
    _check_contents("limits", limits, 0, 2**31)
    sequence = _sequences(sequence_ids, num_tokens, values.device)
    order = sanitize(wide(values)).sort(dim=0, descending=True, stable=True).indices
    order = order.gather(0, sequence[order].sort(dim=0, stable=True).indices)  # by sequence, then by value
    starts = pad(_sizes(sequence, limits.shape[0]).cumsum(0), (1, 0))
    place = torch.arange(num_tokens, device=values.device)[:, None] - starts[sequence[order]]
    taken = torch.empty_like(place).scatter(0, order, place) < limits[sequence][:, None]
    experts = torch.arange(num_experts, dtype=torch.int32, device=values.device)
    ids = torch.where(taken, experts, num_experts).sort(dim=1).values
    return ids.masked_fill(ids == num_experts, -1)


# ---- fit_capacity ----------------------------------------------------------------------------------------------------


def _precedence(drop: str, priorities: Tensor | None, num_tokens: int, top_k: int, device: torch.device) -> Tensor:
    """The rank [T,K] of each choice; 0 is the last to be dropped."""
    choices = torch.arange(num_tokens * top_k, device=device)
    if drop == "reverse":
        choices = choices.flip(0)
    elif drop == "choice":
        choices = choices.view(top_k, num_tokens).T
    elif drop == "priority":
        assert priorities is not None
        order = sanitize(priorities.flatten()).sort(descending=True, stable=True).indices
        choices = torch.empty_like(choices).scatter(0, order, choices)
    return choices.reshape(num_tokens, top_k)


@checked
def fit_capacity(
    topk_ids: TopkIds,
    priorities: Annotated[Tensor, AnyFloats("T", "K")] | None,
    scores: Annotated[Tensor, AnyFloats("T", "E")] | None,
    sequence_ids: SequenceIds | None,
    limits: Limits,
    num_experts: Size,
    drop: Annotated[str, OneOf(DROPS)],
    candidates: int,
) -> Tensor:
    """kept_ids [T,K] int32: topk_ids [T,K] with dropped choices set to -1, so that no expert has more than limits[b]
    choices from sequence b. An expert keeps the first in token order ("order"), the last ("reverse"), first choices
    before second ones ("choice"), or those of the highest priorities [T,K] ("priority", ties by order).

    With scores [T,E], there are candidates - K rounds. In round r each token offers its first dropped choice to the
    r-th best expert that it had not chosen, among those of scores above 0. The expert accepts by the same precedence
    while it has capacity.
    """
    num_tokens, top_k = topk_ids.shape
    if drop == "priority" and priorities is None:
        raise ValueError(f"priorities: expected shape [{num_tokens}, {top_k}], got none")
    if scores is not None and scores.shape[1] != num_experts:
        raise ValueError(f"scores: expected shape [{num_tokens}, {num_experts}], got {list(scores.shape)}")
    _check_contents("topk_ids", topk_ids, -1, num_experts)
    _check_contents("sequence_ids", sequence_ids, 0, limits.shape[0])
    _check_contents("limits", limits, 0, 2**31)
    device = topk_ids.device
    sequence = _sequences(sequence_ids, num_tokens, device)
    num_groups = limits.shape[0] * num_experts  # of (sequence, expert)
    rank = _precedence(drop, priorities, num_tokens, top_k, device)

    def group_of(experts: Tensor, *, where: Tensor) -> Tensor:
        return (sequence.view(-1, *[1] * (experts.dim() - 1)) * num_experts + experts).masked_fill(~where, num_groups)

    groups = group_of(topk_ids.long(), where=topk_ids >= 0).flatten()
    place = _places(groups, rank.flatten().argsort(), num_groups)
    per_group = limits.long().repeat_interleave(num_experts)
    room_of = pad(per_group, (0, 1))
    keep = (place < room_of[groups]).view(num_tokens, top_k)
    kept = topk_ids.masked_fill(~keep, -1)
    if scores is None:
        return kept
    room = (per_group - _sizes(groups, num_groups)).clamp(min=0)
    had = torch.zeros(num_tokens, num_experts, dtype=torch.int8, device=device)
    had = had.scatter_add(1, topk_ids.clamp(min=0).long(), (topk_ids >= 0).to(torch.int8)) > 0
    had = had | ~(scores > 0)
    others = sanitize(scores).masked_fill(had, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    lost = (topk_ids >= 0) & ~keep
    for round_ in range(min(candidates - top_k, num_experts)):
        expert = others[:, round_]
        offered = lost.any(1) & ~had.gather(1, expert[:, None])[:, 0]
        choice = _first_where(lost).clamp(max=top_k - 1)[:, None]
        groups = group_of(expert, where=offered)
        place = _places(groups, rank.gather(1, choice)[:, 0].argsort(), num_groups)
        accepted = offered & (place < pad(room, (0, 1))[groups])
        room = room - _sizes(groups.masked_fill(~accepted, num_groups), num_groups)
        here = torch.zeros_like(lost).scatter(1, choice, accepted[:, None])
        kept = torch.where(here, expert[:, None].to(torch.int32), kept)
        lost = lost & ~here
    return kept


# ---- assign_balanced -------------------------------------------------------------------------------------------------


@checked
def assign_balanced(
    values: Values, sequence_ids: SequenceIds | None, num_sequences: Size, eps: Finite, max_iterations: Count
) -> Tensor:
    """expert_ids [T] int32: assigns each expert an equal number of a sequence's tokens (one more for the first T mod E
    experts) such that the sum of the assigned values [T,E] float32 is close to the maximum.

    This is an auction. In each iteration every unassigned token bids for the expert with the largest value - price. If
    the second largest difference is d smaller, the bid is price + min(d, 4 · spread + 1) + eps. Each expert keeps as
    many of the highest bids as it has places (ties to the lowest token); when it is full, its price is the lowest of
    them. After max_iterations the unassigned tokens get the free places, both in ascending order.

    spread is max - min of the finite values of the sequence. A negative eps means spread / 50, at least 1e-4. Values
    that are not finite count as max + spread + 1 if positive, else as min - spread - 1.
    """
    num_tokens, num_experts = values.shape
    _check_contents("sequence_ids", sequence_ids, 0, num_sequences)
    sequence = _sequences(sequence_ids, num_tokens, values.device)
    values, spread = _bounded(wide(values), sequence, num_sequences)
    step = (spread / torch.full_like(spread, 50)).clamp(min=1e-4) if eps < 0 else torch.full_like(spread, eps)
    most = 4 * spread + 1
    expert = torch.arange(num_experts, device=values.device)
    sizes = _sizes(sequence, num_sequences)[:, None]
    places = (sizes // num_experts + (expert < sizes % num_experts)).flatten()  # per shop: a pair (sequence, expert)
    never_paid = 1e4 * torch.finfo(values.dtype).max ** 0.5
    price = values.new_full(places.shape, never_paid).masked_fill(places > 0, 0)
    none = num_sequences * num_experts
    shop = torch.full_like(sequence, none)  # where a token has a place
    paid = torch.zeros_like(values[:, 0])
    for _ in range(max_iterations):
        outside = shop == none
        if values.device.type == "cpu" and not outside.any():
            break
        worth = values - price.view(num_sequences, num_experts)[sequence]
        best = worth.amax(1, keepdim=True)
        at = _first_where(worth == best)
        second = best[:, 0] if num_experts == 1 else worth.scatter(1, at[:, None], -math.inf).amax(1)
        wanted = sequence * num_experts + at
        bid = (price[wanted] + (best[:, 0] - second).minimum(most[sequence])) + step[sequence]
        shop = torch.where(outside, wanted, shop)
        paid = torch.where(outside, bid, paid)
        place = _places(shop, paid.sort(descending=True, stable=True).indices, none)
        is_full = (_sizes(shop, none) >= places) & (places > 0)
        shop = torch.where(place < pad(places, (0, 1))[shop], shop, none)
        lowest = torch.full_like(price, never_paid, dtype=price.dtype)
        lowest = pad(lowest, (0, 1)).scatter_reduce(0, shop, paid, "amin")[:-1]
        price = torch.where(is_full, lowest, price)
    waiting = shop == none
    free = (places - _sizes(shop, none)).view(num_sequences, num_experts).cumsum(1)
    place = _places(
        sequence.masked_fill(~waiting, num_sequences), torch.arange(num_tokens, device=shop.device), num_sequences
    )
    left = (free[sequence] <= place[:, None]).sum(1)
    return torch.where(waiting, left, shop % num_experts).to(torch.int32)


def _bounded(values: Tensor, sequence: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Finite values [T,E], and max - min of the finite ones of each sequence [B]."""
    is_finite = values.isfinite()
    huge = torch.finfo(values.dtype).max ** 0.5  # differences and prices stay finite
    values = values.clamp(-huge, huge)
    low, high = values.new_full((num_sequences,), huge), values.new_full((num_sequences,), -huge)
    low = low.scatter_reduce(0, sequence, values.masked_fill(~is_finite, huge).amin(1), "amin")
    high = high.scatter_reduce(0, sequence, values.masked_fill(~is_finite, -huge).amax(1), "amax")
    spread = (high - low).clamp(min=0)  # nothing finite: 0
    top = torch.where(high >= low, high + spread + 1, 1)[sequence][:, None]
    bottom = torch.where(high >= low, low - spread - 1, 0)[sequence][:, None]
    return torch.where(is_finite, values, torch.where(values > 0, top, bottom)), spread


# ---- assign_capped ---------------------------------------------------------------------------------------------------


@checked
def assign_capped(
    values: Values,
    sequence_ids: SequenceIds | None,
    limits: Limits,
    cap: Size,
    entropy: Annotated[float, Range(2**-126, math.inf, "high")],  # normal in float32
    iterations: Count,
    tolerance: AtLeast0 = 0.0,
    longest: int | None = None,
    largest: int | None = None,
) -> Tensor:
    """log A [T,E] of the assignment A that maximizes ⟨S, A⟩ + entropy · H(A) subject to Σ_t A = limits[b] for each
    sequence b, Σ_e A <= cap and 0 <= A <= 1. S is values [T,E], limits [B] int32. Results above 0 mean A = 1. They are
    float32, or float64 for float64 values. If cap >= E, the result is S / entropy.

    A = min(1, exp(S / entropy + price_e - price_t)). Each iteration makes the sums of the experts exact, then those of
    the tokens: coordinate ascent on the dual problem. A sequence stops after an iteration that changed none of its
    price_t by more than `tolerance`, whatever other sequences do. A last step makes the sums of the experts exact. A
    limit above the sequence length counts as that length. S / entropy is clamped to ±√(largest number); NaN is the
    lowest.

    longest and largest are upper bounds of the tokens per sequence and of the limits. They avoid reading from a device.
    """
    num_tokens, num_experts = values.shape
    _check_contents("sequence_ids", sequence_ids, 0, limits.shape[0])
    _check_contents("limits", limits, 0, 2**31)
    huge = torch.finfo(wide(values).dtype).max ** 0.5
    worth = (sanitize(wide(values)) / entropy).clamp(-huge, huge)
    if cap >= num_experts or num_tokens == 0:  # cap does not bind
        return worth
    sequence = _sequences(sequence_ids, num_tokens, values.device)
    sizes = _sizes(sequence, limits.shape[0])
    longest = num_tokens if sequence_ids is None else int(sizes.max()) if longest is None else longest
    tokens = torch.arange(num_tokens, device=values.device)
    at = sequence * longest + _places(sequence, tokens, limits.shape[0])  # in [B,longest]; the rest is padding
    padded = worth.new_full((limits.shape[0] * longest, num_experts), -math.inf).index_copy(0, at, worth)
    plan = padded.view(-1, longest, num_experts).mT
    each = limits.minimum(sizes).to(worth.dtype)[:, None, None]
    most = torch.full_like(each[:1], cap)
    largest = min(int(limits.max()) if largest is None else largest, longest)
    of_token = torch.zeros_like(plan[:, :1])
    settled = (sizes == 0)[:, None, None]
    for _ in range(iterations):
        if values.device.type == "cpu" and settled.all():
            break
        of_expert = _price(plan - of_token, each, largest)
        charge = (-_price((plan + of_expert).mT.contiguous(), most, cap)).clamp(min=0).mT
        stays = ((charge - of_token).abs() <= tolerance).all(-1, keepdim=True)
        of_token = torch.where(settled, of_token, charge)
        settled = settled | stays
    of_expert = _price(plan - of_token, each, largest)
    return (plan + of_expert - of_token).mT.reshape(-1, num_experts)[at]


def _price(values: Tensor, total: Tensor, largest: int) -> Tensor:
    """p [...,1] such that Σ min(1, exp(values + p)) over the last dimension is `total`, at most `largest` and its size.

    If the j largest terms are 1, the others must sum to total - j. The solution is the first j for which none of them
    exceeds 1. Since j < total, only the `largest` best values have to be sorted. Rows of -inf give inf.
    """
    descending, best = values.topk(min(max(largest, 1), values.shape[-1]), -1)
    others = values.scatter(-1, best, -math.inf).logsumexp(-1, keepdim=True)
    ascending = torch.cat((others, descending.flip(-1)), -1)
    rest = ascending.logcumsumexp(-1)[..., 1:].flip(-1)  # of the elements from j on
    left = total - torch.arange(descending.shape[-1], dtype=values.dtype, device=values.device)
    price = left.clamp(min=torch.finfo(values.dtype).tiny).log() - rest
    first = ((descending + price <= 0) & (left > 0)).to(torch.int8).argmax(-1, keepdim=True)
    return price.gather(-1, first)
