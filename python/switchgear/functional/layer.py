# SPDX-License-Identifier: BSD-3-Clause
"""moe: a whole layer in one op forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import autograd, ops
from switchgear.arrays import accepts_arrays
from switchgear.autograd import apply, needs_autograd
from switchgear.backends import in_autocast
from switchgear.functional.arguments import (
    as_dtype,
    as_ids,
    as_limit,
    as_number,
    as_weights,
    dropout_seed,
    flat,
    in_autocast_dtype,
)
from switchgear.functional.offloaded import moe_of_offloaded, source_of
from switchgear.functional.products import AnyWeight, check_selected, grouped_gemm
from switchgear.functional.routes import plan
from switchgear.functional.rows import combine, glu
from switchgear.ops import GluOptions
from switchgear.reference import weight_dtype
from switchgear.weights.offloaded import OffloadedWeight, Source
from switchgear.weights.weight import AdaptedWeight, SelectedWeight, Weight, taken_by_moe

_WEIGHTS = (Weight, AdaptedWeight, SelectedWeight, OffloadedWeight)


def rows_of(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flattens leading dimensions to x [T,H], topk_ids and topk_weights [T,K], in the dtypes of the kernels."""
    if x.dim() != 2:  # a reshape that changes nothing would cost a microsecond
        x = flat("x", x)
    if topk_ids.dim() != 2:
        topk_ids = flat("topk_ids", topk_ids)
    if topk_weights.dim() != 2:
        topk_weights = flat("topk_weights", topk_weights)
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
        down_proj: [E,H,I]. Either of the last two dimensions of a projection must be contiguous (a stride of 1): pass
            transposed storage ([E,H,N], [E,I,H]) as `weight.mT`, without a copy. Either projection can be a Weight in
            another format or an AdaptedWeight, or both a SelectedWeight (switchgear.weights).
        topk_ids: [..., K] int32 or int64 in [0, E); -1 is an empty choice and adds nothing.
        topk_weights: [..., K], any floating dtype; used in float32, of any sign and sum.
        activation, gated, interleaved, alpha, limit: see glu.
        gate_up_bias, down_bias: [E,N] and [E,H].

    Returns y with the shape and dtype of x. Other float tensors than topk_weights must have x's dtype, except biases
    next to a Weight, which are converted; torch.autocast casts all to its own.

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
    x, topk_ids, topk_weights = rows_of(x, topk_ids, topk_weights)
    tensors = (x, first, second, gate_up_bias, down_bias, topk_ids, topk_weights)
    if needs_autograd(*tensors):
        check_stacked(first, second)
        y: Tensor = apply(autograd.Moe, *tensors, *options)[0]
    elif ops.needs_no_dispatch(*tensors):
        others = (gate_up_bias, down_bias, topk_ids, topk_weights, *options)
        y = ops.moe_forward_on_host(x, first, (), second, (), *others)
    else:
        check_stacked(first, second)
        others = (gate_up_bias, down_bias, topk_ids, topk_weights, *options)
        y = ops.moe_forward(x, (first,), (), (second,), (), *others, False)[0]
    return y if len(shape) == 2 else y.reshape(shape)


def check_stacked(gate_up_proj: AnyWeight, down_proj: AnyWeight) -> None:
    """The ops also take a list of matrices, of which a matrix alone would be one."""
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if len(weight.shape) != 3:
            raise ValueError(f"{name}: expected shape [E, N, C], got {list(weight.shape)}")


def _moe_of_weights(
    x: Tensor,
    weights: tuple[AnyWeight, AnyWeight],
    biases: tuple[Tensor | None, Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
    *,
    source: Source | None = None,
) -> Tensor:
    """moe if a projection is not a tensor. source: of the weights, if they are offloaded and in memory now."""
    shape, columns = x.shape, weights[0].shape[2]
    if x.shape[-1] != columns:  # stored bytes do not show H, so no op checks it
        raise ValueError(f"x: expected shape [..., {columns}], got {list(shape)}")
    x, topk_ids, topk_weights = rows_of(x, topk_ids, topk_weights)
    y = _moe_of_stored(x, weights, biases, topk_ids, topk_weights, options)
    if y is None:
        first, second = weights
        if (loads := source_of(first)) is not None:
            y = _moe_of_offloaded(loads, x, weights, biases, topk_ids, topk_weights, options)
        elif isinstance(first, SelectedWeight) and isinstance(second, SelectedWeight):
            y = _selected_moe(x, (first, second), biases, topk_ids, topk_weights, options)
        elif isinstance(first, SelectedWeight) or isinstance(second, SelectedWeight):
            y = _moe_in_stages(x, weights, biases, topk_ids, topk_weights, options)
        else:
            y = _moe_of_parts(x, weights, biases, topk_ids, topk_weights, options, source)
    return y if len(shape) == 2 else y.reshape(shape)


def _moe_of_stored(
    x: Tensor,
    weights: tuple[Any, Any],
    biases: tuple[Tensor | None, Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
) -> Tensor | None:
    """moe of x [T,H] with lossy weights, and adapters of both or none, without gradients. Returns None for all other
    calls, which are told apart later: that takes as long as a small kernel."""
    first, second = weights
    adapted: tuple[AdaptedWeight, ...] = ()
    if type(first) is AdaptedWeight and type(second) is AdaptedWeight and not first.dropout and not second.dropout:
        adapted, first, second = weights, first.weight, second.weight
    if type(first) is not Weight or type(second) is not Weight or first.is_lossless or second.is_lossless:
        return None
    factors = [tensor for weight in adapted for tensor in (weight.a, weight.b)] if adapted else ()
    if in_autocast(x.device.type) or needs_autograd(x, *biases, topk_ids, topk_weights, *factors):
        return None
    adapters = tuple(weight.adapter(x.dtype) for weight in adapted)
    if biases[0] is not None or biases[1] is not None:
        biases = _biases_like(x, biases)
    routing = (topk_ids, topk_weights)
    layer = (first.tensors, first.form, second.tensors, second.form, *biases, *routing, *options)
    tensors = (*biases, *routing, *adapters[0], *adapters[1]) if adapters else (*biases, *routing)
    if first.needs_no_dispatch and second.needs_no_dispatch and ops.needs_no_dispatch(x, *tensors):
        y: Tensor = ops.moe_forward_on_host(x, *layer, *adapters)
        return y
    return ops.moe_forward(x, *layer, False, *adapters)[0]


def _moe_of_offloaded(
    source: Source,
    x: Tensor,
    weights: tuple[AnyWeight, AnyWeight],
    biases: tuple[Tensor | None, Tensor | None],
    *others: Any,
) -> Tensor:
    """moe of x [T,H] with experts that `source` loads."""
    if in_autocast(kind := x.device.type):
        x, one, other = in_autocast_dtype(kind, x, *biases)
        biases = (one, other)
    return moe_of_offloaded(source, _moe_of_weights, accumulate, x, weights, biases, *others)


def _moe_of_parts(
    x: Tensor,
    weights: tuple[Any, Any],
    biases: tuple[Tensor | None, Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
    source: Source | None,
) -> Tensor:
    """moe of x [T,H] with projections that are stored, plain or adapted, in one op."""
    first, second = weights
    adapters: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())
    dropout: tuple[float, ...] = ()
    # Without these nothing changes, and finding that out takes as long as a small kernel.
    has_adapters = isinstance(first, AdaptedWeight) or isinstance(second, AdaptedWeight)
    if has_adapters or in_autocast(x.device.type):
        x, first, second, biases, adapters, dropout = _Layer.of(x, weights, biases)
    gate_up_bias, down_bias = biases
    trained = [weight for weight in (first, second) if isinstance(weight, Tensor)]
    if has_adapters:
        trained += [tensor for adapter in adapters for tensor in adapter[:2]]
    wants_gradients = needs_autograd(x, gate_up_bias, down_bias, topk_weights, *trained)
    first, second = _taken(first, x.dtype), _taken(second, x.dtype)
    if isinstance(first, Tensor) and isinstance(second, Tensor) and not has_adapters:
        named = {"gate_up_bias": gate_up_bias, "down_bias": down_bias, **options.keywords()}
        return moe(x, first, second, topk_ids, topk_weights, **named)
    others = (*_biases_like(x, biases), topk_ids, topk_weights)
    (tensors, form), (down_tensors, down_form) = _parts_of(first), _parts_of(second)
    seed = dropout_seed(x.device) if any(dropout) else None
    if wants_gradients:
        groups = (tensors, down_tensors, *adapters, () if seed is None else (seed,))
        parts = autograd.Parts((form, down_form), tuple(map(len, groups)), tuple(options), dropout, source)
        y: Tensor = apply(autograd.MoeOfParts, x, *others, parts, *(tensor for group in groups for tensor in group))[0]
        return y
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
        return y
    return ops.moe_forward(x, *layer, *options, False, *adapters, seed, dropout)[0]


def _biases_like(x: Tensor, biases: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    one, other = biases
    return as_dtype("gate_up_bias", one, x.dtype), as_dtype("down_bias", other, x.dtype)


def accumulate(
    sums: Tensor,
    x: Tensor,
    weights: tuple[AnyWeight, AnyWeight],
    biases: tuple[Tensor | None, Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: GluOptions,
) -> None:
    """moe_accumulate of x [T,H] to sums [T,H]."""
    first: Any
    second: Any
    x, first, second, biases, adapters, dropout = _Layer.of(x, weights, biases)
    if dropout:
        raise ValueError(f"dropout: expected none in moe_accumulate, got {dropout}")
    if sums.dtype is not weight_dtype(x.dtype):
        raise TypeError(f"sums: expected {weight_dtype(x.dtype)} for x in {x.dtype}, got {sums.dtype}")
    trained = [weight for weight in (first, second) if isinstance(weight, Tensor)]
    trained += [tensor for adapter in adapters for tensor in adapter[:2]]
    if needs_autograd(sums, x, *biases, topk_weights, *trained):
        raise ValueError("moe_accumulate: expected no tensor that needs a gradient, or torch.no_grad()")
    layer = (*_parts_of(_taken(first, x.dtype)), *_parts_of(_taken(second, x.dtype)))
    ops.moe_accumulate(x, *layer, *_biases_like(x, biases), topk_ids, topk_weights, *options, sums, *adapters)


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
        one, other = (weight.adapter(x.dtype) if isinstance(weight, AdaptedWeight) else () for weight in weights)
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
    check_selected("gate_up_proj", first, "gate_up_bias", biases[0])
    check_selected("down_proj", second, "down_bias", biases[1])
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
