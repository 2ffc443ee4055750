# SPDX-License-Identifier: BSD-3-Clause
"""What only a device can show: CUDA graphs, streams that are not the default, and tensors of more than 2³¹ elements.

`make gpu` runs them, with SWITCHGEAR_ROUTINGS for each captured graph. Without a GPU, a stand-in for a graph calls the
layer again: that tests the tests of graphs and streams.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import switchgear
from gpu.smoke import Shape
from switchgear import Plan

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")

ROUTINGS = int(os.environ.get("SWITCHGEAR_ROUTINGS", "25" if HAS_GPU else "6"))
SHAPES = (
    Shape(1, 256, 128, 32, 4),  # decoding
    Shape(64, 256, 128, 64, 8),  # few rows per expert
    Shape(1024, 256, 192, 8, 2),  # tiles of 128 rows
    Shape(96, 264, 136, 33, 3),  # tails
)
TAIL = 64  # tokens at the end of a large tensor, computed alone for comparison
MANY = 2**31 // 4096 + TAIL  # rows of 4096: more than 2³¹ elements


def bfloat16(*size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16) * scale


def needs(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip("needs a GPU with more free memory")


class Layer:
    """A layer with static inputs, as a captured graph needs them."""

    def __init__(self, shape: Shape, train: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def leaf(*size: int, scale: float) -> Tensor:
            values = torch.randn(size, generator=generator) * scale
            return values.bfloat16().to(DEVICE).requires_grad_(train)

        self.shape, self.train = shape, train
        self.x = leaf(shape.tokens, shape.hidden_size, scale=1.0)
        self.gate_up = leaf(shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size, scale=0.1)
        self.down = leaf(shape.num_experts, shape.hidden_size, shape.intermediate_size, scale=0.1)
        self.logits = torch.zeros(shape.tokens, shape.num_experts, device=DEVICE)
        self.outputs: list[Tensor] = []

    def __call__(self) -> None:
        """y, and in training the gradients of all inputs, in `outputs`: the same memory at every replay."""
        leaves = [self.x, self.gate_up, self.down]
        routing = switchgear.route(self.logits, self.shape.top_k, normalize=True)
        y = switchgear.moe(self.x, self.gate_up, self.down, routing.topk_ids, routing.topk_weights)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y)) if self.train else ()
        self.outputs = [y.detach(), *grads]

    def choose(self, number: int) -> None:
        """Routing `number`: most are random, some send all tokens to a few experts, some are all ties."""
        generator = torch.Generator().manual_seed(number)
        logits = torch.randn(self.logits.shape, generator=generator)
        if number % 5 == 1:
            logits[:, self.shape.top_k :] -= 100.0
        elif number % 5 == 2:
            logits.zero_()
        elif number % 5 == 3:
            logits *= 30.0
        self.logits.copy_(logits)


def capture(layer: Layer) -> Callable[[], None]:
    """A function that replays the layer. It runs before the capture: kernels are loaded at their first use."""
    if not HAS_GPU:
        return layer
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    return graph.replay


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_replayed_graph_has_the_bits_of_a_call(shape: Shape, train: bool) -> None:
    static, direct = Layer(shape, train), Layer(shape, train)
    replay = capture(static)
    for number in range(ROUTINGS // 5 if train and ROUTINGS > 25 else ROUTINGS):
        static.choose(number)
        direct.choose(number)
        replay()
        if number < 20 or number % 7 == 0:  # direct calls take longer; in steps of 7 come all five kinds of `choose`
            direct()
            for got, want in zip(static.outputs, direct.outputs, strict=True):
                assert torch.equal(got, want), number


@contextlib.contextmanager
def other_stream() -> Iterator[None]:
    """A stream that is not the default one, some 10 ms late."""
    if not HAS_GPU:
        yield
        return
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        yield
    stream.synchronize()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_run_on_the_current_stream(shape: Shape) -> None:
    """Inputs come late on the stream itself: an op on another stream would read them before they are there."""
    layer, want = Layer(shape, True), Layer(shape, True)
    for number in range(8):
        want.choose(number)
        want()
        expected = [tensor.clone() for tensor in want.outputs]
        layer.logits.fill_(0.0)
        late = want.logits.clone()
        with other_stream():
            layer.logits.copy_(late)
            layer()
        for got, wanted in zip(layer.outputs, expected, strict=True):
            assert torch.equal(got, wanted), number


@needs_gpu
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


@needs_gpu
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


@needs_gpu
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


@needs_gpu
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
