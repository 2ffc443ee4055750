# SPDX-License-Identifier: BSD-3-Clause
"""Identical bits for any number of threads, in any run, batch or memory location, and when a checkpointed step is
recomputed. This is the default; there is no faster, less exact mode."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import pytest
import torch
from problems import DTYPES, bits_of, counts, equal_bits, on_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import switchgear
from switchgear import ops
from switchgear.testing import Case, GluOptions, Layer, make_layer

THREADS = (1, 2, 3, 5, 8)
# Several row tiles for one expert and several column panels, none of them full multiples.
CASE = Case("several tiles", 300, 2, 5, 150, 90)


def layer_of(dtype: torch.dtype, case: Case = CASE) -> Layer:
    layer = make_layer(case, dtype, bias=True)
    layer.topk_ids[: case.num_tokens // 2, 0] = 3  # one hot expert
    return layer


def digest(layer: Layer, logits: Tensor) -> str:
    """A digest of every function, forward and backward, on one layer."""
    sha = hashlib.sha256()

    def add(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...] = ()) -> None:
        starts = [t for t in outputs if t.requires_grad]
        loss = torch.stack([t.float().square().sum() for t in starts]).sum() if starts else None
        grads = torch.autograd.grad(loss, inputs, retain_graph=True) if starts else ()
        for tensor in (*outputs, *grads):
            sha.update(bits_of(tensor).numpy().tobytes())

    parts = (t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in layer)
    x, gate_up, down, gate_up_bias, down_bias, ids, weights = parts
    y = switchgear.moe(x, gate_up, down, ids, weights, gate_up_bias=gate_up_bias, down_bias=down_bias)
    add((y,), (x, gate_up, down, gate_up_bias, down_bias, weights))

    weight = gate_up[:, 0].detach().requires_grad_()
    add((switchgear.gate(x, weight, float32=True),), (x, weight))
    logits = logits.detach().requires_grad_()
    routing = switchgear.route(logits, 2, normalize=True)
    add((routing.topk_ids, routing.topk_weights), (logits,))
    plan = switchgear.plan(ids, len(gate_up))
    add(tuple(plan))
    rows = switchgear.permute(x, plan, weights)
    a = switchgear.glu(switchgear.grouped_gemm(rows, gate_up, plan.expert_offsets, bias=gate_up_bias), "gelu")
    y = switchgear.combine(switchgear.grouped_gemm(a, list(down), plan.expert_offsets), plan, weights)
    add((rows, a, y), (x, gate_up, down, gate_up_bias, weights))
    return sha.hexdigest()


def moved(layer: Layer, elements: int) -> Layer:
    """A copy of the layer, offset by `elements` elements in memory."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return torch.cat((tensor.new_zeros(elements), tensor.flatten()))[elements:].view(tensor.shape)

    return Layer(*map(copy, layer))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@counts(ci=2, full=100)
@pytest.mark.some(6)
def test_threads_runs_and_places(backend: str, dtype: torch.dtype, count: int) -> None:
    """`count` runs for each number of threads, each at another place in memory."""
    layer, logits = layer_of(dtype), torch.randn(300, 5).to(dtype)
    digests = set()
    for threads, run in itertools.product(THREADS, range(count)):
        torch.set_num_threads(threads)
        digests.add(digest(moved(layer, run % 7), logits))
    assert len(digests) == 1


# ---- batch invariance ------------------------------------------------------------------------------------------------

BATCHES = (1, 2, 3, 7, 16, 64, 65, 257, 1024)  # 1,439 tokens per round


def tokens_of(layer: Layer, rows: Tensor) -> Layer:
    return layer._replace(x=layer.x[rows], topk_ids=layer.topk_ids[rows], topk_weights=layer.topk_weights[rows])


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@counts(ci=3, full=30)
def test_a_token_does_not_depend_on_its_batch(backend: str, dtype: torch.dtype, count: int) -> None:
    """In any batch and order, y and the gradients of a token's x and weights have the bits of the full batch. 3 dtypes
    times 3 rounds are 13,000 tokens."""
    layer, options = layer_of(dtype, CASE._replace(num_tokens=1024)), GluOptions()
    grad_y = torch.randn(layer.x.shape).to(dtype)

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        part = tokens_of(layer, rows)
        y, h = ops.moe_forward(*part.arguments(), *options, True)
        needs = [True, False, False, False, False, True]
        grads = ops.moe_backward(grad_y[rows], part.x, h, *part.arguments()[1:], *options, needs)
        return y, grads[0], grads[5]

    whole = run(torch.arange(1024))
    assert equal_bits(whole[0], ops.moe_forward(*layer.arguments(), *options, False)[0])  # whether h is saved or not
    for _ in range(count):
        for size in BATCHES:
            rows = torch.randperm(1024)[:size]
            for name, some, all_rows in zip(("y", "grad_x", "grad_topk_weights"), run(rows), whole, strict=True):
                assert equal_bits(some, all_rows[rows]), f"{name} in a batch of {size}"


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@counts(ci=3, full=30)
def test_a_token_of_a_whole_module_does_not_depend_on_its_batch(backend: str, dtype: torch.dtype, count: int) -> None:
    """The same from the router to y: 3 dtypes times 3 rounds are 13,000 pairs."""
    layer = switchgear.MoE(72, 16, 12, 3, normalize=True, selection_bias=True, router_bias=True, dtype=dtype).eval()
    x = torch.randn(1024, 72).to(dtype)
    with torch.no_grad():
        whole = layer(x)
        for _, size in itertools.product(range(count), BATCHES):
            rows = torch.randperm(1024)[:size]
            assert equal_bits(layer(x[rows]), whole[rows]), f"a batch of {size}"


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.some(6)
def test_a_slot_does_not_depend_on_its_batch(backend: str, dtype: torch.dtype) -> None:
    """The same for the separate stages, with inner dimensions of several packed chunks."""
    layer = layer_of(dtype, Case("deep", 120, 2, 5, 2100, 1030))

    def run(rows: Tensor) -> Tensor:
        x, gate_up, down, gate_up_bias, down_bias, ids, weights = tokens_of(layer, rows)
        plan = switchgear.plan(ids, len(gate_up))
        h = switchgear.grouped_gemm(
            x, gate_up, plan.expert_offsets, bias=gate_up_bias, token_indices=plan.token_indices
        )
        z = switchgear.grouped_gemm(switchgear.glu(h), down, plan.expert_offsets, bias=down_bias)
        return switchgear.combine(z, plan, weights)

    whole = run(torch.arange(120))
    for size in (1, 2, 5, 50):
        rows = torch.randperm(120)[:size]
        assert equal_bits(run(rows), whole[rows]), f"a batch of {size}"


# ---- recomputation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@counts(ci=20, full=1_000)
def test_checkpointed_steps(backend: str, reentrant: bool, count: int) -> None:
    """Steps of a layer whose logits have many ties: the recomputed routing, and so each gradient, is the same."""
    layer = make_layer(Case("small", 24, 3, 8, 12, 10))
    gate = torch.randint(-1, 2, (8, 12)).float()

    def block(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = switchgear.route(x.round() @ gate.T, 3, normalize=True)
        return x + switchgear.moe(x, gate_up, down, routing.topk_ids, routing.topk_weights)

    def step(x: Tensor, run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = tuple(t.detach().requires_grad_() for t in (x, gate, layer.gate_up_proj, layer.down_proj))
        y = run(*leaves)
        y.square().sum().backward()
        return y.detach(), *(leaf.grad for leaf in leaves)

    for _ in range(count):
        x = torch.randn(24, 12)
        again = step(x, lambda *leaves: checkpoint(block, *leaves, use_reentrant=reentrant))
        assert equal_bits(again, step(x, block))
