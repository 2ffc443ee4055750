# SPDX-License-Identifier: BSD-3-Clause
"""Checks results: the correct layer in float64 on a sample of tokens, and the tolerance for the difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Case, Layer, forward, train
from .competitors.registry import Skip

_QUANTISED = {"int8": 0.05, "int4": 0.3}  # of `tolerance`
SAMPLED_TOKENS = 4  # float64 on all tokens would take longer than the benchmark


class Expected(NamedTuple):
    tokens: list[int]
    y: Tensor  # [sampled, H]
    expert: int
    grads: tuple[Tensor, ...] | None  # of x and topk_weights at `tokens`, of gate_up_proj and down_proj at `expert`


def _experts(case: Case, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer's formula for a few tokens, expert by expert."""
    y = torch.zeros_like(x, dtype=torch.float64)
    for expert in torch.unique(ids).tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate_up, down = case.matrices(expert)
        gate, up = (x[token] @ gate_up.T).chunk(2, -1)
        rows = (F.silu(gate) * up) @ down.T
        y = y.index_add(0, token, rows * weights[token, choice, None])
    return y


def expected(case: Case) -> Expected:
    """y (and the gradients of x and topk_weights) of a few tokens; in training the weight gradients of one expert."""
    inputs = case.inputs[0]
    generator = torch.Generator().manual_seed(1)
    tokens = sorted(torch.randperm(case.tokens, generator=generator)[:SAMPLED_TOKENS].tolist())
    training = case.mode == "train"
    x = inputs.x[tokens].double().requires_grad_(training)
    weights = inputs.topk_weights[tokens].double().requires_grad_(training)
    y = _experts(case, x, inputs.topk_ids_int64[tokens], weights)
    expert = int(inputs.topk_ids_int64[tokens[0], 0])
    if not training:
        return Expected(tokens, y, expert, None)
    torch.autograd.backward(y, case.grad_y[tokens].double())
    gate_up, down = (matrix.requires_grad_() for matrix in case.matrices(expert))
    token, choice = (inputs.topk_ids_int64 == expert).nonzero(as_tuple=True)
    gate, up = (inputs.x[token].double() @ gate_up.T).chunk(2, -1)
    rows = ((F.silu(gate) * up) @ down.T) * inputs.topk_weights[token, choice, None].double()
    torch.autograd.backward(rows, case.grad_y[token].double())
    grads = [tensor.grad for tensor in (x, weights, gate_up, down)]
    return Expected(tokens, y.detach(), expert, tuple(grad for grad in grads if grad is not None))


def tolerance(case: Case) -> float:
    """The largest relative error (root mean square) that a correct implementation may have.

    Stored values are rounded to the dtype, u relative each: h, silu(gate)·up, the expert's row, its weighted row, and
    in the slowest case each partial sum over K; a backward pass adds as many roundings again. Sums of n random terms in
    float32 add u32·sqrt(n). Roundings are random, so six standard deviations bound them.

    Quantisation dominates all that. Steps of 1/127 of a row's largest element, about 4 standard deviations, are uniform
    errors of 4/127/sqrt(12) = 0.9 %, of weights and of activations, in three products: 2.2 % together. With 16 levels
    for a group of 32, whose largest element is about 2.1 standard deviations, 2.1/7.5/sqrt(12) = 8 %, of weights only:
    14 %, and 22 % for groups of a whole row. The bounds allow twice as much.

    fp8 and mxfp4 are compared with their decoded values, so only products count. A library that decodes them to
    bfloat16 first rounds both weights once more. One that rounds x and silu(gate)·up to int8, in groups of 32, has
    errors of 2.1/127/sqrt(12) = 0.5 % in each of three products, 0.8 % together: half of the bound.
    """
    if case.dtype_name in _QUANTISED:
        return _QUANTISED[case.dtype_name]
    unit = {torch.bfloat16: 2.0**-9, torch.float32: 2.0**-24}[case.dtype]
    passes = 1 if case.mode == "forward" else 2
    roundings = (6 if case.stored is None else 8) + case.shape.top_k
    stored = unit * roundings * passes
    longest = max(case.shape.hidden_size, 2 * case.shape.intermediate_size, case.tokens)
    return stored + passes * 6 * 2.0**-24 * 2 * math.sqrt(longest)


def relative_error(case: Case, layer: Layer, want: Expected) -> float:
    """Runs `layer` once and compares everything that is known: the worst root-mean-square error, relative."""

    def distance(got: Tensor, wanted: Tensor) -> float:
        error = (got.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        return float(error) if bool(torch.isfinite(error)) else math.inf

    inputs = case.inputs[0]
    if case.mode == "forward":
        return distance(forward(layer, inputs)[want.tokens], want.y)
    grads = train(layer, case, inputs)
    assert want.grads is not None
    x, topk_weights, gate_up, down = want.grads
    return max(
        distance(grads.x[want.tokens], x),
        distance(grads.topk_weights[want.tokens], topk_weights),
        distance(grads.gate_up_proj[want.expert], gate_up),
        distance(grads.down_proj[want.expert], down),
    )


class Verified(NamedTuple):
    layers: dict[str, Layer]  # the correct ones
    errors: dict[str, float]  # of correct and of wrong ones
    limit: float
    skipped: list[dict[str, str]]  # case, competitor, reason


def verify(case: Case, names: Sequence[str], prepare: Callable[[str], Layer], title: str) -> Verified:
    """Makes and checks each competitor's layer. A failure in another library is a reason to skip it."""
    want, found = expected(case), Verified({}, {}, tolerance(case), [])
    for name in names:
        try:
            layer = prepare(name)
            found.errors[name] = relative_error(case, layer, want)
        except Exception as problem:  # other libraries fail in many ways, including out of memory
            if name.startswith("switchgear") and not isinstance(problem, Skip):
                raise
            reason = str(problem) if isinstance(problem, Skip) else f"{type(problem).__name__}: {problem}"
            found.skipped.append({"case": title, "competitor": name, "reason": reason})
            continue
        if found.errors[name] <= found.limit:
            found.layers[name] = layer
    return found
