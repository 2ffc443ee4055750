# SPDX-License-Identifier: BSD-3-Clause
"""The functions under torch's transformations: opcheck, compile, export, vmap, functional gradients, meta tensors."""

from __future__ import annotations

import shutil
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import ops, reference
from switchgear.offload import FromPreRouter
from switchgear.ops.layer import _layer_in
from switchgear.routing import Capacity, DeviceBalance, ImportanceLoad, PreRouter, SwitchLoss, TopP
from switchgear.testing import Case, GluOptions, Layer, make_layer
from switchgear.utils.modules import not_compiled

CASE = Case("compile", 9, 2, 4, 12, 6, "holes")
NO_TOKENS = CASE._replace(num_tokens=0)


def op_samples(name: str, case: Case, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of an op that together cover every optional argument and every layout."""
    layer = make_layer(case, dtype, bias=True, transposed=True)
    plain = make_layer(case, dtype, gated=False)
    x, gate_up, _, gate_up_bias, _, topk_ids, weights = layer
    plan = reference.plan(topk_ids, case.num_experts)
    offsets, token_indices, _ = plan
    rows = torch.randn(topk_ids.numel(), case.hidden_size).to(dtype)
    h = torch.randn(topk_ids.numel(), 2 * case.intermediate_size).to(dtype)
    a, plain_h = h[:, : case.intermediate_size].contiguous(), h[:, : case.intermediate_size].contiguous()
    logits = torch.randn(case.num_tokens, 8).to(dtype)
    ids = torch.randint(8, (case.num_tokens, 3), dtype=torch.int32)
    clamped = GluOptions("swiglu_oai", True, True, 1.702, 7.0)
    plain_options = GluOptions("relu2", False)
    some = torch.arange(case.num_experts, dtype=torch.int32)[::2].contiguous()
    samples: dict[str, list[tuple[Any, ...]]] = {
        "route": [
            (logits, None, 3, "softmax", False, 1.0, 1, 1, "max"),
            (logits, torch.randn(8), 3, "sigmoid", True, 2.5, 4, 2, "top2_sum"),
        ],
        "route_backward": [(torch.randn(case.num_tokens, 3), logits, ids, "softmax", True, 1.0)],
        "plan": [(topk_ids, case.num_experts)],
        "permute": [(x, *plan, None), (x, *plan, weights)],
        "combine": [(rows, *plan, None), (rows, *plan, weights)],
        "combine_weight_backward": [(x, rows, *plan)],
        "grouped_gemm": [
            (x, [gate_up], (), gate_up_bias, offsets, token_indices),
            (rows, [gate_up], (), None, offsets, None),
            (rows, [gate_up[e, : e + 1] for e in range(case.num_experts)], (), None, offsets, None),
        ],
        "grouped_gemm_wgrad": [
            (h, x, offsets, token_indices, False),
            (h, rows, offsets, None, True),
            (h, rows, offsets, None, True, some),
        ],
        "glu": [(h, *GluOptions()), (h, *clamped), (h, *plain_options)],
        "glu_backward": [(a, h, *GluOptions()), (a, h, *clamped), (a, plain_h, *plain_options)],
        "moe_forward": [
            (*layer.arguments(), *clamped, True),
            (*layer.arguments(), *GluOptions(), False),
            (*plain.arguments(), *plain_options, True),
        ],
        "moe_backward": [
            (x, x, h, *layer.arguments()[1:], *clamped, [True] * 6),
            (x, x, h, *layer.arguments()[1:], *clamped, [False, True, False, True, False, True]),
            (x, x, h, *layer.arguments()[1:], *clamped, [True] * 6, None, None, None, [], some),
            (x, x, plain_h, *plain.arguments()[1:], *plain_options, [True] * 6),
        ],
    }
    return samples[name]


OPS = (
    "route", "route_backward", "plan", "permute", "combine", "combine_weight_backward", "grouped_gemm",
    "grouped_gemm_wgrad", "glu", "glu_backward", "moe_forward", "moe_backward",
)  # fmt: skip


@pytest.mark.parametrize("name", OPS)
@pytest.mark.some(6)
def test_opcheck(name: str) -> None:
    """Schema, fake implementation and dispatch of each op, by torch's own checker."""
    for case, dtype in ((CASE, torch.float32), (CASE, torch.bfloat16), (NO_TOKENS, torch.float32)):
        for sample in op_samples(name, case, dtype):
            torch.library.opcheck(getattr(ops, name), sample)


@pytest.mark.parametrize("name", OPS)
def test_fake_results_are_laid_out_as_real_ones(backend: str, name: str) -> None:
    for case in (CASE, NO_TOKENS):
        for sample in op_samples(name, case, torch.float32):
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = getattr(ops, name)(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, sample))
            real = getattr(ops, name)(*sample)
            for a, b in zip(*(torch.utils._pytree.tree_leaves(value) for value in (fake, real)), strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


class Block(nn.Module):
    """All functions of the package in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = switchgear.MoE(
            12, 6, 4, 2, normalize=True, shared_intermediate_size=5, return_routing=True, bias=True
        )

    def forward(self, x: Tensor) -> Tensor:
        y, routing = self.moe(x)
        plan = switchgear.plan(routing.topk_ids, routing.num_experts)
        permuted_x = switchgear.permute(x.reshape(-1, 12), plan)
        h = switchgear.grouped_gemm(permuted_x, self.moe.experts.gate_up_proj, plan.expert_offsets)
        permuted_y = switchgear.grouped_gemm(switchgear.glu(h), self.moe.experts.down_proj, plan.expert_offsets)
        again = switchgear.combine(permuted_y, plan, routing.topk_weights)
        return y + again.reshape(y.shape) + switchgear.load_balancing_loss(routing.router_logits, routing.topk_ids)


def results(block: Any, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


# An op is opaque to a compiler, so one set of kernels is enough for tests of graphs.


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.some(1)
def test_compile(dynamic: bool) -> None:
    torch.compiler.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num_tokens in (5, 7, 2) if dynamic else (5,):
        x = torch.randn(2, num_tokens, 12)
        pairs = zip(results(compiled, x, [*block.parameters()]), results(block, x, [*block.parameters()]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        with torch.no_grad():
            assert torch.equal(compiled(x), block(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_limits_under_dynamic_shapes(overflow: Literal["drop", "reroute"]) -> None:
    torch.compiler.reset()
    moe = switchgear.MoE(16, 8, 4, 2, capacity=Capacity(1.0, overflow=overflow))
    compiled = torch.compile(moe, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for num_tokens in (7, 16):
            x = torch.randn(num_tokens, 16)
            assert torch.equal(compiled(x), moe(x))


@pytest.mark.parametrize("overflow", ["reroute", "overselect"])
def test_a_graph_drops_and_counts_as_without_one(overflow: str) -> None:
    """No column is removed in a graph; neither the limit, nor candidates, nor losses depend on their number."""
    balance = [SwitchLoss(0.01, per_choice=True), DeviceBalance(4, num_experts=8), ImportanceLoad()]
    limit = Capacity(0.5, "choice", overflow, expand=1.5, renormalize=True)
    moe = switchgear.MoE(16, 8, 8, select=TopP(0.4), capacity=limit, balance=balance, return_routing=True)
    x = torch.randn(2, 16, 16)
    with torch.no_grad():
        moe.gate.weight.mul_(4)
        y, routing = moe(x)
        losses = moe.losses
        compiled, graph = torch.compile(moe, backend="eager")(x)
    assert torch.equal(compiled, y)
    assert routing.num_dropped == graph.num_dropped > 0
    assert routing.topk_ids.shape[1] < graph.topk_ids.shape[1] == 8
    assert moe.losses.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(moe.losses[name], loss)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    # torch's cache does not key graphs by op schemas, so its code may call ops as another version declares them.
    torch.compiler.reset()
    block, x = switchgear.MoE(12, 6, 4, 2), torch.randn(2, 5, 12)
    compiled = torch.compile(block, fullgraph=True, backend="inductor")
    with torch._inductor.config.patch(force_disable_caches=True):
        found = results(compiled, x, [*block.parameters()])
    for a, b in zip(found, results(block, x, [*block.parameters()]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # inductor fuses the torch parts in another order


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export(strict: bool) -> None:
    block, x = Block().eval(), torch.randn(2, 5, 12)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    dims = {"x": {1: torch.export.Dim("tokens", min=1, max=4096)}}
    exported = torch.export.export(block, (x,), dynamic_shapes=dims, strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"switchgear.moe_forward.default", "switchgear.gate_route.default"} <= targets
    for num_tokens in (5, 8):
        x = torch.randn(2, num_tokens, 12)
        assert torch.equal(exported.module()(x), block(x))


def test_an_empty_list_may_be_none() -> None:
    """As in a package of AOTInductor, which has no empty lists."""
    x, tensors, _, down_tensors, _, *others = make_layer(CASE).arguments()
    layer = _layer_in((x, tensors, None, down_tensors, None, *others, *GluOptions(), False), 1)
    assert layer == ops.Layer(tensors, (), down_tensors, (), *others, *GluOptions())


def loss_of(layer: Layer) -> Any:
    def loss(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor) -> Tensor:
        return switchgear.moe(x, gate_up_proj, down_proj, layer.topk_ids, topk_weights).square().sum()

    return loss


def test_functional_gradients(backend: str) -> None:
    layer = make_layer(CASE)
    loss, arguments = loss_of(layer), (layer.x, layer.gate_up_proj, layer.down_proj, layer.topk_weights)
    leaves = [t.clone().requires_grad_() for t in arguments]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    grads = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    _, pullback = torch.func.vjp(loss, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(pullback(torch.tensor(1.0)), wanted, strict=True))


def test_vmap(backend: str) -> None:
    """Over tokens, over weights (an ensemble), over gradients, and inside a gradient."""
    layer = make_layer(CASE)
    loss, arguments = loss_of(layer), (layer.x, layer.gate_up_proj, layer.down_proj, layer.topk_weights)
    xs = torch.randn(3, *layer.x.shape)
    losses = torch.func.vmap(loss, (0, None, None, None))(xs, *arguments[1:])
    assert torch.equal(losses, torch.stack([loss(x, *arguments[1:]) for x in xs]))
    assert torch.func.vmap(loss, (0, None, None, None))(xs[:0], *arguments[1:]).shape == (0,)

    stacked = torch.randn(*layer.gate_up_proj.shape[:1], 3, *layer.gate_up_proj.shape[1:])
    losses = torch.func.vmap(loss, (None, 1, None, None))(layer.x, stacked, *arguments[2:])
    assert torch.equal(losses, torch.stack([loss(layer.x, stacked[:, i], *arguments[2:]) for i in range(3)]))

    grads = torch.func.vmap(torch.func.grad(loss, argnums=1), (0, None, None, None))(xs, *arguments[1:])
    wanted = torch.stack([torch.func.grad(loss, argnums=1)(x, *arguments[1:]) for x in xs])
    torch.testing.assert_close(grads, wanted)

    def total(xs: Tensor) -> Tensor:
        return torch.func.vmap(loss, (0, None, None, None))(xs, *arguments[1:]).sum()

    wanted = torch.stack([torch.func.grad(loss)(x, *arguments[1:]) for x in xs])
    torch.testing.assert_close(torch.func.grad(total)(xs), wanted)
    leaf = xs.clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(leaf.grad, wanted)


def test_vmap_of_stages(backend: str) -> None:
    logits, x = torch.randn(3, 6, 4), torch.randn(3, 6, 12)

    def stages(logits: Tensor, x: Tensor) -> Tensor:
        routing = switchgear.route(logits, 2)
        plan = switchgear.plan(routing.topk_ids, routing.num_experts)
        return switchgear.combine(switchgear.glu(switchgear.permute(x, plan)), plan, routing.topk_weights)

    wanted = torch.stack([stages(*pair) for pair in zip(logits, x, strict=True)])
    assert torch.equal(torch.func.vmap(stages)(logits, x), wanted)
    grads = torch.func.vmap(torch.func.grad(lambda *pair: stages(*pair).sum()))(logits, x)
    wanted = torch.stack(
        [torch.func.grad(lambda *pair: stages(*pair).sum())(*pair) for pair in zip(logits, x, strict=True)]
    )
    torch.testing.assert_close(grads, wanted)


def test_batched_gradients(backend: str) -> None:
    """Of torch.autograd, whose vmap is another than torch.func's."""
    layer = make_layer(CASE)
    leaves = [layer.x, layer.gate_up_proj, layer.down_proj, layer.topk_weights]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]

    def fused(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor) -> Tensor:
        return switchgear.moe(x, gate_up_proj, down_proj, layer.topk_ids, topk_weights)

    def staged(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor) -> Tensor:
        plan = switchgear.plan(layer.topk_ids, len(gate_up_proj))
        h = switchgear.grouped_gemm(switchgear.permute(x, plan), gate_up_proj, plan.expert_offsets)
        y = switchgear.grouped_gemm(switchgear.glu(h), down_proj, plan.expert_offsets)
        return switchgear.combine(y, plan, topk_weights)

    for function in (fused, staged):
        y = function(*leaves)
        seeds = torch.stack([torch.ones_like(y), y.detach()])
        got = torch.autograd.grad(y, leaves, seeds, is_grads_batched=True, retain_graph=True)
        wanted = zip(*(torch.autograd.grad(y, leaves, seed, retain_graph=True) for seed in seeds), strict=True)
        for grad, parts in zip(got, wanted, strict=True):
            torch.testing.assert_close(grad, torch.stack(parts))

    def first_token(x: Tensor) -> Tensor:
        return fused(x, *leaves[1:])[0]

    jacobian = torch.autograd.functional.jacobian(first_token, leaves[0], vectorize=True)
    torch.testing.assert_close(jacobian, torch.func.jacrev(first_token)(leaves[0]))


def test_what_is_not_supported_raises(backend: str) -> None:
    """Forward mode and second derivatives raise an error and never return zeros."""
    layer = make_layer(CASE)
    loss, x, others = loss_of(layer), layer.x, (layer.gate_up_proj, layer.down_proj, layer.topk_weights)

    def of_x(x: Tensor) -> Tensor:
        return loss(x, *others)

    with raises(NotImplementedError):
        torch.func.jvp(of_x, (x,), (x,))
    with raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        of_x(torch.autograd.forward_ad.make_dual(x, x))
    with raises(RuntimeError):
        torch.func.grad(lambda x: torch.func.grad(of_x)(x).sum())(x)
    with raises(NotImplementedError):
        torch.func.hessian(of_x)(x)


def test_meta_tensors() -> None:
    layer = Layer(*(t.to("meta") if t is not None else t for t in make_layer(CASE)))
    y = switchgear.moe(layer.x, layer.gate_up_proj, layer.down_proj, layer.topk_ids, layer.topk_weights)
    assert y.is_meta
    assert y.shape == layer.x.shape


def test_negative_and_conjugate_views(backend: str) -> None:
    """Lazy views are materialised before a kernel reads their memory."""
    x = torch.randn(5, 12, dtype=torch.complex64)
    layer = make_layer(Case("lazy", 5, 2, 4, 12, 6))
    lazy = torch.imag(x.conj())
    assert lazy.is_neg()
    rest = (layer.gate_up_proj, layer.down_proj, layer.topk_ids, layer.topk_weights)
    assert torch.equal(switchgear.moe(lazy, *rest), switchgear.moe(-x.imag, *rest))


def test_a_pre_router_in_one_graph() -> None:
    pre, x = PreRouter(8, [4, 4]), torch.randn(5, 8)
    compiled = torch.compile(pre, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(x), pre(x)))
    FromPreRouter(compiled, nn.Embedding(3, 8), 1).close()


def test_a_function_outside_of_graphs() -> None:
    """What torch.compiler.disable promises: it is not traced, inside or outside of what is compiled."""
    compiling = []

    @not_compiled
    def outside(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x + len(compiling)

    def around(x: Tensor) -> Tensor:
        return 2 * outside(2 * x)

    x = torch.ones(2)
    with raises(torch._dynamo.exc.Unsupported):
        torch.compile(around, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    compiled = torch.compile(around, backend="eager")
    assert torch.equal(compiled(x), torch.full((2,), 6.0))
    assert torch.equal(compiled(x), torch.full((2,), 8.0))
    assert torch.equal(around(x), torch.full((2,), 10.0))
    assert compiling == [False] * 3
