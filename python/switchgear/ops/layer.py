# SPDX-License-Identifier: BSD-3-Clause
"""The whole layer in one op: moe_forward, moe_backward, and the way past torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchgear import backends
from switchgear.ops.native import Kernels, host
from switchgear.ops.registration import _matrix, _register, _rows

_LAYER = (
    "Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, Tensor topk_ids, "
    "Tensor topk_weights, str activation, bool gated, bool interleaved, float alpha, float limit"
)


def _allocate_moe_forward(
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
    y = torch.empty_like(_matrix("x", x), memory_format=torch.contiguous_format)
    if gate_up_proj.dim() == 4 and gate_up_proj.dtype is torch.uint8:  # in panels, which the kernel checks
        width = gate_up_proj.numel() // max(gate_up_proj.shape[0] * x.shape[1] * x.itemsize, 1)
    else:
        width = _matrix("gate_up_proj", gate_up_proj, 3).shape[1]
    return y, x.new_empty(_matrix("topk_ids", topk_ids).numel() if save_h else 0, width)


def _moe_forward(
    kernels: Kernels,
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
    options = (activation, gated, interleaved, alpha, limit)
    layer = (gate_up_proj, down_proj, gate_up_bias, down_bias, topk_ids, topk_weights)
    y, h = _allocate_moe_forward(x, *layer, *options, save_h)
    kernels.module.moe_forward(
        _rows(x), gate_up_proj, down_proj, _rows(gate_up_bias), _rows(down_bias),
        topk_ids.contiguous(), topk_weights.contiguous(), y, h if save_h else None, *options, kernels.execution(),
    )  # fmt: skip
    return y, h


moe_forward: Callable[..., tuple[Tensor, Tensor]] = _register(
    f"moe_forward(Tensor x, {_LAYER}, bool save_h) -> (Tensor y, Tensor h)",
    _moe_forward,
    _allocate_moe_forward,
)


# Torch's dispatcher costs a call more than its kernel's binding does: 5 µs, and many times that where a model has
# emptied the caches since the last call, as in decoding. So the layer goes past it, where it would only hand the call
# on.
_PLAIN = (Tensor, nn.Parameter)
_dispatch_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing
_is_profiling: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def needs_no_dispatch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are plain tensors for the CPU's kernels, and nobody traces, profiles or redirects their ops."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _is_tracing() or _is_profiling():
        return False
    for tensor in (x, *others):
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu):
            return False
    return backends.runs_natively(x.dtype)


def moe_forward_on_host(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *options: Any,
) -> Tensor:
    """y of moe_forward, for tensors that need no dispatch."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    host.module.moe_forward(
        _rows(x), gate_up_proj, down_proj, _rows(gate_up_bias), _rows(down_bias),
        topk_ids.contiguous(), topk_weights.contiguous(), y, None, *options, host.execution(),
    )  # fmt: skip
    return y


def _allocate_moe_backward(
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
) -> tuple[Tensor, ...]:
    """Gradients of weights have the strides of the weights, so that an optimizer sees one layout."""
    tensors = (x, gate_up_proj, down_proj, gate_up_bias, down_bias, topk_weights)
    weights = (False, True, True, False, False, False)
    return tuple(
        x.new_empty(0, dtype=x.dtype if tensor is None else tensor.dtype)
        if tensor is None or not need
        else torch.empty_like(tensor, memory_format=torch.preserve_format if is_weight else torch.contiguous_format)
        for tensor, need, is_weight in zip(tensors, needs, weights, strict=True)
    )


def _moe_backward(
    kernels: Kernels,
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
) -> tuple[Tensor, ...]:
    options = (activation, gated, interleaved, alpha, limit)
    layer = (gate_up_proj, down_proj, gate_up_bias, down_bias, topk_ids, topk_weights)
    small = (needs[0], False, False, *needs[3:])
    grad_x, _, _, *rest = _allocate_moe_backward(grad_y, x, h, *layer, *options, small)
    projections = (
        kernels.empty_weight(weight) if need else x.new_empty(0)
        for weight, need in zip((gate_up_proj, down_proj), needs[1:3], strict=True)
    )
    grads = (grad_x, *projections, *rest)
    present = (True, True, True, gate_up_bias is not None, down_bias is not None, True)
    outputs: Any = (grad if need and there else None for grad, need, there in zip(grads, needs, present, strict=True))
    kernels.module.moe_backward(
        _rows(grad_y), _rows(x), _rows(h), gate_up_proj, down_proj,
        _rows(gate_up_bias), _rows(down_bias), topk_ids.contiguous(), topk_weights.contiguous(),
        *outputs, *options, kernels.execution(),
    )  # fmt: skip
    return grads


moe_backward: Callable[..., tuple[Tensor, ...]] = _register(
    f"moe_backward(Tensor grad_y, Tensor x, Tensor h, {_LAYER}, bool[] needs) -> (Tensor grad_x, "
    "Tensor grad_gate_up_proj, Tensor grad_down_proj, Tensor grad_gate_up_bias, Tensor grad_down_bias, "
    "Tensor grad_topk_weights)",
    _moe_backward,
    _allocate_moe_backward,
)
