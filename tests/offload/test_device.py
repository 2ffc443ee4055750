# SPDX-License-Identifier: BSD-3-Clause
"""The calls of torch.cuda, in their order, where there is no GPU; and on one, the bits of the resident model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_store import MemoryStore
from offload_cases import check, make_model, outputs_of, same_bits, steps_of
from queued_device import QueuedDevice, QueuedStream
from torch import Tensor

import switchgear
from errors import raises
from switchgear import MoE, offload
from switchgear.offload import HotColdSplit, NextGate, attach, hot_cold
from switchgear.offload.device import CudaDevice, find_device
from switchgear.offload.store_records import PAGE


class Calls:
    """Stands in for torch.cuda. copies: the stream and the bytes of each asynchronous copy."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.queued = QueuedDevice(4, is_eager=True)
        self.copies: list[tuple[str, int]] = []
        self.pinned = 0
        empty, copy = torch.empty, Tensor.copy_

        def make(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            made = empty(*args, **options)
            self.pinned += made.nbytes if pin_memory else 0
            return made

        def copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if non_blocking:
                self.copies.append((self.queued.current.name, to.nbytes))
            return copy(to, source)

        @contextmanager
        def stream(chosen: QueuedStream) -> Iterator[None]:
            with self.queued.on_stream(chosen):
                yield

        patch.setattr(torch, "empty", make)
        patch.setattr(Tensor, "copy_", copy_)
        patch.setattr(Tensor, "pin_memory", Tensor.clone)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        patch.setattr(torch.cuda, "Stream", lambda device: self.queued.copies)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.queued.current)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "synchronize", lambda device: self.queued.synchronize())
        patch.setattr(torch.cuda, "is_current_stream_capturing", self.queued.is_capturing)
        for module in (attach, hot_cold):
            patch.setattr(module, "find_device", lambda _: CudaDevice(torch.device("cpu")))


@torch.no_grad()
def test_records_are_copied_from_pinned_memory_on_the_copy_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    store = MemoryStore(model)
    record = store.layers["0.experts"].record_bytes
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        cache = offload.offload(model, store, slots=2, staging_slots=3)
        assert calls.pinned == 3 * record + PAGE
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        found = cache.statistics
        assert calls.copies.count(("copies", record)) == found.misses + 1  # one more was read at the start
        assert {call for call in calls.copies if call[0] != "copies"} == {("main", 6 * 4)}  # slots
        check(cache)
        calls.queued.is_in_capture = True
        with raises(RuntimeError):
            outputs_of(model, steps)
        calls.queued.is_in_capture = False
        cache.close()
    assert all(map(same_bits, outputs_of(model, steps), wanted))


def test_gradients_and_inference_in_turns(memory: str) -> None:
    """The cache was made in inference mode: its memory is written in both, and saved by autograd."""
    model = make_model()
    switchgear.store(model, "int8")
    x = steps_of(count=2)[1]

    def results() -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        model(inputs).float().square().sum().backward()
        assert inputs.grad is not None
        with torch.inference_mode():
            return [inputs.grad.clone(), *outputs_of(model, steps_of(count=4))]

    wanted = results()
    with torch.inference_mode():
        cache = offload.offload(model, MemoryStore(model), slots=2)
    for _ in range(3):
        assert all(map(same_bits, results(), wanted))
    assert cache.statistics.misses > 0


@torch.no_grad()
def test_hot_experts_are_copied_on_the_copy_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoE(16, 8, 8, 2)
    x = torch.randn(30, 16)
    wanted = moe(x)
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        moe.experts = HotColdSplit(moe.experts, "cpu", 8)
        torch.testing.assert_close(moe(x), wanted, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in calls.copies]
    assert names.index("main") < names.index("copies")  # rows leave before the hot part is queued
    assert names.count("copies") >= 2


def test_devices() -> None:
    assert find_device(torch.device("cpu")) is None
    with raises(ValueError, "device"):
        find_device(torch.device("meta"))
    model = make_model()
    if not torch.cuda.is_available():
        with raises(ValueError, "device"):
            offload.offload(model, MemoryStore(model), slots=2, device="cuda:1")
    with raises(ValueError, "staging_slots"):
        offload.offload(model, MemoryStore(model), slots=2, staging_slots=1)
    wide = make_model(size=512)
    switchgear.store(wide, "compact")
    with raises(ValueError):
        offload.offload(wide, MemoryStore(wide), slots=2, device="cuda:0")


def test_x_on_another_device() -> None:
    model = make_model()
    with offload.offload(model, MemoryStore(model), slots=2):
        x = torch.empty(1, 32, dtype=torch.bfloat16, device="meta")
        ids, weights = torch.zeros(1, 1, dtype=torch.int32, device="meta"), torch.ones(1, 1, device="meta")
        with raises(ValueError, "x"):
            model[0].experts(x, ids, weights)  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["plain", "int4"])
@torch.no_grad()
def test_the_bits_of_the_resident_model_on_a_gpu(form: str, tmp_path: Path) -> None:
    model = make_model(3, size=256, num_experts=16).cuda()
    if form != "plain":
        switchgear.store(model, form)
    steps = [x.cuda() for x in steps_of(size=256, count=40)]
    wanted = outputs_of(model, steps)
    store = offload.write_store(model.cpu(), tmp_path / "experts", "as published" if form != "plain" else form)
    model.cuda()
    for options in (
        {"slots": 1},
        {"slots": 5, "shared": True},
        {"slots": 4, "prefetch": NextGate(model)},
        {"slots": 16},
    ):
        with offload.offload(model, store, **options) as cache:
            assert all(map(same_bits, outputs_of(model, steps), wanted))
            assert cache.is_inert == (options["slots"] == 16)
        assert all(map(same_bits, outputs_of(model, steps), wanted))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_hot_and_cold_on_a_gpu() -> None:
    moe = MoE(256, 128, 16, 2)
    x = torch.randn(200, 256)
    wanted = moe(x)
    experts, there = moe.experts, MoE(256, 128, 16, 2)
    there.load_state_dict(moe.state_dict())
    there.cuda()
    for threshold in (0, 20, 1000):
        there.experts = HotColdSplit(experts, "cuda", threshold)
        torch.testing.assert_close(there(x.cuda()).cpu(), wanted, rtol=1e-3, atol=1e-4)
