# SPDX-License-Identifier: BSD-3-Clause
"""The functions of switchgear, differentiable.

    router_logits [T,E] ──route──► topk_ids, topk_weights [T,K]            T tokens, K choices, E experts
                                      │
                                      └──plan──► Plan{expert_offsets [E+1], token_indices [S], slot_indices [T,K]}
                                                                                                      S = T·K slots
    x [T,H] ──permute──► permuted_x [S,H] ──grouped_gemm──► h [S,N] ──glu──► a [S,I] ──grouped_gemm──► permuted_y [S,H]
                                                                     permuted_y ──combine──► y [T,H]

`gate` computes router_logits from x and the router's weight. `moe` computes everything after route with one op forward
and one backward. It saves x and h for backward, and no other tensor of that size. The stages can also be called
separately.

Arguments are torch tensors or arrays of other libraries (see arrays.py). A projection can also be a Weight in another
format (weights/). Derivatives are in autograd.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from switchgear import autograd, ops, reference
from switchgear.arrays import accepts_arrays
from switchgear.autograd import apply, needs_autograd
from switchgear.backends import in_autocast
from switchgear.ops import GluOptions
from switchgear.weights.weight import AdaptedWeight, SelectedWeight, Weight, taken_by_grouped_gemm, taken_by_moe

T = TypeVar("T", Tensor, Tensor | None)
AnyWeight = Tensor | Weight | AdaptedWeight | SelectedWeight
_WEIGHTS = (Weight, AdaptedWeight, SelectedWeight)
_INT32 = torch.iinfo(torch.int32)
_LARGEST = torch.finfo(torch.float32).max


class Routing(NamedTuple):
    """The decision of a router: expert topk_ids[t,k] (-1: none) gets token t with weight topk_weights[t,k]."""

    topk_ids: Tensor  # [T,K] int32
    topk_weights: Tensor  # [T,K] float32
    router_logits: Tensor  # [T,E]
    num_experts: int
    scores: Tensor | None = None  # [T,E] float32, where the weights come from; None if not computed
    losses: dict[str, Tensor] = {}  # noqa: RUF012  float32 scalars by name; replaced as a whole, never written to
    num_dropped: Tensor | None = None  # int64 scalar: choices dropped by a capacity; None without one


class Plan(NamedTuple):
    """The slots of a routing, ordered by (expert, token, choice)."""

    expert_offsets: Tensor  # [E+1] int32, exclusive: expert e owns the slots [expert_offsets[e], expert_offsets[e+1])
    token_indices: Tensor  # [S] int32, slot -> token; -1 past expert_offsets[E]
    slot_indices: Tensor  # [T,K] int32, (token, choice) -> slot; -1 for an empty choice


# ---- helpers ---------------------------------------------------------------------------------------------------------


def as_ids(name: str, ids: Tensor) -> Tensor:
    if ids.dtype is torch.int32:
        return ids
    if ids.dtype is not torch.int64:
        raise TypeError(f"{name}: expected int32 or int64, got {ids.dtype}")
    return ids.clamp(_INT32.min, _INT32.max).int()  # saturates: an invalid id must not wrap around to a valid one


def as_weights(name: str, weights: T, dtype: torch.dtype) -> T:
    """Converts token weights to float32 (float64 if `dtype` is float64), differentiably."""
    wanted = reference.weight_dtype(dtype)
    if weights is None or weights.dtype is wanted:
        return weights
    if not weights.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {weights.dtype}")
    return weights.to(wanted)


def in_autocast_dtype(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts the tensors to autocast's dtype, except uint8 and float64 (as torch does)."""
    dtype = torch.get_autocast_dtype(device_type)
    stay = (torch.float64, torch.uint8)
    return tuple(tensor if tensor is None or tensor.dtype in stay else tensor.to(dtype) for tensor in tensors)


def _flat(name: str, tensor: Tensor) -> Tensor:
    """[..., N] -> [T,N]"""
    if tensor.dim() > 0 and tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected a last dimension of at least 1, got shape {list(tensor.shape)}")
    return tensor.reshape(-1, tensor.shape[-1])


def as_number(name: str, value: float) -> float:
    return value if isinstance(value, float) else _converted(name, value)


def _converted(name: str, value: Any) -> float:
    try:
        if not isinstance(value, (str, bytes)):  # float() would parse these
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        pass
    raise TypeError(f"{name}: expected float, got {type(value).__name__}")


def as_limit(limit: float | None) -> float:
    if limit is None:
        return 0.0
    limit = as_number("limit", limit)
    if not 2.0**-150 < limit <= _LARGEST:  # smaller numbers are 0 in float32, which means no limit
        raise ValueError(f"limit: expected a positive number of float32 (1.4e-45 to 3.4e38) or None, got {limit}")
    return limit


# ---- route, plan -----------------------------------------------------------------------------------------------------


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
            "top2_sum".

    Returns:
        Routing with topk_ids [T,K] int32 in order of choice and topk_weights [T,K] float32 (float64 for float64).

    Raises:
        ValueError: an option out of range. TypeError: a dtype that is not floating.
    """
    if router_logits.dim() != 2:
        router_logits = _flat("router_logits", router_logits)
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
    rows = x if x.dim() == 2 else _flat("x", x)
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
    """`route` on the logits of `gate`, with the arguments of both: one op if no gradient is needed."""
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
        x = _flat("x", x)
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
        router_logits = _flat("router_logits", router_logits)
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


# ---- permute, combine ------------------------------------------------------------------------------------------------


@accepts_arrays
def permute(x: Tensor, plan: Plan, topk_weights: Tensor | None = None) -> Tensor:
    """The rows of x [T,H] in slot order, [S,H]: permuted_x[s] = x[token_indices[s]], times the slot's weight if given.

    topk_weights [T,K] may have any floating dtype. Rows past expert_offsets[E] are zero. Differentiable in both.
    """
    topk_weights = as_weights("topk_weights", topk_weights, x.dtype)
    if needs_autograd(x, topk_weights):
        permuted_x: Tensor = apply(autograd.Permute, x, topk_weights, *plan)
        return permuted_x
    return ops.permute(x, *plan, topk_weights)


@accepts_arrays
def combine(permuted_y: Tensor, plan: Plan, topk_weights: Tensor | None = None) -> Tensor:
    """Sums each token's slots, [T,H]: y[t] = Σ_k topk_weights[t,k] · permuted_y[slot_indices[t,k]].

    permuted_y [S,H]; topk_weights [T,K] of any floating dtype, 1 if absent. The sum is in float32, in order of k.
    Differentiable in both.
    """
    topk_weights = as_weights("topk_weights", topk_weights, permuted_y.dtype)
    if needs_autograd(permuted_y, topk_weights):
        y: Tensor = apply(autograd.Combine, permuted_y, topk_weights, *plan)
        return y
    return ops.combine(permuted_y, *plan, topk_weights)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


@accepts_arrays
def grouped_gemm(
    x: Tensor,
    weight: AnyWeight | Sequence[Tensor],
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    token_indices: Tensor | None = None,
) -> Tensor:
    """Multiplies each expert's rows by its matrix: out[s] = x[r(s)] · weight[e(s)]ᵀ + bias[e(s)], [S,N].

    Args:
        x: [S,C] in slot order; or [T,C] with token_indices [S] (Plan.token_indices), and then r(s) = token_indices[s].
        weight: [E,N,C], or E matrices [N_e,C] of different heights. Either of the last two dimensions may be
            contiguous: pass transposed weights [E,C,N] as `weight.mT`, without a copy. (Matrices of a list whose
            strides differ are copied.) A Weight in another format, an AdaptedWeight or a SelectedWeight also works;
            panels are expanded for the call, because only `moe` can read them.
        expert_offsets: [E+1] int32 (Plan.expert_offsets).
        bias: [E,N], N being the largest N_e.

    Rows past expert_offsets[E], and columns past an expert's N_e, are zero. Float tensors must have the same dtype;
    torch.autocast casts them to its own. Differentiable in x, a plain weight, adapters and bias; an expert without rows
    gets zero gradients.
    """
    if isinstance(weight, AdaptedWeight):
        return _adapted_grouped_gemm(x, weight, expert_offsets, bias, token_indices)
    if isinstance(weight, Weight):
        return _stored_grouped_gemm(x, weight, expert_offsets, bias, token_indices)
    if isinstance(weight, SelectedWeight):
        return _selected_grouped_gemm(x, weight, expert_offsets, bias, token_indices)
    matrices = [weight] if isinstance(weight, Tensor) else list(weight)
    if not matrices:
        raise ValueError("weight: expected at least one matrix, got none")
    if in_autocast(x.device.type):
        x, bias, *matrices = in_autocast_dtype(x.device.type, x, bias, *matrices)
    if needs_autograd(x, bias, *matrices):
        out: Tensor = apply(autograd.GroupedGemm, x, bias, expert_offsets, token_indices, *matrices)
        return out
    return ops.grouped_gemm(x, matrices, (), bias, expert_offsets, token_indices, False, False)


def _stored_grouped_gemm(
    x: Tensor, weight: Weight, expert_offsets: Tensor, bias: Tensor | None, token_indices: Tensor | None
) -> Tensor:
    if in_autocast(x.device.type):
        x, bias = in_autocast_dtype(x.device.type, x, bias)
    wants_gradients = needs_autograd(x, bias)
    if weight.is_lossless:
        has_kernels = weight.data.is_cpu  # other devices warn about missing ones
        taken = weight.plain() if wants_gradients and has_kernels else taken_by_grouped_gemm(weight, x.dtype)
        if isinstance(taken, Tensor):
            return grouped_gemm(x, taken, expert_offsets, bias=bias, token_indices=token_indices)
    if bias is not None and not weight.is_lossless:
        bias = bias.to(x.dtype)
    if wants_gradients:
        args = (x, bias, expert_offsets, token_indices, weight.form, *weight.tensors)
        out: Tensor = apply(autograd.StoredGroupedGemm, *args)
        return out
    return ops.grouped_gemm(x, weight.tensors, weight.form, bias, expert_offsets, token_indices, False, False)


def _selected_grouped_gemm(
    x: Tensor, selected: SelectedWeight, expert_offsets: Tensor, bias: Tensor | None, token_indices: Tensor | None
) -> Tensor:
    _check_selected("weight", selected, "bias", bias)
    tensors = (x, selected.weight, bias, selected.trained, selected.trained_bias)
    if in_autocast(x.device.type):
        tensors = in_autocast_dtype(x.device.type, *tensors)
    x, weight, bias, trained, trained_bias = tensors
    if needs_autograd(x, trained, trained_bias):
        args = (x, weight, bias, expert_offsets, token_indices, selected.experts, trained, trained_bias)
        out: Tensor = apply(autograd.SelectedGroupedGemm, *args)
        return out
    return ops.grouped_gemm(x, [weight], (), bias, expert_offsets, token_indices, False, False)


def _check_selected(name: str, selected: SelectedWeight, bias_name: str, bias: Tensor | None) -> None:
    """Checks what no kernel sees: the trained experts' shapes, and that the rest is frozen."""
    for frozen_name, frozen in ((name, selected.weight), (bias_name, bias)):
        if frozen is not None and frozen.requires_grad:
            raise ValueError(f"{frozen_name}: expected a frozen one, of which some experts are trained alone")
    count, (_, rows, columns) = selected.experts.shape[0], selected.weight.shape
    for trained, shape in ((selected.trained, (count, rows, columns)), (selected.trained_bias, (count, rows))):
        if trained is not None and trained.shape != shape:
            raise ValueError(f"{name}: expected trained experts of shape {list(shape)}, got {list(trained.shape)}")


def _adapted_grouped_gemm(
    x: Tensor,
    adapted: AdaptedWeight,
    expert_offsets: Tensor,
    bias: Tensor | None,
    token_indices: Tensor | None,
) -> Tensor:
    """The product with the weight, plus that with the adapter."""
    out = grouped_gemm(x, adapted.weight, expert_offsets, bias=bias, token_indices=token_indices)
    a, b, scales, *ranks = adapted.adapter()
    if in_autocast(x.device.type):
        x, a, b = in_autocast_dtype(x.device.type, x, a, b)
    if ranks:
        unused = torch.arange(a.shape[1], device=a.device) >= ranks[0][:, None]
        a, b = a.masked_fill(unused[:, :, None], 0), b.masked_fill(unused[:, None, :], 0)
    if adapted.dropout > 0:
        rows = x if token_indices is None else x[token_indices.clamp(min=0).long()]
        kept = reference.keeps(_dropout_seed(x.device), 0, rows.shape[0], rows.shape[1], adapted.dropout)
        x, token_indices, scales = torch.where(kept, rows, 0), None, scales / (1 - adapted.dropout)
    low = grouped_gemm(x, a, expert_offsets, token_indices=token_indices)
    experts = torch.bucketize(torch.arange(len(low), device=x.device), expert_offsets[1:], right=True)
    scaled = low * scales[experts.clamp(max=len(scales) - 1), None]
    return out + grouped_gemm(scaled.to(low.dtype), b, expert_offsets)


def _dropout_seed(device: torch.device) -> Tensor:
    """A new seed for the masks of dropout, from torch's generator."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


# ---- glu -------------------------------------------------------------------------------------------------------------


@accepts_arrays
def glu(
    h: Tensor,
    activation: str = "silu",
    *,
    gated: bool = True,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """The activation between the two projections: act(gate) ⊙ up for gated experts, else act(h).

    Args:
        h: [..., N], N = 2I for gated experts, else I.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "swiglu_oai" (gpt-oss, gated only):
            gate · sigmoid(alpha · gate) ⊙ (up + 1).
        interleaved: gate = h[..., 0::2] and up = h[..., 1::2]; otherwise the first and the second half.
        limit: gate = min(gate, limit) and up = clamp(up, -limit, limit) first.

    Returns [..., I]. Source of gated units: arXiv:2002.05202.
    """
    rows = h if h.dim() == 2 else _flat("h", h)
    options = (activation, gated, interleaved, as_number("alpha", alpha), as_limit(limit))
    a: Tensor = apply(autograd.Glu, rows, *options) if needs_autograd(rows) else ops.glu(rows, *options)
    return a if h.dim() == 2 else a.reshape(*h.shape[:-1], a.shape[-1])


# ---- the whole layer -------------------------------------------------------------------------------------------------


def _rows_of(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flattens leading dimensions to x [T,H], topk_ids and topk_weights [T,K], in the dtypes of the kernels."""
    if x.dim() != 2:  # a reshape that changes nothing would cost a microsecond
        x = _flat("x", x)
    if topk_ids.dim() != 2:
        topk_ids = _flat("topk_ids", topk_ids)
    if topk_weights.dim() != 2:
        topk_weights = _flat("topk_weights", topk_weights)
    return x, as_ids("topk_ids", topk_ids), as_weights("topk_weights", topk_weights, x.dtype)


@accepts_arrays
def moe(
    x: Tensor,
    gate_up_proj: AnyWeight,
    down_proj: AnyWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """Applies a layer of experts: y[t] = Σ_k topk_weights[t,k] · (glu(x[t] · W_guᵀ + b_gu) · W_dᵀ + b_d).

    W and b in each term are those of expert topk_ids[t,k].

    Args:
        x: [..., H] in float32, bfloat16 or float16 (float64: reference only); leading dimensions are flattened to T.
        gate_up_proj: [E,N,H], N = 2I for gated experts (gate and up), else I.
        down_proj: [E,H,I]. Pass transposed storage ([E,H,N], [E,I,H]) as `weight.mT`, without a copy. Either projection
            can be a Weight in another format or an AdaptedWeight, or both a SelectedWeight (switchgear.weights).
        topk_ids: [..., K] int32 or int64 in [0, E); -1 is an empty choice and adds nothing.
        topk_weights: [..., K], any floating dtype; used in float32, of any sign and sum.
        activation, gated, interleaved, alpha, limit: see glu.
        gate_up_bias, down_bias: [E,N] and [E,H].

    Returns y with the shape and dtype of x. Float tensors must have x's dtype; torch.autocast casts all to its own.

    Differentiable in x, plain projections, adapters, the biases and topk_weights. Only requested gradients are
    computed; an expert without tokens gets zeros. The graph saves h = x · W_guᵀ + b_gu [T·K,N] and the arguments.

    Raises:
        ValueError: a wrong shape, or an id out of range. TypeError: a wrong dtype.
    """
    options = (activation, gated, interleaved, as_number("alpha", alpha), as_limit(limit))
    if isinstance(gate_up_proj, _WEIGHTS) or isinstance(down_proj, _WEIGHTS):
        weights = (gate_up_proj, down_proj)
        return _moe_of_weights(x, weights, (gate_up_bias, down_bias), topk_ids, topk_weights, GluOptions(*options))
    first, second, device_type = gate_up_proj, down_proj, x.device.type
    if in_autocast(device_type):
        tensors = in_autocast_dtype(device_type, x, first, second, gate_up_bias, down_bias)
        x, first, second, gate_up_bias, down_bias = tensors
    shape = x.shape
    x, topk_ids, topk_weights = _rows_of(x, topk_ids, topk_weights)
    tensors = (x, first, second, gate_up_bias, down_bias, topk_ids, topk_weights)
    if needs_autograd(*tensors):
        y: Tensor = apply(autograd.Moe, *tensors, *options)[0]
    elif ops.needs_no_dispatch(*tensors):
        others = (gate_up_bias, down_bias, topk_ids, topk_weights, *options)
        y = ops.moe_forward_on_host(x, first, (), second, (), *others)
    else:
        others = (gate_up_bias, down_bias, topk_ids, topk_weights, *options)
        y = ops.moe_forward(x, (first,), (), (second,), (), *others, False)[0]
    return y if len(shape) == 2 else y.reshape(shape)


def _moe_of_weights(
    x: Tensor,
    weights: tuple[AnyWeight, AnyWeight],
    biases: tuple[Tensor | None, Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
) -> Tensor:
    """moe if a projection is not a tensor."""
    shape, columns = x.shape, weights[0].shape[2]
    if x.shape[-1] != columns:  # stored bytes do not show H, so no op checks it
        raise ValueError(f"x: expected shape [..., {columns}], got {list(shape)}")
    x, topk_ids, topk_weights = _rows_of(x, topk_ids, topk_weights)
    first: Any
    second: Any
    first, second = weights
    if type(first) is Weight and type(second) is Weight and not in_autocast(x.device.type):
        # What follows finds this out too, in the time of a small kernel.
        routing = topk_ids, topk_weights
        if not first.is_lossless and not second.is_lossless and not needs_autograd(x, *biases, *routing):
            y: Tensor = _moe_of_stored(x, first, second, biases, routing, options)
            return y if len(shape) == 2 else y.reshape(shape)
    if isinstance(first, SelectedWeight) and isinstance(second, SelectedWeight):
        return _selected_moe(x, (first, second), biases, topk_ids, topk_weights, options).reshape(shape)
    has_adapters = isinstance(weights[0], AdaptedWeight) or isinstance(weights[1], AdaptedWeight)
    if isinstance(first, SelectedWeight) or isinstance(second, SelectedWeight):
        return _moe_in_stages(x, weights, biases, topk_ids, topk_weights, options).reshape(shape)
    adapters: tuple[tuple[Tensor, ...], ...] = ((), ())
    dropout: tuple[float, ...] = ()
    gate_up_bias, down_bias = biases
    # Without these nothing changes, and finding that out takes as long as a small kernel.
    if has_adapters or in_autocast(x.device.type):
        x, first, second, (gate_up_bias, down_bias), adapters, dropout = _Layer.of(x, weights, biases)
    trained = [weight for weight in (first, second) if isinstance(weight, Tensor)]
    if has_adapters:
        trained += [tensor for adapter in adapters for tensor in adapter[:2]]
    wants_gradients = needs_autograd(x, gate_up_bias, down_bias, topk_weights, *trained)
    first, second = _taken(first, x.dtype), _taken(second, x.dtype)
    if isinstance(first, Tensor) and isinstance(second, Tensor) and not has_adapters:
        named = {"gate_up_bias": gate_up_bias, "down_bias": down_bias, **options.keywords()}
        return moe(x, first, second, topk_ids, topk_weights, **named).reshape(shape)
    if gate_up_bias is not None:
        gate_up_bias = gate_up_bias.to(x.dtype)
    if down_bias is not None:
        down_bias = down_bias.to(x.dtype)
    others = (gate_up_bias, down_bias, topk_ids, topk_weights)
    (tensors, form), (down_tensors, down_form) = _parts_of(first), _parts_of(second)
    seed = _dropout_seed(x.device) if any(dropout) else None
    if wants_gradients:
        groups = (tensors, down_tensors, *adapters, () if seed is None else (seed,))
        parts = autograd.Parts((form, down_form), tuple(map(len, groups)), tuple(options), dropout)
        flat = [tensor for group in groups for tensor in group]
        y = apply(autograd.MoeOfParts, x, *others, parts, *flat)[0]
        return y.reshape(shape)
    layer = (tensors, form, down_tensors, down_form, *others)
    stored = [weight for weight in (first, second) if isinstance(weight, Weight)]
    plain = [weight for weight in (first, second) if isinstance(weight, Tensor)]
    if (
        all(weight.needs_no_dispatch for weight in stored)
        and ops.needs_no_dispatch(x, *others, *plain)
        and (not has_adapters or ops.needs_no_dispatch(x, *adapters[0], *adapters[1]))
    ):
        late = (*adapters, seed, dropout) if has_adapters else ()
        y = ops.moe_forward_on_host(x, *layer, *options, *late)
    else:
        y = ops.moe_forward(x, *layer, *options, False, *adapters, seed, dropout)[0]
    return y if len(shape) == 2 else y.reshape(shape)


def _moe_of_stored(
    x: Tensor,
    first: Weight,
    second: Weight,
    biases: tuple[Tensor | None, Tensor | None],
    routing: tuple[Tensor, Tensor],
    options: GluOptions,
) -> Tensor:
    """moe of x [T,H] with lossy weights alone, without gradients."""
    one, other = biases
    if one is not None or other is not None:
        biases = (None if one is None else one.to(x.dtype), None if other is None else other.to(x.dtype))
    layer = (first.tensors, first.form, second.tensors, second.form, *biases, *routing, *options)
    if first.needs_no_dispatch and second.needs_no_dispatch and ops.needs_no_dispatch(x, *biases, *routing):
        return ops.moe_forward_on_host(x, *layer)
    return ops.moe_forward(x, *layer, False)[0]


class _Layer(NamedTuple):
    """The float tensors of a call of moe, in autocast's dtype."""

    x: Tensor
    first: Tensor | Weight
    second: Tensor | Weight
    biases: tuple[Tensor | None, Tensor | None]
    adapters: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # empty: none
    dropout: tuple[float, ...]  # empty: none

    @staticmethod
    def of(x: Tensor, weights: tuple[AnyWeight, AnyWeight], biases: tuple[Tensor | None, Tensor | None]) -> _Layer:
        first: Any
        second: Any
        first, second = (weight.weight if isinstance(weight, AdaptedWeight) else weight for weight in weights)
        if isinstance(first, SelectedWeight) or isinstance(second, SelectedWeight):
            raise ValueError("gate_up_proj, down_proj: expected no adapter of a weight with experts that train alone")
        one, other = (weight.adapter() if isinstance(weight, AdaptedWeight) else () for weight in weights)
        dropout = tuple(weight.dropout if isinstance(weight, AdaptedWeight) else 0.0 for weight in weights)
        if in_autocast(kind := x.device.type):

            def cast(weight: Tensor | Weight) -> Tensor | Weight:
                return in_autocast_dtype(kind, weight)[0] if isinstance(weight, Tensor) else weight

            x, *both = in_autocast_dtype(kind, x, *biases)
            biases, first, second = (both[0], both[1]), cast(first), cast(second)
            one, other = ((*in_autocast_dtype(kind, *adapter[:2]), *adapter[2:]) for adapter in (one, other))
        return _Layer(x, first, second, biases, (one, other), dropout if any(dropout) else ())


def _moe_in_stages(
    x: Tensor,
    weights: Sequence[AnyWeight],
    biases: Sequence[Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
) -> Tensor:
    """moe stage by stage, for what its op does not take: one projection of which some experts are trained alone."""
    slots = plan(topk_ids, weights[0].shape[0])
    h = grouped_gemm(x, weights[0], slots.expert_offsets, bias=biases[0], token_indices=slots.token_indices)
    rows = grouped_gemm(glu(h, **options.keywords()), weights[1], slots.expert_offsets, bias=biases[1])
    return combine(rows, slots, topk_weights)


def _selected_moe(
    x: Tensor,
    weights: tuple[SelectedWeight, SelectedWeight],
    biases: tuple[Tensor | None, Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
) -> Tensor:
    """moe of x [T,H] with projections of which the same experts are trained."""
    first, second = weights
    _check_selected("gate_up_proj", first, "gate_up_bias", biases[0])
    _check_selected("down_proj", second, "down_bias", biases[1])
    if first.experts is not second.experts and not torch.equal(first.experts, second.experts):
        raise ValueError("down_proj: expected the trained experts of gate_up_proj, got others")
    frozen = (first.weight, second.weight)
    trained = (first.trained, second.trained, first.trained_bias, second.trained_bias)
    if in_autocast(kind := x.device.type):
        frozen, trained = (in_autocast_dtype(kind, *tensors) for tensors in (frozen, trained))
        x, *both = in_autocast_dtype(kind, x, *biases)
        biases = (both[0], both[1])
    others = (*biases, topk_ids, topk_weights)
    if needs_autograd(x, topk_weights, *trained):
        y: Tensor = apply(autograd.SelectedMoe, x, *frozen, *others, first.experts, *trained, *options)[0]
        return y
    named = {"gate_up_bias": biases[0], "down_bias": biases[1], **options.keywords()}
    return moe(x, *frozen, topk_ids, topk_weights, **named)


def _taken(weight: Tensor | Weight, dtype: torch.dtype) -> Tensor | Weight:
    """The weight that moe uses for an x of `dtype`."""
    if isinstance(weight, Tensor) or not weight.is_lossless:
        return weight
    taken = taken_by_moe(weight, dtype)
    if isinstance(taken, Tensor) and in_autocast(taken.device.type):
        return taken.to(dtype)
    return taken


def _parts_of(weight: Tensor | Weight) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return ((weight,), ()) if isinstance(weight, Tensor) else (weight.tensors, weight.form)
