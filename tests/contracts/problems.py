# SPDX-License-Identifier: BSD-3-Clause
"""Random problems of a whole expert layer, many per call, with results and error bounds in float64.

A token's result depends only on its own row and its own experts, so problems of one width share a call: each owns some
tokens and some experts, and its missing choices are -1. The float64 formulas are written again here, slot by slot, so
that only torch's elementwise functions are shared with the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backends_in_use import ISAS
from switchgear.testing import GluOptions, Layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def counts(ci: int, full: int) -> pytest.MarkDecorator:
    """Runs a test with count=ci, and with count=full under `-m slow`."""
    return pytest.mark.parametrize(
        "count", [pytest.param(ci, id="ci"), pytest.param(full, id="full", marks=pytest.mark.slow)]
    )


# For tests of exact bits: torch's own bits, which the reference inherits, depend on shapes and strides.
on_kernels = pytest.mark.parametrize("backend", ISAS, indirect=True)


# ---- random layers ---------------------------------------------------------------------------------------------------


def random_options(rng: np.random.Generator, activations: tuple[str, ...] | None = None) -> GluOptions:
    activation = str(rng.choice(activations or tuple(ACTIVATIONS)))
    return GluOptions(
        activation,
        gated=activation == "swiglu_oai" or bool(rng.integers(2)),
        interleaved=bool(rng.integers(2)),
        alpha=1.5,  # exact in float32, like the limit
        limit=float(rng.choice([0.0, 0.0, 1.5])),
    )


def random_ids(rng: np.random.Generator, problems: int) -> tuple[np.ndarray, int]:
    """topk_ids [T,K] int32 of `problems` problems with 0 to 9 tokens, 1 to 7 experts and 1 to 4 choices, and the number
    of experts E. One choice in ten is empty, duplicates occur, and tokens of different problems are mixed."""
    tokens, experts, choices = (rng.integers(low, high, problems) for low, high in ((0, 10), (1, 8), (1, 5)))
    problem = rng.permutation(np.repeat(np.arange(problems), tokens))
    first = np.cumsum(experts) - experts
    ids = first[problem, None] + np.floor(rng.random((len(problem), 4)) * experts[problem, None])
    empty = (np.arange(4) >= choices[problem, None]) | (rng.random(ids.shape) < 0.1)
    return np.where(empty, -1, ids).astype(np.int32), int(experts.sum())


def random_layer(
    rng: np.random.Generator,
    dtype: torch.dtype,
    options: GluOptions,
    hidden_size: int,
    intermediate_size: int,
    problems: tuple[np.ndarray, int],
    draw: Callable[..., np.ndarray] | None = None,
) -> Layer:
    """A layer of independent problems, from random_ids. `draw(name, *shape)` makes the numbers; by default they are
    normal and scaled so that h and y are of order one. Every other layer lacks biases or has transposed weights."""
    ids, num_experts = problems
    width = intermediate_size * (2 if options.gated else 1)
    scale = {"gate_up_proj": 2 / np.sqrt(hidden_size), "down_proj": 1 / np.sqrt(intermediate_size)}
    draw = draw or (lambda name, *shape: rng.standard_normal(shape, np.float32) * scale.get(name, 1.0))

    def tensor(name: str, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(draw(name, *shape), np.float32)).to(dtype)

    def weight(name: str, experts: int, rows: int, columns: int) -> Tensor:
        return tensor(name, experts, rows, columns) if rng.integers(2) else tensor(name, experts, columns, rows).mT

    return Layer(
        tensor("x", len(ids), hidden_size),
        weight("gate_up_proj", num_experts, width, hidden_size),
        weight("down_proj", num_experts, hidden_size, intermediate_size),
        tensor("gate_up_bias", num_experts, width) if rng.integers(2) else None,
        tensor("down_bias", num_experts, hidden_size) if rng.integers(2) else None,
        torch.from_numpy(ids),
        torch.from_numpy(np.asarray(draw("topk_weights", *ids.shape), np.float32)),
    )


# ---- float64 formulas ------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda gate, _: F.silu(gate),
    "gelu": lambda gate, _: F.gelu(gate),
    "gelu_tanh": lambda gate, _: F.gelu(gate, approximate="tanh"),
    "relu": lambda gate, _: gate.relu(),
    "relu2": lambda gate, _: gate.relu().square(),
    "swiglu_oai": lambda gate, alpha: gate * torch.sigmoid(alpha * gate),
}


def limited(x: Tensor, low: float, high: float) -> Tensor:
    """x.clamp(low, high), whose gradient passes at the ends, as in our kernels; that of clamp depends on the torch."""
    return torch.where(x > high, high, torch.where(x < low, low, x))


def split(h: Tensor, options: GluOptions) -> tuple[Tensor, Tensor]:
    """gate and up after the clamps, up including its +1; for plain experts up is 1."""
    if not options.gated:
        gate, up = h, torch.ones_like(h)
    elif options.interleaved:
        gate, up = h[..., 0::2], h[..., 1::2]
    else:
        gate, up = h.chunk(2, dim=-1)
    if options.limit:
        gate = limited(gate, -math.inf, options.limit)
        up = limited(up, -options.limit, options.limit) if options.gated else up
    return gate, up + 1 if options.activation == "swiglu_oai" else up


def activate(h: Tensor, options: GluOptions) -> Tensor:
    gate, up = split(h, options)
    return ACTIVATIONS[options.activation](gate, options.alpha) * up


class Slots(NamedTuple):
    """The non-empty choices, in any order."""

    token: Tensor
    choice: Tensor
    expert: Tensor


def slots_of(topk_ids: Tensor) -> Slots:
    token, choice = (topk_ids >= 0).nonzero(as_tuple=True)
    return Slots(token, choice, topk_ids[token, choice].long())


def times(matrices: Tensor, rows: Tensor) -> Tensor:
    """matrices [S,M,N] times rows [S,N]."""
    return torch.bmm(matrices, rows.unsqueeze(-1)).squeeze(-1)


def affine(rows: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = times(weight[expert], rows)
    return out if bias is None else out + bias[expert]


def sum_by(index: Tensor, rows: Tensor, size: int) -> Tensor:
    return rows.new_zeros(size, *rows.shape[1:]).index_add(0, index, rows)


class Stages(NamedTuple):
    """What a layer computes: h and a per slot, in the order of slots_of, and y per token."""

    h: Tensor
    a: Tensor
    y: Tensor


def stages(layer: Layer, options: GluOptions) -> Stages:
    """The stages of a float64 layer, differentiable."""
    s = slots_of(layer.topk_ids)
    h = affine(layer.x[s.token], s.expert, layer.gate_up_proj, layer.gate_up_bias)
    a = activate(h, options)
    z = affine(a, s.expert, layer.down_proj, layer.down_bias)
    return Stages(h, a, sum_by(s.token, layer.topk_weights[s.token, s.choice, None] * z, len(layer.x)))


def equal_bits(a: Any, b: Any) -> bool:
    """Whether two tensors, or two sequences of them, have equal dtypes, shapes and bits; None equals None."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(bits_of(a), bits_of(b))
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(map(equal_bits, a, b))


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
