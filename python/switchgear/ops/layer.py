# SPDX-License-Identifier: BSD-3-Clause
"""The whole layer in one op: moe_forward, moe_accumulate, moe_backward, and a call that bypasses torch's dispatcher.

The schemas list the fields of Layer; an op collects its arguments into one, which all that is beneath takes as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from switchgear import backends
from switchgear.ops.native import Kernels, host
from switchgear.ops.registration import matrix, register, rows, usable
from switchgear.reference.layer import NUM_REQUIRED, GluOptions, Layer

__all__ = [
    "GRADIENTS", "GluOptions", "Layer", "differentiable", "layer_accumulate", "layer_backward",
    "layer_backward_to_sums", "layer_forward", "moe_accumulate", "moe_backward", "moe_backward_on_host", "moe_forward",
    "moe_forward_on_host", "needs_no_dispatch", "plain_layer_on_host",
]  # fmt: skip

_TYPES = {
    Sequence[Tensor]: "Tensor[]",
    Sequence[int]: "int[]",
    Sequence[float]: "float[]",
    Sequence[Tensor] | None: "Tensor[]?",
    Tensor | None: "Tensor?",
    Tensor: "Tensor",
}
_DEFAULTS = {None: "=None", (): "=[]"}


def _in_schema(name: str) -> str:
    hint, defaults = get_type_hints(Layer)[name], Layer._field_defaults
    return f"{_TYPES.get(hint) or hint.__name__} {name}{_DEFAULTS[defaults[name]] if name in defaults else ''}"


_LAYER = ", ".join(map(_in_schema, Layer._fields[:NUM_REQUIRED]))
_OPTIONAL = ", ".join(map(_in_schema, Layer._fields[NUM_REQUIRED:]))
_ADAPTERS = ", ".join(map(_in_schema, Layer._fields[NUM_REQUIRED : NUM_REQUIRED + 2]))


def _layer_in(args: Sequence[Any], first: int) -> Layer:
    """The layer among an op's arguments: its required fields from `first` on, an argument of the op, optional ones."""
    end = first + NUM_REQUIRED
    tensors, form, down_tensors, down_form, *others = args[first:end]
    optional = args[end + 1 : end + 1 + len(Layer._field_defaults)]
    return Layer(tensors, form or (), down_tensors, down_form or (), *others, *optional)  # AOTInductor passes None


def _for_kernels(layer: tuple[Any, ...]) -> tuple[Any, ...]:
    """The fields of a layer with tensors in layouts that kernels take."""
    (
        gate_up_proj, gate_up_form, down_proj, down_form, gate_up_bias, down_bias, topk_ids, topk_weights,
        activation, gated, interleaved, alpha, limit, gate_up_adapter, down_adapter, dropout_seed, dropout,
    ) = layer  # fmt: skip
    return (
        gate_up_proj, gate_up_form, down_proj, down_form,
        gate_up_bias if gate_up_bias is None else rows(gate_up_bias),
        down_bias if down_bias is None else rows(down_bias),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        activation, gated, interleaved, alpha, limit,
        usable(gate_up_adapter) if gate_up_adapter else (),
        usable(down_adapter) if down_adapter else (),
        dropout_seed,
        dropout,
    )  # fmt: skip


# ---- floating-point operations, from shapes --------------------------------------------------------------------------
# A formula counts each of T·K choices, empty ones too. A multiply-add is two operations. The first projection takes
# 2·T·K·N·H, the second 2·T·K·H·I; an adapter of rank r adds 2·T·K·r to each of its matrices' columns and rows.


def _products(x: Sequence[int], layer: Any) -> tuple[int, int]:
    """Operations of the first and of the second projection."""
    width = layer.gate_up_form[1] if layer.gate_up_form else layer.gate_up_proj[0][1]  # stored bytes do not show it
    per_column = 2 * prod(layer.topk_ids) * x[1]
    return per_column * width, per_column * (width // 2 if layer.gated else width)


def _low_rank_products(layer: Any) -> int:
    """Operations of a [E,r,C] and b [E,N,r]."""
    shapes = (shape for adapter in layer[NUM_REQUIRED : NUM_REQUIRED + 2] for shape in (adapter or ())[:2])
    return sum(2 * prod(layer.topk_ids) * prod(shape[1:]) for shape in shapes)


def _forward_flops(x: Sequence[int], *args: Any, **_: Any) -> int:
    layer = _layer_in(args, 0)
    return sum(_products(x, layer)) + _low_rank_products(layer)


def _backward_flops(grad_y: Any, x: Sequence[int], h: Any, *args: Any, **_: Any) -> int:
    """A product's gradients are a product each: of its input, and of its weight if it trains."""
    layer, needs, experts = _layer_in(args, 0), args[NUM_REQUIRED], args[18] if len(args) > 18 else None
    first, second = _products(x, layer)
    of_inputs = second + (first if needs[0] else 0)
    of_weights = (first if needs[1] else 0) + (second if needs[2] else 0)
    if experts is not None:  # as if all experts had as many rows
        of_weights = of_weights * experts[0] // layer.gate_up_proj[0][0]
    return of_inputs + of_weights + 2 * _low_rank_products(layer)


# ---- moe_forward -----------------------------------------------------------------------------------------------------


def _allocate_forward(x: Tensor, layer: Layer, save_h: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(matrix("x", x), memory_format=torch.contiguous_format)
    form = layer.gate_up_form
    width = form[1] if form else matrix("gate_up_proj", layer.gate_up_proj[0], 3).shape[1]
    return y, x.new_empty(matrix("topk_ids", layer.topk_ids).numel() if save_h else 0, width)


def _forward(kernels: Kernels, x: Tensor, layer: Layer, save_h: bool) -> tuple[Tensor, Tensor]:
    y, h = _allocate_forward(x, layer, save_h)
    kernels.module.moe_forward((rows(x),), _for_kernels(layer), (y, h if save_h else None), kernels.execution())
    return y, h


moe_forward: Callable[..., tuple[Tensor, Tensor]] = register(
    f"moe_forward(Tensor x, {_LAYER}, bool save_h, {_OPTIONAL}) -> (Tensor y, Tensor h)",
    _allocate_forward,
    run=_forward,
    collect=lambda args: (args[0], _layer_in(args, 1), args[1 + NUM_REQUIRED]),
    flops=_forward_flops,
)


def layer_forward(x: Tensor, layer: Layer, save_h: bool, is_direct: bool = False) -> tuple[Tensor, Tensor]:
    """The op moe_forward. is_direct: the tensors need no dispatch."""
    if is_direct:
        return _forward(host, x, layer, save_h)
    return moe_forward(x, *layer[:NUM_REQUIRED], save_h, *layer[NUM_REQUIRED:])


# Torch's dispatcher costs more per call than the kernel's binding: 5 µs, and many times that if the caches were
# evicted since the last call, as in decoding. So the layer bypasses it if it would only pass the call on.
_Parameter = nn.Parameter
_dispatch_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing
_is_compiling = torch.compiler.is_compiling
_is_profiling: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def needs_no_dispatch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are plain tensors for the CPU's kernels, and no tracer, profiler or dispatch mode is active. The
    native call checks that `others` are on x's device."""
    if _is_compiling() or _dispatch_modes() or _is_tracing() or _is_profiling() or not x.is_cpu:
        return False
    for tensor in (x, *others):
        # The dispatcher resolves negated views. A parameter, which owns its memory, is none.
        if tensor is not None and (kind := type(tensor)) is not _Parameter and (kind is not Tensor or tensor.is_neg()):
            return False
    return backends.runs_natively(x.dtype)


def moe_forward_on_host(x: Tensor, layer: tuple[Any, ...]) -> Tensor:
    """y of moe_forward, for tensors that need no dispatch. layer: the fields of Layer."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    host.module.moe_forward((rows(x),), _for_kernels(layer), (y, None), host.execution())
    return y


def plain_layer_on_host(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    options: tuple[Any, ...],
) -> Tensor:
    """moe_forward_on_host with plain projections, without a microsecond for collecting them."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    layer = (
        gate_up_proj, (), down_proj, (), rows(gate_up_bias), rows(down_bias), topk_ids.contiguous(),
        topk_weights.contiguous(), *options, None, None, None, (),
    )  # fmt: skip
    host.module.moe_forward((rows(x),), layer, (y, None), host.execution())
    return y


# ---- moe_accumulate --------------------------------------------------------------------------------------------------


def _accumulate(kernels: Kernels, x: Tensor, layer: Layer, sums: Tensor) -> None:
    kernels.module.moe_accumulate((rows(x),), _for_kernels(layer), (sums, None), kernels.execution())


moe_accumulate: Callable[..., None] = register(
    f"moe_accumulate(Tensor x, {_LAYER}, Tensor(a!) sums, {_ADAPTERS}) -> ()",
    lambda *_: None,  # it changes sums
    run=_accumulate,
    collect=lambda args: (args[0], _layer_in(args, 1), args[1 + NUM_REQUIRED]),
    flops=_forward_flops,
)


def layer_accumulate(x: Tensor, layer: Layer, sums: Tensor, h: Tensor | None = None) -> None:
    """The op moe_accumulate, which takes no dropout. With h [S,N], for training: it is written, and dropout is taken;
    the reference rounds what it adds to `sums`."""
    if h is None:
        moe_accumulate(x, *layer[:NUM_REQUIRED], sums, layer.gate_up_adapter, layer.down_adapter)
    elif x.is_cpu and backends.runs_natively(x.dtype):
        host.module.moe_accumulate((rows(x),), _for_kernels(layer), (sums, h), host.execution())
    else:
        y, own = layer_forward(x, layer, True)
        sums += y
        h.copy_(own)


# ---- moe_backward ----------------------------------------------------------------------------------------------------

GRADIENTS = (
    "x", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias", "topk_weights",
    "gate_up_a", "gate_up_b", "down_a", "down_b",
)  # fmt: skip
"""The outputs of moe_backward are the gradients of these, in this order."""


def differentiable(x: Tensor, layer: Layer) -> tuple[Tensor | None, ...]:
    """The tensors of which GRADIENTS are the gradients; None for absent ones."""
    first, second = layer.gate_up_adapter or (None, None), layer.down_adapter or (None, None)
    weights = layer.gate_up_proj[0], layer.down_proj[0], layer.gate_up_bias, layer.down_bias
    return x, *weights, layer.topk_weights, first[0], first[1], second[0], second[1]


def _allocate_needed(
    x: Tensor,
    layer: Layer,
    needs: Sequence[bool],
    experts: Tensor | None,
    empty_weight: Callable[[Tensor], Tensor] = torch.empty_like,
) -> list[Tensor | None]:
    """The needed gradients, None for others. Those of weights have the strides of the weights, so that an optimizer
    sees one layout. With a list of experts they are those of these experts only."""
    count = None if experts is None else matrix("experts", experts, 1).shape[0]  # at most E
    grads: list[Tensor | None] = [None] * len(GRADIENTS)
    for index, (tensor, need) in enumerate(zip(differentiable(x, layer), needs, strict=False)):
        if tensor is None or not need:
            continue
        name, grad = GRADIENTS[index], None
        if count is not None and name.endswith(("_proj", "_bias")):
            tensor = tensor[:count]
        if name.endswith(("_proj", "_a", "_b")):
            grad = empty_weight(tensor)
            if grad.stride(-1) != 1 and grad.stride(-2) != 1:
                grad = None  # the weight overlaps itself, so its strides are not usable
        grads[index] = torch.empty_like(tensor, memory_format=torch.contiguous_format) if grad is None else grad
    return grads


def _fill_absent(x: Tensor, layer: Layer, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The outputs of the op: tensors without elements in place of gradients that are not needed."""
    pairs = zip(grads, differentiable(x, layer), strict=True)
    return tuple([x.new_empty(0, dtype=(x if t is None else t).dtype) if grad is None else grad for grad, t in pairs])


def _backward(
    kernels: Kernels,
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    layer: Layer,
    needs: Sequence[bool],
    experts: Tensor | None,
    sums: Tensor | None = None,
) -> list[Tensor | None]:
    if sums is not None:
        needs = False, *needs[1:]
    grads = _allocate_needed(x, layer, needs, experts, kernels.empty_weight)
    inputs = (rows(grad_y), rows(x), rows(h), None if experts is None else experts.contiguous())
    outputs = (grads[0] if sums is None else sums, *grads[1:], False, sums is not None)
    kernels.module.moe_backward(inputs, _for_kernels(layer), outputs, kernels.execution())
    return grads


moe_backward: Callable[..., tuple[Tensor, ...]] = register(
    f"moe_backward(Tensor grad_y, Tensor x, Tensor h, {_LAYER}, bool[] needs, {_OPTIONAL}, Tensor? experts=None) "
    f"-> ({', '.join(f'Tensor grad_{name}' for name in GRADIENTS)})",
    lambda grad_y, x, h, layer, *others: _fill_absent(x, layer, _allocate_needed(x, layer, *others)),
    run=lambda kernels, *args: _fill_absent(args[1], args[3], _backward(kernels, *args)),
    collect=lambda args: (*args[:3], _layer_in(args, 3), args[3 + NUM_REQUIRED], args[-1]),
    flops=_backward_flops,
)


def layer_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    layer: Layer,
    needs: Sequence[bool],
    experts: Tensor | None = None,
    is_direct: bool = False,
) -> Sequence[Tensor | None]:
    """The op moe_backward. is_direct: the tensors need no dispatch; gradients that are not needed are None then."""
    if is_direct:
        return _backward(host, grad_y, x, h, layer, needs, experts)
    return moe_backward(grad_y, x, h, *layer[:NUM_REQUIRED], needs, *layer[NUM_REQUIRED:], experts)


def layer_backward_to_sums(
    sums: Tensor | None, grad_y: Tensor, x: Tensor, h: Tensor, layer: Layer, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """layer_backward on the host that adds the gradient of x to sums [T,H], if there are any, in the order of
    moe_accumulate. The reference rounds what it adds."""
    if backends.runs_natively(x.dtype):
        return _backward(host, grad_y, x, h, layer, (False, *needs[1:]), None, sums)
    grads = layer_backward(grad_y, x, h, layer, (sums is not None, *needs[1:]))
    if sums is not None:
        assert grads[0] is not None
        sums += grads[0]
    return grads


def moe_backward_on_host(
    weight_gradients: tuple[Tensor | None, Tensor | None],
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    layer: Layer,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of moe_backward, for plain projections without adapters that need no dispatch. Those of the
    projections are added to `weight_gradients`, which have the strides of the projections, and are None here; None,
    too, for one that is not needed."""
    grads = _allocate_needed(x, layer, (needs[0], False, False, *needs[3:6]), None)
    outputs = (grads[0], *weight_gradients, *grads[3:], True, False)
    host.module.moe_backward((rows(grad_y), rows(x), h, None), _for_kernels(layer), outputs, host.execution())
    return grads
