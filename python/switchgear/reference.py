# SPDX-License-Identifier: BSD-3-Clause
"""Every op of switchgear in plain torch: the specification, and the backend "reference".

The signatures are those of the torch ops in ops/, and the formats those of include/switchgear/ops.h. Any floating
dtype works on any device. Sums run in float32 (float64 for float64) and are rounded to the dtype of the inputs once, at
the end. Gradients are written out as formulas rather than left to autograd, so that a gradcheck in float64 proves the
formulas that the kernels implement.

Letters: T tokens · K top_k · E experts · H hidden_size · I intermediate_size · S = T·K slots · N = 2I (gated) or I.
Errors: ValueError, or TypeError for a dtype, naming the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from switchgear import reference_compact, reference_panels

SCORE_FUNCTIONS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2_sum")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai")
NORMALIZE_EPSILON = 1e-20  # keeps normalised weights finite where every chosen score underflowed


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check(name: str, tensor: Tensor | None, shape: Sequence[int | None], dtype: torch.dtype | None = None) -> None:
    """`tensor` has `shape` (None: any size) and `dtype` (None: any floating dtype); only its first size may be 0. An
    absent tensor passes."""
    if tensor is None:
        return
    if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
        raise TypeError(f"{name}: expected {dtype or 'a floating dtype'}, got {tensor.dtype}")
    wanted = [got if want is None else want for want, got in zip(shape, tensor.shape, strict=False)]
    if tensor.dim() != len(shape) or wanted != list(tensor.shape):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{sizes}], got {list(tensor.shape)}")
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{name}: expected sizes of at least 1, got {list(tensor.shape)}")


def _check_range(name: str, indices: Tensor, low: int, high: int) -> None:
    """Every index is in [low, high)."""
    if indices.numel() and bool(((indices < low) | (indices >= high)).any()):
        smallest, largest = indices.aminmax()
        raise ValueError(f"{name}: expected {low} to {high - 1}, got {int(smallest)} to {int(largest)}")


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of topk_weights, and of every sum, beside tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(weight_dtype(tensor.dtype))


# ---- route -----------------------------------------------------------------------------------------------------------


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
    """The exponential of the scores. In float32 a fixed sequence of IEEE operations, each rounded on its own, so that
    scores have the same bits on every backend; results below the smallest normal number are 0."""
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
    half = exponent >> 1  # in two steps: 2^exponent itself may lie outside of float32
    result = (p * _power_of_two(half)) * _power_of_two(exponent - half)
    return result.masked_fill(x < _LOWEST, 0)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _sum(values: Tensor) -> Tensor:
    """The sum over the last dimension in float64, one term after the other: the order is part of the result."""
    return values.double().cumsum(-1)[..., -1:]


def scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores [T,E] of sanitised logits: softmax over all experts, or the sigmoid of each."""
    if score_function == "sigmoid":
        return 1 / (1 + exp(-logits))
    exponentials = exp(logits - logits.amax(-1, keepdim=True))
    return (exponentials.double() / _sum(exponentials)).to(logits.dtype)


def _keep_best_groups(values: Tensor, num_groups: int, topk_groups: int, group_score: str) -> Tensor:
    """`values` [T,E] with -Inf outside the `topk_groups` best of `num_groups` groups of consecutive experts."""
    num_tokens, num_experts = values.shape
    groups = values.view(num_tokens, num_groups, num_experts // num_groups)
    rank = groups.amax(-1)
    if group_score == "top2_sum" and groups.shape[-1] > 1:
        rank = rank + groups.topk(2, dim=-1).values[..., 1]
    kept = rank.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
    dropped = torch.ones_like(rank, dtype=torch.bool).scatter(1, kept, False)
    return groups.masked_fill(dropped[:, :, None], -math.inf).view(num_tokens, num_experts)


def _check_route(router_logits: Tensor, top_k: int, score_function: str, num_groups: int, topk_groups: int) -> None:
    _check("router_logits", router_logits, (None, None))
    num_experts = router_logits.shape[1]
    check_choice("score_function", score_function, SCORE_FUNCTIONS)
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {num_experts} experts, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups: expected 1 to {num_groups}, got {topk_groups}")
    eligible = topk_groups * (num_experts // num_groups)
    if not 1 <= top_k <= eligible:
        raise ValueError(f"top_k: expected 1 to {eligible} (eligible experts), got {top_k}")


def route(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    top_k: int,
    score_function: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """topk_ids [T,K] int32 and topk_weights [T,K] of router_logits [T,E], whatever bits they hold.

    The order of choice is total: value descending, then id ascending. The value is the logit itself under a plain
    softmax, which is monotone, so that rounding makes no ties; otherwise score + selection_bias.
    """
    _check_route(router_logits, top_k, score_function, num_groups, topk_groups)
    check_choice("group_score", group_score, GROUP_SCORES)
    _check_finite("scale", scale)
    _check("selection_bias", selection_bias, (router_logits.shape[1],))
    logits = sanitize(_wide(router_logits))
    score = scores(logits, score_function)
    if score_function == "softmax" and selection_bias is None and num_groups == 1:
        value = logits
    else:
        value = score if selection_bias is None else score + sanitize(selection_bias.to(score.dtype))
        if num_groups > 1:
            value = _keep_best_groups(value, num_groups, topk_groups, group_score)
    topk_ids = value.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    topk_weights = score.gather(1, topk_ids)
    if normalize:
        total = _sum(topk_weights) + NORMALIZE_EPSILON
        topk_weights = (topk_weights.double() / total).to(score.dtype)
    return topk_ids.to(torch.int32, memory_format=torch.contiguous_format), topk_weights * scale


def route_backward(
    grad_topk_weights: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    score_function: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """grad_router_logits [T,E], in float64 until the end. With p the scores, w those chosen, g the incoming gradient
    times scale, s = Σ w + 1e-20, and U_j the u_k of expert j or 0:

    u_k = g_k, or (g_k - Σ g w / s) / s if normalised
    softmax   grad_j = p_j (U_j - Σ u w)          sigmoid   grad_j = U_j p_j (1 - p_j)

    0 where the logit was not finite, since sanitising it is constant.
    """
    num_tokens, top_k = topk_ids.shape
    _check("router_logits", router_logits, (num_tokens, None))
    _check("grad_topk_weights", grad_topk_weights, (num_tokens, top_k), weight_dtype(router_logits.dtype))
    _check("topk_ids", topk_ids, (num_tokens, top_k), torch.int32)
    check_choice("score_function", score_function, SCORE_FUNCTIONS)
    _check_finite("scale", scale)
    _check_range("topk_ids", topk_ids, -1, router_logits.shape[1])
    ids, empty = topk_ids.clamp(min=0).long(), topk_ids < 0
    score = scores(sanitize(_wide(router_logits)), score_function).double()
    chosen = score.gather(1, ids).masked_fill(empty, 0)
    grad_chosen = (grad_topk_weights.double() * scale).masked_fill(empty, 0)
    if normalize:
        total = _sum(chosen) + NORMALIZE_EPSILON
        grad_chosen = ((grad_chosen - _sum(grad_chosen * chosen) / total) / total).masked_fill(empty, 0)
    grad_score = torch.zeros_like(score).scatter_add(1, ids, grad_chosen)
    if score_function == "softmax":
        grad_logits = score * (grad_score - _sum(grad_chosen * chosen))
    else:
        grad_logits = grad_score * score * (1 - score)
    return grad_logits.masked_fill(~router_logits.isfinite(), 0).to(router_logits.dtype)


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """expert_offsets [E+1], token_indices [S] and slot_indices [T,K] of topk_ids [T,K].

    Slots are in the order (expert, token, choice).
    """
    _check("topk_ids", topk_ids, (None, None), torch.int32)
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    _check_range("topk_ids", topk_ids, -1, num_experts)
    num_tokens, top_k = topk_ids.shape
    num_slots = num_tokens * top_k
    empty = topk_ids < 0
    expert = torch.where(empty, num_experts, topk_ids).flatten().long()  # empty slots sort last
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    ends = counts[:num_experts].cumsum(0)
    pairs = expert.argsort(stable=True)  # slot -> t·K + k
    slots = torch.arange(num_slots, device=topk_ids.device)
    token_indices = torch.where(slots < ends[-1], pairs // max(top_k, 1), -1)
    slot_indices = torch.empty_like(slots).scatter(0, pairs, slots).view(num_tokens, top_k).masked_fill(empty, -1)
    expert_offsets = torch.nn.functional.pad(ends, (1, 0))
    return expert_offsets.to(torch.int32), token_indices.to(torch.int32), slot_indices.to(torch.int32)


def _check_offsets(expert_offsets: Tensor, num_slots: int, token_indices: Tensor | None, num_tokens: int) -> None:
    _check("token_indices", token_indices, (num_slots,), torch.int32)
    _check("expert_offsets", expert_offsets, (None,), torch.int32)
    offsets = expert_offsets.tolist()
    if len(offsets) < 2 or offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > num_slots:
        raise ValueError(f"expert_offsets: expected 0, then ascending numbers up to {num_slots}, got {offsets}")
    if token_indices is not None:
        _check_range("token_indices", token_indices[: offsets[-1]], 0, num_tokens)


def _check_plan(expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor, num_tokens: int | None) -> None:
    _check("slot_indices", slot_indices, (num_tokens, None), torch.int32)
    _check_offsets(expert_offsets, slot_indices.numel(), token_indices, slot_indices.shape[0])
    _check_range("slot_indices", slot_indices, -1, slot_indices.numel())


# ---- permute, combine ------------------------------------------------------------------------------------------------


def _gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices] with zero rows where an index is -1. `indices` may have any shape."""
    if rows.shape[0] == 0:
        return rows.new_zeros((*indices.shape, *rows.shape[1:]))
    gathered = rows[indices.clamp(min=0).long()]
    return gathered.masked_fill((indices < 0).view(*indices.shape, *[1] * (rows.dim() - 1)), 0)


def _to_slots(values: Tensor, slot_indices: Tensor) -> Tensor:
    """[T,K] -> [S]: the value of each slot, 0 past the last one in use."""
    num_slots = slot_indices.numel()
    target = torch.where(slot_indices < 0, num_slots, slot_indices).flatten().long()
    return values.new_zeros(num_slots + 1).scatter(0, target, values.flatten())[:num_slots]


def permute(
    x: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor, topk_weights: Tensor | None
) -> Tensor:
    """permuted_x[s] = x[token_indices[s]], times the slot's weight where given. x [T,H] -> [S,H]."""
    _check("x", x, (slot_indices.shape[0], None))
    _check_plan(expert_offsets, token_indices, slot_indices, x.shape[0])
    _check("topk_weights", topk_weights, slot_indices.shape, weight_dtype(x.dtype))
    permuted_x = _gather_rows(x, token_indices)
    if topk_weights is None:
        return permuted_x
    return (_wide(permuted_x) * _to_slots(topk_weights, slot_indices)[:, None]).to(x.dtype)


def combine(
    permuted_y: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor, topk_weights: Tensor | None
) -> Tensor:
    """y[t] = Σ_k topk_weights[t,k] · permuted_y[slot_indices[t,k]], weights of 1 where absent. [S,H] -> [T,H]."""
    _check_plan(expert_offsets, token_indices, slot_indices, None)
    _check("permuted_y", permuted_y, (slot_indices.numel(), None))
    _check("topk_weights", topk_weights, slot_indices.shape, weight_dtype(permuted_y.dtype))
    rows = _wide(_gather_rows(permuted_y, slot_indices))
    if topk_weights is not None:
        rows = rows * topk_weights.masked_fill(slot_indices < 0, 0)[:, :, None]
    return rows.sum(1).to(permuted_y.dtype)


def combine_weight_backward(
    grad_y: Tensor, permuted_y: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor
) -> Tensor:
    """grad_topk_weights[t,k] = <grad_y[t], permuted_y[slot_indices[t,k]]>, 0 for empty slots."""
    _check("grad_y", grad_y, (slot_indices.shape[0], None))
    _check_plan(expert_offsets, token_indices, slot_indices, grad_y.shape[0])
    _check("permuted_y", permuted_y, (slot_indices.numel(), grad_y.shape[1]), grad_y.dtype)
    products = _wide(_gather_rows(permuted_y, slot_indices)) * _wide(grad_y)[:, None]
    return products.sum(-1).masked_fill(slot_indices < 0, 0)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def _segments(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its slots) of every expert that has any."""
    offsets = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        if begin < end:
            yield expert, slice(begin, end)


def _rows(x: Tensor, token_indices: Tensor | None) -> Tensor:
    return _wide(x if token_indices is None else _gather_rows(x, token_indices))


def _gemm(rows: Tensor, matrices: Tensor | Sequence[Tensor], bias: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """Each expert's rows times its matrix, transposed, in the wide dtype; zeros where there is nothing to multiply."""
    out = rows.new_zeros(rows.shape[0], max(matrix.shape[0] for matrix in matrices))
    for expert, slots in _segments(expert_offsets):
        width = matrices[expert].shape[0]
        out[slots, :width] = rows[slots] @ _wide(matrices[expert]).mT
        if bias is not None:
            out[slots, :width] += _wide(bias[expert, :width])
    return out


def _wgrad(grad_rows: Tensor, rows: Tensor, expert_offsets: Tensor, grad_weight: Tensor) -> Tensor:
    """Fills grad_weight [E,N,C] with Σ_s grad_rows[s] ⊗ rows[s] of each expert."""
    grad_weight.zero_()
    for expert, slots in _segments(expert_offsets):
        grad_weight[expert] = grad_rows[slots].mT @ rows[slots]
    return grad_weight


def _sum_rows(rows: Tensor, expert_offsets: Tensor, like: Tensor) -> Tensor:
    """The sum of each expert's rows, as [E,N] in the dtype of `like`."""
    ones = rows.new_ones(rows.shape[0], 1)
    return _wgrad(rows, ones, expert_offsets, like.new_empty(*like.shape, 1)).squeeze(-1)


def grouped_gemm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    input_gradient: bool = False,
) -> Tensor:
    """out[s,n] = Σ_c x[r(s),c] · weight[e(s)][n,c] + bias[e(s),n], with r(s) = token_indices[s] where given, else s.

    x [R,C]; weight: one packed [E,N,C], or E matrices [N_e,C]; bias [E,N]. out [S,N], N the widest. `input_gradient`: a
    kernel adds up in the order in which its moe_backward does, instead of its moe_forward; otherwise a packed weight
    may be compact.
    """
    _check("x", x, (None, None))
    if not input_gradient:
        weight = [reference_compact.plain(matrix, x.shape[1], x.dtype) for matrix in weight]
    num_experts = expert_offsets.shape[0] - 1
    matrices = weight[0] if len(weight) == 1 and weight[0].dim() == 3 else weight
    if len(matrices) != num_experts:
        raise ValueError(f"weight: expected {num_experts} experts, got {len(matrices)}")
    for matrix in weight:
        _check("weight", matrix, (*[None] * (matrix.dim() - 1), x.shape[1]), x.dtype)
    _check("bias", bias, (num_experts, max(matrix.shape[0] for matrix in matrices)), x.dtype)
    _check_offsets(expert_offsets, len(x if token_indices is None else token_indices), token_indices, len(x))
    return _gemm(_rows(x, token_indices), list(matrices), bias, expert_offsets).to(x.dtype)


def grouped_gemm_wgrad(
    grad_out: Tensor, x: Tensor, expert_offsets: Tensor, token_indices: Tensor | None, transposed: bool
) -> Tensor:
    """grad_weight[e][n,c] = Σ_{s of e} grad_out[s,n] · x[r(s),c] as [E,N,C], whose memory is [E,C,N] if transposed."""
    _check("grad_out", grad_out, (x.shape[0] if token_indices is None else token_indices.shape[0], None))
    _check("x", x, (None, None), grad_out.dtype)
    _check_offsets(expert_offsets, len(grad_out), token_indices, len(x))
    grad_weight = empty_weight(x, expert_offsets.shape[0] - 1, grad_out.shape[1], x.shape[1], transposed)
    return _wgrad(_wide(grad_out), _rows(x, token_indices), expert_offsets, grad_weight)


def empty_weight(like: Tensor, num_experts: int, rows: int, columns: int, transposed: bool) -> Tensor:
    """[E,rows,columns], uninitialised; with `transposed` a view of [E,columns,rows] memory."""
    if transposed:
        return like.new_empty(num_experts, columns, rows).mT
    return like.new_empty(num_experts, rows, columns)


# ---- glu -------------------------------------------------------------------------------------------------------------


def _activate(gate: Tensor, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if activation == "relu":
        return gate.relu(), (gate > 0).to(gate.dtype)
    if activation == "relu2":
        return gate.relu().square(), 2 * gate.relu()
    if activation == "gelu":
        cumulative = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
        return gate * cumulative, cumulative + gate * density
    if activation == "gelu_tanh":
        c, cubic = math.sqrt(2 / math.pi), 0.044715
        tanh = torch.tanh(c * (gate + cubic * gate.pow(3)))
        slope = 0.5 * gate * (1 - tanh.square()) * c * (1 + 3 * cubic * gate.square())
        return 0.5 * gate * (1 + tanh), 0.5 * (1 + tanh) + slope
    beta = alpha if activation == "swiglu_oai" else 1.0  # g · sigmoid(beta · g)
    sigmoid = torch.sigmoid(beta * gate)
    return gate * sigmoid, sigmoid * (1 + beta * gate * (1 - sigmoid))


def _check_options(activation: str, gated: bool, alpha: float, limit: float) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    if activation == "swiglu_oai" and not gated:
        raise ValueError("activation: expected gated experts for swiglu_oai, got gated=False")
    _check_finite("alpha", alpha)
    _check_finite("limit", limit)
    if limit < 0:
        raise ValueError(f"limit: expected 0 (none) or a positive number, got {limit}")


def _intermediate_size(name: str, width: int, gated: bool) -> int:
    if gated and width % 2:
        raise ValueError(f"{name}: expected an even N (gates and ups) for gated experts, got N={width}")
    return width // 2 if gated else width


def _halves(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return h[:, 0::2], h[:, 1::2]
    middle = h.shape[1] // 2
    return h[:, :middle], h[:, middle:]


def _glu(h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float) -> Tensor:
    if not gated:
        return _activate(h.clamp(max=limit) if limit > 0 else h, activation, alpha)[0]
    gate, up = _halves(h, interleaved)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        up = up + 1
    return _activate(gate, activation, alpha)[0] * up


def _glu_backward(
    grad_a: Tensor, h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float
) -> Tensor:
    """A clamped value passes its gradient where it lies within the limits, ends included."""
    if not gated:
        gate = h.clamp(max=limit) if limit > 0 else h
        grad_h = grad_a * _activate(gate, activation, alpha)[1]
        return grad_h.masked_fill(h > limit, 0) if limit > 0 else grad_h
    gate, up = raw_gate, raw_up = _halves(h, interleaved)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        up = up + 1
    value, slope = _activate(gate, activation, alpha)
    grad_gate, grad_up = grad_a * up * slope, grad_a * value
    if limit > 0:
        grad_gate = grad_gate.masked_fill(raw_gate > limit, 0)
        grad_up = grad_up.masked_fill(raw_up.abs() > limit, 0)
    if interleaved:
        return torch.stack((grad_gate, grad_up), -1).flatten(1)
    return torch.cat((grad_gate, grad_up), -1)


def glu(h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float) -> Tensor:
    """a [S,I] of h [S,N]: act(gate) ⊙ up for gated experts, act(h) for plain ones.

    limit > 0    gate = min(gate, limit) and up = clamp(up, -limit, limit) first
    swiglu_oai   gate · sigmoid(alpha · gate) ⊙ (up + 1), gpt-oss's gate (gated only)
    interleaved  gate = h[:, 0::2], up = h[:, 1::2]; otherwise gate = h[:, :I], up = h[:, I:]
    """
    _check_options(activation, gated, alpha, limit)
    _check("h", h, (None, None))
    _intermediate_size("h", h.shape[1], gated)
    return _glu(_wide(h), activation, gated, interleaved, alpha, limit).to(h.dtype)


def glu_backward(
    grad_a: Tensor, h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float
) -> Tensor:
    """grad_h [S,N] of grad_a [S,I]."""
    _check_options(activation, gated, alpha, limit)
    _check("h", h, (None, None))
    _check("grad_a", grad_a, (h.shape[0], _intermediate_size("h", h.shape[1], gated)), h.dtype)
    return _glu_backward(_wide(grad_a), _wide(h), activation, gated, interleaved, alpha, limit).to(h.dtype)


# ---- the whole layer -------------------------------------------------------------------------------------------------


def _check_layer(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    alpha: float,
    limit: float,
) -> None:
    _check_options(activation, gated, alpha, limit)
    _check("x", x, (None, None))
    num_tokens, hidden_size = x.shape
    _check("gate_up_proj", gate_up_proj, (None, None, hidden_size), x.dtype)
    num_experts, width, _ = gate_up_proj.shape
    intermediate_size = _intermediate_size("gate_up_proj", width, gated)
    _check("down_proj", down_proj, (num_experts, hidden_size, intermediate_size), x.dtype)
    _check("gate_up_bias", gate_up_bias, (num_experts, width), x.dtype)
    _check("down_bias", down_bias, (num_experts, hidden_size), x.dtype)
    _check("topk_ids", topk_ids, (num_tokens, None), torch.int32)
    _check("topk_weights", topk_weights, topk_ids.shape, weight_dtype(x.dtype))


def _plain(weight: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A weight of `dtype` that may be in panels or compact."""
    if weight.dim() == 4 and weight.dtype is torch.uint8:
        return reference_panels.plain(weight, columns, dtype)
    return reference_compact.plain(weight, columns, dtype)


def moe_forward(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    """y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu) · W_dᵀ + b_d), and h [S,N] = x·W_guᵀ + b_gu in slot order.

    h is [0,N] unless save_h. Projections may be in panels (reference_panels), or compact (reference_compact) where x is
    bfloat16 or float32.
    """
    gate_up_proj = _plain(gate_up_proj, x.shape[1], x.dtype)
    intermediate_size = _intermediate_size("gate_up_proj", gate_up_proj.shape[1], gated)
    down_proj = _plain(down_proj, intermediate_size, x.dtype)
    layer = (gate_up_proj, down_proj, gate_up_bias, down_bias, topk_ids, topk_weights)
    _check_layer(x, *layer, activation, gated, alpha, limit)
    expert_offsets, token_indices, slot_indices = plan(topk_ids, gate_up_proj.shape[0])
    h = _gemm(_rows(x, token_indices), gate_up_proj, gate_up_bias, expert_offsets)
    a = _glu(h, activation, gated, interleaved, alpha, limit)
    permuted_y = _gemm(a, down_proj, down_bias, expert_offsets)
    y = combine(permuted_y, expert_offsets, token_indices, slot_indices, topk_weights)
    return y.to(x.dtype), h.to(x.dtype) if save_h else x.new_empty(0, h.shape[1])


def moe_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of moe_forward from x and h alone; `a` is recomputed. With dy the rows of grad_y in slot order, w their
    weights, one line per output (those that `needs` does not ask for are empty):

        da' = dy · W_d                    dh = glu'(h, w · da')
        x             Σ_k dh · W_gu       gate_up_proj  dhᵀ · x          gate_up_bias  Σ dh
        topk_weights  <da', a> + <dy,b_d> down_proj     (w · dy)ᵀ · a    down_bias     Σ w · dy
    """
    layer = (gate_up_proj, down_proj, gate_up_bias, down_bias, topk_ids, topk_weights)
    _check_layer(x, *layer, activation, gated, alpha, limit)
    _check("grad_y", grad_y, x.shape, x.dtype)
    _check("h", h, (topk_ids.numel(), gate_up_proj.shape[1]), x.dtype)
    need_x, need_gate_up, need_down, need_gate_up_bias, need_down_bias, need_weights = needs
    options = (activation, gated, interleaved, alpha, limit)
    expert_offsets, token_indices, slot_indices = plan(topk_ids, gate_up_proj.shape[0])
    absent = x.new_empty(0)
    grad_x = grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = absent
    grad_weights = topk_weights.new_empty(0)

    rows_h = _wide(h)
    grad_rows = _rows(grad_y, token_indices)  # dy
    weighted = grad_rows * _to_slots(topk_weights, slot_indices)[:, None]  # w · dy
    a = _glu(rows_h, *options)
    if need_down:
        grad_down = _wgrad(weighted, a, expert_offsets, torch.empty_like(down_proj))
    if need_down_bias and down_bias is not None:
        grad_down_bias = _sum_rows(weighted, expert_offsets, down_bias)
    if need_weights:
        grad_a = _gemm(grad_rows, down_proj.mT, None, expert_offsets)  # da'
        grad_slot = (grad_a * a).sum(-1)
        if down_bias is not None:
            for expert, slots in _segments(expert_offsets):
                grad_slot[slots] += grad_rows[slots] @ _wide(down_bias[expert])
        grad_weights = _gather_rows(grad_slot, slot_indices)
    if need_x or need_gate_up or need_gate_up_bias:
        grad_h = _glu_backward(_gemm(weighted, down_proj.mT, None, expert_offsets), rows_h, *options)
        if need_x:
            grad_slots = _gemm(grad_h, gate_up_proj.mT, None, expert_offsets)
            grad_x = combine(grad_slots, expert_offsets, token_indices, slot_indices, None).to(x.dtype)
        if need_gate_up:
            grad_gate_up = _wgrad(grad_h, _rows(x, token_indices), expert_offsets, torch.empty_like(gate_up_proj))
        if need_gate_up_bias and gate_up_bias is not None:
            grad_gate_up_bias = _sum_rows(grad_h, expert_offsets, gate_up_bias)
    return grad_x, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias, grad_weights
