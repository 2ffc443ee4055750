# SPDX-License-Identifier: BSD-3-Clause
"""Unused values cannot affect a token: NaN in padding rows, in weights of empty choices, in experts it did not choose.
And used values are not masked: NaN in gives NaN out."""

from __future__ import annotations

import pytest
import torch
from problems import ACTIVATIONS, DTYPES, equal_bits, on_kernels
from torch import Tensor

import switchgear
from switchgear.testing import Case, Layer, make_layer

CASE = Case("some", 40, 2, 6, 37, 21)


def gradients(layer: Layer, grad_y: Tensor) -> tuple[Tensor, ...]:
    """y, then the gradients of x, gate_up_proj, down_proj and topk_weights."""
    x, gate_up, down, _, _, ids, weights = layer
    leaves = tuple(t.detach().requires_grad_() for t in (x, gate_up, down, weights))
    y = switchgear.moe(*leaves[:3], ids, leaves[3])
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("content", [torch.nan, torch.inf, 3e38], ids=str)
def test_padding_rows_do_not_reach_tokens(backend: str, dtype: torch.dtype, content: float) -> None:
    """From router to output: y and grad_x of the tokens have the same bits as without padding."""
    layer = make_layer(CASE, dtype)
    gate = torch.randn(6, 37).to(dtype)
    padding = torch.arange(40) % 3 == 1
    x = torch.where(padding[:, None], torch.tensor(content).to(dtype), layer.x)
    logits = x @ gate.T

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        routing = switchgear.route(logits[rows], 2, normalize=True)
        assert (routing.topk_ids.sort(-1).values.diff() > 0).all()
        part = layer._replace(x=x[rows], topk_ids=routing.topk_ids, topk_weights=routing.topk_weights)
        y, grad_x, *_ = gradients(part, torch.ones_like(x[rows]))
        return y, grad_x

    everything, alone = run(torch.arange(40)), run((~padding).nonzero().squeeze(1))
    assert equal_bits([part[~padding] for part in everything], alone)
    assert alone[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_choices_are_ignored(backend: str, dtype: torch.dtype) -> None:
    """Weights of empty choices, tokens without choices, and unused experts may contain NaN: no number changes."""
    layer = make_layer(CASE._replace(pattern="holes"), dtype)
    layer.topk_ids[layer.topk_ids == 4] = -1
    layer.topk_ids[:5] = -1
    empty = layer.topk_ids < 0
    grad_y = torch.ones_like(layer.x)
    wanted = gradients(layer, grad_y)
    spoiled = Layer(*(None if t is None else t.clone() for t in layer))
    spoiled.topk_weights[empty] = torch.nan
    spoiled.x[:5] = torch.nan
    spoiled.gate_up_proj[4] = torch.nan
    spoiled.down_proj[4] = torch.nan
    for a, b in zip(gradients(spoiled, grad_y), wanted, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("limit", [None, 2.0])
def test_nan_is_not_hidden(backend: str, dtype: torch.dtype, gated: bool, limit: float | None) -> None:
    """No activation or clamp turns NaN into a number, forward or backward."""
    for activation in ACTIVATIONS:
        if activation == "swiglu_oai" and not gated:
            continue
        for column in range(6):
            h = torch.randn(3, 6).abs().add(0.1).to(dtype)
            h[1, column] = torch.nan
            h.requires_grad_()
            a = switchgear.glu(h, activation, gated=gated, limit=limit)
            (grad,) = torch.autograd.grad(a.sum(), h)
            hit = torch.zeros(a.shape, dtype=torch.bool)
            hit[1, column % a.shape[1]] = True
            assert torch.equal(a.isnan(), hit), activation
            assert grad[~h.isnan()].view(-1)[:1].isfinite().all()
            if activation != "relu":  # its slope is constant for any gate
                assert grad[1].isnan().any(), activation
