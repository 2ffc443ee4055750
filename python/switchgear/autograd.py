# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives: the autograd.Functions around the ops, used only if a gradient or a forward-mode tangent is needed.

Ops have no autograd formula; callers such as functional/ apply these functions. Gradients can be taken once, those of
gate any number of times; forward mode raises. A stored Weight has no gradient: gradients reach activations, biases and
topk_weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from switchgear import ops, reference
from switchgear.reference import formats
from switchgear.reference.checks import wide
from switchgear.weights.offloaded import Source


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be needed. requires_grad shows neither forward-mode tangents nor tensors beneath a
    torch.vmap. For these the bare op would silently return wrong derivatives."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


class _Once(torch.autograd.Function):
    """Runs `function` on tensors. Differentiating its result raises."""

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


def once(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Runs a backward pass, `function` of tensors, inside _Once if autograd records it (create_graph=True)."""
    if torch.compiler.is_compiling() or not needs_autograd(*tensors):
        return function(*tensors)
    return apply(_Once, function, *tensors)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


def is_transposed(weight: Tensor) -> bool:
    """Whether the memory of weight [..., N, C] is that of [..., C, N]."""
    return weight.stride(-2) == 1 and weight.stride(-1) != 1


# ---- route -----------------------------------------------------------------------------------------------------------


class Route(torch.autograd.Function):
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

        return once(grad, grad_topk_weights, *ctx.saved_tensors), *[None] * 8


class RouteDynamic(torch.autograd.Function):
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

        return once(grad, grad_topk_weights, *ctx.saved_tensors), *[None] * 8


# ---- gate ------------------------------------------------------------------------------------------------------------


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


# ---- permute, combine ------------------------------------------------------------------------------------------------
# Each is the backward of the other; the gradient of the weights is the same inner product for both.


class Permute(torch.autograd.Function):
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

        return *once(grads, grad, *ctx.saved_tensors), None, None, None


class Combine(torch.autograd.Function):
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

        return *once(grads, grad, *ctx.saved_tensors), None, None, None


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def _heighten(matrix: Tensor, height: int) -> Tensor:
    """Pads the matrix with rows of zeros to `height`."""
    missing = height - matrix.shape[-2]
    return pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _sum_by_row(grad_slots: Tensor, x: Tensor, token_indices: Tensor | None) -> Tensor:
    """The gradient of x: sums those of each row's slots. Unassigned slots add their zeros to row 0."""
    if token_indices is None:
        return grad_slots
    total = torch.zeros(x.shape, dtype=reference.weight_dtype(x.dtype), device=x.device)
    if x.shape[0]:
        total = total.index_add(0, token_indices.clamp(min=0), grad_slots.to(total.dtype))
    return total.to(x.dtype)


def _grouped_gemm_grads(needs: Sequence[bool], grad_out: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias and each weight; None where `needs` is false."""
    x, _, expert_offsets, token_indices, *weight = saved
    need_x, need_bias, *need_weight = needs
    packed = weight[0].dim() == 3
    grad_x = grad_bias = None
    grad_weight: list[Tensor | None] = [None] * len(weight)
    if need_x:
        transposes = [_heighten(matrix, grad_out.shape[1]).mT for matrix in weight]
        grad_x = ops.grouped_gemm(grad_out, transposes, (), None, expert_offsets, None, False, True)
        grad_x = _sum_by_row(grad_x, x, token_indices)
    if need_bias:  # the weight gradient of a column of ones
        ones = grad_out.new_ones(grad_out.shape[0], 1)
        grad_bias = ops.grouped_gemm_wgrad(grad_out, ones, expert_offsets, None, False).squeeze(-1)
        for expert, matrix in enumerate(() if packed else weight):
            grad_bias[expert, matrix.shape[0] :] = 0  # columns past this expert's height
    if any(need_weight):
        grad = ops.grouped_gemm_wgrad(grad_out, x, expert_offsets, token_indices, is_transposed(weight[0]))
        grad_weight = [grad] if packed else [grad[e, : matrix.shape[0]] for e, matrix in enumerate(weight)]
    return grad_x, grad_bias, *grad_weight


class GroupedGemm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, expert_offsets: Tensor, token_indices: Tensor | None, *weight: Tensor
    ) -> Any:
        return ops.grouped_gemm(x, weight, (), bias, expert_offsets, token_indices, False, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, need_bias, _, _, *need_weight = ctx.needs_input_grad
        needs = (need_x, need_bias, *need_weight)
        grad_x, grad_bias, *grad_weight = once(partial(_grouped_gemm_grads, needs), grad_out, *ctx.saved_tensors)
        return grad_x, grad_bias, None, None, *grad_weight


class StoredGroupedGemm(torch.autograd.Function):
    """grouped_gemm with integer or minifloat weights. The gradient of x uses the decoded weight and ignores the
    rounding of x (straight-through estimator)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        expert_offsets: Tensor,
        token_indices: Tensor | None,
        form: tuple[int, ...],
        *weight: Tensor,
    ) -> Any:
        return ops.grouped_gemm(x, weight, form, bias, expert_offsets, token_indices, False, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, bias, expert_offsets, token_indices, ctx.form, *weight = inputs
        ctx.save_for_backward(x, bias, expert_offsets, token_indices, *weight)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, need_bias, *_ = ctx.needs_input_grad
        form = ctx.form

        def grads(grad_out: Tensor, x: Tensor, bias: Tensor | None, *rest: Any) -> Any:
            expert_offsets, token_indices, *weight = rest
            grad_x = grad_bias = None
            if need_x:
                grad_x = _sum_by_row(_times(grad_out, weight, form, expert_offsets), x, token_indices)
            if need_bias and bias is not None:
                grad_bias = _sum_slots(grad_out, bias, expert_offsets)
            return grad_x, grad_bias

        saved = ctx.saved_tensors
        return *once(grads, grad_out, *saved), *[None] * (len(saved) - 1)


def _times(rows: Tensor, weight: Sequence[Tensor], form: tuple[int, ...], expert_offsets: Tensor) -> Tensor:
    """Multiplies rows [S,N] by each expert's matrix of a stored or plain weight, [S,C]."""
    if formats.format_of(form) in (*formats.BITS, *formats.DECODED):
        return ops.grouped_gemm(rows, weight, form, None, expert_offsets, None, True, False)
    plain = formats.decode(weight, form, rows.dtype)
    return ops.grouped_gemm(rows, [plain.mT], (), None, expert_offsets, None, False, True)


def _sum_slots(rows: Tensor, bias: Tensor, expert_offsets: Tensor) -> Tensor:
    """The gradient of a bias [E,N]: the sum of each expert's rows."""
    ones = rows.new_ones(rows.shape[0], 1)
    return ops.grouped_gemm_wgrad(rows, ones, expert_offsets, None, False).squeeze(-1).to(bias.dtype)


class SelectedGroupedGemm(torch.autograd.Function):
    """grouped_gemm with a weight of which some experts are trained alone; see SelectedWeight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        expert_offsets: Tensor,
        token_indices: Tensor | None,
        experts: Tensor,
        trained: Tensor,
        trained_bias: Tensor | None,
    ) -> Any:
        return ops.grouped_gemm(x, [weight], (), bias, expert_offsets, token_indices, False, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)  # the trained tensors too: an in-place change of them raises in backward

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, *_, need_weight, need_bias = ctx.needs_input_grad

        def grads(grad_out: Tensor, x: Tensor, weight: Tensor, _: Any, *rest: Any) -> Any:
            expert_offsets, token_indices, experts, trained, _ = rest
            grad_x = grad_weight = grad_bias = None
            if need_x:
                grad_x = ops.grouped_gemm(grad_out, [weight.mT], (), None, expert_offsets, None, False, True)
                grad_x = _sum_by_row(grad_x, x, token_indices)
            if need_weight:
                layout = is_transposed(trained)
                grad_weight = ops.grouped_gemm_wgrad(grad_out, x, expert_offsets, token_indices, layout, experts)
            if need_bias:
                ones = grad_out.new_ones(grad_out.shape[0], 1)
                grad_bias = ops.grouped_gemm_wgrad(grad_out, ones, expert_offsets, None, False, experts).squeeze(-1)
            return grad_x, grad_weight, grad_bias

        grad_x, *of_trained = once(grads, grad_out, *ctx.saved_tensors)
        return grad_x, *[None] * 5, *of_trained


# ---- glu -------------------------------------------------------------------------------------------------------------


class Glu(torch.autograd.Function):
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

        return once(grad, grad_a, *ctx.saved_tensors), *[None] * 5


# ---- the whole layer -------------------------------------------------------------------------------------------------


# A gradient that is there is added to in place, by the kernel that computes the new one: otherwise autograd would add a
# temporary of the size of the weight. What backward returns then is a gradient without elements, so that hooks of the
# accumulation, such as those of DistributedDataParallel, still run.


def _gradients_there(
    weights: Sequence[Tensor], needs: Sequence[bool], others: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None] | None:
    """The .grad of both weights, None for one that needs no gradient, if the kernel can add to all that are needed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_anomaly_enabled() or not any(needs):
        return None
    for weight, need in zip(weights, needs, strict=True):
        if need and not _can_add(weight):
            return None
    if not ops.needs_no_dispatch(*[tensor for tensor in (*others, *weights) if tensor is not None]):
        return None
    first, second = (weight.grad if need else None for weight, need in zip(weights, needs, strict=True))
    return first, second


def _can_add(weight: Tensor) -> bool:
    """Whether autograd would add a gradient of this weight to its .grad, and nothing sees the gradient before."""
    if not weight.is_leaf or weight._backward_hooks:
        return False
    grad = weight.grad
    if grad is None or type(grad) is not Tensor or grad.requires_grad or grad.is_neg() or grad.layout != weight.layout:
        return False
    if grad.dtype is not weight.dtype or grad.stride() != weight.stride() or not grad.is_cpu:
        return False
    if grad.stride(-1) != 1 and grad.stride(-2) != 1:
        return False
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # of torch.autograd.grad, which returns gradients and leaves .grad alone
        return False


_adding = threading.Lock()  # backward passes of several threads may meet at one weight


def _nothing_of(weight: Tensor) -> Tensor:
    """A gradient that adds nothing, and takes no time to add."""
    indices = torch.empty((1, 0), dtype=torch.int64)
    values = weight.new_empty((0, *weight.shape[1:]))
    return torch.sparse_coo_tensor(indices, values, weight.shape, is_coalesced=True, check_invariants=False)


class Moe(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *others: Any) -> Any:
        return ops.moe_forward(x, [gate_up_proj], (), [down_proj], (), *others, True)

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
        saved = ctx.saved_tensors  # once: a checkpoint computes them when they are asked for
        x, gate_up_proj, down_proj, *others, h = saved
        weights = gate_up_proj, down_proj
        if (there := _gradients_there(weights, needs[1:3], (x, h, grad_y, *others))) is not None:
            with _adding:
                found = ops.moe_backward_on_host(there, grad_y, x, h, *weights, *others, *options, needs=needs)
            nothing = (None if grad is None else _nothing_of(grad) for grad in there)
            grad_x, *grad_biases, grad_weights = found
            return grad_x, *nothing, *grad_biases, None, grad_weights, *[None] * 5

        def grads(grad_y: Tensor, x: Tensor, *saved: Any) -> Any:
            gate_up_proj, down_proj, *others, h = saved
            layer = ([gate_up_proj], (), [down_proj], (), *others)
            outputs = ops.moe_backward(grad_y, x, h, *layer, *options, needs)
            return tuple(output if need else None for output, need in zip(outputs, needs, strict=False))

        *grad_inputs, grad_weights = once(grads, grad_y, *saved)
        return *grad_inputs, None, grad_weights, *[None] * 5


class SelectedMoe(torch.autograd.Function):
    """Moe with projections of which some experts are trained alone; see SelectedWeight.

    Inputs: those of Moe up to topk_weights; experts; the trained projections and biases; the options.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *others: Any) -> Any:
        return ops.moe_forward(x, [gate_up_proj], (), [down_proj], (), *others[:4], *others[9:], True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, h = output
        ctx.options = inputs[12:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(*inputs[:12], h)  # the trained tensors too: an in-place change of them raises in backward

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * 17
        need_x, *_, need_weights = ctx.needs_input_grad[:7]
        of_trained = ctx.needs_input_grad[8:12]
        options, needs = ctx.options, [need_x, *of_trained, need_weights]

        def grads(grad_y: Tensor, x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *saved: Any) -> Any:
            *others, experts, _, _, _, _, h = saved
            layer = ([gate_up_proj], (), [down_proj], (), *others)
            outputs = ops.moe_backward(grad_y, x, h, *layer, *options, needs, experts=experts)
            return tuple(output if need else None for output, need in zip(outputs, needs, strict=False))

        grad_x, *grad_trained, grad_weights = once(grads, grad_y, *ctx.saved_tensors)
        return grad_x, *[None] * 5, grad_weights, None, *grad_trained, *[None] * 5


class Parts(NamedTuple):
    """What the tensors of MoeOfParts are."""

    forms: tuple[tuple[int, ...], tuple[int, ...]]  # of both projections
    counts: tuple[int, ...]  # of tensors: of the projections, of their adapters, and of the seed of dropout
    options: tuple[Any, ...]
    dropout: tuple[float, ...]
    source: Source | None = None  # of offloaded experts, which backward needs again

    def split(self, tensors: Sequence[Any]) -> list[list[Any]]:
        """The tensors, group by group."""
        rest = iter(tensors)
        return [[next(rest) for _ in range(count)] for count in self.counts]


class MoeOfParts(torch.autograd.Function):
    """Moe with stored projections, which are frozen, and with adapters. The gradient ignores the rounding of x and a
    for integer weights (straight-through estimator).

    Inputs: x, the biases, topk_ids, topk_weights; parts; then the tensors that they describe.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        topk_ids: Tensor,
        topk_weights: Tensor,
        parts: Parts,
        *tensors: Tensor,
    ) -> Any:
        first, second, *adapters, seed = parts.split(tensors)
        layer = (first, parts.forms[0], second, parts.forms[1], gate_up_bias, down_bias, topk_ids, topk_weights)
        drops = (seed[0] if seed else None, parts.dropout)
        return ops.moe_forward(x, *layer, *parts.options, True, *adapters, *drops)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.parts = inputs[:6]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1], *inputs[6:])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        parts: Parts = ctx.parts
        need_x, need_gate_up_bias, need_down_bias, _, need_weights, _, *rest = ctx.needs_input_grad
        need_first, need_second, *need_adapters, _of_seed = parts.split(rest)
        needs = [need_x, need_first[0], need_second[0], need_gate_up_bias, need_down_bias, need_weights]
        for need in need_adapters:
            needs += need[:2] or (False, False)

        def grads(grad_y: Tensor, x: Tensor, *saved: Any) -> Any:
            gate_up_bias, down_bias, topk_ids, topk_weights, h, *tensors = saved
            first, second, *adapters, seed = parts.split(tensors)
            layer = (first, parts.forms[0], second, parts.forms[1], gate_up_bias, down_bias, topk_ids, topk_weights)
            drops = (seed[0] if seed else None, parts.dropout)

            def compute(*_: Any) -> Any:
                return ops.moe_backward(grad_y, x, h, *layer, *parts.options, needs, *adapters, *drops)

            outputs = compute() if parts.source is None else parts.source.run(x, topk_ids, compute, together=True)
            return tuple(output if need else None for output, need in zip(outputs, needs, strict=True))

        grad_x, grad_first, grad_second, *grad_biases, grad_weights, first_a, first_b, second_a, second_b = once(
            grads, grad_y, *ctx.saved_tensors
        )
        of_groups: tuple[list[Any], ...] = (
            [grad_first],
            [grad_second],
            [first_a, first_b],
            [second_a, second_b],
            [None],
        )
        of_tensors = (
            (*grads_of, None, None, None, None)[:count]
            for grads_of, count in zip(of_groups, parts.counts, strict=True)
        )  # fmt: skip
        return grad_x, *grad_biases, None, grad_weights, None, *(grad for group in of_tensors for grad in group)
