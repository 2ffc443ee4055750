# SPDX-License-Identifier: BSD-3-Clause
"""Routers: logits, the choice of experts, and the slots of a choice; and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import ops
from switchgear.arrays import accepts_arrays
from switchgear.backends import cast_in_autocast, in_autocast
from switchgear.functional.arguments import as_ids, as_number, as_weights, flat
from switchgear.functional.gradients import apply, needs_autograd, once
from switchgear.reference import wide


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
    scale = as_number("scale", scale)
    options = (top_k, score_function, normalize, scale, num_groups, topk_groups, group_score)
    return _choose(False, options, (score_function, normalize, scale), router_logits, selection_bias)


def _choose(
    is_dynamic: bool, options: Any, of_gradient: Any, router_logits: Tensor, selection_bias: Tensor | None
) -> Routing:
    """The Routing of Route's inputs."""
    if router_logits.dim() != 2:
        router_logits = flat("router_logits", router_logits)
    if selection_bias is not None:
        selection_bias = as_weights("selection_bias", selection_bias.detach(), torch.float32)
    inputs = is_dynamic, options, of_gradient, router_logits, selection_bias
    topk_ids, topk_weights = apply(Route, *inputs) if needs_autograd(router_logits) else Route.forward(*inputs)
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
        router_logits: Tensor = apply(Gate, rows, weight, bias, float32)
    else:
        router_logits = ops.gate(rows, weight, bias, float32)
    return router_logits if x.dim() == 2 else router_logits.reshape(*x.shape[:-1], router_logits.shape[-1])


def _of_gate(x: Tensor, weight: Tensor, bias: Tensor | None, float32: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the dtypes that the op takes."""
    if not float32:
        if in_autocast(x.device.type):
            x, weight, bias = cast_in_autocast(x.device.type, x, weight, bias)
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
    scale = as_number("scale", scale)
    options = (score_function, normalize, scale, num_groups, topk_groups, group_score)
    if needs_autograd(x, weight, bias):
        router_logits = gate(x, weight, bias, float32=float32)
        return _choose(False, (top_k, *options), options[:3], router_logits, selection_bias)
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
    top_p = as_number("top_p", top_p)
    if score_function == "softmax" and top_p >= 1:
        top_p = math.inf  # even if rounding makes the probabilities add up to less
    count = router_logits.shape[-1] if max_experts is None else max_experts
    threshold, scale = as_number("threshold", threshold), as_number("scale", scale)
    options = (count, min_experts, score_function, top_p, threshold, normalize, scale)
    return _choose(True, options, (score_function, normalize, scale), router_logits, selection_bias)


@accepts_arrays
def plan(topk_ids: Tensor, num_experts: int) -> Plan:
    """The slots of topk_ids [T,K] (int32 or int64, -1 for none), ordered by (expert, token, choice).

    Raises:
        ValueError: an id that is neither -1 nor in [0, num_experts). TypeError: another dtype.
    """
    return Plan(*ops.plan(as_ids("topk_ids", topk_ids), num_experts))


# ---- gradients -------------------------------------------------------------------------------------------------------


class Gate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, float32: bool) -> Any:
        return ops.gate(x, weight, bias, float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, _ = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        args = (grad_logits, x, weight, ctx.needs_input_grad[:3], ctx.bias_dtype)
        if torch.compiler.is_compiling() or not needs_autograd(grad_logits, x, weight):
            return *_gate_grads(*args), None
        return *apply(GateGrads, *args), None


class GateGrads(torch.autograd.Function):
    """The backward pass of Gate, used if autograd records it (create_graph=True)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
        return _gate_grads(grad, x, weight, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, to_x: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None) -> Any:
        """The second derivative, in torch's products, so there are all further ones. to_x is the gradient of grad_x."""
        saved = ctx.saved_tensors
        grad, x, weight = saved if saved[0].dtype == saved[1].dtype == saved[2].dtype else map(wide, saved)
        of_grad = of_x = of_weight = None
        if to_x is not None:
            of_grad, of_weight = to_x.to(x.dtype) @ weight.mT, grad.mT @ to_x.to(x.dtype)
        if to_weight is not None:
            through_weight = x @ to_weight.to(x.dtype).mT
            of_grad = through_weight if of_grad is None else of_grad + through_weight
            of_x = grad @ to_weight.to(x.dtype)
        if to_bias is not None:
            rows = to_bias.to(x.dtype).expand_as(grad)
            of_grad = rows if of_grad is None else of_grad + rows
        results = (of_grad, of_x, of_weight)
        return *(None if r is None else r.to(s.dtype) for r, s in zip(results, saved, strict=True)), None, None


def _gate_grads(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    """grad_x = g·W, grad_weight = gᵀ·x and grad_bias = Σ g.

    grad_x sums over a few experts, so it is computed as a weight gradient, whose kernel is made for short sums: that of
    the expert that has the rows of gᵀ and W. grad_weight has few rows and long sums, as a product of few tokens. Both
    read gᵀ. Each element has one order of sums, so a row of grad_x does not depend on the others.
    """
    need_x, need_weight, need_bias = needs
    if grad.shape[0] == 0:
        grad_bias = grad.new_zeros(grad.shape[1], dtype=bias_dtype) if need_bias else None
        return x.new_zeros(x.shape) if need_x else None, torch.zeros_like(weight) if need_weight else None, grad_bias
    rows, matrix = x, weight
    if not grad.dtype == x.dtype == weight.dtype:  # the gradient of float32 logits keeps its precision
        grad, rows, matrix = wide(grad), wide(x), wide(weight)
    grad_x = grad_weight = grad_bias = None
    transposed = grad.mT.contiguous()
    one_expert = torch.arange(2, dtype=torch.int32, device=x.device) * grad.shape[1]
    if need_x:
        grad_x = ops.grouped_gemm_wgrad(transposed, matrix, one_expert, None, False)[0].to(x.dtype)
    if need_weight:
        rows = rows if 1 in rows.stride() else rows.contiguous()  # weights of a product need it
        columns = (rows.mT[None],)
        grad_weight = ops.grouped_gemm(transposed, columns, (), None, one_expert, None, False, True).to(weight.dtype)
    if need_bias:  # the weight gradient of a column of ones
        ones, offsets = grad.new_ones(grad.shape[0], 1), torch.arange(2, dtype=torch.int32, device=x.device) * len(grad)
        grad_bias = ops.grouped_gemm_wgrad(grad, ones, offsets, None, False)[0, :, 0].to(bias_dtype)
    return grad_x, grad_weight, grad_bias


class Route(torch.autograd.Function):
    """route, or route_dynamic, with the options of the op, and those of its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        is_dynamic: bool, options: Any, of_gradient: Any, router_logits: Tensor, selection_bias: Tensor | None
    ) -> Any:
        return (ops.route_dynamic if is_dynamic else ops.route)(router_logits, selection_bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, ctx.options, router_logits, _ = inputs
        topk_ids, _ = output
        ctx.mark_non_differentiable(topk_ids)
        ctx.save_for_backward(router_logits, topk_ids)

    @staticmethod
    def backward(ctx: Any, _: Any, grad_topk_weights: Tensor) -> Any:
        options = ctx.options

        def grad(*tensors: Any) -> Any:
            return ops.route_backward(*tensors, *options)

        return None, None, None, once(grad, grad_topk_weights, *ctx.saved_tensors), None
