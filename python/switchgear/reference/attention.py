# SPDX-License-Identifier: BSD-3-Clause
"""Attention over a cache, norms and rotary embeddings in plain torch: the specification, which autograd differentiates,
and what devices without kernels run.

Letters: B sequences · T new tokens · N heads of q · J heads of the cache · C its capacity · D, V widths of a head.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from switchgear.checks import Range, checked
from switchgear.reference.checks import AnyFloats, Floats, Indices, Numbers, Rows, check_range, wide

__all__ = ["attend", "rms_norm", "rotate_heads"]

Positive = Annotated[float, Range(0, math.inf, "low high")]


@checked
def attend(
    q: Annotated[Tensor, Floats("B", "T", "N", "D")],
    keys: Annotated[Tensor, Floats("B", "J", "C", "D")],
    values: Annotated[Tensor, Floats("B", "J", "C", "V")],
    starts: Annotated[Tensor, Indices("B")] | None,
    sinks: Annotated[Tensor, Numbers(torch.float32, "N")] | None,
    length: Annotated[int, Range(0, 2**31 - 1)],
    scale: Positive,
    window: Annotated[int, Range(0, 2**31 - 1)],
) -> Tensor:
    """Causal attention of q over `length` positions of a cache, of which the last T are those of q: [B,T,N,V].

    Row t of sequence b is at p = length - T + t and sees the positions in [max(starts[b], p - window + 1), p]; window 0
    is none. `sinks` are scores of a position without a value. A row that sees nothing is zero.
    """
    num_tokens, heads, (cache_heads, capacity) = q.shape[1], q.shape[2], keys.shape[1:3]
    if heads % cache_heads:
        raise ValueError(f"keys: expected a number of heads that divides N={heads}, got {cache_heads}")
    if not num_tokens <= length <= capacity:
        raise ValueError(f"length: expected T={num_tokens} to C={capacity}, got {length}")
    position = torch.arange(length, device=q.device)
    own = position[length - num_tokens :, None]
    is_seen = position <= own
    if window:
        is_seen = is_seen & (position > own - window)
    is_seen = is_seen[None, None]  # [B,1,T,L]
    if starts is not None:
        if starts.device.type == "cpu":
            check_range("starts", starts, 1 - 2**31, length + 1)
        is_seen = is_seen & (position >= starts[:, None, None, None])
    group = heads // cache_heads
    k, v = (wide(t[:, :, :length]).repeat_interleave(group, 1) for t in (keys, values))
    scores = (wide(q).transpose(1, 2) @ k.mT * scale).masked_fill(~is_seen, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    sees_none = ~is_seen.any(-1, keepdim=True)
    weights = scores.masked_fill(sees_none, 0).softmax(-1)[..., :length].masked_fill(~is_seen, 0)
    v = v.masked_fill(~is_seen.any(2)[..., None], 0)  # what no row sees may be memory that nothing has written
    return (weights @ v).transpose(1, 2).contiguous().to(q.dtype)


@checked
def rms_norm(
    x: Rows, residual: Rows | None, weight: Annotated[Tensor, AnyFloats("H")], eps: Positive
) -> tuple[Tensor, Tensor]:
    """s · weight / √(mean(s²) + eps) of each row, and s: x + residual, rounded to their dtype. Without a residual, s is
    x, and the second result is empty."""
    total = x if residual is None else (wide(x) + wide(residual)).to(x.dtype)
    return _normalize(wide(total), weight, eps).to(x.dtype), x[:0].clone() if residual is None else total


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


Heads = Annotated[Tensor, Floats("B", "T", "J", "D")]
Angles = Annotated[Tensor, AnyFloats(None, "T", "R")]
Weights = Annotated[Tensor, AnyFloats(None)]


@checked
def rotate_heads(
    q: Annotated[Tensor, Floats("B", "T", "N", "D")],
    k: Annotated[Tensor, Floats("B", "T", "J", "D")],
    v: Annotated[Tensor, Floats("B", "T", "J", "V")],
    cos: Angles | None,
    sin: Angles | None,
    q_weight: Weights | None,
    k_weight: Weights | None,
    eps: Positive,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,T,N,D], keys [B,J,T,D] and values [B,J,T,V]: heads of q and k normalised by a weight, [D] for each head or
    [N·D] for all of a token's, and rotated by angles of [B,T,R] or [1,T,R]: elements i and i + R for i < R, or 2·i and
    2·i + 1 if interleaved."""
    rotated = []
    for name, heads, weight in (("q_weight", q, q_weight), ("k_weight", k, k_weight)):
        x = wide(heads)
        if weight is not None:
            depth, whole = heads.shape[-1], heads[0, 0].numel()
            if weight.shape[0] not in (depth, whole):
                raise ValueError(f"{name}: expected {depth} or {whole} elements, got {weight.shape[0]}")
            x = _normalize(x if weight.shape[0] == depth else x.flatten(2), weight, eps).view(heads.shape)
        rotated.append(_rotate(x, cos, sin, interleaved).to(heads.dtype))
    keys, values = (t.transpose(1, 2).contiguous() for t in (rotated[1], v))
    return rotated[0].contiguous(), keys, values


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    if (cos is None) != (sin is None):
        raise ValueError("sin: expected it with cos, and not alone")
    if cos is None or sin is None:
        return x
    if cos.shape[0] not in (1, x.shape[0]) or 2 * cos.shape[2] > x.shape[3]:
        raise ValueError(
            f"cos: expected 1 or {x.shape[0]} sequences, at most {x.shape[3] // 2} angles, got {list(cos.shape)}"
        )
    cos, sin, count = cos.to(x.dtype)[:, :, None], sin.to(x.dtype)[:, :, None], cos.shape[2]
    pairs, rest = torch.split(x, [2 * count, x.shape[3] - 2 * count], -1)
    first, second = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat((torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1), rest), -1)
