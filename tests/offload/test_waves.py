# SPDX-License-Identifier: BSD-3-Clause
"""Waves on the kernels of a GPU, which add rows in the order of choices and take no slots of plain weights: the bits of
the resident model. tests/simt runs them on the CPU; the reference has their roundings, not their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from memory_store import MemoryStore
from offload_cases import check, make_model, outputs_of, same_bits, steps_of
from queued_device import QueuedDevice
from torch import Tensor, nn

import switchgear
from backends_in_use import SIMT_DEVICES, backend_named
from errors import raises
from switchgear import offload
from switchgear.adapters import add_lora
from switchgear.offload import attach, waves

pytestmark = pytest.mark.in_turns

FORMS = ("plain", "int8", "int4", "fp8", "mxfp4", "nf4", "groups")


@pytest.fixture(params=["reference", *SIMT_DEVICES])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(waves, "adds_in_order_of_experts", lambda x: False)
    monkeypatch.setattr(attach, "find_device", lambda _: QueuedDevice(1, is_eager=True))
    with backend_named(request.param):
        yield request.param


def check_equal(backend: str, got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        if backend == "reference":
            # Rows are rounded to bfloat16 before they are added, here and not there: K + 1 roundings of 2^-9.
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
        else:
            assert same_bits(a, b)


def randomized(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("bias" in name or "lora" in name):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, gpu: str) -> None:
    model, steps = make_model(bias=form in ("plain", "int8")), steps_of(count=7)
    randomized(model)
    if form != "plain":
        switchgear.store(model, form)
    wanted = outputs_of(model, steps)
    for options in ({"slots": 1}, {"slots": 3, "shared": True}):
        with offload.offload(model, MemoryStore(model), **options) as cache:
            check_equal(gpu, outputs_of(model, steps), wanted)
            assert cache.statistics.misses > 0
            check(cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_dtypes_and_layouts(dtype: torch.dtype, gpu: str) -> None:
    options: dict[str, Any] = {"gated": False, "activation": "gelu"} if dtype is torch.float16 else {}
    model, steps = make_model(dtype=dtype, top_k=3, **options), steps_of(dtype, count=7)
    wanted = outputs_of(model, steps)
    with offload.offload(model, MemoryStore(model), slots=2):
        check_equal(gpu, outputs_of(model, steps), wanted)


@pytest.mark.parametrize("form", ["plain", "int4"])
def test_adapters(form: str, gpu: str) -> None:
    model, steps = make_model(bias=True), steps_of(count=7)
    if form != "plain":
        switchgear.store(model, form)
    add_lora(model, rank=8)
    randomized(model)
    wanted = outputs_of(model, steps)
    with offload.offload(model, MemoryStore(model), slots=1, shared=True):
        check_equal(gpu, outputs_of(model, steps), wanted)


def test_gradients(gpu: str) -> None:
    """Of stored weights; those of plain ones are refused by name."""
    model = make_model(dtype=torch.float32)
    x = steps_of(torch.float32, count=2)[1]
    inputs = x.clone().requires_grad_()
    with offload.offload(model, MemoryStore(model), slots=2):
        with raises(ValueError, "x"):
            model(inputs)
        with torch.no_grad():
            assert model(inputs).shape == x.shape
    switchgear.store(model, "int8")
    model(inputs).square().sum().backward()
    wanted, inputs.grad = inputs.grad, None
    with offload.offload(model, MemoryStore(model), slots=2, shared=True):
        model(inputs).square().sum().backward()
    assert inputs.grad is not None
    assert wanted is not None
    assert same_bits(inputs.grad, wanted)
