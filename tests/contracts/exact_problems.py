# SPDX-License-Identifier: BSD-3-Clause
"""Problems with small integers, for which all roundings in the layer are exact: results equal float64 bit for bit.

Weights are sparse and the activation is relu, so h, a and their gradients are integers (quarters, if clamped) that
bfloat16 represents, and float32 sums of them are exact in any order. Only a wrong term can change a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from problems import random_layer, random_options, stages
from torch import Tensor

import switchgear
from switchgear.testing import GluOptions, Layer

GRADIENTS = ("x", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias", "topk_weights")


class Problem(NamedTuple):
    layer: Layer
    options: GluOptions
    grad_y: Tensor
    y: Tensor
    grads: dict[str, Tensor]


def solve(layer: Layer, options: GluOptions, grad_y: Tensor) -> Problem:
    """Adds y and its gradients to the problem, from float64, rounded once."""
    dtype = layer.x.dtype
    tensors = {name: getattr(layer, name) for name in GRADIENTS}
    leaves = {name: t.double().requires_grad_() for name, t in tensors.items() if t is not None}
    h, a, y = stages(layer._replace(**leaves), options)
    h.retain_grad()
    y.backward(grad_y.double())
    for intermediate in (h, a, h.grad):
        assert torch.equal(intermediate.to(dtype).double(), intermediate), "the problem is not exact"
    grads = {name: leaf.grad.to(tensors[name].dtype) for name, leaf in leaves.items()}
    return Problem(layer, options, grad_y, y.detach().to(dtype), grads)


def sparse_integers(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Numbers for random_layer that keep intermediate results within 8 bits: about two nonzero weights per row."""

    def draw(name: str, *shape: int) -> np.ndarray:
        values = rng.integers(-2, 3, shape) if name == "topk_weights" else rng.integers(-1, 2, shape)
        if name.endswith("proj"):
            values = values * (rng.random(shape) < 2 / max(shape[1:]))
        return values

    return draw


def sparse_problem(
    rng: np.random.Generator,
    dtype: torch.dtype,
    hidden_size: int,
    intermediate_size: int,
    problems: tuple[np.ndarray, int],
) -> Problem:
    options, draw = random_options(rng, ("relu",)), sparse_integers(rng)
    layer = random_layer(rng, dtype, options, hidden_size, intermediate_size, problems, draw)
    return solve(layer, options, torch.from_numpy(draw("grad_y", *layer.x.shape)).to(dtype))


def leaves(layer: Layer) -> Layer:
    return Layer(*(t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in layer))


def check(problem: Problem, layer: Layer, y: Tensor, seed: int) -> None:
    assert torch.equal(y, problem.y), f"seed {seed}: y"
    y.backward(problem.grad_y)
    for name, wanted in problem.grads.items():
        grad = getattr(layer, name).grad
        assert grad.dtype == wanted.dtype, name
        assert torch.equal(grad, wanted), f"seed {seed}: grad_{name}, {problem.options}"


def check_moe(problem: Problem, seed: int) -> None:
    layer = leaves(problem.layer)
    x, gate_up, down, gate_up_bias, down_bias, ids, weights = layer
    y = switchgear.moe(
        x, gate_up, down, ids, weights, gate_up_bias=gate_up_bias, down_bias=down_bias, **problem.options.keywords()
    )
    check(problem, layer, y, seed)
