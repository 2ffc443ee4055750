# SPDX-License-Identifier: BSD-3-Clause
"""The activation between the projections in plain torch. The specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from switchgear.checks import Finite, NotNegative, OneOf, checked
from switchgear.reference.checks import Floats, wide

__all__ = ["ACTIVATIONS", "activate", "glu", "glu_backward", "halves"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai")
Activation = Annotated[str, OneOf(ACTIVATIONS)]
AnyActivation = Activation | Callable[..., Tensor]  # a function of gate and up, or of h, which no kernel contains
Hidden = Annotated[Tensor, Floats("S", "N")]


def activate(gate: Tensor, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if activation == "relu":
        return gate.relu(), (gate > 0).to(gate.dtype)
    if activation == "relu2":
        return gate.relu().square(), 2 * gate.relu()
    if activation == "gelu":
        cumulative = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
        return gate * cumulative, cumulative + gate * density
    if activation == "gelu_tanh":
        c, cubic = math.sqrt(2 / math.pi), 0.044715
        tanh = torch.tanh(c * (gate + cubic * gate.pow(3)))
        slope = 0.5 * gate * (1 - tanh.square()) * c * (1 + 3 * cubic * gate.square())
        return 0.5 * gate * (1 + tanh), 0.5 * (1 + tanh) + slope
    beta = alpha if activation == "swiglu_oai" else 1.0  # g · sigmoid(beta · g)
    sigmoid = torch.sigmoid(beta * gate)
    return gate * sigmoid, sigmoid * (1 + beta * gate * (1 - sigmoid))


def find_intermediate_size(name: str, width: int, activation: str, gated: bool) -> int:
    """I of N. Raises ValueError if there is none."""
    if activation == "swiglu_oai" and not gated:
        raise ValueError("activation: expected gated experts for swiglu_oai, got gated=False")
    if gated and width % 2:
        raise ValueError(f"{name}: expected an even N (gates and ups) for gated experts, got N={width}")
    return width // 2 if gated else width


def halves(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return h[:, 0::2], h[:, 1::2]
    middle = h.shape[1] // 2
    return h[:, :middle], h[:, middle:]


def split(h: Tensor, gated: bool, interleaved: bool, limit: float) -> tuple[Tensor, ...]:
    """(gate, up) of the rows h [S,2I], or (h,), within the limit."""
    if not gated:
        return (h.clamp(max=limit) if limit > 0 else h,)
    gate, up = halves(h, interleaved)
    return (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit > 0 else (gate, up)


def glu_of(h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float) -> Tensor:
    gate, *ups = split(h, gated, interleaved, limit)
    if not gated:
        return activate(gate, activation, alpha)[0]
    (up,) = ups
    if activation == "swiglu_oai":
        up = up + 1
    return activate(gate, activation, alpha)[0] * up


def glu_backward_of(
    grad_a: Tensor, h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float
) -> Tensor:
    """A clamp passes the gradient if the value is within the limits, ends included, whatever this torch's own does."""
    if not gated:
        gate = h.clamp(max=limit) if limit > 0 else h
        grad_h = grad_a * activate(gate, activation, alpha)[1]
        return grad_h.masked_fill(h > limit, 0) if limit > 0 else grad_h
    gate, up = raw_gate, raw_up = halves(h, interleaved)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        up = up + 1
    value, slope = activate(gate, activation, alpha)
    grad_gate, grad_up = grad_a * up * slope, grad_a * value
    if limit > 0:
        grad_gate = grad_gate.masked_fill(raw_gate > limit, 0)
        grad_up = grad_up.masked_fill(raw_up.abs() > limit, 0)
    if interleaved:
        return torch.stack((grad_gate, grad_up), -1).flatten(1)
    return torch.cat((grad_gate, grad_up), -1)


@checked
def glu(h: Hidden, activation: Activation, gated: bool, interleaved: bool, alpha: Finite, limit: NotNegative) -> Tensor:
    """a [S,I] of h [S,N]: act(gate) ⊙ up for gated experts, else act(h).

    limit > 0    gate = min(gate, limit) and up = clamp(up, -limit, limit) first
    swiglu_oai   gate · sigmoid(alpha · gate) ⊙ (up + 1), gpt-oss's gate (gated only)
    interleaved  gate = h[:, 0::2], up = h[:, 1::2]; otherwise gate = h[:, :I], up = h[:, I:]
    """
    find_intermediate_size("h", h.shape[1], activation, gated)
    return glu_of(wide(h), activation, gated, interleaved, alpha, limit).to(h.dtype).contiguous()


@checked
def glu_backward(
    grad_a: Annotated[Tensor, Floats("S", "I")],
    h: Hidden,
    activation: Activation,
    gated: bool,
    interleaved: bool,
    alpha: Finite,
    limit: NotNegative,
) -> Tensor:
    """grad_h [S,N] of grad_a [S,I]."""
    width = find_intermediate_size("h", h.shape[1], activation, gated)
    if grad_a.shape[1] != width:
        raise ValueError(f"grad_a: expected shape [{len(h)}, {width}], got {list(grad_a.shape)}")
    return glu_backward_of(wide(grad_a), wide(h), activation, gated, interleaved, alpha, limit).to(h.dtype)
