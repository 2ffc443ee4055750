# SPDX-License-Identifier: BSD-3-Clause
"""Training of adapters with fewer slots than a step has experts: waves have the bits of the resident model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_store import MemoryStore
from offload_cases import check, make_model, same_bits
from torch import Tensor, nn

import switchgear
from switchgear import offload
from switchgear.adapters import add_lora
from switchgear.reference.layer import keeps, shift_seed

DTYPES = (torch.float32, torch.bfloat16)


def make(dtype: torch.dtype, form: str, dropout: float = 0.0, **options: Any) -> nn.Module:
    model = make_model(dtype=dtype, size=512 if form in ("panels", "compact") else 32, **options)
    if form != "plain":
        switchgear.store(model, form)
    add_lora(model, rank=2, dropout=dropout)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def steps_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, the gradients of x and those of all that trains."""
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    inputs = x.clone().requires_grad_()
    y = model(inputs)
    y.float().square().sum().backward()
    assert inputs.grad is not None
    return [y.detach(), inputs.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def check_bits(model: nn.Module, x: Tensor, slots: int, **options: Any) -> None:
    wanted = steps_of(model, x)
    with offload.offload(model, MemoryStore(model), slots=slots, **options) as cache:
        got = steps_of(model, x)
        assert len(got) == len(wanted) > 8
        assert all(map(same_bits, got, wanted))
        check(cache)


FORMS = ("plain", "panels", "int8", "int4", "fp8", "mxfp4", "nf4", "groups")
CASES = [(form, dtype) for form in FORMS for dtype in DTYPES]


@pytest.mark.parametrize(("form", "dtype"), [*CASES, ("compact", torch.bfloat16)])
def test_the_bits_of_the_resident_model(form: str, dtype: torch.dtype) -> None:
    model = make(dtype, form, bias=form == "int8")
    width = 512 if form in ("panels", "compact") else 32
    for slots, count in ((1, 5), (2, 40), (3, 40)):  # all tokens in each wave; those that have choices in it
        check_bits(model, torch.randn(1, count, width).to(dtype), slots)


def test_more_choices_than_slots_and_many_tokens() -> None:
    model = make(torch.bfloat16, "int4", num_experts=8, top_k=5)
    check_bits(model, torch.randn(1, 700, 32).bfloat16(), 1, shared=True)


@pytest.mark.parametrize("count", [7, 40])
def test_dropout(count: int) -> None:
    """The masks are those of one call, whose slots waves share."""
    check_bits(make(torch.float32, "int8", dropout=0.3), torch.randn(1, count, 32), 2)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
def test_a_shifted_seed(seed: int) -> None:
    whole = torch.tensor([seed])
    for projection in (0, 1):
        wanted = keeps(whole, projection, 50, 16, 0.5)[13:]
        assert torch.equal(keeps(shift_seed(whole, 13), projection, 37, 16, 0.5), wanted)


def test_each_expert_is_read_once_per_direction() -> None:
    model = make(torch.float32, "int8", num_layers=1)
    store = MemoryStore(model)
    with offload.offload(model, store, slots=1) as cache:
        steps_of(model, torch.randn(1, 40, 32))
        assert cache.statistics.misses + cache.statistics.hits == 2 * 6
        assert len(store.reader.begun) <= 1 + 2 * 6  # one more at the start
