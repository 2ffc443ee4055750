# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import switchgear
from errors import raises
from switchgear import ops, reference, testing
from switchgear.testing import CASES, Bounded, Case, GluOptions, Layer, assert_close, make_layer

pytestmark = pytest.mark.in_turns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADS = ("x", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias", "topk_weights")
DEFAULT = GluOptions()
SMALL = Case("small", 9, 2, 4, 14, 6, "holes")

# Every activation, gated and plain if possible, with each layout of gate and up, and with a limit that takes effect.
OPTIONS = [
    GluOptions(activation, gated, interleaved, 1.702, limit)
    for activation, (gated, interleaved), limit in itertools.product(
        reference.ACTIVATIONS, ((True, False), (True, True), (False, False)), (0.0, 0.75)
    )
    if gated or activation != "swiglu_oai"
]


def call(layer: Layer, options: GluOptions = DEFAULT, **changes: Any) -> Tensor:
    keywords = {**options._asdict(), "limit": options.limit or None}
    keywords |= {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias, **changes}
    return switchgear.moe(layer.x, layer.gate_up_proj, layer.down_proj, layer.topk_ids, layer.topk_weights, **keywords)


def leaves(layer: Layer) -> Layer:
    """The layer with float tensors that require gradients."""
    return Layer(*(t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in layer))


def differentiable(layer: Layer) -> tuple[Tensor | None, ...]:
    """The differentiable tensors, in the order of GRADS."""
    return (*layer[:5], layer.topk_weights)


def gradients(layer: Layer, grad_y: Tensor, options: GluOptions = DEFAULT) -> list[Tensor | None]:
    layer = leaves(layer)
    call(layer, options).backward(grad_y)
    return [None if t is None else t.grad for t in differentiable(layer)]


class Problem(NamedTuple):
    """A layer, the gradient of its result, and the expected results."""

    layer: Layer
    grad_y: Tensor
    h: Tensor  # what forward saves for backward
    y_bound: Bounded
    h_bound: Bounded
    grad_bounds: tuple[Bounded, ...]


@cache
def problem(case: Case, dtype: torch.dtype, options: GluOptions, bias: bool, transposed: bool) -> Problem:
    layer = make_layer(case, dtype, gated=options.gated, bias=bias, transposed=transposed)
    grad_y = torch.randn(layer.x.shape, dtype=torch.float64).to(dtype)
    y_bound, h_bound = testing.moe_forward(layer, options)
    h = h_bound.value.to(dtype)
    return Problem(layer, grad_y, h, y_bound, h_bound, testing.moe_backward(grad_y, h, layer, options))


def check(layer: Layer, grad_y: Tensor, h: Tensor, y_bound: Bounded, h_bound: Bounded, grad_bounds: Any, options: Any):
    """Forward and backward within their bounds; exactly zero where no token contributed."""
    computed_y, computed_h = ops.moe_forward(*layer.arguments(), *options, True)
    assert_close(computed_h, h_bound, "h")
    assert_close(computed_y, y_bound, "y")
    assert torch.equal(computed_y, call(layer, options)), "y depends on whether h is kept"

    grads = ops.moe_backward(grad_y, layer.x, h, *layer.arguments()[1:], *options, [True] * 6)[:6]
    idle = torch.bincount(layer.topk_ids[layer.topk_ids >= 0], minlength=layer.gate_up_proj.shape[0]) == 0
    for name, tensor, grad, bound in zip(GRADS, differentiable(layer), grads, grad_bounds, strict=True):
        if tensor is None:
            assert grad.numel() == 0
            continue
        assert grad.dtype == tensor.dtype
        assert_close(grad, bound, f"gradient of {name}")
        if name not in ("x", "topk_weights"):
            assert grad.stride() == torch.empty_like(tensor).stride()
            assert not grad[idle].any(), f"{name}: an expert without tokens got a gradient"
    assert not grads[-1][layer.topk_ids < 0].any()


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    check(*problem(case, dtype, DEFAULT, True, False), DEFAULT)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_options(backend: str, options: GluOptions) -> None:
    check(*problem(SMALL, torch.float32, options, False, False), options)
    check(*problem(SMALL, torch.bfloat16, options, True, True), options)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.some(8)
def test_gradcheck(case: Case) -> None:
    """The formulas of the reference in float64, for every argument; small shapes with the routing of the case."""
    small = case._replace(
        num_tokens=min(case.num_tokens, 6), hidden_size=min(case.hidden_size, 4), intermediate_size=2,
        num_experts=min(case.num_experts, 5), top_k=min(case.top_k, 4),
    )  # fmt: skip
    layer = make_layer(small, torch.float64, bias=True)
    tensors = [t for t in differentiable(leaves(layer)) if t is not None]
    assert torch.autograd.gradcheck(lambda *t: call(Layer(*t[:5], layer.topk_ids, t[5])), tensors)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
@pytest.mark.some(12)
def test_gradcheck_options(options: GluOptions) -> None:
    layer = make_layer(Case("tiny", 4, 2, 3, 3, 2), torch.float64, gated=options.gated, bias=True, transposed=True)
    tensors = [t for t in differentiable(leaves(layer)) if t is not None]
    assert torch.autograd.gradcheck(lambda *t: call(Layer(*t[:5], layer.topk_ids, t[5]), options), tensors)


def test_definition(backend: str) -> None:
    """Against the formula, token by token, written without the library."""
    layer = make_layer(Case("definition", 5, 2, 4, 8, 6), torch.float32)
    wanted = torch.zeros(5, 8, dtype=torch.float64)
    x, w1, w2, _, _, ids, weights = layer.double()
    for t, k in itertools.product(range(5), range(2)):
        gate, up = (w1[ids[t, k]] @ x[t]).chunk(2)
        wanted[t] += weights[t, k] * (w2[ids[t, k]] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(call(layer).double(), wanted, rtol=1e-4, atol=1e-5)


# ---- guarantees ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:7], ids=str)
def test_same_bits_for_any_number_of_threads(isa: str, case: Case, dtype: torch.dtype) -> None:
    layer, grad_y, *_ = problem(case, dtype, DEFAULT, True, False)
    expected = [call(layer), *gradients(layer, grad_y)]
    for num_threads in (2, 3, 8):
        torch.set_num_threads(num_threads)
        results = [call(layer), *gradients(layer, grad_y)]
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    layer = make_layer(Case("batch", 70, 2, 3, 75, 41), dtype)
    together = call(layer)
    for t in (0, 3, 41, 69):
        alone = layer._replace(x=layer.x[t : t + 1], topk_ids=layer.topk_ids[t : t + 1])
        alone = alone._replace(topk_weights=layer.topk_weights[t : t + 1])
        assert torch.equal(call(alone)[0], together[t])


def test_leading_dimensions_and_types_of_routing(backend: str) -> None:
    layer = make_layer(Case("leading", 12, 2, 4, 16, 8), torch.float32)
    wanted = call(layer)
    deep = layer._replace(
        x=layer.x.view(3, 4, 16),
        topk_ids=layer.topk_ids.long().view(3, 4, 2),
        topk_weights=layer.topk_weights.double().view(3, 4, 2),
    )
    assert torch.equal(call(deep), wanted.view(3, 4, 16))
    one = layer._replace(x=layer.x[0], topk_ids=layer.topk_ids[0], topk_weights=layer.topk_weights[0])
    assert call(one).shape == (16,)
    none = deep._replace(x=deep.x[:, :0], topk_ids=deep.topk_ids[:, :0], topk_weights=deep.topk_weights[:, :0])
    assert call(none).shape == (3, 0, 16)


def test_strided_arguments(backend: str) -> None:
    """Rows at any distance, columns of a wider matrix, weights that are part of a larger tensor, expanded gradients."""
    layer = make_layer(Case("strided", 10, 2, 4, 16, 8), torch.float32)
    wanted, grads = call(layer), gradients(layer, torch.ones(10, 16))
    wide = torch.zeros(10, 40)
    wide[:, 3:19] = layer.x
    stacked = torch.zeros(4, 40, 16)
    stacked[:, 5:21] = layer.gate_up_proj
    strided = layer._replace(
        x=wide[:, 3:19], gate_up_proj=stacked[:, 5:21], topk_ids=layer.topk_ids.t().contiguous().t(),
        topk_weights=layer.topk_weights.t().contiguous().t(),
    )  # fmt: skip
    assert torch.equal(call(strided), wanted)
    for a, b in zip(gradients(strided, torch.ones(1, 1).expand(10, 16)), grads, strict=True):
        assert a is b is None or torch.equal(a, b)
    every_second = layer.x.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(call(layer._replace(x=every_second)), wanted)


def test_only_wanted_gradients_are_computed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(SMALL, torch.float32, bias=True)
    everything = gradients(layer, torch.ones_like(layer.x))
    asked: list[list[bool]] = []
    backward = ops.layer_backward
    monkeypatch.setattr(ops, "layer_backward", lambda *args: asked.append(list(args[4][:6])) or backward(*args))
    for index, name in enumerate(GRADS):
        one = layer._replace(**{name: getattr(layer, name).detach().requires_grad_()})
        call(one).sum().backward()
        assert asked.pop() == [other == name for other in GRADS]
        assert torch.equal(getattr(one, name).grad, everything[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [[], [2], [0, 3]], ids=str)
def test_gradients_of_some_experts(backend: str, experts: list[int], dtype: torch.dtype) -> None:
    """The projections' and biases' gradients of the listed experts alone, with the bits that they have among all."""
    listed = torch.tensor(experts, dtype=torch.int32)
    for transposed in (False, True):
        layer, grad_y, h, *_ = problem(SMALL, dtype, DEFAULT, True, transposed)
        args = (grad_y, layer.x, h, *layer.arguments()[1:], *DEFAULT, [True] * 6)
        for name, all_of, some in zip(
            GRADS, ops.moe_backward(*args)[:6], ops.moe_backward(*args, experts=listed)[:6], strict=True
        ):
            wanted = all_of if name in ("x", "topk_weights") else all_of[experts]
            assert torch.equal(some, wanted), name
            assert some.stride() == torch.empty_like(wanted).stride() or not experts
    with raises(ValueError):
        ops.moe_backward(*args, experts=torch.tensor([4], dtype=torch.int32))


def test_backward_keeps_x_h_and_arguments_alone(backend: str) -> None:
    layer = leaves(make_layer(SMALL, torch.float32))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(layer)
    arguments = {t.data_ptr() for t in layer if t is not None}
    others = [t.shape for t in kept if t.data_ptr() not in arguments]
    assert others == [(SMALL.num_tokens * SMALL.top_k, 2 * SMALL.intermediate_size)]


def test_no_gradient_asked_for(backend: str) -> None:
    layer = leaves(make_layer(SMALL, torch.float32))
    with torch.no_grad():
        assert call(layer).grad_fn is None
    with torch.inference_mode():
        assert not call(layer).requires_grad
    assert call(make_layer(SMALL, torch.float32)).grad_fn is None


def test_second_derivatives_raise(backend: str) -> None:
    layer = leaves(make_layer(SMALL, torch.float32))
    (grad,) = torch.autograd.grad(call(layer).sum(), layer.x, create_graph=True)
    with raises(RuntimeError):
        grad.sum().backward()


def test_autocast(backend: str) -> None:
    layer = leaves(make_layer(SMALL, torch.float32, bias=True))
    low = Layer(*(t.detach().bfloat16() if t is not None and t.is_floating_point() else t for t in layer))
    low = low._replace(topk_weights=layer.topk_weights.detach())
    with torch.autocast("cpu", torch.bfloat16):
        y = call(layer)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call(low))
    y.backward(torch.ones_like(y))
    for tensor, grad in zip(differentiable(layer), gradients(low, torch.ones_like(y)), strict=True):
        assert tensor.grad.dtype == torch.float32
        assert torch.equal(tensor.grad, grad.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert call(layer.double()).dtype == torch.float64


def test_autocast_casts_floating_tensors_alone(backend: str) -> None:
    layer = make_layer(SMALL, torch.float32, bias=True)
    for name, dtype in {"x": torch.int32, "gate_up_proj": torch.int8, "down_bias": torch.complex64}.items():
        wrong = layer._replace(**{name: getattr(layer, name).to(dtype)})
        with raises(TypeError, name), torch.autocast("cpu", torch.bfloat16):
            call(wrong)


def test_float64_runs_on_the_reference() -> None:
    layer = make_layer(SMALL, torch.float64, bias=True)
    with switchgear.use_backend("native"):
        y = call(layer)
    assert y.dtype == torch.float64
    x, *others = layer.arguments()
    assert torch.equal(y, reference.moe_forward(x, reference.Layer(*others, *DEFAULT), False)[0])


# ---- errors --------------------------------------------------------------------------------------------------------


def test_a_matrix_is_no_stack_of_experts(backend: str) -> None:
    """Where gradients are needed, too. The op takes lists of matrices, of which a matrix alone would be one."""
    x, ids, weights = torch.randn(3, 20), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    gate_up_proj, down_proj = torch.randn(1, 2, 20), torch.randn(20, 1)
    for trained in (False, True):
        with raises(ValueError, "down_proj"):
            switchgear.moe(x.clone().requires_grad_(trained), gate_up_proj, down_proj, ids, weights)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(9, 13)}, ValueError, "x"),
        ({"down_proj": torch.zeros(4, 14, 7)}, ValueError, "down_proj"),
        ({"gate_up_proj": torch.zeros(4, 11, 14)}, ValueError, "gate_up_proj"),
        ({"gate_up_proj": torch.zeros(12, 14)}, ValueError, "gate_up_proj"),
        ({"gate_up_bias": torch.zeros(3, 12)}, ValueError, "gate_up_bias"),
        ({"down_bias": torch.zeros(4, 14).bfloat16()}, TypeError, "down_bias"),
        ({"down_proj": torch.zeros(4, 14, 6).half()}, TypeError, "down_proj"),
        ({"topk_ids": torch.full((9, 2), 4)}, ValueError, "topk_ids"),
        ({"topk_ids": torch.full((9, 2), -2)}, ValueError, "topk_ids"),
        ({"topk_ids": torch.full((9, 2), 2**32)}, ValueError, "topk_ids"),
        ({"topk_ids": torch.zeros(8, 2).int()}, ValueError, "topk_ids"),
        ({"topk_ids": torch.zeros(9, 2)}, TypeError, "topk_ids"),
        ({"topk_weights": torch.zeros(9, 3)}, ValueError, "topk_weights"),
        ({"topk_weights": torch.zeros(9, 2).int()}, TypeError, "topk_weights"),
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"activation": "swiglu_oai", "gated": False, "gate_up_proj": torch.zeros(4, 6, 14)}, ValueError, "activation"),
        ({"limit": 0.0}, ValueError, "limit"),
        ({"limit": -1.0}, ValueError, "limit"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"x": [1.0]}, TypeError, "x"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = make_layer(SMALL, torch.float32)
    tensors = {name: value for name, value in changes.items() if name in Layer._fields[:3] + Layer._fields[5:]}
    options = {name: value for name, value in changes.items() if name not in tensors}
    with raises(error, message):
        call(layer._replace(**tensors), **options)
