# SPDX-License-Identifier: BSD-3-Clause
"""Routers: logits, the choice of experts, and the slots of a choice."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import autograd, ops
from switchgear.arrays import accepts_arrays
from switchgear.autograd import apply, needs_autograd
from switchgear.backends import in_autocast
from switchgear.functional.arguments import as_ids, as_number, as_weights, flat, in_autocast_dtype


class Routing(NamedTuple):
    """The decision of a router: expert topk_ids[t,k] (-1: none) gets token t with weight topk_weights[t,k].

    Attributes:
        topk_ids: [T,K] int32.
        topk_weights: [T,K] float32.
        router_logits: [T,E].
        num_experts: E.
        scores: [T,E] float32, where the weights come from; None if not computed.
        losses: float32 scalars by name.
        num_dropped: int64 scalar, the choices that a capacity dropped; None without one.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    router_logits: Tensor
    num_experts: int
    scores: Tensor | None = None
    losses: dict[str, Tensor] = {}  # noqa: RUF012  replaced as a whole, never written to
    num_dropped: Tensor | None = None


def _replaced(routing: Routing, /, **changes: Any) -> Routing:
    return Routing(**{**dict(zip(Routing._fields, routing, strict=True)), **changes})


if torch.__version__ < "2.13":  # whose compiler does not trace that of NamedTuple
    Routing._replace = _replaced  # type: ignore[method-assign, assignment]


class Plan(NamedTuple):
    """The slots of a routing, ordered by (expert, token, choice).

    Attributes:
        expert_offsets: [E+1] int32; expert e owns the slots [expert_offsets[e], expert_offsets[e+1]).
        token_indices: [S] int32, the token of a slot; -1 past expert_offsets[E].
        slot_indices: [T,K] int32, the slot of a choice; -1 for an empty choice.
    """

    expert_offsets: Tensor
    token_indices: Tensor
    slot_indices: Tensor


@accepts_arrays
def route(
    router_logits: Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> Routing:
    """Chooses `top_k` experts for each token and weighs them.

    Total: any bits in router_logits (NaN, ±Inf, ties) give K distinct ids in [0, E) per token, the same on every
    backend. NaN and -Inf rank as the lowest finite number, +Inf as the highest, and ties go to the lowest id.

    Args:
        router_logits: [..., E], any floating dtype; leading dimensions are flattened to T. Scores are float32.
        top_k: K, choices per token.
        score_function: "softmax" over all experts, or "sigmoid" of each (DeepSeek-V3, arXiv:2412.19437).
        normalize: divide the chosen scores by their sum.
        scale: multiplies topk_weights last (routed_scaling_factor).
        selection_bias: [E], added to the scores for the choice but not to the weights (loss-free balancing,
            arXiv:2408.15664). It gets no gradient.
        num_groups, topk_groups, group_score: only experts of the best `topk_groups` of `num_groups` equal groups can be
            chosen (device-limited routing, arXiv:2405.04434); a group ranks by its "max" or the sum of its two best,
            "top2_sum", where an expert that a bias of -Inf closes counts 0.

    Returns:
        Routing with topk_ids [T,K] int32 in order of choice and topk_weights [T,K] float32 (float64 for float64).

    Raises:
        ValueError: an option out of range. TypeError: a dtype that is not floating.
    """
    if router_logits.dim() != 2:
        router_logits = flat("router_logits", router_logits)
    if selection_bias is not None:
        selection_bias = as_weights("selection_bias", selection_bias.detach(), torch.float32)
    options = (top_k, score_function, normalize, as_number("scale", scale), num_groups, topk_groups, group_score)
    if needs_autograd(router_logits):
        topk_ids, topk_weights = apply(autograd.Route, router_logits, selection_bias, *options)
    else:
        topk_ids, topk_weights = ops.route(router_logits, selection_bias, *options)
    return Routing(topk_ids, topk_weights, router_logits, router_logits.shape[1])


@accepts_arrays
def gate(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, float32: bool = False) -> Tensor:
    """The logits of a linear router, [..., E]: x · weightᵀ + bias, as torch.nn.functional.linear.

    Each sum is in float32, in one order. So the logits of a token have the same bits in any batch and for any number of
    threads, and other tokens cannot change its experts. (The reference sums as torch does.)

    Args:
        x: [..., H] in float32, bfloat16 or float16 (float64: reference only).
        weight, bias: [E,H] and [E], each in the dtype of x or in float32.
        float32: return float32 logits, not rounded to the dtype of weight; ignore torch.autocast, which otherwise casts
            all tensors to its dtype.

    Differentiable in x, weight and bias.

    Raises:
        ValueError: a wrong shape. TypeError: a wrong dtype.
    """
    x, weight, bias = _of_gate(x, weight, bias, float32)
    rows = x if x.dim() == 2 else flat("x", x)
    if needs_autograd(rows, weight, bias):
        router_logits: Tensor = apply(autograd.Gate, rows, weight, bias, float32)
    else:
        router_logits = ops.gate(rows, weight, bias, float32)
    return router_logits if x.dim() == 2 else router_logits.reshape(*x.shape[:-1], router_logits.shape[-1])


def _of_gate(x: Tensor, weight: Tensor, bias: Tensor | None, float32: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the dtypes that the op takes."""
    if not float32:
        if in_autocast(x.device.type):
            x, weight, bias = in_autocast_dtype(x.device.type, x, weight, bias)
        return x, weight, bias
    if weight.dtype is not x.dtype:
        weight = as_weights("weight", weight, x.dtype)
    if bias is not None and bias.dtype is not x.dtype:
        bias = as_weights("bias", bias, x.dtype)
    return x, weight, bias


@accepts_arrays
def gate_route(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    float32: bool = False,
    score_function: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> Routing:
    """`route` on the logits of `gate`, with the arguments of both: one op if no gradient is needed.

    Returns:
        Routing with router_logits [T,E], topk_ids [T,K] int32 and topk_weights [T,K] float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, or an option out of range. TypeError: a wrong dtype.
    """
    if needs_autograd(x, weight, bias):
        return route(
            gate(x, weight, bias, float32=float32),
            top_k,
            score_function=score_function,
            normalize=normalize,
            scale=scale,
            selection_bias=selection_bias,
            num_groups=num_groups,
            topk_groups=topk_groups,
            group_score=group_score,
        )
    options = (score_function, normalize, as_number("scale", scale), num_groups, topk_groups, group_score)
    x, weight, bias = _of_gate(x, weight, bias, float32)
    if x.dim() != 2:
        x = flat("x", x)
    if selection_bias is not None:
        selection_bias = as_weights("selection_bias", selection_bias.detach(), torch.float32)
    tensors = (x, weight, bias, selection_bias)
    op = ops.gate_route_on_host if ops.needs_no_dispatch(*tensors) else ops.gate_route
    router_logits, topk_ids, topk_weights = op(*tensors, float32, top_k, *options)
    return Routing(topk_ids, topk_weights, router_logits, router_logits.shape[1])


@accepts_arrays
def route_dynamic(
    router_logits: Tensor,
    *,
    top_p: float = math.inf,
    threshold: float = 0.0,
    min_experts: int = 1,
    max_experts: int | None = None,
    score_function: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
) -> Routing:
    """Chooses a variable number of experts for each token: the smallest set of the best experts whose scores add up to
    top_p (arXiv:2403.07652), without experts whose score is below threshold (arXiv:2408.04278).

    Args:
        router_logits: [..., E], as for `route`. Options not listed here are also as for `route`.
        top_p: sum of scores to reach; the expert that reaches it is chosen too. From 1 on, softmax chooses all experts.
        threshold: lower bound of a single score.
        min_experts, max_experts: bounds of the number of experts, whatever the scores. K of the Routing is max_experts,
            by default E; unused choices come last, with id -1 and weight 0.

    Raises:
        ValueError: an option out of range. TypeError: a dtype that is not floating.
    """
    if router_logits.dim() != 2:
        router_logits = flat("router_logits", router_logits)
    if selection_bias is not None:
        selection_bias = as_weights("selection_bias", selection_bias.detach(), torch.float32)
    top_p = as_number("top_p", top_p)
    if score_function == "softmax" and top_p >= 1:
        top_p = math.inf  # even if rounding makes the probabilities add up to less
    count = router_logits.shape[1] if max_experts is None else max_experts
    options = (
        count, min_experts, score_function, top_p, as_number("threshold", threshold), normalize,
        as_number("scale", scale),
    )  # fmt: skip
    if needs_autograd(router_logits):
        topk_ids, topk_weights = apply(autograd.RouteDynamic, router_logits, selection_bias, *options)
    else:
        topk_ids, topk_weights = ops.route_dynamic(router_logits, selection_bias, *options)
    return Routing(topk_ids, topk_weights, router_logits, router_logits.shape[1])


@accepts_arrays
def plan(topk_ids: Tensor, num_experts: int) -> Plan:
    """The slots of topk_ids [T,K] (int32 or int64, -1 for none), ordered by (expert, token, choice).

    Raises:
        ValueError: an id that is neither -1 nor in [0, num_experts). TypeError: another dtype.
    """
    return Plan(*ops.plan(as_ids("topk_ids", topk_ids), num_experts))
