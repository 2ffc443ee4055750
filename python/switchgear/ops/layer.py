# SPDX-License-Identifier: BSD-3-Clause
"""The whole layer in one op: moe_forward, moe_accumulate, moe_backward, and a call that bypasses torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchgear import backends
from switchgear.ops import flops
from switchgear.ops.native import Kernels, host
from switchgear.ops.registration import matrix, register, rows, usable

_LAYER = (
    "Tensor[] gate_up_proj, int[] gate_up_form, Tensor[] down_proj, int[] down_form, Tensor? gate_up_bias, "
    "Tensor? down_bias, Tensor topk_ids, Tensor topk_weights, "
    "str activation, bool gated, bool interleaved, float alpha, float limit"
)
_ADAPTERS = "Tensor[]? gate_up_adapter=None, Tensor[]? down_adapter=None, Tensor? dropout_seed=None, float[] dropout=[]"
_SAVE_H, _SUMS, _NEEDS = 14, 14, 16  # places among the arguments of moe_forward, moe_accumulate and moe_backward


# ---- moe_forward -----------------------------------------------------------------------------------------------------


def _allocate_moe_forward(
    x: Tensor, gate_up_proj: Sequence[Tensor], gate_up_form: Sequence[int], *others: Any
) -> tuple[Tensor, Tensor]:
    topk_ids, save_h = others[4], others[_SAVE_H - 3]
    y = torch.empty_like(matrix("x", x), memory_format=torch.contiguous_format)
    width = gate_up_form[1] if gate_up_form else matrix("gate_up_proj", gate_up_proj[0], 3).shape[1]
    return y, x.new_empty(matrix("topk_ids", topk_ids).numel() if save_h else 0, width)


def _moe_forward_writes(kernels: Kernels, *args: Any) -> tuple[Any, Any]:
    y, h = _allocate_moe_forward(*args)
    return (y, h), (y, h if args[_SAVE_H] else None)


moe_forward: Callable[..., tuple[Tensor, Tensor]] = register(
    f"moe_forward(Tensor x, {_LAYER}, bool save_h, {_ADAPTERS}) -> (Tensor y, Tensor h)",
    "rwfwfrrddooooo-aann",
    _allocate_moe_forward,
    written=_moe_forward_writes,
    flops=flops.moe_forward,
)


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


def moe_forward_on_host(
    x: Tensor,
    gate_up_proj: Tensor | Sequence[Tensor],
    gate_up_form: Sequence[int],
    down_proj: Tensor | Sequence[Tensor],
    down_form: Sequence[int],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    *adapters: Any,
) -> Tensor:
    """y of moe_forward, for tensors that need no dispatch. A plain projection can be passed as a tensor. adapters: the
    op's last arguments, if there are any."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if adapters:
        adapters = (usable(adapters[0]), usable(adapters[1]), *adapters[2:])
    host.module.moe_forward(
        rows(x), gate_up_proj, gate_up_form, down_proj, down_form, rows(gate_up_bias), rows(down_bias),
        topk_ids.contiguous(), topk_weights.contiguous(), y, None, activation, gated, interleaved, alpha, limit,
        host.execution(), *adapters,
    )  # fmt: skip
    return y


# ---- moe_accumulate --------------------------------------------------------------------------------------------------


def _nothing(*args: Any) -> None:
    """Without outputs: moe_accumulate changes `sums`."""


def _moe_accumulate_writes(kernels: Kernels, *args: Any) -> tuple[None, tuple[Tensor]]:
    return None, (args[_SUMS],)


moe_accumulate: Callable[..., None] = register(
    f"moe_accumulate(Tensor x, {_LAYER}, Tensor(a!) sums, Tensor[]? gate_up_adapter=None, Tensor[]? down_adapter=None) "
    "-> ()",
    "rwfwfrrddooooo-aa",
    _nothing,
    written=_moe_accumulate_writes,
    flops=flops.moe_forward,
)


# ---- moe_backward ----------------------------------------------------------------------------------------------------


def _trained(args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """The arguments for which moe_backward computes gradients."""
    _, x, _, gate_up_proj, _, down_proj, _, gate_up_bias, down_bias, _, topk_weights = args[:11]
    adapters = (tensor for adapter in args[_NEEDS + 1 : _NEEDS + 3] for tensor in (*(adapter or ()), None, None)[:2])
    return x, gate_up_proj[0], down_proj[0], gate_up_bias, down_bias, topk_weights, *adapters


def _needs(args: Sequence[Any]) -> tuple[bool, ...]:
    needs = args[_NEEDS]
    return (*needs, *[False] * (10 - len(needs)))


def _allocate_moe_backward(*args: Any) -> tuple[Tensor, ...]:
    return _gradients(torch.empty_like, args)


def _gradients(empty_weight: Callable[[Tensor], Tensor], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Gradients of weights have the strides of the weights, so that an optimizer sees one layout. With a list of
    experts they are those of these experts only."""
    x, experts = args[1], args[_NEEDS + 5]
    count = None if experts is None else matrix("experts", experts, 1).shape[0]  # at most E

    def gradient(index: int, tensor: Tensor | None, need: bool) -> Tensor:
        if tensor is None or not need:
            absent: Tensor = x.new_empty(0, dtype=x.dtype if tensor is None else tensor.dtype)
            return absent
        if count is not None and 0 < index < 5:
            tensor = tensor[:count]
        if index in (1, 2) or index > 5:
            grad = empty_weight(tensor)
            if grad.stride(-1) == 1 or grad.stride(-2) == 1:
                return grad  # otherwise the weight overlaps itself, so its strides are not usable
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    trained = _trained(args)
    return tuple(gradient(index, *pair) for index, pair in enumerate(zip(trained, _needs(args), strict=True)))


def _moe_backward_writes(kernels: Kernels, *args: Any) -> tuple[Any, Any]:
    grads = _gradients(kernels.empty_weight, args)
    pairs = zip(grads, _needs(args), _trained(args), strict=True)
    return grads, tuple(grad if need and tensor is not None else None for grad, need, tensor in pairs)


moe_backward: Callable[..., tuple[Tensor, ...]] = register(
    f"moe_backward(Tensor grad_y, Tensor x, Tensor h, {_LAYER}, bool[] needs, {_ADAPTERS}, Tensor? experts=None) "
    "-> (Tensor grad_x, Tensor grad_gate_up_proj, Tensor grad_down_proj, Tensor grad_gate_up_bias, "
    "Tensor grad_down_bias, Tensor grad_topk_weights, Tensor grad_gate_up_a, Tensor grad_gate_up_b, "
    "Tensor grad_down_a, Tensor grad_down_b)",
    "rrrwfwfrrddooooo-aannd",
    _allocate_moe_backward,
    written=_moe_backward_writes,
    early=6,
    flops=flops.moe_backward,
)


def moe_backward_on_host(
    weight_gradients: tuple[Tensor | None, Tensor | None],
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *options: Any,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of moe_backward without those of the projections, for plain tensors that need no dispatch. These
    are added to `weight_gradients`, which have the strides of the projections; None for one that is not needed."""

    def gradient(tensor: Tensor | None, need: bool) -> Tensor | None:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if need and tensor is not None else None

    need_x, _, _, *need_biases, need_weights = needs
    grad_x = gradient(x, need_x)
    grad_biases = map(gradient, (gate_up_bias, down_bias), need_biases)
    others = *grad_biases, gradient(topk_weights, need_weights)
    host.module.moe_backward(
        rows(grad_y), rows(x), h, gate_up_proj, (), down_proj, (), rows(gate_up_bias), rows(down_bias),
        topk_ids.contiguous(), topk_weights.contiguous(), None, grad_x, *weight_gradients, *others, *options,
        host.execution(), None, None, None, None, None, None, None, None, True,
    )  # fmt: skip
    return grad_x, *others
