# SPDX-License-Identifier: BSD-3-Clause
"""Products with a SelectedWeight: the gradients of the trained experts are those slices of the whole gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import switchgear
from errors import raises
from switchgear.testing import Case, Layer, make_layer
from switchgear.weights import SelectedWeight

pytestmark = pytest.mark.in_turns

CASE = Case("selected", 13, 2, 5, 14, 6, "holes")
EXPERTS = [1, 2, 4]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def trained_of(layer: Layer) -> list[Tensor]:
    """Leaves: the trained slices of both projections and biases."""
    named = (layer.gate_up_proj, layer.down_proj, layer.gate_up_bias, layer.down_bias)
    return [leaf(tensor[EXPERTS]) for tensor in named if tensor is not None]


def moe_of(layer: Layer, x: Tensor, topk_weights: Tensor, trained: list[Tensor]) -> Tensor:
    experts = torch.tensor(EXPERTS, dtype=torch.int32)
    biases = trained[2:] if len(trained) > 2 else (None, None)
    first = SelectedWeight(layer.gate_up_proj, trained[0], experts, biases[0])
    second = SelectedWeight(layer.down_proj, trained[1], experts, biases[1])
    given = {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias}
    return switchgear.moe(x, first, second, layer.topk_ids, topk_weights, **given)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moe_has_the_gradients_of_the_whole(backend: str, dtype: torch.dtype, bias: bool, transposed: bool) -> None:
    layer = make_layer(CASE, dtype, bias=bias, transposed=transposed)
    trained, x, weights = trained_of(layer), leaf(layer.x), leaf(layer.topk_weights)
    y = moe_of(layer, x, weights, trained)
    grad_y = torch.randn(y.shape).to(dtype)
    y.backward(grad_y)

    whole = Layer(*(leaf(t) if t is not None and t.is_floating_point() else t for t in layer))
    given = {"gate_up_bias": whole.gate_up_bias, "down_bias": whole.down_bias}
    projections = whole.gate_up_proj, whole.down_proj
    wanted = switchgear.moe(whole.x, *projections, whole.topk_ids, whole.topk_weights, **given)
    wanted.backward(grad_y)
    assert torch.equal(y, wanted)
    assert torch.equal(x.grad, whole.x.grad)
    assert torch.equal(weights.grad, whole.topk_weights.grad)
    named = [t for t in (*projections, whole.gate_up_bias, whole.down_bias) if t is not None]
    for part, tensor in zip(trained, named, strict=True):
        assert torch.equal(part.grad, tensor.grad[EXPERTS])
    with torch.no_grad():
        assert torch.equal(moe_of(layer, x, weights, trained), y)


@pytest.mark.parametrize("gathers", [False, True])
def test_grouped_gemm_has_the_gradients_of_the_whole(backend: str, gathers: bool) -> None:
    layer = make_layer(CASE, torch.float32, bias=True)
    plan = switchgear.plan(layer.topk_ids, 5)
    rows = layer.x if gathers else switchgear.permute(layer.x, plan)
    given: Any = {"token_indices": plan.token_indices} if gathers else {}
    experts = torch.tensor(EXPERTS, dtype=torch.int32)
    trained, bias = leaf(layer.gate_up_proj[EXPERTS]), leaf(layer.gate_up_bias[EXPERTS])
    x, whole_x, whole, whole_bias = (leaf(t) for t in (rows, rows, layer.gate_up_proj, layer.gate_up_bias))
    selected = SelectedWeight(layer.gate_up_proj, trained, experts, bias)
    out = switchgear.grouped_gemm(x, selected, plan.expert_offsets, bias=layer.gate_up_bias, **given)
    wanted = switchgear.grouped_gemm(whole_x, whole, plan.expert_offsets, bias=whole_bias, **given)
    grad = torch.randn(out.shape)
    out.backward(grad)
    wanted.backward(grad)
    assert torch.equal(out, wanted)
    assert torch.equal(x.grad, whole_x.grad)
    assert torch.equal(trained.grad, whole.grad[EXPERTS])
    assert torch.equal(bias.grad, whole_bias.grad[EXPERTS])


def test_one_selected_projection() -> None:
    """Runs stage by stage."""
    layer = make_layer(CASE, torch.float32)
    down = leaf(layer.down_proj[EXPERTS])
    second = SelectedWeight(layer.down_proj, down, torch.tensor(EXPERTS, dtype=torch.int32))
    y = switchgear.moe(layer.x, layer.gate_up_proj, second, layer.topk_ids, layer.topk_weights)
    torch.testing.assert_close(y, switchgear.moe(*layer[:3], *layer[5:]))
    y.sum().backward()
    assert down.grad.any()


def test_errors() -> None:
    layer = make_layer(CASE, torch.float32, bias=True)
    trained, experts = trained_of(layer), torch.tensor(EXPERTS, dtype=torch.int32)
    first = SelectedWeight(layer.gate_up_proj, trained[0], experts, trained[2])
    second = SelectedWeight(layer.down_proj, trained[1], experts, trained[3])
    others = (layer.topk_ids, layer.topk_weights)

    def call(first: SelectedWeight, second: SelectedWeight, **given: Any) -> None:
        biases = {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias} | given
        switchgear.moe(layer.x, first, second, *others, **biases)

    call(first, second)
    with raises(ValueError, "down_proj"):
        call(first, second._replace(trained=trained[1][:2]))
    with raises(ValueError, "down_proj"):
        call(first, second._replace(experts=torch.tensor([0, 2, 4], dtype=torch.int32)))
    with raises(ValueError, "gate_up_proj"):
        call(first._replace(weight=leaf(layer.gate_up_proj)), second)
    with raises(ValueError, "down_bias"):
        call(first, second, down_bias=leaf(layer.down_bias))
