# SPDX-License-Identifier: BSD-3-Clause
"""Attention over a cache of keys and values, norms, and rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from switchgear.ops.native import Kernels, host
from switchgear.ops.registration import dense, matrix, register, rows
from switchgear.reference import attention

__all__ = [
    "attend", "attend_on_host", "attention_block_on_host", "decoder_layers_on_host", "rms_norm", "rms_norm_on_host",
    "rotate_heads", "rotate_heads_on_host",
]  # fmt: skip


def _allocate(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    batch, num_tokens, heads = matrix("q", q, 4).shape[:3]
    return q.new_empty(batch, num_tokens, heads, matrix("values", values, 4).shape[3])


def _flops(q: Sequence[int], keys: Sequence[int], values: Sequence[int], *others: Any, **_: Any) -> int:
    """As if each row saw all positions that are filled."""
    length: int = others[2]
    return 2 * q[0] * q[1] * q[2] * length * (q[3] + values[3])


def _pass(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, sinks: Tensor | None, *options: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (rows(q), rows(keys), rows(values), dense(starts), dense(sinks)), options


attend: Callable[..., Tensor] = register(
    "attend(Tensor q, Tensor keys, Tensor values, Tensor? starts, Tensor? sinks, int length, float scale, "
    "int window) -> Tensor",
    _allocate,
    _pass,
    specified_in=attention,
    flops=_flops,
)


def attend_on_host(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    length: int,
    scale: float,
    window: int,
) -> Tensor:
    """attend for tensors that need no dispatch."""
    batch, num_tokens, heads, _ = q.shape
    out = torch.empty((batch, num_tokens, heads, values.shape[3]), dtype=q.dtype)
    inputs = (rows(q), rows(keys), rows(values), dense(starts), dense(sinks))
    host.module.attend(inputs, (length, scale, window), (out,), host.execution())
    return out


# ---- rms_norm --------------------------------------------------------------------------------------------------------


def _allocate_norm(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(matrix("x", x), memory_format=torch.contiguous_format)
    return y, x.new_empty(0, x.shape[1]) if residual is None else torch.empty_like(y)


def _norm(kernels: Kernels, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = _allocate_norm(x, residual)
    inputs, outputs = (rows(x), rows(residual), dense(weight)), (y, None if residual is None else total)
    kernels.module.rms_norm(inputs, (eps,), outputs, kernels.execution())
    return y, total


rms_norm: Callable[..., tuple[Tensor, Tensor]] = register(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)",
    _allocate_norm,
    run=_norm,
    specified_in=attention,
)
rms_norm_on_host = partial(_norm, host)
"""rms_norm for tensors that need no dispatch."""


# ---- rotate_heads ----------------------------------------------------------------------------------------------------


def _allocate_heads(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (
        t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]) for t in (matrix("k", k, 4), matrix("v", v, 4))
    )
    return torch.empty_like(matrix("q", q, 4), memory_format=torch.contiguous_format), keys, values


def _rotate_heads(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if into is None:
        outputs = _allocate_heads(q, k, v)
    else:
        outputs = torch.empty_like(q, memory_format=torch.contiguous_format), *into
    inputs = (rows(q), rows(k), rows(v), rows(cos), rows(sin), dense(q_weight), dense(k_weight))
    rotated, keys, values = outputs
    passed = rotated, keys.transpose(1, 2), values.transpose(1, 2)
    kernels.module.rotate_heads(inputs, (eps, interleaved), passed, kernels.execution())
    return outputs


rotate_heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = register(
    "rotate_heads(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, "
    "float eps, bool interleaved) -> (Tensor q_out, Tensor keys, Tensor values)",
    _allocate_heads,
    run=_rotate_heads,
    specified_in=attention,
)
rotate_heads_on_host = partial(_rotate_heads, host)
"""rotate_heads for tensors that need no dispatch; `into`, keys and values, may be parts of a cache."""


# ---- attention_block -------------------------------------------------------------------------------------------------


def attention_block_on_host(
    inputs: tuple[Any, ...], options: tuple[Any, ...], keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """The attention of a decoder layer, from the norm before it to that after it: (the latter's rows [B·T,H], their sum
    with x). It is the ops above with their bits, for tensors that need no dispatch. inputs and options are those of
    AttentionBlockArgs in ops.h; keys and values are the cache's memory, which the new tokens are written to."""
    x, input_norm, output_norm, *projections, q_norm, k_norm, cos, sin, starts, sinks = inputs
    inputs = (
        x, dense(input_norm), dense(output_norm), *projections, dense(q_norm), dense(k_norm), rows(cos), rows(sin),
        starts, sinks,
    )  # fmt: skip
    y = x.new_empty(x.shape[0] * x.shape[1], x.shape[2])
    total = torch.empty_like(y)
    host.module.attention_block(inputs, options, (keys, values, y, total), host.execution())
    return y, total


def decoder_layers_on_host(
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    starts: Tensor | None,
    layers: Sequence[tuple[tuple[Any, ...], Tensor | None, tuple[Any, ...]]],
    options: tuple[tuple[Any, ...], ...],
    memory: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """For each layer, attention_block_on_host, gate_route and moe on its rows, and the sum of both, with their bits:
    [B,T,H], the x of the next.

    angles (cos, sin), starts: inputs of attention_block. layers: (the other inputs but x and the cache, in their order
    and in layouts that the kernels take; sinks; (weight, bias, selection_bias) of the router, and the fields of Layer
    with None for the choices). options: those of attention_block, and those of `route` with top_k and whether weights
    are rounded. memory: keys and values."""
    cos, sin = rows(angles[0]), rows(angles[1])
    inputs, outputs, results = [], [], []
    for (weights, sinks, block), keeping in zip(layers, memory, strict=True):
        inputs.append((x, *weights, cos, sin, starts, sinks, *block))
        x = torch.empty_like(x)
        outputs.append((*keeping, x))
        results.append(x)
    host.module.decoder_layers(tuple(inputs), options, tuple(outputs), host.execution())
    return results
