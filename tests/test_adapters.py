# SPDX-License-Identifier: BSD-3-Clause
"""AdaptedWeight: a projection with an adapter, W + scale_e · B_e[:, :r_e] · A_e[:r_e], against loops in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import switchgear
from switchgear import ops, reference
from switchgear.ops import GluOptions
from switchgear.testing import Case, Layer, make_layer
from switchgear.weights import AdaptedWeight

DEFAULT = GluOptions()
OPTIONS = (
    DEFAULT,
    GluOptions("gelu", gated=False),
    GluOptions("swiglu_oai", interleaved=True, alpha=1.5, limit=2.0),
)
CASES = (
    Case("small", 9, 2, 5, 20, 12),
    Case("wider_than_panels", 40, 3, 4, 136, 72, "holes"),
    Case("few", 300, 2, 4, 40, 24, "few"),
    Case("one_token", 1, 2, 8, 64, 32),
    Case("one_expert", 7, 1, 1, 32, 24),
    Case("no_tokens", 0, 2, 8, 64, 32),
    Case("all_sizes_one", 1, 1, 1, 1, 1),
)
SMALL = CASES[0]


class Adapted(NamedTuple):
    """A layer and the adapters of both projections."""

    layer: Layer
    adapters: tuple[AdaptedWeight, AdaptedWeight]

    def leaves(self) -> list[Tensor]:
        """x, topk_weights, the biases, and a and b of both adapters."""
        layer, (first, second) = self
        tensors = (
            layer.x,
            layer.topk_weights,
            layer.gate_up_bias,
            layer.down_bias,
            first.a,
            first.b,
            second.a,
            second.b,
        )
        return [tensor for tensor in tensors if tensor is not None]


NAMES = ("x", "topk_weights", "gate_up_bias", "down_bias", "A_gu", "B_gu", "A_d", "B_d")


def make(
    case: Case, dtype: torch.dtype, rank: int, *, ragged: bool = False, dropout: float = 0.0, gated: bool = True
) -> Adapted:
    layer = make_layer(case, dtype, gated=gated, bias=True)

    def adapted(weight: Tensor) -> AdaptedWeight:
        experts, rows, columns = weight.shape
        a = (torch.randn(experts, rank, columns, dtype=torch.float64) / math.sqrt(columns)).to(dtype)
        b = (torch.randn(experts, rows, rank, dtype=torch.float64) / math.sqrt(rank)).to(dtype)
        scale: float | Tensor = 0.75
        ranks = None
        if ragged:
            scale, ranks = torch.randn(experts), torch.arange(experts).int().remainder(rank + 1).flip(0)
        return AdaptedWeight(weight, a, b, scale, ranks, dropout)

    return Adapted(layer, (adapted(layer.gate_up_proj), adapted(layer.down_proj)))


def call(adapted: Adapted, options: GluOptions = DEFAULT) -> Tensor:
    layer = adapted.layer
    keywords: dict[str, Any] = options.keywords()
    return switchgear.moe(
        layer.x, *adapted.adapters, layer.topk_ids, layer.topk_weights, gate_up_bias=layer.gate_up_bias,
        down_bias=layer.down_bias, **keywords,
    )  # fmt: skip


def doubled(adapted: Adapted) -> Adapted:
    """The same numbers in float64, as leaves."""

    def double(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().double().requires_grad_()

    layer = Layer(*(t if t is not None and not t.is_floating_point() else double(t) for t in adapted.layer))
    adapters = tuple(
        weight._replace(weight=proj, a=double(weight.a), b=double(weight.b))
        for weight, proj in zip(adapted.adapters, (layer.gate_up_proj, layer.down_proj), strict=True)
    )
    return Adapted(layer, (adapters[0], adapters[1]))


def loop(adapted: Adapted, options: GluOptions, seed: Tensor | None = None) -> Tensor:
    """y by a loop over tokens and choices, for autograd in float64."""
    layer, both = adapted
    slots = reference.plan(layer.topk_ids, layer.gate_up_proj.shape[0])[2]

    def times(row: Tensor, expert: int, projection: int, slot: int) -> Tensor:
        weight = both[projection]
        rank = weight.a.shape[1] if weight.ranks is None else int(weight.ranks[expert])
        scale = float(weight.scale[expert]) if isinstance(weight.scale, Tensor) else weight.scale
        masked = row
        if weight.dropout:
            assert seed is not None
            kept = reference.keeps(seed, projection, slots.numel(), len(row), weight.dropout)[slot]
            masked, scale = row * kept, scale / (1 - weight.dropout)
        low = weight.a[expert, :rank] @ masked
        assert isinstance(weight.weight, Tensor)
        return weight.weight[expert] @ row + scale * (weight.b[expert, :, :rank] @ low)

    rows = []
    for t, ids in enumerate(layer.topk_ids.tolist()):
        total = torch.zeros(layer.x.shape[1], dtype=torch.float64)
        for k, expert in enumerate(ids):
            if expert < 0:
                continue
            slot = int(slots[t, k])
            h = times(layer.x[t], expert, 0, slot)
            if layer.gate_up_bias is not None:
                h = h + layer.gate_up_bias[expert]
            y = times(switchgear.glu(h[None], **options.keywords())[0], expert, 1, slot)
            if layer.down_bias is not None:
                y = y + layer.down_bias[expert]
            total = total + layer.topk_weights[t, k] * y
        rows.append(total)
    if not rows:
        return torch.stack([leaf.sum() for leaf in adapted.leaves()]).sum() * torch.zeros(0, layer.x.shape[1])
    return torch.stack(rows)


def distance(got: Tensor, wanted: Tensor) -> float:
    """The largest difference in units of the largest number."""
    if not got.numel():
        return 0.0
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-6))


# Sums of up to 200 numbers of about equal size, each rounded a few times on the way.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def check(adapted: Adapted, options: GluOptions = DEFAULT, *, fixed_seed: Tensor | None = None) -> None:
    exact = doubled(adapted)
    wanted = loop(exact, options, fixed_seed)
    grad_y = torch.randn(wanted.shape, dtype=torch.float64)
    leaves = adapted.leaves()
    for leaf in leaves:
        leaf.requires_grad_()
    y = call(adapted, options)
    bound = BOUNDS[y.dtype]
    assert y.dtype is adapted.layer.x.dtype
    assert distance(y, wanted) < bound
    with torch.no_grad():
        if fixed_seed is None:
            assert torch.equal(call(adapted, options), y)
    grads = torch.autograd.grad(y, leaves, grad_y.to(y.dtype))
    wanted_grads = torch.autograd.grad(wanted, exact.leaves(), grad_y.to(y.dtype).double())
    for name, got, want in zip(NAMES, grads, wanted_grads, strict=True):
        assert got.shape == want.shape
        assert got.isfinite().all(), name
        assert distance(got, want) < bound, name
    for leaf in leaves:
        leaf.requires_grad_(False)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    check(make(case, dtype, 3))


@pytest.mark.parametrize("rank", [1, 8, 16, 65])
def test_ranks(backend: str, rank: int) -> None:
    check(make(SMALL, torch.float32, rank))
    check(make(SMALL, torch.bfloat16, rank, ragged=True))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.activation)
def test_options(backend: str, options: GluOptions) -> None:
    check(make(SMALL, torch.float32, 4, gated=options.gated), options)


def test_float64() -> None:
    check(make(SMALL, torch.float64, 5, ragged=True))
    check(make(CASES[4], torch.float64, 2))


def test_elements_past_a_rank_are_not_read(backend: str) -> None:
    adapted = make(SMALL, torch.float32, 6, ragged=True)
    for weight in adapted.adapters:
        assert weight.ranks is not None
        unused = torch.arange(6) >= weight.ranks[:, None]
        weight.a.masked_fill_(unused[:, :, None], math.nan)
        weight.b.masked_fill_(unused[:, None, :], math.nan)
    leaves = [tensor.requires_grad_() for tensor in adapted.leaves()]
    y = call(adapted)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    ranks = adapted.adapters[0].ranks
    assert ranks is not None
    unused = torch.arange(6) >= ranks[:, None]
    assert not grads[4][unused].any()
    assert not grads[5].mT[unused].any()
