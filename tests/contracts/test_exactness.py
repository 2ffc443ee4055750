# SPDX-License-Identifier: BSD-3-Clause
"""Integer problems equal float64 bit for bit, forward and backward: see exact_problems.py."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from exact_problems import Problem, check, check_moe, leaves, solve, sparse_problem
from problems import DTYPES, counts, random_ids, random_layer, random_options
from torch import Tensor

import switchgear
from switchgear import ops


@functools.cache
def fifty_problems(seed: int) -> Problem:
    rng = np.random.default_rng([2, seed])
    return sparse_problem(rng, DTYPES[seed % 3], *(int(n) for n in rng.integers(1, 70, 2)), random_ids(rng, 50))


@functools.cache
def dense_problem(seed: int) -> Problem:
    """Long sums in float32: all terms matter, and all sums stay below 2^24."""
    rng = np.random.default_rng([3, seed])

    def draw(name: str, *shape: int) -> np.ndarray:
        return rng.integers(-1, 2, shape)

    hidden_size, intermediate_size = (int(n) for n in rng.integers(1, [700, 200]))
    options = random_options(rng, ("relu",))
    layer = random_layer(rng, torch.float32, options, hidden_size, intermediate_size, random_ids(rng, 2), draw)
    return solve(layer, options, torch.from_numpy(draw("grad_y", *layer.x.shape)).float())


@counts(ci=500, full=5_000)
def test_moe(backend: str, count: int) -> None:
    for seed in range(count // 50):
        check_moe(fifty_problems(seed), seed)


@counts(ci=10, full=100)
def test_moe_with_long_sums(backend: str, count: int) -> None:
    for seed in range(count):
        check_moe(dense_problem(seed), seed)


@pytest.mark.parametrize("pattern", ["first", "last", "skewed"])
def test_imbalance(backend: str, pattern: str) -> None:
    """700 tokens, most or all of them for one expert: several row tiles, and sums of 700 terms."""
    rng = np.random.default_rng(14)
    ranks = np.minimum(rng.zipf(2.0, (700, 2)), 5) - 1
    ids = {"first": np.zeros((700, 2)), "last": np.full((700, 2), 4), "skewed": ranks}[pattern].astype(np.int32)
    for dtype in DTYPES:
        problem = sparse_problem(rng, dtype, 70, 40, (ids, 5))
        check_moe(problem, 14)


@counts(ci=250, full=2_500)
def test_stages(backend: str, count: int) -> None:
    """The same problems stage by stage, with experts as a list, and every other time with input weights of 1."""
    for seed in range(count // 50):
        problem = fifty_problems(seed)
        layer = leaves(problem.layer)
        plan = switchgear.plan(layer.topk_ids, len(layer.gate_up_proj))
        rows = switchgear.permute(layer.x, plan, torch.ones_like(layer.topk_weights) if seed % 2 else None)
        h = switchgear.grouped_gemm(rows, layer.gate_up_proj, plan.expert_offsets, bias=layer.gate_up_bias)
        a = switchgear.glu(h, **problem.options.keywords())
        z = switchgear.grouped_gemm(a, list(layer.down_proj), plan.expert_offsets, bias=layer.down_bias)
        check(problem, layer, switchgear.combine(z, plan, layer.topk_weights), seed)


@counts(ci=20, full=500)
def test_grouped_gemm_of_unequal_matrices(backend: str, count: int) -> None:
    """A list of matrices of different heights, gathered rows, long inner dimensions."""
    for seed in range(count):
        rng = np.random.default_rng([4, seed])
        dtype, experts, tokens, depth = DTYPES[seed % 3], *(int(n) for n in rng.integers(1, [6, 40, 700]))
        heights = rng.integers(1, 140, experts)
        ids = torch.from_numpy(rng.integers(-1, experts, (tokens, 2)).astype(np.int32))
        plan = switchgear.plan(ids, experts)

        def integers(*shape: int, dtype: torch.dtype = dtype, rng: np.random.Generator = rng) -> Tensor:
            return torch.from_numpy(rng.integers(-1, 2, shape)).to(dtype)

        x, bias = integers(tokens, depth), integers(experts, int(heights.max()))
        matrices = [integers(int(n), depth) for n in heights]
        out = switchgear.grouped_gemm(x, matrices, plan.expert_offsets, bias=bias, token_indices=plan.token_indices)
        wanted = torch.zeros(len(plan.token_indices), int(heights.max()), dtype=torch.float64)
        offsets = plan.expert_offsets.tolist()
        for e, matrix in enumerate(matrices):
            rows = slice(offsets[e], offsets[e + 1])
            gathered = x[plan.token_indices[rows].long()].double()
            wanted[rows, : len(matrix)] = gathered @ matrix.double().T + bias[e, : len(matrix)].double()
        assert torch.equal(out, wanted.to(dtype)), f"seed {seed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_nearest_even(backend: str, dtype: torch.dtype) -> None:
    """Sums and products of integer pairs near the precision limit, including ties, in every op that stores floats."""
    limit = int(2 / torch.finfo(dtype).eps)  # the first integer whose successor the dtype cannot represent
    numbers = torch.cat((torch.arange(limit - 40, limit + 1), torch.arange(0, 60)))
    a, b = (t.flatten().to(dtype) for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    pairs, minus = torch.stack((a, b), 1), torch.tensor([1.0, -1.0]).to(dtype)
    ids, ones = torch.zeros(len(a), 1, dtype=torch.int32), torch.ones(len(a), 1)
    offsets = torch.tensor([0, len(a)], dtype=torch.int32)

    def rounded(exact: Tensor) -> Tensor:
        return exact.to(dtype)

    total, product = rounded(a.double() + b.double()), rounded(a.double() * b.double())
    difference = rounded(b.double() - a.double())
    assert (total.double() != a.double() + b.double()).any()

    weight = torch.stack((torch.ones_like(minus), -minus))[None]  # [1, 2, 2]: the sum, and b - a
    out = switchgear.grouped_gemm(pairs, weight, offsets)
    assert torch.equal(out, torch.stack((total, difference), 1))
    assert torch.equal(switchgear.glu(pairs, "relu"), product[:, None])

    plan = switchgear.plan(ids, 1)
    assert torch.equal(switchgear.permute(a[:, None], plan, b.float()[:, None]), product[:, None])
    both = switchgear.plan(torch.zeros(len(a), 2, dtype=torch.int32), 1)
    assert torch.equal(switchgear.combine(pairs.view(-1, 1), both), total[:, None])

    # x passes relu unchanged: y = a + b in forward, and grad_x = the sum of a pair of gradients in backward
    x, eye, all_ones = pairs.clone().requires_grad_(), torch.eye(2)[None].to(dtype), torch.ones(1, 2, 2).to(dtype)
    y = switchgear.moe(x, eye, all_ones, ids, ones, activation="relu", gated=False)
    assert torch.equal(y, total[:, None].expand(-1, 2))
    y.backward(pairs)
    assert torch.equal(x.grad, total[:, None] * (pairs > 0))

    # a weight gradient with two slots per expert
    experts = 200
    left = torch.ones(2 * experts, 1).to(dtype)
    grad = ops.grouped_gemm_wgrad(
        left, pairs[:experts].reshape(-1, 1), torch.arange(0, 2 * experts + 1, 2, dtype=torch.int32), None, False
    )
    assert torch.equal(grad.flatten(), total[:experts])
