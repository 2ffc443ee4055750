# SPDX-License-Identifier: BSD-3-Clause
"""moe: a whole layer in one op forward and one backward; moe_accumulate, of which a call has some experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchgear import ops
from switchgear.arrays import accepts_arrays
from switchgear.backends import cast_in_autocast, in_autocast
from switchgear.functional.arguments import (
    as_dtype,
    as_ids,
    as_limit,
    as_number,
    as_weights,
    dropout_seed,
    flat,
)
from switchgear.functional.gradients import apply, is_transformed, needs_autograd
from switchgear.functional.layer_gradients import Moe, inputs_of
from switchgear.functional.products import AnyWeight, check_trained, grouped_gemm
from switchgear.functional.routes import plan
from switchgear.functional.rows import combine, glu
from switchgear.ops import GluOptions, Layer
from switchgear.reference import weight_dtype
from switchgear.weights.weight import Operand, operand_of

Biases = tuple[Tensor | None, Tensor | None]


def rows_of(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flattens leading dimensions to x [T,H], topk_ids and topk_weights [T,K], in the dtypes of the kernels."""
    if x.dim() != 2:  # a reshape that changes nothing would cost a microsecond
        x = flat("x", x)
    if topk_ids.dim() != 2:
        topk_ids = flat("topk_ids", topk_ids)
    if topk_weights.dim() != 2:
        topk_weights = flat("topk_weights", topk_weights)
    if topk_ids.dtype is not torch.int32:
        topk_ids = as_ids("topk_ids", topk_ids)
    if topk_weights.dtype is not torch.float32 or x.dtype is torch.float64:
        topk_weights = as_weights("topk_weights", topk_weights, x.dtype)
    return x, topk_ids, topk_weights


def _options(
    activation: str | Callable[..., Tensor], gated: bool, interleaved: bool, alpha: float, limit: float | None
) -> tuple[Any, ...]:
    """Those of GluOptions. Conversions that change nothing would cost a microsecond."""
    alpha = alpha if isinstance(alpha, float) else as_number("alpha", alpha)
    return activation, gated, interleaved, alpha, 0.0 if limit is None else as_limit(limit)


@accepts_arrays
def moe(
    x: Tensor,
    gate_up_proj: AnyWeight,
    down_proj: AnyWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str | Callable[..., Tensor] = "silu",
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
        down_proj: [E,H,I]. Either of the last two dimensions of a projection must be contiguous (a stride of 1): pass
            transposed storage ([E,H,N], [E,I,H]) as `weight.mT`, without a copy. Either projection can be a Weight in
            another format or an AdaptedWeight, or both a SelectedWeight (switchgear.weights).
        topk_ids: [..., K] int32 or int64 in [0, E); -1 is an empty choice and adds nothing.
        topk_weights: [..., K], any floating dtype; used in float32, of any sign and sum.
        activation, gated, interleaved, alpha, limit: see glu. A function runs between two grouped products, so h and a
            are written to memory: 1.2 to 1.9 times the time of a named activation, with a backward pass 1.1 to 1.3.
        gate_up_bias, down_bias: [E,N] and [E,H].

    Returns y with the shape and dtype of x. Other float tensors than topk_weights must have x's dtype, except biases
    next to a Weight, which are converted; torch.autocast casts all to its own.

    Differentiable in x, plain projections, adapters, the biases and topk_weights. Only requested gradients are
    computed; an expert without tokens gets zeros. The graph saves h = x · W_guᵀ + b_gu [T·K,N] and the arguments.

    Raises:
        ValueError: a wrong shape, or an id out of range. TypeError: a wrong dtype.
    """
    options = _options(activation, gated, interleaved, alpha, limit)
    weights, biases, shape, kind = (gate_up_proj, down_proj), (gate_up_bias, down_bias), x.shape, x.device.type
    autocast = kind if in_autocast(kind) else None
    if autocast is not None:
        x, *cast = cast_in_autocast(kind, x, *biases)
        biases = (cast[0], cast[1])
    y = apply_layer(*rows_of(x, topk_ids, topk_weights), weights, biases, options, autocast)
    return y if len(shape) == 2 else y.reshape(shape)


def apply_layer(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: tuple[AnyWeight, AnyWeight],
    biases: Biases,
    options: tuple[Any, ...],
    autocast: str | None,
) -> Tensor:
    """moe of `rows_of`. autocast: the device type whose torch.autocast is on and gave x and biases their dtype."""
    if callable(options[0]):
        return _moe_in_stages(x, topk_ids, topk_weights, weights, biases, options)
    (gate_up_proj, down_proj), is_direct = weights, None
    if isinstance(gate_up_proj, Tensor) and isinstance(down_proj, Tensor) and autocast is None:
        tensors = (x, gate_up_proj, down_proj, *biases, topk_ids, topk_weights)
        is_direct = ops.needs_no_dispatch(*tensors)
        if is_direct and not needs_autograd(*tensors):  # the way below takes microseconds more
            return ops.plain_layer_on_host(*tensors, options)
    first, second = operand_of(gate_up_proj, x.dtype, autocast), operand_of(down_proj, x.dtype, autocast)
    if (loads := first.source or second.source) is not None:
        y: Tensor = loads.moe(x, topk_ids, topk_weights, weights, biases, options, autocast)
        return y
    if first.trained is not None or second.trained is not None:
        if first.trained is None or second.trained is None:
            return _moe_in_stages(x, topk_ids, topk_weights, weights, biases, options)
        _check_both_trained(first, second, biases)
    layer = build_layer(x, first, second, biases, topk_ids, topk_weights, options)
    gate_up_bias, down_bias = layer[4:6]
    if is_direct is None:
        known = first.needs_no_dispatch and second.needs_no_dispatch
        plain = () if known else (*first.tensors, *second.tensors)
        others = (*plain, *first.adapter, *second.adapter)
        is_direct = ops.needs_no_dispatch(x, gate_up_bias, down_bias, topk_ids, topk_weights, *others)
    if needs_autograd(x, gate_up_bias, down_bias, topk_weights, *first.leaves, *second.leaves):
        is_direct = is_direct and not is_transformed()
        inputs = inputs_of(x, Layer(*layer), (first.trained, second.trained), None, is_direct)
        y = apply(Moe, *inputs)[0]
        return y
    if is_direct:
        return ops.moe_forward_on_host(x, layer)
    return ops.layer_forward(x, Layer(*layer), False)[0]


def build_layer(
    x: Tensor,
    first: Operand,
    second: Operand,
    biases: Biases,
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The fields of Layer; making one takes a microsecond, which a forward of one token notices."""
    gate_up_bias, down_bias = biases
    if not first.form and first.tensors[0].dim() != 3:  # a list of matrices, of which a matrix alone would be one
        raise ValueError(f"gate_up_proj: expected shape [E, N, C], got {list(first.tensors[0].shape)}")
    if not second.form and second.tensors[0].dim() != 3:
        raise ValueError(f"down_proj: expected shape [E, N, C], got {list(second.tensors[0].shape)}")
    adapter, down_adapter, seed = first.adapter, second.adapter, None
    dropout: tuple[float, ...] = ()
    if first.form or second.form or adapter or down_adapter:
        if gate_up_bias is not None:
            gate_up_bias = as_dtype("gate_up_bias", gate_up_bias, x.dtype)
        if down_bias is not None:
            down_bias = as_dtype("down_bias", down_bias, x.dtype)
        if first.dropout or second.dropout:
            seed, dropout = dropout_seed(x.device), (first.dropout, second.dropout)
    return (
        first.tensors, first.form, second.tensors, second.form, gate_up_bias, down_bias, topk_ids, topk_weights,
        *options, adapter, down_adapter, seed, dropout,
    )  # fmt: skip


def _check_both_trained(first: Operand, second: Operand, biases: Biases) -> None:
    assert first.trained is not None
    assert second.trained is not None
    if first.adapter or second.adapter:
        raise ValueError("gate_up_proj, down_proj: expected no adapter of a weight with experts that train alone")
    for name, operand, bias in zip(("gate_up", "down"), (first, second), biases, strict=True):
        check_trained(f"{name}_proj", operand, f"{name}_bias", bias)
    one, other = first.trained.experts, second.trained.experts
    if one is not other and not torch.equal(one, other):
        raise ValueError("down_proj: expected the trained experts of gate_up_proj, got others")


def _moe_in_stages(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: tuple[AnyWeight, AnyWeight],
    biases: Biases,
    options: tuple[Any, ...],
) -> Tensor:
    """moe stage by stage, for what its op does not take: an activation that is a function, and one projection of which
    some experts are trained alone."""
    slots = plan(topk_ids, weights[0].shape[0])
    h = grouped_gemm(x, weights[0], slots.expert_offsets, bias=biases[0], token_indices=slots.token_indices)
    a = glu(h, **GluOptions(*options).keywords())
    return combine(grouped_gemm(a, weights[1], slots.expert_offsets, bias=biases[1]), slots, topk_weights)


def moe_accumulate(
    sums: Tensor,
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
    """Adds the output of `moe` to `sums` in place, without rounding it to the dtype of x. Returns `sums`.

    For experts that are not all in memory at once: start from zeros, and call it for disjoint ranges of experts in
    ascending order, each with a topk_ids that is -1 for all other experts. `sums.to(x.dtype)` then has the bits of one
    call of `moe` with all experts, on the CPU's kernels: sums are added in the same order. (On the reference they are
    equal up to rounding.) The data of an expert that a call does not use is not read: its slot may hold another's.

    Args:
        sums: float32 (float64 if x is), the shape of x, rows contiguous. It must not overlap another argument.
        The others: as those of `moe`; torch.autocast casts them, but not `sums`. No SelectedWeight, no dropout.

    There is no gradient. CUDA devices have no kernels for it: ValueError, or for weights that only the reference takes
    there, the reference with its warning.

    Raises:
        ValueError: a wrong shape, an id out of range, a gradient is needed. TypeError: a wrong dtype.
    """
    options = _options(activation, gated, interleaved, alpha, limit)
    if sums.shape != x.shape:
        raise ValueError(f"sums, x: expected equal shapes, got {list(sums.shape)} and {list(x.shape)}")
    if sums.dim() != 2 and not sums.is_contiguous():
        raise ValueError(f"sums: expected a contiguous tensor or two dimensions, got strides {list(sums.stride())}")
    biases, autocast, given = (gate_up_bias, down_bias), None, sums if sums.dim() == 2 else sums.view(-1, x.shape[-1])
    if in_autocast(kind := x.device.type):
        x, *cast = cast_in_autocast(kind, x, *biases)
        biases, autocast = (cast[0], cast[1]), kind
    accumulate(given, *rows_of(x, topk_ids, topk_weights), (gate_up_proj, down_proj), biases, options, autocast)
    return sums


def accumulate(
    sums: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: tuple[AnyWeight, AnyWeight],
    biases: Biases,
    options: tuple[Any, ...],
    autocast: str | None,
) -> None:
    """moe_accumulate of `rows_of` to sums [T,H]; the arguments of apply_layer."""
    first, second = operand_of(weights[0], x.dtype, autocast), operand_of(weights[1], x.dtype, autocast)
    if first.trained is not None or second.trained is not None:
        raise ValueError("gate_up_proj, down_proj: expected no weights with experts that train alone")
    if first.source is not None or second.source is not None:
        raise ValueError("gate_up_proj, down_proj: expected weights in memory, got offloaded experts")
    if first.dropout or second.dropout:
        raise ValueError(f"dropout: expected none in moe_accumulate, got {(first.dropout, second.dropout)}")
    if sums.dtype is not weight_dtype(x.dtype):
        raise TypeError(f"sums: expected {weight_dtype(x.dtype)} for x in {x.dtype}, got {sums.dtype}")
    if needs_autograd(sums, x, *biases, topk_weights, *first.leaves, *second.leaves):
        raise ValueError("moe_accumulate: expected no tensor that needs a gradient, or torch.no_grad()")
    biases = as_dtype("gate_up_bias", biases[0], x.dtype), as_dtype("down_bias", biases[1], x.dtype)
    layer = build_layer(x, first, second, biases, topk_ids, topk_weights, options)
    ops.layer_accumulate(x, Layer(*layer), sums)
