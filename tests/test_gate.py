# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import switchgear
from errors import raises
from switchgear import Router, ops, routing, testing
from switchgear.functional import gate_route
from switchgear.testing import Bounded, assert_close, exact

HALVES = (torch.bfloat16, torch.float16)
# (dtype of x, dtype of weight and bias)
DTYPES = [(torch.float32, torch.float32)] + [(x, weight) for x in HALVES for weight in (x, torch.float32)]
# (T, E, H): sizes of one, odd sizes, several panels of columns, and depths of more than one chunk of 1024 words
SHAPES = [(1, 1, 1), (5, 3, 37), (0, 4, 8), (50, 70, 130), (3, 130, 2100), (9, 8, 1027)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda pair: f"{pair[0]}, {pair[1]}".replace("torch.", ""))


def tensors(shape: tuple[int, int, int], dtype: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor, Tensor]:
    """x [T,H], weight [E,H], bias [E]."""
    num_tokens, num_experts, hidden_size = shape
    x, weight = torch.randn(num_tokens, hidden_size), torch.randn(num_experts, hidden_size)
    return x.to(dtype[0]), weight.to(dtype[1]), torch.randn(num_experts).to(dtype[1])


def product(a: Bounded, weight: Tensor, bias: Tensor | None) -> Bounded:
    """a · weightᵀ + bias, the product of a single expert."""
    offsets = torch.tensor([0, len(a.value)], dtype=torch.int32)
    return testing.gemm(a, weight[None], None if bias is None else bias[None], offsets)


# ---- values ----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("float32", [False, True])
def test_logits_against_float64(backend: str, dtype: tuple[torch.dtype, torch.dtype], float32: bool) -> None:
    for shape in SHAPES:
        x, weight, bias = tensors(shape, dtype)
        for some_bias in (bias, None):
            logits = switchgear.gate(x, weight, some_bias, float32=float32)
            assert logits.dtype == (torch.float32 if float32 else dtype[1])
            assert_close(logits, product(exact(x), weight, some_bias).rounded(logits.dtype), str(shape))


@dtypes
def test_gradients_against_float64(backend: str, dtype: tuple[torch.dtype, torch.dtype]) -> None:
    for shape in SHAPES:
        leaves = [tensor.requires_grad_() for tensor in tensors(shape, dtype)]
        logits = switchgear.gate(*leaves, float32=True)
        grad = torch.randn(logits.shape)
        x, weight, bias = (leaf.detach() for leaf in leaves)
        offsets = torch.tensor([0, len(x)], dtype=torch.int32)
        ones = torch.ones(len(x), 1)
        wanted = {
            "x": product(exact(grad), weight.T, None),
            "weight": Bounded(*(part[0] for part in testing.wgrad(exact(grad), exact(x), offsets))),
            "bias": Bounded(*(part[0, :, 0] for part in testing.wgrad(exact(grad), exact(ones), offsets))),
        }
        grads = torch.autograd.grad(logits, leaves, grad)
        for leaf, got, (name, bound) in zip((x, weight, bias), grads, wanted.items(), strict=True):
            assert got.is_contiguous()
            assert got.dtype == leaf.dtype
            assert_close(got, bound.rounded(leaf.dtype), f"{name} of {shape}")


def test_formulas_of_the_gradients() -> None:
    leaves = [tensor.double().requires_grad_() for tensor in tensors((5, 4, 7), (torch.float32, torch.float32))]
    assert gradcheck(switchgear.gate, leaves)
    for needed in range(3):
        some = [leaf.detach().requires_grad_(index == needed) for index, leaf in enumerate(leaves)]
        assert gradcheck(switchgear.gate, some)
        assert gradgradcheck(switchgear.gate, some)


def test_second_derivatives() -> None:
    """As those of torch.nn.functional.linear, also through torch.func and with logits in float32."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors((5, 4, 7), (torch.float32, torch.float32))]
    assert gradgradcheck(switchgear.gate, leaves)
    x, weight, bias = (leaf.detach() for leaf in leaves)

    def penalty(product: Any, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(product(x, weight, bias).tanh().sum(), x, create_graph=True)
        return grad.square().sum()

    for x_dtype in (torch.float64, torch.float32, torch.bfloat16):
        leaf = x.to(x_dtype).requires_grad_()
        weight, bias = weight.to(x_dtype), bias.to(x_dtype)
        (got,) = torch.autograd.grad(penalty(switchgear.gate, leaf), leaf)
        (wanted,) = torch.autograd.grad(penalty(nn.functional.linear, leaf), leaf)
        assert got.dtype == x_dtype
        torch.testing.assert_close(got, wanted)

    def slopes(product: Any) -> Tensor:
        def loss(row: Tensor) -> Tensor:
            return product(row[None], weight.double(), bias.double()).tanh().sum()

        penalty_of = torch.func.grad(lambda row: torch.func.grad(loss)(row).square().sum())
        return torch.func.vmap(penalty_of)(x.double())

    torch.testing.assert_close(slopes(switchgear.gate), slopes(nn.functional.linear))


def test_layouts(backend: str) -> None:
    """Leading dimensions; rows and weights that are parts of larger tensors."""
    x, weight = torch.randn(2, 3, 5, 40), torch.randn(9, 40)
    logits = switchgear.gate(x, weight)
    assert logits.shape == (2, 3, 5, 9)
    torch.testing.assert_close(logits, x @ weight.T)
    padded, wide = torch.randn(6, 50), torch.randn(4, 40, 2)
    torch.testing.assert_close(switchgear.gate(padded[:, 3:43], weight), padded[:, 3:43] @ weight.T)
    torch.testing.assert_close(switchgear.gate(x[0, 0], wide[..., 0]), x[0, 0] @ wide[..., 0].T)
    assert switchgear.gate(x[0, 0, 0], weight).shape == (9,)


@pytest.mark.parametrize("layout", ["every second column", "a column of each", "one number", "one row", "transposed"])
def test_gradients_of_rows_of_any_strides(backend: str, layout: str) -> None:
    layouts = {
        "every second column": lambda: torch.randn(3, 5, 32)[..., ::2],
        "a column of each": lambda: torch.randn(5, 16, 3)[..., 0],
        "one number": lambda: torch.randn(1).expand(5, 16),
        "one row": lambda: torch.randn(16).expand(5, 16),
        "transposed": lambda: torch.randn(16, 10)[:, ::2].mT,
    }
    x, layer = layouts[layout](), switchgear.MoE(16, 8, 4, 2)
    weight = torch.randn(4, 16, requires_grad=True)
    logits = switchgear.gate(x, weight)
    grad = torch.randn(logits.shape)
    logits.backward(grad)
    rows = x.reshape(-1, 16)
    offsets = torch.tensor([0, len(rows)], dtype=torch.int32)
    wanted = Bounded(*(part[0] for part in testing.wgrad(exact(grad.view(-1, 4)), exact(rows), offsets)))
    assert weight.grad is not None
    assert_close(weight.grad, wanted.rounded(torch.float32))
    found = [torch.autograd.grad(layer(some).sum(), list(layer.parameters())) for some in (x, x.contiguous())]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---- one order of sums -----------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(300, 8, 64), (300, 70, 1030), (257, 5, 2200), (24, 300, 131)], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_batch(
    isa: str, dtype: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int]
) -> None:
    x, weight, bias = tensors(shape, dtype)
    whole = switchgear.gate(x, weight, bias, float32=True)
    for threads, size in itertools.product((1, 2, 3, 8), (1, 2, 6, 7, 16, 49, 145, len(x))):
        torch.set_num_threads(threads)
        rows = torch.randperm(len(x))[:size]
        assert torch.equal(switchgear.gate(x[rows], weight, bias, float32=True), whole[rows]), (threads, size)


@dtypes
def test_bits_of_gradients_of_rows_do_not_depend_on_the_batch(isa: str, dtype: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight, _ = tensors((150, 9, 200), dtype)
    grad = torch.randn(150, 9)

    def grad_x(rows: Tensor) -> Tensor:
        leaf = x[rows].requires_grad_()
        (result,) = torch.autograd.grad(switchgear.gate(leaf, weight, float32=True), leaf, grad[rows])
        return result

    whole = grad_x(torch.arange(150))
    for size in (1, 2, 7, 64):
        rows = torch.randperm(150)[:size]
        assert torch.equal(grad_x(rows), whole[rows])


def test_bits_of_a_row_of_a_pathway_aware_score_do_not_depend_on_the_batch(isa: str) -> None:
    score = routing.GatingResidual(1030, 9)
    torch.nn.init.normal_(score.residual)
    x, before = torch.randn(50, 1030), torch.randn(50, 9)
    whole = score(x, switchgear.Context(fields={"previous_logits": before}))
    for rows in (slice(0, 1), slice(3, 10), slice(20, 49)):
        assert torch.equal(score(x[rows], switchgear.Context(fields={"previous_logits": before[rows]})), whole[rows])


def near_ties(num_tokens: int, num_experts: int, hidden_size: int) -> tuple[Tensor, Tensor]:
    """x and a weight such that all logits of a token are equal, but for the order in which their terms are added."""
    half = torch.randn(num_tokens, hidden_size // 2)
    x = torch.cat((half, half.flip(-1)), -1)
    row = torch.randn(hidden_size)
    shifts = torch.randint(2, (num_experts, hidden_size // 2)).bool()  # swaps k and its mirror image
    mirrored = torch.cat((shifts, shifts.flip(-1)), -1)
    return x, torch.where(mirrored, row.flip(-1), row)


@pytest.mark.parametrize("options", [{"top_k": 2}, switchgear.presets.batch_independent()], ids=["default", "preset"])
def test_strangers_flip_no_choice_between_near_ties(isa: str, options: dict[str, Any]) -> None:
    """200 sequences whose logits are equal but for rounding: their experts are the same alone and in a batch."""
    for case in range(20):
        torch.manual_seed(case)
        layer = switchgear.MoE(64, 8, 8, **options).eval()
        x, weight = near_ties(10, 8, 64)
        with torch.no_grad():
            assert layer.gate.weight is not None
            layer.gate.weight.copy_(weight)
            assert (layer.gate(x).router_logits.aminmax(dim=-1)[1] > layer.gate(x).router_logits.amin(-1)).any()
        testing.assert_batch_invariant(layer, x[:, None])


# ---- gate_route ------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize": True, "scale": 2.5, "score_function": "sigmoid", "selection_bias": torch.randn(12)},
    {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"},
]


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=["default", "deepseek", "groups"])
def test_gate_route_is_gate_and_route(
    backend: str, dtype: tuple[torch.dtype, torch.dtype], options: dict[str, Any]
) -> None:
    """Directly, through torch's dispatcher, and with gradients."""
    for shape, float32 in itertools.product([(7, 12, 40), (0, 12, 5), (200, 12, 33)], (False, True)):
        x, weight, bias = tensors(shape, dtype)
        logits = switchgear.gate(x, weight, bias, float32=float32)
        wanted = switchgear.route(logits, 3, **options)
        leaf = x.clone().requires_grad_()
        for rows in (x, leaf):
            routing = gate_route(rows, weight, 3, bias=bias, float32=float32, **options)
            for got, want in zip(routing[:3], wanted[:3], strict=True):
                assert torch.equal(got, want)
        given = {"score_function": "softmax", "normalize": False, "scale": 1.0, "selection_bias": None}
        values = {**given, "num_groups": 1, "topk_groups": 1, "group_score": "max", **options}
        selection_bias = values.pop("selection_bias")
        outputs = ops.gate_route(x, weight, bias, selection_bias, float32, 3, *values.values())
        for got, want in zip(outputs, (logits, *wanted[:2]), strict=True):
            assert torch.equal(got, want)


def test_router_gives_the_same_with_gradients(backend: str) -> None:
    for float32, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        router = Router(24, 8, 2, normalize=True, bias=True, float32=float32, dtype=dtype)
        x = torch.randn(9, 24).to(dtype)
        trained = router(x)
        with torch.no_grad():
            plain = router(x)
        assert trained.router_logits.dtype == (torch.float32 if float32 else dtype)
        for got, want in zip(trained[:3], plain[:3], strict=True):
            assert torch.equal(got, want)
        trained.topk_weights[:, 0].sum().backward()
        assert router.weight is not None
        assert router.weight.grad is not None
        assert router.weight.grad.abs().sum() > 0


def test_router_keeps_a_float32_weight() -> None:
    """Logits have the dtype of the weight; x is not rounded to it, nor it to that of x."""
    router, x = Router(24, 8, 2), torch.randn(9, 24).bfloat16()
    logits = router(x).router_logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, nn.functional.linear(x.float(), router.weight))


def test_autocast(backend: str) -> None:
    x, weight, bias = tensors((6, 5, 40), (torch.float32, torch.float32))
    rounded = [tensor.bfloat16() for tensor in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(switchgear.gate(x, weight, bias), switchgear.gate(*rounded))
        assert torch.equal(gate_route(x, weight, 2, bias=bias).router_logits, switchgear.gate(*rounded))
        logits = switchgear.gate(x, weight, bias, float32=True)
    assert torch.equal(logits, switchgear.gate(x, weight, bias))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "name", "changes"),
    [
        (ValueError, "weight", {"weight": torch.randn(3, 9)}),
        (ValueError, "weight", {"weight": torch.randn(8)}),
        (ValueError, "bias", {"bias": torch.randn(4)}),
        (ValueError, "x", {"x": torch.randn(2, 3, 0)}),
        (TypeError, "x", {"x": torch.ones(5, 8, dtype=torch.int64)}),
        (TypeError, "weight", {"weight": torch.randn(3, 8).half()}),
        (TypeError, "bias", {"bias": torch.randn(3).bfloat16()}),
        (ValueError, "weight", {"weight": torch.randn(0, 8)}),
    ],
)
def test_bad_input(backend: str, error: type[Exception], name: str, changes: dict[str, Tensor]) -> None:
    arguments = {"x": torch.randn(5, 8), "weight": torch.randn(3, 8), "bias": torch.randn(3), **changes}
    with raises(error, name):
        switchgear.gate(**arguments)
    with raises(error, name):
        gate_route(top_k=2, **arguments)


def test_bad_options_of_gate_route(backend: str) -> None:
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    for top_k in (0, 4, -1):
        with raises(ValueError, "top_k"):
            gate_route(x, weight, top_k)
    with raises(ValueError, "selection_bias"):
        gate_route(x, weight, 2, selection_bias=torch.randn(4))
