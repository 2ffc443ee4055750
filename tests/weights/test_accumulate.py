# SPDX-License-Identifier: BSD-3-Clause
"""moe_accumulate: waves of experts, each added to the same float32 sums, are one call of moe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from form_cases import FORM_CASES, E, FormCase, forms, in_records, same_bits
from torch import Tensor

import switchgear
from errors import raises
from switchgear.functional import moe_accumulate
from switchgear.weights import AdaptedWeight, Plain, SelectedWeight, Weight, encode

PLAIN = FormCase(Plain(), (torch.bfloat16, torch.float32, torch.float16), 0)
WAVES = ([(0, 5)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [(0, 2), (2, 2), (2, 5)])


def layer_of(case: FormCase, dtype: torch.dtype) -> tuple[Weight, Weight, tuple[Tensor, Tensor]]:
    hidden, inner = case.hidden_size, case.intermediate_size
    first = encode((torch.randn(E, 2 * inner, hidden) / 8).to(dtype), case.form, parts=2)
    second = encode((torch.randn(E, hidden, inner) / 8).to(dtype), case.form)
    return first, second, (torch.randn(E, 2 * inner).to(dtype), torch.randn(E, hidden).to(dtype))


def only(topk_ids: Tensor, wave: tuple[int, int]) -> Tensor:
    return topk_ids.masked_fill((topk_ids < wave[0]) | (topk_ids >= wave[1]), -1)


def accumulated(waves: Any, x: Tensor, weights: Any, topk_ids: Tensor, topk_weights: Tensor, **options: Any) -> Tensor:
    sums = torch.zeros(x.shape, dtype=torch.float32)
    for wave in waves:
        pair = weights(wave) if callable(weights) else weights
        assert moe_accumulate(sums, x, *pair, only(topk_ids, wave), topk_weights, **options) is sums
    return sums


@pytest.mark.parametrize("case", [*FORM_CASES, PLAIN], ids=str)
@pytest.mark.some(10)
def test_waves_are_one_call(isa: str, case: FormCase) -> None:
    """Also if only a wave's experts are in memory, each in a record of an arena, and other records are garbage."""
    for dtype in case.dtypes:
        first, second, biases = layer_of(case, dtype)
        named = {"gate_up_bias": biases[0], "down_bias": biases[1]}
        for num_tokens in (0, 2, 40):
            x, _, topk_weights = case.inputs(num_tokens, dtype)
            topk_ids = torch.randint(-1, E, topk_weights.shape, dtype=torch.int32)
            wanted = switchgear.moe(x, first, second, topk_ids, topk_weights, **named)

            def resident(wave: tuple[int, int], pair: tuple[Weight, Weight] = (first, second)) -> list[Weight]:
                """The wave's experts in the first slots; the others share one whose bytes are 0xff."""
                begin, end = wave
                slots = [expert - begin if begin <= expert < end else E for expert in range(E)]
                order = torch.arange(begin, end) if begin < end else torch.tensor([0])
                rest = torch.tensor(slots, dtype=torch.int32)
                return [in_records(weight.permuted(order), list(range(len(order))), E + 1, rest) for weight in pair]

            for waves in WAVES:
                for weights in ((first, second), resident):
                    sums = accumulated(waves, x, weights, topk_ids, topk_weights, **named)
                    assert same_bits(sums.to(dtype), wanted)


def test_the_order_is_ascending(isa: str) -> None:
    """Another order of waves rounds differently, so the tests above would detect one."""
    first, second, _ = layer_of(PLAIN, torch.float32)
    x, ids, weights = PLAIN.inputs(60, torch.float32)
    ids = torch.rand(60, E).argsort(-1)[:, :4].int()
    weights = torch.rand(60, 4)
    up, down = (accumulated(waves, x, (first, second), ids, weights) for waves in (WAVES[1], WAVES[1][::-1]))
    assert not same_bits(up, down)
    assert same_bits(up, switchgear.moe(x, first, second, ids, weights))


@forms
@pytest.mark.some(4)
def test_on_the_reference(case: FormCase) -> None:
    first, second, _ = layer_of(case, torch.float32)
    x, ids, weights = case.inputs(11, torch.float32)
    with switchgear.backends.use_backend("reference"):
        sums = accumulated(WAVES[2], x, (first, second), ids, weights)
        torch.testing.assert_close(sums, switchgear.moe(x, first, second, ids, weights), rtol=1e-5, atol=1e-5)
    x, weights = x.double(), weights.double()
    sums = torch.zeros(x.shape, dtype=torch.float64)
    plain = first.plain().double(), second.plain().double()
    moe_accumulate(sums, x, *plain, ids, weights)
    torch.testing.assert_close(sums, switchgear.moe(x, *plain, ids, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [FORM_CASES[2], FORM_CASES[5], PLAIN], ids=str)
def test_adapters_autocast_and_leading_dimensions(isa: str, case: FormCase) -> None:
    first, second, _ = layer_of(case, torch.float32)
    adapted = [
        AdaptedWeight(weight, torch.randn(E, 3, weight.cols) / 8, torch.randn(E, weight.rows, 3) / 8, 0.5)
        for weight in (first, second)
    ]
    x, ids, weights = case.inputs(12, torch.float32)
    x, ids, weights = (tensor.view(3, 4, -1) for tensor in (x, ids, weights))
    wanted = switchgear.moe(x, *adapted, ids, weights)
    assert same_bits(accumulated(WAVES[1], x, adapted, ids, weights), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = switchgear.moe(x, *adapted, ids, weights)
        assert same_bits(accumulated(WAVES[1], x, adapted, ids, weights).bfloat16(), wanted)
    dropping = [weight._replace(dropout=0.5) for weight in adapted]
    with raises(ValueError, "dropout"):
        accumulated(WAVES[0], x, dropping, ids, weights)


def test_compile() -> None:
    torch.compiler.reset()
    first, second, _ = layer_of(FORM_CASES[2], torch.float32)
    x, ids, weights = FORM_CASES[2].inputs(12, torch.float32)

    def waves(x: Tensor) -> Tensor:
        return accumulated(WAVES[2], x, (first, second), ids, weights)

    with torch.no_grad():
        assert same_bits(torch.compile(waves, fullgraph=True, backend="aot_eager")(x), waves(x))


def test_errors() -> None:
    first, second, _ = layer_of(FORM_CASES[2], torch.bfloat16)
    x, ids, weights = FORM_CASES[2].inputs(4)
    zeros, call = torch.zeros(4, 128), (first, second, ids, weights)
    with raises(TypeError, "sums"):
        moe_accumulate(zeros.bfloat16(), x, *call)
    with raises(ValueError):
        moe_accumulate(zeros[:3], x, *call)
    with raises(ValueError, "sums"):
        moe_accumulate(torch.zeros(128, 4).mT, x, *call)
    with raises(ValueError, "sums"):
        moe_accumulate(torch.zeros(2, 2, 256)[..., :128], x.view(2, 2, 128), first, second, ids, weights)
    with raises(ValueError, "sums"):
        moe_accumulate(zeros, x, first, second, ids, zeros.flatten()[:8].view(4, 2))
    with raises(ValueError, "topk_ids"):
        moe_accumulate(zeros, x, first, second, ids + E, weights)
    with raises(ValueError):
        moe_accumulate(zeros, x.clone().requires_grad_(), *call)
    plain, trained = first.plain(), torch.tensor([1], dtype=torch.int32)
    with raises(ValueError, "gate_up_proj"):
        moe_accumulate(zeros, x, plain[0], second, ids, weights)
    with raises(ValueError):
        moe_accumulate(zeros, x, SelectedWeight(plain, plain[1:2], trained), second, ids, weights)
    assert not zeros.any()
