# SPDX-License-Identifier: BSD-3-Clause
"""Building blocks of selections. They use the ops route and plan, so any ranking is total, ties go to the lowest index,
and there is no loop over experts."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from switchgear import ops, reference
from switchgear.functional import Routing
from switchgear.routing.context import Context, can_be_read

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]
SCORE_FUNCTIONS = get_args(ScoreFunction)


def scores_of(router_logits: Tensor, score_function: str) -> Tensor:
    """Scores [T,E] of router_logits, float32 (float64 for float64), differentiable and finite for any logits: "softmax"
    over the experts, "sigmoid" of each, or "sqrt_softplus" √log(1 + exp z) of each."""
    logits = finite(router_logits)
    if score_function == "softmax":
        return logits.softmax(-1)
    if score_function == "sigmoid":
        return sigmoid(logits)
    reference.check_choice("score_function", score_function, SCORE_FUNCTIONS)
    above = torch.where(logits < 0, 0.0, logits)  # at 0, clamp has a gradient of 1 or, from torch 2.14 on, of 0
    softplus = above + _power(logits).log1p()
    return softplus.clamp(min=torch.finfo(softplus.dtype).tiny).sqrt()  # the gradient of sqrt at 0 is infinite


def sigmoid(values: Tensor) -> Tensor:
    """1 / (1 + exp(-z)), with the same bits at any place of a tensor. On CPUs torch's own sigmoid and softplus compute
    the last elements of a tensor in another way."""
    power = _power(values)
    return torch.where(values < 0, power, 1.0) / (1 + power)


def _power(values: Tensor) -> Tensor:
    """exp(-|z|), which cannot overflow. The gradient at 0 is that of exp(-z), not the 0 of abs."""
    return torch.where(values < 0, values, -values).exp()


def finite(values: Tensor) -> Tensor:
    """Converts as `wide` does; NaN and -Inf become the lowest finite number, +Inf the highest, without gradient."""
    return reference.sanitize(reference.wide(values))


def is_open(router_logits: Tensor) -> Tensor:
    """Whether Masked leaves each expert open, [T,E] bool: it gives the others the lowest number of the dtype."""
    return router_logits > torch.finfo(router_logits.dtype).min


def weighed(scores: Tensor, normalize: bool, scale: float) -> Tensor:
    """The weights of choices with these scores [T,K], 0 for empty ones; normalize: divided by their sum."""
    if normalize:
        scores = scores / (scores.sum(-1, keepdim=True) + reference.NORMALIZE_EPSILON)
    return scores if scale == 1 else scores * scale


def choose(values: Tensor, count: int) -> Tensor:
    """The ids [R,count] int32 of the largest of values [R,N] in each row, by descending value, then ascending index."""
    topk_ids, _ = ops.route(values.detach(), None, count, "softmax", False, 1.0, 1, 1, "max")
    return topk_ids


def positions(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """A stable counting sort: how many earlier elements of groups [P] (integers, -1 for none) are equal, [P] int64, and
    the size of each group, [num_groups] int64."""
    offsets, _, slots = ops.plan(groups.to(torch.int32).view(-1, 1), num_groups)
    offsets = offsets.long()
    return slots.view(-1) - offsets[groups.clamp(min=0).long()], offsets.diff()


def ranks(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The rank [P] int64 of each of values [P] within its group, 0 for the largest; ties to the lowest index."""
    order = finite(values.detach()).sort(descending=True, stable=True).indices
    in_order, _ = positions(groups[order], max(num_groups, 1))  # no sequences have no tokens
    return torch.empty_like(in_order).scatter(0, order, in_order)


def keep_choices(routing: Routing, keep: Tensor) -> Routing:
    """The routing with choices emptied where keep [T,K] is false."""
    return routing._replace(
        topk_ids=routing.topk_ids.masked_fill(~keep, -1), topk_weights=routing.topk_weights.masked_fill(~keep, 0)
    )


def left_aligned(routing: Routing) -> Routing:
    """Moves holes behind the choices, whose order stays."""
    order = (routing.topk_ids < 0).to(torch.int8).sort(dim=-1, stable=True).indices
    return routing._replace(
        topk_ids=routing.topk_ids.gather(1, order), topk_weights=routing.topk_weights.gather(1, order)
    )


def total_weight(routing: Routing) -> Tensor:
    """The sum of each token's weights [T,1], added in the order of the experts: empty columns change no bit of it."""
    dense = routing.topk_weights.new_zeros(routing.topk_ids.shape[0], routing.num_experts)
    dense = dense.scatter_add(1, routing.topk_ids.clamp(min=0).long(), routing.topk_weights)  # 0 for empty choices
    return dense.sum(1, keepdim=True)


def trim(routing: Routing) -> Routing:
    """Removes trailing columns that are empty for all tokens. On the CPU only: elsewhere their number would have to be
    read back, and in a compiled graph it would be a data-dependent shape."""
    ids = routing.topk_ids
    if not can_be_read(ids):
        return routing
    used = int((ids >= 0).any(0).sum()) if ids.shape[0] else 1
    return routing._replace(topk_ids=ids[:, : max(used, 1)], topk_weights=routing.topk_weights[:, : max(used, 1)])


def uniform(shape: tuple[int, ...], context: Context, device: torch.device) -> Tensor:
    """Float32 random numbers in [0, 1)."""
    return torch.rand(shape, generator=context.source(), device=device, dtype=torch.float32)


def jittered(x: Tensor, jitter: float, context: Context, float32: bool) -> Tensor:
    """x times uniform noise in [1 - jitter, 1 + jitter], both in float32 if `float32`, else in the dtype of x."""
    x = reference.wide(x) if float32 else x
    return x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter, generator=context.source())


def gumbel(shape: tuple[int, ...], context: Context, device: torch.device) -> Tensor:
    """-log(-log u), float32: the argmax of log-probabilities plus this noise is a draw from them.

    Uses 24-bit uniform numbers, which torch draws several times faster than exponential ones. It takes 1 - u, since u
    is finer where the result is large. u = 0 is replaced by the midpoint of the interval below 2^-24.
    """
    waiting = uniform(shape, context, device).neg_().log1p_().neg_().clamp_(min=2.0**-25)
    return waiting.log_().neg_()


def draw(probabilities: Tensor, context: Context) -> Tensor:
    """An id [R,1] int64 for each row of probabilities [R,N] (any sum), never of probability 0: the position of a
    uniform number in the cumulative sum."""
    up_to = probabilities.cumsum(-1)
    point = uniform((probabilities.shape[0], 1), context, probabilities.device) * up_to[:, -1:]
    return (up_to <= point).sum(-1, keepdim=True).clamp(max=probabilities.shape[1] - 1)


def from_pairs(
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    num_tokens: int,
    num_experts: int,
    max_experts_per_token: int | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_ids [T,K'] int32 and topk_weights [T,K'] of P pairs: each token's experts in ascending order, then holes.

    Args:
        token, expert: [P] integers below num_tokens and num_experts; a pair with token -1 is ignored. Pairs are
            distinct.
        weight: [P] float32; the result is differentiable in it.
        max_experts_per_token: K'. If None it is the largest number of experts of a token (at least 1), read back from
            the device; in a compiled graph, or for meta tensors, it is E. A token with more experts keeps the lowest
            ones.
    """
    _, order, _ = ops.plan(expert.to(torch.int32).masked_fill(token < 0, -1).view(-1, 1), num_experts)
    order = order.long()  # pairs sorted by expert, -1 past the last one
    in_order = order.clamp(min=0)
    token = token[in_order].masked_fill(order < 0, -1)
    column, per_token = positions(token, num_tokens)  # the index of a pair within its token, in order of experts
    width = max_experts_per_token
    if width is None and (torch.compiler.is_compiling() or token.is_meta):
        width = num_experts
    elif width is None:
        width = max(int(per_token.max()), 1) if num_tokens else 1
    target = token * width + column
    target = torch.where((token >= 0) & (column < width), target, num_tokens * width)
    size = num_tokens * width + 1  # dropped pairs go to the last element
    ids = torch.full((size,), -1, dtype=torch.int32, device=token.device)
    ids = ids.scatter(0, target, expert[in_order].to(torch.int32))[:-1]
    weights = weight.new_zeros(size).scatter(0, target, weight[in_order])[:-1]
    return ids.view(num_tokens, width), weights.view(num_tokens, width)
