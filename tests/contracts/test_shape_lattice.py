# SPDX-License-Identifier: BSD-3-Clause
"""No shape is special: numbers of experts around every power of two, K up to E, widths without common divisors, few
tokens. Results are exact, so they are compared bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from exact_problems import check_moe, sparse_problem
from problems import DTYPES, counts, random_ids
from torch import Tensor

import switchgear

EXPERTS = (1, 2, 3, 5, 7, 8, 13, 31, 32, 33, 60, 64, 127, 128, 129, 160, 255, 256, 257, 384, 511, 512, 513)
EXPERTS += (1000, 1023, 1024, 1025, 2048, 4096)
CHOICES = (1, 2, 6, 8, 10, 32, 33)
TOKENS = (0, 1, 31, 32, 33, 1023, 1025)
LATTICE = [
    (experts, top_k, tokens)
    for experts, top_k, tokens in itertools.product(EXPERTS, (*CHOICES, None), TOKENS)
    for top_k in [experts if top_k is None else top_k]
    if top_k <= experts
]
MAX_SLOTS = 50_000  # per case in CI; K = E = 4096 with 1025 tokens has 4.2 million


def check_routing(experts: int, top_k: int, tokens: int) -> None:
    """route, plan, permute and combine on logits with few distinct values, against sorts in numpy."""
    rng = np.random.default_rng([experts, top_k, tokens])
    logits = rng.integers(0, 4, (tokens, experts)).astype(np.float32)
    ids = switchgear.route(torch.from_numpy(logits), top_k).topk_ids
    assert np.array_equal(ids.numpy(), np.argsort(-logits, axis=1, kind="stable")[:, :top_k])

    plan = switchgear.plan(ids, experts)
    pairs = np.argsort(ids.numpy().ravel(), kind="stable")
    counts_of_experts = np.bincount(ids.numpy().ravel(), minlength=experts)
    assert np.array_equal(plan.expert_offsets.numpy(), np.append(0, np.cumsum(counts_of_experts)))
    assert np.array_equal(plan.token_indices.numpy(), pairs // top_k)
    assert np.array_equal(plan.slot_indices.numpy().ravel()[pairs], np.arange(len(pairs)))

    x = torch.from_numpy(rng.integers(-4, 5, (tokens, 3)).astype(np.float32))
    permuted_x = switchgear.permute(x, plan)
    assert torch.equal(permuted_x, x[torch.from_numpy(pairs // top_k)])
    weights = torch.from_numpy(rng.integers(-2, 3, (tokens, top_k)).astype(np.float32))
    assert torch.equal(switchgear.combine(permuted_x, plan, weights), x * weights.sum(1, keepdim=True))


@counts(ci=100, full=len(LATTICE))
def test_routing(backend: str, count: int) -> None:
    small = [case for case in LATTICE if case[1] * case[2] <= MAX_SLOTS]
    for case in LATTICE if count == len(LATTICE) else small[:: len(small) // count]:
        check_routing(*case)


WIDE = (2879, 2880, 2881, 7167, 7168, 7169)


@counts(ci=100, full=2_000)
def test_widths(backend: str, count: int) -> None:
    """moe forward and backward for hidden and intermediate sizes from 1 to 257, each value in both roles."""
    for seed in range(count):
        rng = np.random.default_rng([10, seed])
        hidden_size, intermediate_size = (int(rng.permutation(257)[seed * step % 257]) + 1 for step in (1, 3))
        check_moe(sparse_problem(rng, DTYPES[seed % 3], hidden_size, intermediate_size, random_ids(rng, 1)), seed)


@pytest.mark.parametrize("width", WIDE)
def test_model_widths(backend: str, width: int) -> None:
    for seed, (hidden_size, intermediate_size) in enumerate([(width, 5), (5, width)]):
        rng = np.random.default_rng([11, width, seed])
        check_moe(
            sparse_problem(rng, DTYPES[(width + seed) % 3], hidden_size, intermediate_size, random_ids(rng, 2)), seed
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(backend: str, tokens: int, dtype: torch.dtype) -> None:
    """Every function, forward and backward, with no token, and with one token that has an empty choice."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    logits = leaf(tokens, 4)
    routing = switchgear.route(logits, 2)
    assert routing.topk_ids.shape == (tokens, 2)
    routing.topk_weights.sum().backward()
    assert logits.grad.shape == logits.shape

    ids = routing.topk_ids.clone()
    ids[:, 1] = -1
    plan = switchgear.plan(ids, 4)
    assert plan.expert_offsets[-1] == tokens
    x, weights, gate_up, down = leaf(tokens, 6), torch.rand(tokens, 2, requires_grad=True), leaf(4, 6, 6), leaf(4, 6, 3)
    rows = switchgear.permute(x, plan, weights)
    a = switchgear.glu(switchgear.grouped_gemm(rows, gate_up, plan.expert_offsets))
    y = switchgear.combine(switchgear.grouped_gemm(a, down, plan.expert_offsets), plan, weights)
    y = y + switchgear.moe(x, gate_up, down, ids, weights)
    assert y.shape == x.shape
    assert y.isfinite().all()
    y.sum().backward()
    for tensor in (x, weights, gate_up, down):
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.isfinite().all()
        assert bool(tensor.grad.any()) == bool(tokens)
