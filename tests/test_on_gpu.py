# SPDX-License-Identifier: BSD-3-Clause
"""What only a device can show: CUDA graphs, streams that are not the default, and tensors of more than 2³¹ elements.

`make gpu` runs them. tools/gpu/replay.py replays graphs with more routings.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import switchgear
from gpu import replay
from switchgear import Plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TAIL = 64  # tokens at the end of a large tensor, computed alone for comparison
MANY = 2**31 // 4096 + TAIL  # rows of 4096: more than 2³¹ elements


def bfloat16(*size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16) * scale


def needs(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip("needs a GPU with more free memory")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", replay.SHAPES, ids=str)
def test_a_replay_has_the_bits_of_a_call(shape: replay.Shape, train: bool) -> None:
    replay.replays(shape, train, "cuda", 25)


@pytest.mark.parametrize("shape", replay.SHAPES, ids=str)
def test_ops_run_on_the_current_stream(shape: replay.Shape) -> None:
    replay.streams(shape, "cuda")


@pytest.mark.parametrize("policy", ["route_dynamic", "column_topk", "fit_capacity", "assign_balanced"])
def test_policies_are_captured(policy: str) -> None:
    logits = torch.randn(96, 16, device="cuda")
    sequence = (torch.arange(96, device="cuda") % 3).int()
    limits = torch.full((3,), 8, dtype=torch.int32, device="cuda")

    def call() -> Tensor:
        if policy == "column_topk":
            return switchgear.ops.column_topk(logits, sequence, limits)
        if policy == "assign_balanced":
            return switchgear.ops.assign_balanced(logits, sequence, 2, -1.0, 20)
        some = switchgear.functional.route_dynamic(logits, top_p=0.6, max_experts=4)
        if policy == "route_dynamic":
            return some.topk_ids
        return switchgear.ops.fit_capacity(
            some.topk_ids, some.topk_weights, logits, sequence, limits, 16, "priority", 16
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(10):
        logits.copy_(torch.randn_like(logits))
        graph.replay()
        assert torch.equal(captured, call())


def test_a_layer_of_more_elements_than_an_int_counts() -> None:
    """x, y and the slots' rows; the last tokens are those of a call with them alone."""
    needs(24)
    x = bfloat16(MANY, 4096)
    gate_up, down = bfloat16(8, 128, 4096, scale=0.02), bfloat16(8, 4096, 64, scale=0.1)
    routing = switchgear.route(torch.randn(MANY, 8, device="cuda"), 1)
    y = switchgear.moe(x, gate_up, down, routing.topk_ids, routing.topk_weights)
    last = slice(MANY - TAIL, MANY)
    alone = switchgear.moe(x[last], gate_up, down, routing.topk_ids[last], routing.topk_weights[last])
    torch.testing.assert_close(y[last], alone, rtol=2.0**-6, atol=2.0**-6)


def test_stages_of_more_elements_than_an_int_counts() -> None:
    needs(24)
    x = bfloat16(MANY, 4096)
    ids = torch.randint(0, 4, (MANY, 1), device="cuda", dtype=torch.int32)
    plan: Plan = switchgear.plan(ids, 4)
    rows = switchgear.permute(x, plan)
    last = slice(MANY - TAIL, MANY)
    assert torch.equal(rows[last], x[plan.token_indices[last].long()])
    ones = torch.ones(MANY, 1, device="cuda")
    assert torch.equal(switchgear.combine(rows, plan, ones)[last], x[last])
    a = switchgear.glu(rows)
    torch.testing.assert_close(a[last], switchgear.glu(rows[last].clone()), rtol=0, atol=0)


def test_a_gradient_of_more_elements_than_an_int_counts() -> None:
    """The gradient of a weight of 2³¹ elements, in float32 sums over few rows."""
    needs(24)
    experts = 2**31 // (4096 * 1024) + 1
    rows, grad = bfloat16(2 * experts, 4096), bfloat16(2 * experts, 1024)
    offsets = torch.arange(0, 2 * experts + 1, 2, device="cuda", dtype=torch.int32)
    weight = torch.zeros(experts, 1024, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    switchgear.grouped_gemm(rows, weight, offsets).backward(grad)
    assert weight.grad is not None
    want = grad[-2:].float().T @ rows[-2:].float()
    torch.testing.assert_close(weight.grad[-1].float(), want, rtol=2.0**-7, atol=2.0**-7)
