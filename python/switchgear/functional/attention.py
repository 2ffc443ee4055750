# SPDX-License-Identifier: BSD-3-Clause
"""What decoder layers have beside products: attention over a cache, norms, and rotary embeddings.

Each is one call of a kernel in forward, and autograd of its definition in backward (reference/attention.py). A token's
bits depend on its sequence and its place there, not on its batch, its padding, the tokens beside it in a call, or the
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchgear import ops
from switchgear.arrays import accepts_arrays
from switchgear.functional.arguments import as_dtype, as_ids, as_number, flat
from switchgear.functional.gradients import apply, needs_autograd, once
from switchgear.reference import attention


@accepts_arrays
def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    length: int | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of T new tokens over a cache, whose last T filled positions are theirs: [B,T,N,V].

    Args:
        q: [B,T,N,D].
        keys: [B,J,C,D]; J divides N, and heads n·N/J to (n+1)·N/J - 1 of q use head n of the cache.
        values: [B,J,C,V].
        scale: of scores; by default 1/√D.
        length: the positions that are filled, T to C; all by default. Others are not read.
        window: a token sees its own position and the window - 1 before it; by default all.
        starts: [B] int32 or int64, the position of each sequence's first token, 0 by default. Negative: the cache has
            dropped so many positions. Tokens before it see nothing, and their rows are zero.
        sinks: [N], the score of a position without a value (gpt-oss), of any floating dtype.

    Float tensors have the same dtype. Sums are float32. Differentiable in q, keys, values and sinks.

    Raises:
        ValueError: a wrong shape, or an option out of range. TypeError: a wrong dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else as_number("scale", scale)
    length = keys.shape[-2] if length is None else length
    starts = None if starts is None else as_ids("starts", starts)
    sinks = as_dtype("sinks", sinks, torch.float32)
    inputs = q, keys, values, starts, sinks
    options = length, scale, 0 if window is None else window
    if needs_autograd(*inputs):
        out: Tensor = apply(Defined, attention.attend, ops.attend, len(inputs), *inputs, *options)
        return out
    op = ops.attend_on_host if ops.needs_no_dispatch(*inputs) else ops.attend
    return op(*inputs, *options)


@accepts_arrays
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None) -> Any:
    """x · weight / √(mean(x²) + eps) over the last dimension, in float32, rounded once.

    Args:
        x: [...,H].
        weight: [H] in the dtype of x or in float32.
        residual: as x, added to it first. Then returns (the norm of the sum, the sum).

    Differentiable in all tensors. Raises ValueError or TypeError for a wrong shape or dtype.
    """
    inputs = flat("x", x), None if residual is None else flat("residual", residual), weight
    eps = as_number("eps", eps)
    if needs_autograd(*inputs):
        y, total = apply(Defined, attention.rms_norm, ops.rms_norm, len(inputs), *inputs, eps)
    else:
        op = ops.rms_norm_on_host if ops.needs_no_dispatch(*inputs) else ops.rms_norm
        y, total = op(*inputs, eps)
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))


@accepts_arrays
def rotate_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of new tokens as `attend` takes them: q [B,T,N,D], keys [B,J,T,D], values [B,J,T,V].

    Args:
        q, k, v: [B,T,N,D], [B,T,J,D] and [B,T,J,V].
        cos, sin: [B,T,R], or [1,T,R] for all sequences, in the dtype of q or float32: elements i and i + R of each head
            turn by angle i < R; the others stay. By default none.
        q_weight, k_weight: [D] to normalise each head first, as `rms_norm`; [N·D] and [J·D] for all of a token's at
            once.
        interleaved: elements 2·i and 2·i + 1 turn instead.
        into: part of a cache [B,J,T,D] and [B,J,T,V], which keys and values are written to and which are then returned.
            Without gradients only.

    Differentiable in all tensors. Raises ValueError or TypeError for a wrong shape or dtype.
    """
    inputs = q, k, v, cos, sin, q_weight, k_weight
    eps = as_number("eps", eps)
    if needs_autograd(*inputs):
        if into is not None:
            raise ValueError("into: expected none where a gradient is needed")
        out: tuple[Tensor, Tensor, Tensor] = apply(
            Defined, attention.rotate_heads, ops.rotate_heads, len(inputs), *inputs, eps, interleaved
        )
        return out
    if ops.needs_no_dispatch(*inputs, *(into or ())):
        return ops.rotate_heads_on_host(*inputs, eps, interleaved, into)
    rotated, keys, values = ops.rotate_heads(*inputs, eps, interleaved)
    if into is None:
        return rotated, keys, values
    return rotated, into[0].copy_(keys), into[1].copy_(values)


class Defined(torch.autograd.Function):
    """An op in forward; in backward, the gradients of its definition. Inputs: the definition, the op, the number of
    tensors, these and the other arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(definition: Callable[..., Any], op: Callable[..., Any], count: int, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.definition, _, count, *args = inputs
        ctx.options = args[count:]
        ctx.save_for_backward(*args[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs, saved = ctx.needs_input_grad[3:], ctx.saved_tensors  # which a checkpoint gives once

        def differentiate(*tensors: Any) -> Any:
            inputs, incoming = tensors[: -len(grads)], tensors[-len(grads) :]
            leaves = [
                None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=False)
            ]
            with torch.enable_grad():
                outputs = ctx.definition(*leaves, *ctx.options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            used = [(out, grad) for out, grad in zip(outputs, incoming, strict=True) if out.requires_grad]
            asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            return torch.autograd.grad(
                [out for out, _ in used], asked, [grad for _, grad in used], materialize_grads=True
            )

        found = iter(once(differentiate, *saved, *grads))
        given = [next(found) if need else None for need in needs[: len(saved)]]
        return None, None, None, *given, *(None for _ in ctx.options)
