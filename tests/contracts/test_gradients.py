# SPDX-License-Identifier: BSD-3-Clause
"""Gradients against finite differences in float64, on the reference: the kernels use the same formulas, and
test_accuracy.py and test_exactness.py bound their results. Also: gradients exist for any routing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import ACTIVATIONS, DTYPES, counts, random_ids, random_layer, random_options
from torch import Tensor
from torch.autograd import gradcheck

import switchgear
from errors import raises
from switchgear.testing import GluOptions


def check(function: Callable[..., object], *tensors: Tensor | None) -> None:
    """Random projections of the Jacobian in float64, which detect any wrong element with probability 1."""
    leaves = []
    for t in tensors:
        if t is not None and t.numel() == 0:
            t = t.new_zeros(t.shape)  # numpy's empty arrays have strides of 0, which gradcheck refuses
        leaves.append(t.detach().requires_grad_() if t is not None and t.is_floating_point() else t)
    assert gradcheck(function, leaves, fast_mode=True, atol=1e-6, rtol=1e-4)


@counts(ci=60, full=500)
def test_moe(count: int) -> None:
    """All activations and layouts, with empty experts, -1, duplicates and all tokens on one expert, for each tensor."""
    for seed in range(count):
        rng = np.random.default_rng([5, seed])
        options = random_options(rng, (tuple(ACTIVATIONS)[seed % len(ACTIVATIONS)],))
        hidden_size, intermediate_size = (int(n) for n in rng.integers(1, 8, 2))
        layer = random_layer(rng, torch.float64, options, hidden_size, intermediate_size, random_ids(rng, 2))
        if seed % 5 == 4:  # all tokens use one expert
            layer = layer._replace(topk_ids=torch.full_like(layer.topk_ids, len(layer.gate_up_proj) - 1))

        def moe(*tensors: Tensor, options: GluOptions = options) -> Tensor:
            x, gate_up, down, gate_up_bias, down_bias, ids, weights = tensors
            return switchgear.moe(
                x, gate_up, down, ids, weights, gate_up_bias=gate_up_bias, down_bias=down_bias, **options.keywords()
            )

        check(moe, *layer.double())


@counts(ci=30, full=500)
def test_route(count: int) -> None:
    """Weights for continuous logits: a small step never changes the choice (float64 logits have no ties)."""
    for seed in range(count):
        rng = np.random.default_rng([6, seed])
        groups, size, tokens = (int(n) for n in rng.integers(1, [5, 6, 6]))
        topk_groups = int(rng.integers(1, groups + 1))
        bias = torch.from_numpy(rng.standard_normal(groups * size)) if rng.integers(2) else None
        options = {
            "top_k": int(rng.integers(1, topk_groups * size + 1)),
            "score_function": str(rng.choice(["softmax", "sigmoid"])),
            "normalize": bool(rng.integers(2)),
            "scale": float(rng.choice([1.0, 2.5])),
            "selection_bias": bias,
            "num_groups": groups,
            "topk_groups": topk_groups,
            "group_score": str(rng.choice(["max", "top2_sum"])),
        }

        def weights(logits: Tensor, options: dict[str, object] = options) -> Tensor:
            return switchgear.route(logits, **options).topk_weights

        check(weights, torch.from_numpy(rng.standard_normal((tokens, groups * size)) * 2))


@counts(ci=20, full=250)
def test_stages(count: int) -> None:
    for seed in range(count):
        rng = np.random.default_rng([7, seed])
        options = random_options(rng)
        layer = random_layer(
            rng, torch.float64, options, *(int(n) for n in rng.integers(1, 7, 2)), random_ids(rng, 2)
        ).double()
        plan = switchgear.plan(layer.topk_ids, len(layer.gate_up_proj))
        slots = len(plan.token_indices)
        rows = torch.from_numpy(rng.standard_normal((slots, layer.x.shape[1])))
        h = torch.from_numpy(rng.standard_normal((slots, layer.gate_up_proj.shape[1])))

        def packed(x: Tensor, weight: Tensor, bias: Tensor | None, plan: switchgear.Plan = plan) -> Tensor:
            return switchgear.grouped_gemm(x, weight, plan.expert_offsets, bias=bias, token_indices=plan.token_indices)

        def listed(x: Tensor, *weight: Tensor, plan: switchgear.Plan = plan) -> Tensor:
            return switchgear.grouped_gemm(x, weight, plan.expert_offsets)

        def glu(h: Tensor, options: GluOptions = options) -> Tensor:
            return switchgear.glu(h, **options.keywords())

        for weights in (None, layer.topk_weights):
            check(lambda x, w, plan=plan: switchgear.permute(x, plan, w), layer.x, weights)
            check(lambda y, w, plan=plan: switchgear.combine(y, plan, w), rows, weights)
        check(packed, layer.x, layer.gate_up_proj, layer.gate_up_bias)
        heights = rng.integers(1, layer.gate_up_proj.shape[1] + 1, len(layer.gate_up_proj))
        check(listed, rows, *(matrix[: int(n)] for matrix, n in zip(layer.gate_up_proj, heights, strict=True)))
        check(glu, h)


# ---- gradients exist -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["no tokens", "no choices", "one expert", "one token"])
def test_every_parameter_gets_a_gradient(backend: str, case: str, dtype: torch.dtype) -> None:
    """Exactly zero for experts without tokens, and never None: data-parallel ranks must reduce the same gradients."""
    ids = {
        "no tokens": torch.empty(0, 2),
        "no choices": torch.full((3, 2), -1),
        "one expert": torch.full((3, 2), 1),
        "one token": torch.tensor([[3, -1]]),
    }[case].int()
    used = ids[ids >= 0].unique().long()
    shapes = {"x": (len(ids), 5), "gate_up_proj": (4, 6, 5), "down_proj": (4, 5, 3), "gate_up_bias": (4, 6)}
    shapes |= {"down_bias": (4, 5), "topk_weights": tuple(ids.shape)}
    tensors = {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    x, gate_up, down, weights = (tensors.pop(n) for n in ("x", "gate_up_proj", "down_proj", "topk_weights"))
    switchgear.moe(x, gate_up, down, ids, weights, **tensors).sum().backward()
    for parameter in (gate_up, down, *tensors.values()):
        assert parameter.grad.isfinite().all()
        idle = torch.ones(4, dtype=torch.bool)
        idle[used] = False
        assert not parameter.grad[idle].any()
    assert x.grad.shape == x.shape
    assert not weights.grad[ids < 0].any()


def test_gradients_can_be_taken_once(backend: str) -> None:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(2, 6, 6, requires_grad=True)
    out = switchgear.grouped_gemm(x, weight, torch.tensor([0, 1, 4], dtype=torch.int32))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)
