# SPDX-License-Identifier: BSD-3-Clause
"""The functions of switchgear, differentiable.

    router_logits [T,E] ──route──► topk_ids, topk_weights [T,K]            T tokens, K choices, E experts
                                      │
                                      └──plan──► Plan{expert_offsets [E+1], token_indices [S], slot_indices [T,K]}
                                                                                                      S = T·K slots
    x [T,H] ──permute──► permuted_x [S,H] ──grouped_gemm──► h [S,N] ──glu──► a [S,I] ──grouped_gemm──► permuted_y [S,H]
                                                                     permuted_y ──combine──► y [T,H]

`moe` is everything after route in one call: one op forward and one backward, which save x and h and nothing else of
that size. The stages stay available one by one.

Tensors are torch tensors; arrays of other libraries work as well (see arrays.py). An autograd.Function is entered only
where a gradient or a forward-mode tangent asks for it. Gradients can be taken once; forward mode raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from switchgear import ops, reference
from switchgear.arrays import accepts_arrays
from switchgear.backends import in_autocast

T = TypeVar("T", Tensor, Tensor | None)
_INT32 = torch.iinfo(torch.int32)


class Routing(NamedTuple):
    """The decision of a router: expert topk_ids[t,k] (-1: none) gets token t with weight topk_weights[t,k]."""

    topk_ids: Tensor  # [T,K] int32
    topk_weights: Tensor  # [T,K] float32
    router_logits: Tensor  # [T,E]
    num_experts: int
    scores: Tensor | None = None  # [T,E] float32 that the weights come from, where the policy had to compute them all
    losses: dict[str, Tensor] = {}  # noqa: RUF012  float32 scalars by name; replaced as a whole, never written to
    num_dropped: Tensor | None = None  # int64 scalar: choices that found no room; None where there is no limit


class Plan(NamedTuple):
    """The slots of a routing, ordered by (expert, token, choice)."""

    expert_offsets: Tensor  # [E+1] int32, exclusive: expert e owns the slots [expert_offsets[e], expert_offsets[e+1])
    token_indices: Tensor  # [S] int32, slot -> token; -1 past expert_offsets[E]
    slot_indices: Tensor  # [T,K] int32, (token, choice) -> slot; -1 for an empty choice


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be wanted. requires_grad does not show it all: not the tangents of forward mode, nor what
    lies beneath a torch.vmap, and there the bare op would return wrong derivatives without a word."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


class _Once(torch.autograd.Function):
    """Runs `function` on tensors; its result raises where somebody differentiates it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("switchgear: gradients can be taken once; there is no second derivative of its functions")


def _once(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """A backward pass: `function` of tensors, guarded by _Once where autograd records it (create_graph=True)."""
    if torch.compiler.is_compiling() or not _needs_autograd(*tensors):
        return function(*tensors)
    return _apply(_Once, function, *tensors)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


def _as_ids(name: str, ids: Tensor) -> Tensor:
    if ids.dtype is torch.int32:
        return ids
    if ids.dtype is not torch.int64:
        raise TypeError(f"{name}: expected int32 or int64, got {ids.dtype}")
    return ids.clamp(_INT32.min, _INT32.max).int()  # saturates, lest a bad id wraps around into a good one


def _as_weights(name: str, weights: T, dtype: torch.dtype) -> T:
    """Weights of tokens in float32 (float64 beside float64 tensors), differentiably."""
    wanted = reference.weight_dtype(dtype)
    if weights is None or weights.dtype is wanted:
        return weights
    if not weights.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {weights.dtype}")
    return weights.to(wanted)


def _autocast(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype; bytes stay as they are, and float64 does, as everywhere in torch."""
    dtype = torch.get_autocast_dtype(device_type)
    stay = (torch.float64, torch.uint8)
    return tuple(tensor if tensor is None or tensor.dtype in stay else tensor.to(dtype) for tensor in tensors)


def _number(name: str, value: float) -> float:
    if isinstance(value, (str, bytes)):  # which float() would read
        raise TypeError(f"{name}: expected float, got {type(value).__name__}")
    return float(value)


def _limit(limit: float | None) -> float:
    if limit is None:
        return 0.0
    if not limit > 0:
        raise ValueError(f"limit: expected a positive number or None, got {limit}")
    return float(limit)


def _is_transposed(weight: Tensor) -> bool:
    """Whether the memory of weight [..., N, C] is that of [..., C, N]."""
    return weight.stride(-2) == 1 and weight.stride(-1) != 1


# ---- route, plan -----------------------------------------------------------------------------------------------------


class _Route(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(router_logits: Tensor, selection_bias: Tensor | None, *options: Any) -> Any:
        return ops.route(router_logits, selection_bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        router_logits, _, _, ctx.score_function, ctx.normalize, ctx.scale, *_ = inputs
        topk_ids, _ = output
        ctx.mark_non_differentiable(topk_ids)
        ctx.save_for_backward(router_logits, topk_ids)

    @staticmethod
    def backward(ctx: Any, _: Any, grad_topk_weights: Tensor) -> Any:
        options = (ctx.score_function, ctx.normalize, ctx.scale)

        def grad(*tensors: Any) -> Any:
            return ops.route_backward(*tensors, *options)

        return _once(grad, grad_topk_weights, *ctx.saved_tensors), *[None] * 8


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
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
    if selection_bias is not None:
        selection_bias = _as_weights("selection_bias", selection_bias.detach(), torch.float32)
    options = (top_k, score_function, normalize, _number("scale", scale), num_groups, topk_groups, group_score)
    if _needs_autograd(router_logits):
        topk_ids, topk_weights = _apply(_Route, router_logits, selection_bias, *options)
    else:
        topk_ids, topk_weights = ops.route(router_logits, selection_bias, *options)
    return Routing(topk_ids, topk_weights, router_logits, router_logits.shape[1])


class _RouteDynamic(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(router_logits: Tensor, selection_bias: Tensor | None, *options: Any) -> Any:
        return ops.route_dynamic(router_logits, selection_bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        router_logits, _, _, _, ctx.score_function, _, _, ctx.normalize, ctx.scale = inputs
        topk_ids, _ = output
        ctx.mark_non_differentiable(topk_ids)
        ctx.save_for_backward(router_logits, topk_ids)

    @staticmethod
    def backward(ctx: Any, _: Any, grad_topk_weights: Tensor) -> Any:
        options = (ctx.score_function, ctx.normalize, ctx.scale)

        def grad(*tensors: Any) -> Any:
            return ops.route_backward(*tensors, *options)

        return _once(grad, grad_topk_weights, *ctx.saved_tensors), *[None] * 8


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
    """Chooses as many experts as each token needs: the fewest, the best first, whose scores add up to top_p
    (arXiv:2403.07652), without those whose score is below threshold (arXiv:2408.04278).

    Args:
        router_logits: [..., E], as for `route`, which the other options are also those of.
        top_p: a share of the scores; the expert that reaches it is chosen too. From 1 on under softmax, all are.
        threshold: of the score itself.
        min_experts, max_experts: bounds of their number, whatever the scores. K of the Routing is max_experts, by
            default E; behind a token's last expert are -1 and weights of 0.

    Raises:
        ValueError: an option out of range. TypeError: a dtype that is not floating.
    """
    if router_logits.dim() != 2:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
    if selection_bias is not None:
        selection_bias = _as_weights("selection_bias", selection_bias.detach(), torch.float32)
    top_p = _number("top_p", top_p)
    if score_function == "softmax" and top_p >= 1:
        top_p = math.inf  # whatever the probabilities add up to
    count = router_logits.shape[1] if max_experts is None else max_experts
    options = (
        count, min_experts, score_function, top_p, _number("threshold", threshold), normalize, _number("scale", scale)
    )  # fmt: skip
    if _needs_autograd(router_logits):
        topk_ids, topk_weights = _apply(_RouteDynamic, router_logits, selection_bias, *options)
    else:
        topk_ids, topk_weights = ops.route_dynamic(router_logits, selection_bias, *options)
    return Routing(topk_ids, topk_weights, router_logits, router_logits.shape[1])


@accepts_arrays
def plan(topk_ids: Tensor, num_experts: int) -> Plan:
    """The slots of topk_ids [T,K] (int32 or int64, -1 for none), ordered by (expert, token, choice).

    Raises:
        ValueError: an id that is neither -1 nor in [0, num_experts). TypeError: another dtype.
    """
    return Plan(*ops.plan(_as_ids("topk_ids", topk_ids), num_experts))


# ---- permute, combine ------------------------------------------------------------------------------------------------
# Each is the other's gradient; the gradient of the weights is the same inner product for both.


class _Permute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
        return ops.permute(x, *plan, topk_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need_x, need_weights, *_ = ctx.needs_input_grad

        def grads(grad: Tensor, x: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
            grad_x = ops.combine(grad, *plan, topk_weights) if need_x else None
            return grad_x, ops.combine_weight_backward(x, grad, *plan) if need_weights else None

        return *_once(grads, grad, *ctx.saved_tensors), None, None, None


class _Combine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(permuted_y: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
        return ops.combine(permuted_y, *plan, topk_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need_y, need_weights, *_ = ctx.needs_input_grad

        def grads(grad: Tensor, permuted_y: Tensor, topk_weights: Tensor | None, *plan: Tensor) -> Any:
            grad_y = ops.permute(grad, *plan, topk_weights) if need_y else None
            return grad_y, ops.combine_weight_backward(grad, permuted_y, *plan) if need_weights else None

        return *_once(grads, grad, *ctx.saved_tensors), None, None, None


@accepts_arrays
def permute(x: Tensor, plan: Plan, topk_weights: Tensor | None = None) -> Tensor:
    """The rows of x [T,H] in slot order, [S,H]: permuted_x[s] = x[token_indices[s]], times the slot's weight if given.

    topk_weights [T,K] may have any floating dtype. Rows past expert_offsets[E] are zero. Differentiable in both.
    """
    topk_weights = _as_weights("topk_weights", topk_weights, x.dtype)
    if _needs_autograd(x, topk_weights):
        permuted_x: Tensor = _apply(_Permute, x, topk_weights, *plan)
        return permuted_x
    return ops.permute(x, *plan, topk_weights)


@accepts_arrays
def combine(permuted_y: Tensor, plan: Plan, topk_weights: Tensor | None = None) -> Tensor:
    """Each token's sum over its slots, [T,H]: y[t] = Σ_k topk_weights[t,k] · permuted_y[slot_indices[t,k]].

    permuted_y [S,H]; topk_weights [T,K] of any floating dtype, 1 if absent. The order of the sum is k ascending, in
    float32. Differentiable in both.
    """
    topk_weights = _as_weights("topk_weights", topk_weights, permuted_y.dtype)
    if _needs_autograd(permuted_y, topk_weights):
        y: Tensor = _apply(_Combine, permuted_y, topk_weights, *plan)
        return y
    return ops.combine(permuted_y, *plan, topk_weights)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def _heighten(matrix: Tensor, height: int) -> Tensor:
    """The matrix with rows of zeros below, up to `height`."""
    missing = height - matrix.shape[-2]
    return pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _grouped_gemm_grads(needs: Sequence[bool], grad_out: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias and each weight, None for those that `needs` leaves out."""
    x, _, expert_offsets, token_indices, *weight = saved
    need_x, need_bias, *need_weight = needs
    packed = weight[0].dim() == 3
    grad_x = grad_bias = None
    grad_weight: list[Tensor | None] = [None] * len(weight)
    if need_x:
        transposes = [_heighten(matrix, grad_out.shape[1]).mT for matrix in weight]
        grad_x = ops.grouped_gemm(grad_out, transposes, None, expert_offsets, None, True)
        if token_indices is not None:  # a row of x may own several slots; those at the tail add their zeros to row 0
            total = torch.zeros(x.shape, dtype=reference.weight_dtype(x.dtype), device=x.device)
            if x.shape[0]:
                total = total.index_add(0, token_indices.clamp(min=0), grad_x.to(total.dtype))
            grad_x = total.to(x.dtype)
    if need_bias:  # the weight gradient of a column of ones
        ones = grad_out.new_ones(grad_out.shape[0], 1)
        grad_bias = ops.grouped_gemm_wgrad(grad_out, ones, expert_offsets, None, False).squeeze(-1)
        for expert, matrix in enumerate(() if packed else weight):
            grad_bias[expert, matrix.shape[0] :] = 0  # columns that this expert leaves at zero
    if any(need_weight):
        grad = ops.grouped_gemm_wgrad(grad_out, x, expert_offsets, token_indices, _is_transposed(weight[0]))
        grad_weight = [grad] if packed else [grad[e, : matrix.shape[0]] for e, matrix in enumerate(weight)]
    return grad_x, grad_bias, *grad_weight


class _GroupedGemm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, expert_offsets: Tensor, token_indices: Tensor | None, *weight: Tensor
    ) -> Any:
        return ops.grouped_gemm(x, weight, bias, expert_offsets, token_indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, need_bias, _, _, *need_weight = ctx.needs_input_grad
        needs = (need_x, need_bias, *need_weight)
        grad_x, grad_bias, *grad_weight = _once(partial(_grouped_gemm_grads, needs), grad_out, *ctx.saved_tensors)
        return grad_x, grad_bias, None, None, *grad_weight


@accepts_arrays
def grouped_gemm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    token_indices: Tensor | None = None,
) -> Tensor:
    """Each expert's rows times its matrix: out[s] = x[r(s)] · weight[e(s)]ᵀ + bias[e(s)], [S,N].

    Args:
        x: [S,C] in slot order; or [T,C] with token_indices [S] (Plan.token_indices), and then r(s) = token_indices[s].
        weight: [E,N,C], or E matrices [N_e,C] of different heights. Either of the last two dimensions may be the
            contiguous one: transposed weights [E,C,N] come as `weight.mT`, without a copy. (Matrices of a list whose
            strides differ are copied.)
        expert_offsets: [E+1] int32 (Plan.expert_offsets).
        bias: [E,N], N being the largest N_e.

    Rows past expert_offsets[E], and columns past an expert's N_e, are zero. Float tensors share one dtype, which inside
    torch.autocast is autocast's. Differentiable in x, weight and bias; an expert without rows gets zeros.
    """
    matrices = [weight] if isinstance(weight, Tensor) else list(weight)
    if not matrices:
        raise ValueError("weight: expected at least one matrix, got none")
    if in_autocast(x.device.type):
        x, bias, *matrices = _autocast(x.device.type, x, bias, *matrices)
    if _needs_autograd(x, bias, *matrices):
        out: Tensor = _apply(_GroupedGemm, x, bias, expert_offsets, token_indices, *matrices)
        return out
    return ops.grouped_gemm(x, matrices, bias, expert_offsets, token_indices)


# ---- glu -------------------------------------------------------------------------------------------------------------


class _Glu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, *options: Any) -> Any:
        return ops.glu(h, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        h, *ctx.options = inputs
        ctx.save_for_backward(h)

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor) -> Any:
        options = ctx.options

        def grad(grad_a: Tensor, h: Tensor) -> Any:
            return ops.glu_backward(grad_a, h, *options)

        return _once(grad, grad_a, *ctx.saved_tensors), *[None] * 5


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
    """The activation between the two projections: act(gate) ⊙ up for gated experts, act(h) for plain ones.

    Args:
        h: [..., N], N = 2I for gated experts and I for plain ones.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "swiglu_oai" (gpt-oss, gated only):
            gate · sigmoid(alpha · gate) ⊙ (up + 1).
        interleaved: gate = h[..., 0::2] and up = h[..., 1::2]; otherwise the first and the second half.
        limit: gate = min(gate, limit) and up = clamp(up, -limit, limit) first.

    Returns [..., I]. Source of gated units: arXiv:2002.05202.
    """
    rows = h if h.dim() == 2 else h.reshape(-1, h.shape[-1])
    options = (activation, gated, interleaved, _number("alpha", alpha), _limit(limit))
    a: Tensor = _apply(_Glu, rows, *options) if _needs_autograd(rows) else ops.glu(rows, *options)
    return a if h.dim() == 2 else a.reshape(*h.shape[:-1], a.shape[-1])


# ---- the whole layer -------------------------------------------------------------------------------------------------


class _Moe(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return ops.moe_forward(*args, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, activation, gated, interleaved, alpha, limit = inputs
        _, h = output
        ctx.options = (activation, gated, interleaved, alpha, limit)
        ctx.set_materialize_grads(False)  # no zeros of the size of h
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(*tensors, h)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * 12
        *needs, _, need_weights = ctx.needs_input_grad[:7]
        needs.append(need_weights)
        options = ctx.options

        def grads(grad_y: Tensor, x: Tensor, *saved: Any) -> Any:
            *layer, h = saved
            outputs = ops.moe_backward(grad_y, x, h, *layer, *options, needs)
            return tuple(output if need else None for output, need in zip(outputs, needs, strict=True))

        *grad_inputs, grad_weights = _once(grads, grad_y, *ctx.saved_tensors)
        return *grad_inputs, None, grad_weights, *[None] * 5


def _rows_of(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [T,H], topk_ids and topk_weights [T,K] as the kernels take them, from any leading dimensions."""
    if x.dim() != 2:  # a reshape that changes nothing would cost a microsecond
        x = x.reshape(-1, x.shape[-1])
    if topk_ids.dim() != 2:
        topk_ids = topk_ids.reshape(-1, topk_ids.shape[-1])
    if topk_weights.dim() != 2:
        topk_weights = topk_weights.reshape(-1, topk_weights.shape[-1])
    return x, _as_ids("topk_ids", topk_ids), _as_weights("topk_weights", topk_weights, x.dtype)


@accepts_arrays
def moe(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
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
    """A layer of experts: y[t] = Σ_k topk_weights[t,k] · (glu(x[t] · W_guᵀ + b_gu) · W_dᵀ + b_d).

    The weights W and b in each term are those of expert topk_ids[t,k].

    Args:
        x: [..., H] in float32, bfloat16 or float16 (float64: reference only); leading dimensions are flattened to T.
        gate_up_proj: [E,N,H], N = 2I for gated experts (gate and up), I for plain ones.
        down_proj: [E,H,I]. Transposed storage ([E,H,N], [E,I,H]) comes as `weight.mT`, without a copy.
        topk_ids: [..., K] int32 or int64 in [0, E); -1 is an empty choice and adds nothing.
        topk_weights: [..., K], any floating dtype; used in float32, of any sign and sum.
        activation, gated, interleaved, alpha, limit: see glu.
        gate_up_bias, down_bias: [E,N] and [E,H].

    Returns y like x. Float tensors share x's dtype; inside torch.autocast all are cast to its dtype, which y then has.

    Differentiable in x, the projections, the biases and topk_weights; only the gradients asked for are computed, and an
    expert without tokens gets zeros. Backward keeps x, h = x · W_guᵀ + b_gu [T·K,N], and the arguments.

    Raises:
        ValueError: a shape, or an id that is out of range. TypeError: a dtype.
    """
    device_type = x.device.type
    if in_autocast(device_type):
        x, gate_up_proj, down_proj, gate_up_bias, down_bias = _autocast(
            device_type, x, gate_up_proj, down_proj, gate_up_bias, down_bias
        )
    shape = x.shape
    x, topk_ids, topk_weights = _rows_of(x, topk_ids, topk_weights)
    tensors = (x, gate_up_proj, down_proj, gate_up_bias, down_bias, topk_ids, topk_weights)
    options = (activation, gated, interleaved, _number("alpha", alpha), _limit(limit))
    if _needs_autograd(*tensors):
        y: Tensor = _apply(_Moe, *tensors, *options)[0]
    elif ops.needs_no_dispatch(*tensors):
        y = ops.moe_forward_on_host(*tensors, *options)
    else:
        y = ops.moe_forward(*tensors, *options, False)[0]
    return y if len(shape) == 2 else y.reshape(shape)
