# SPDX-License-Identifier: BSD-3-Clause
"""The choice of experts in plain torch: gate, the product of a router; route and its gradient. The specification."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor

from switchgear.checks import Finite, NotEmpty, OneOf, checked
from switchgear.reference.checks import (
    AnyFloats,
    Floats,
    Rows,
    TopkIds,
    check,
    check_range,
    check_slots,
    weight_dtype,
    wide,
)

__all__ = [
    "GROUP_SCORES", "NORMALIZE_EPSILON", "SCORE_FUNCTIONS", "exp", "gate", "gate_route", "logits_dtype", "route",
    "route_backward", "sanitize", "scores",
]  # fmt: skip

SCORE_FUNCTIONS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2_sum")
ScoreFunction = Annotated[str, OneOf(SCORE_FUNCTIONS)]
GroupScore = Annotated[str, OneOf(GROUP_SCORES)]
Logits = Annotated[Tensor, Floats("T", "E")]
SelectionBias = Annotated[Tensor, AnyFloats("E")]
NORMALIZE_EPSILON = 1e-20  # keeps normalized weights finite if all chosen scores underflow


# ---- gate ------------------------------------------------------------------------------------------------------------


def logits_dtype(weight: Tensor, float32: bool) -> torch.dtype:
    """The dtype of router_logits: that of the router's weight, or float32 (float64 for float64)."""
    return weight_dtype(weight.dtype) if float32 else weight.dtype


@checked
def gate(
    x: Rows,
    weight: Annotated[Tensor, NotEmpty, AnyFloats("E", "H")],
    bias: Annotated[Tensor, AnyFloats("E")] | None,
    float32: bool,
) -> Tensor:
    """router_logits [T,E] = x [T,H] · weight [E,H]ᵀ + bias [E], summed in float32 and rounded once.

    weight and bias have the dtype of x, or float32.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (x.dtype, weight_dtype(x.dtype)):
            raise TypeError(f"{name}: expected {x.dtype} like x or {weight_dtype(x.dtype)}, got {tensor.dtype}")
    logits = wide(x) @ wide(weight).T
    if bias is not None:
        logits = logits + wide(bias)
    return logits.to(logits_dtype(weight, float32))


def gate_route(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection_bias: Tensor | None, float32: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """router_logits [T,E] of gate; topk_ids and topk_weights [T,K] of route with `options`, top_k and the following."""
    router_logits = gate(x, weight, bias, float32)
    return router_logits, *route(router_logits, selection_bias, *options)


# ---- scores ----------------------------------------------------------------------------------------------------------


def sanitize(values: Tensor) -> Tensor:
    """NaN and -Inf become the lowest finite number, +Inf the highest."""
    limits = torch.finfo(values.dtype)
    return values.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)


# exp(r) ≈ 1 + r + r²·(C2 + C3·r + C4·r² + C5·r³ + C6·r⁴) for |r| <= ln2 / 2; csrc/cpu/exp.h derives the numbers.
_LOWEST, _HIGHEST = float.fromhex("-0x1.5d589ep+6"), 89.0
_LOG2_E, _ROUND = float.fromhex("0x1.715476p+0"), float.fromhex("0x1.8p+23")
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")
_C6_TO_C2 = [
    float.fromhex(c) for c in ("0x1.6ac74ep-10", "0x1.123dep-7", "0x1.555858p-5", "0x1.55548cp-3", "0x1.fffffcp-2")
]


def exp(x: Tensor) -> Tensor:
    """The exponential of the scores. In float32 it is a fixed sequence of separately rounded IEEE operations, so that
    scores have the same bits on every backend. Results below the smallest normal number are 0."""
    if x.dtype == torch.float64:
        return torch.exp(x)
    clamped = x.clamp(_LOWEST, _HIGHEST)
    n = (clamped * _LOG2_E + _ROUND) - _ROUND  # nearest integer
    r = (clamped - n * _LN2_HIGH) - n * _LN2_LOW
    q = torch.full_like(r, _C6_TO_C2[0])
    for coefficient in _C6_TO_C2[1:]:
        q = q * r + coefficient
    p = (q * (r * r) + r) + 1
    exponent = n.to(torch.int32)
    half = exponent >> 1  # in two steps: 2^exponent itself may exceed the range of float32
    result = (p * _power_of_two(half)) * _power_of_two(exponent - half)
    return result.masked_fill(x < _LOWEST, 0)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def ordered_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension in float64, term by term: the order affects the result's bits."""
    return values.double().cumsum(-1)[..., -1:]


def scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores [T,E] of sanitized logits: softmax over all experts, or the sigmoid of each."""
    if score_function == "sigmoid":
        return 1 / (1 + exp(-logits))
    exponentials = exp(logits - logits.amax(-1, keepdim=True))
    return (exponentials.double() / ordered_sum(exponentials)).to(logits.dtype)


# ---- route -----------------------------------------------------------------------------------------------------------


def _keep_best_groups(values: Tensor, num_groups: int, topk_groups: int, group_score: str) -> Tensor:
    """`values` [T,E] with -Inf outside the `topk_groups` best of `num_groups` groups of consecutive experts."""
    num_tokens, num_experts = values.shape
    groups = values.view(num_tokens, num_groups, num_experts // num_groups)
    rank = groups.amax(-1)
    if group_score == "top2_sum" and groups.shape[-1] > 1:
        second = groups.topk(2, dim=-1).values[..., 1]
        is_closed = second == torch.finfo(second.dtype).min  # by a bias of -Inf: the sum would close the group
        rank = rank + second.masked_fill(is_closed, 0)
    kept = rank.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
    dropped = torch.ones_like(rank, dtype=torch.bool).scatter(1, kept, False)
    return groups.masked_fill(dropped[:, :, None], -math.inf).view(num_tokens, num_experts)


def _check_sizes(num_experts: int, top_k: int, num_groups: int, topk_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {num_experts} experts, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups: expected 1 to {num_groups}, got {topk_groups}")
    eligible = topk_groups * (num_experts // num_groups)
    if not 1 <= top_k <= eligible:
        raise ValueError(f"top_k: expected 1 to {eligible} (eligible experts), got {top_k}")


@checked
def route(
    router_logits: Logits,
    selection_bias: SelectionBias | None,
    top_k: int,
    score_function: ScoreFunction,
    normalize: bool,
    scale: Finite,
    num_groups: int,
    topk_groups: int,
    group_score: GroupScore,
) -> tuple[Tensor, Tensor]:
    """topk_ids [T,K] int32 and topk_weights [T,K] of router_logits [T,E], which can have any bits.

    The order of choice is total: value descending, then id ascending. Scores are monotone, so without bias and groups
    the value is the logit itself, and rounding creates no ties; otherwise it is score + selection_bias.
    """
    _check_sizes(router_logits.shape[1], top_k, num_groups, topk_groups)
    check_slots("router_logits", router_logits.shape[0], top_k)
    logits = sanitize(wide(router_logits))
    score = scores(logits, score_function)
    if selection_bias is None and num_groups == 1:
        value = logits
    else:
        value = score if selection_bias is None else score + sanitize(selection_bias.to(score.dtype))
        if num_groups > 1:
            value = _keep_best_groups(value, num_groups, topk_groups, group_score)
    topk_ids = value.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    topk_weights = score.gather(1, topk_ids)
    if normalize:
        total = ordered_sum(topk_weights) + NORMALIZE_EPSILON
        topk_weights = (topk_weights.double() / total).to(score.dtype)
    return topk_ids.to(torch.int32, memory_format=torch.contiguous_format), topk_weights * scale


@checked
def route_backward(
    grad_topk_weights: Tensor,
    router_logits: Logits,
    topk_ids: TopkIds,
    score_function: ScoreFunction,
    normalize: bool,
    scale: Finite,
) -> Tensor:
    """grad_router_logits [T,E], in float64 until the end. With p the scores, w the chosen scores, g the incoming
    gradient times scale, s = Σ w + 1e-20, and U_j the u_k of expert j or 0:

    u_k = g_k, or (g_k - Σ g w / s) / s if normalised
    softmax   grad_j = p_j (U_j - Σ u w)          sigmoid   grad_j = U_j p_j (1 - p_j)

    0 where the logit was not finite, since sanitizing makes it constant.
    """
    check("grad_topk_weights", grad_topk_weights, topk_ids.shape, weight_dtype(router_logits.dtype))
    check_range("topk_ids", topk_ids, -1, router_logits.shape[1])
    ids, empty = topk_ids.clamp(min=0).long(), topk_ids < 0
    score = scores(sanitize(wide(router_logits)), score_function).double()
    chosen = score.gather(1, ids).masked_fill(empty, 0)
    grad_chosen = (grad_topk_weights.double() * scale).masked_fill(empty, 0)
    if normalize:
        total = ordered_sum(chosen) + NORMALIZE_EPSILON
        grad_chosen = ((grad_chosen - ordered_sum(grad_chosen * chosen) / total) / total).masked_fill(empty, 0)
    grad_score = torch.zeros_like(score).scatter_add(1, ids, grad_chosen)
    if score_function == "softmax":
        grad_logits = score * (grad_score - ordered_sum(grad_chosen * chosen))
    else:
        grad_logits = grad_score * score * (1 - score)
    return grad_logits.masked_fill(~router_logits.isfinite(), 0).to(router_logits.dtype)
