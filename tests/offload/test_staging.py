# SPDX-License-Identifier: BSD-3-Clause
"""The order of reads, copies and kernels on a GPU, on streams that run late and in any order: every kernel finds the
records of its experts. staging_mistakes.py has mistakes that these tests must see."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from memory_store import MemoryReader, MemoryStore
from offload_cases import check, make_model
from queued_device import QueuedDevice
from staging_mistakes import MISTAKES, Mistake, planted
from torch import Tensor

import switchgear
from errors import raises
from switchgear import offload
from switchgear.offload import attach
from switchgear.offload.pool import Staging
from switchgear.offload.projections import Wave
from switchgear.offload.store_records import PAGE
from switchgear.weights import stored_of

FILES = ("pool.py", "cache.py")
E = 6


class AnyGuesses:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def predict(self, layer: int, hidden_states: Any, topk_ids: Any) -> list[tuple[int, int]]:
        return [(self.chance.randrange(3), self.chance.randrange(E)) for _ in range(self.chance.randrange(4))]

    def observe(self, layer: int, topk_ids: Any) -> None:
        pass


class Kernels:
    """Kernels that compare the records of their experts, when they run, with those of the store."""

    def __init__(self, model: torch.nn.Module, seed: int, chance: random.Random, **options: Any) -> None:
        self.device, self.chance, self.wrong, self.count = QueuedDevice(seed), chance, [], 0  # type: ignore[var-annotated]
        self.store = MemoryStore(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attach, "find_device", lambda _: self.device)
            self.offloaded = offload.offload(model, self.store, **options)
        self.cache = self.offloaded._cache
        self.reader = self.store.reader

    def call(self, index: int, topk_ids: Tensor, *, predicts: bool = True) -> None:
        layer = self.cache.layers[index]
        experts = sorted(set(topk_ids.flatten().tolist()) - {-1})
        done: list[int] = []

        def compute(waves: Iterator[Wave] | None) -> None:
            for wave in waves or (Wave(0, E - 1, True),):
                mine = [expert for expert in experts if wave.low <= expert <= wave.high]
                self._launch(index, mine)
                done.extend(mine)
                if self.chance.random() < 0.5:
                    self.device.go_on()

        layer.run(torch.zeros(len(topk_ids), 32), topk_ids, compute, predicts=predicts)
        assert done == experts

    def read_on(self) -> None:
        """Some reads in flight fill their buffers."""
        for ticket in list(self.reader.tickets):
            if self.chance.random() < 0.2:
                self.reader.fill(ticket)

    def _launch(self, index: int, experts: list[int]) -> None:
        layer, records = self.cache.layers[index], list(self.store.layers.values())[index]
        slots, arena = layer._tables[-1][0], layer.pool.arena
        weights = self.weights(index)

        def kernel() -> None:
            for expert in experts:
                self.count += 1
                begin, size = records.offsets[expert], records.sizes[expert]
                wanted = self.store.files[index][begin : begin + size]
                row = int(slots[expert])
                if not torch.equal(arena[row, :size], wanted):
                    self.wrong.append((index, expert))
                for weight, projection in zip(weights, (0, 1), strict=True):
                    if weight.records is not None:
                        first, bits = weight.records[row].tolist()
                        at = records._planes_of(projection, expert)
                        if (first - row * records.record_bytes // 64, bits) != at:
                            self.wrong.append((index, expert))

        self.device.current.run(kernel)

    def weights(self, index: int) -> Any:
        module = self.model_modules[index]
        return [weight.weight for weight in stored_of(module).weights(module)]

    @property
    def model_modules(self) -> list[Any]:
        return [attachment.target.module for attachment in self.offloaded._attachments]

    def finish(self) -> None:
        self.device.synchronize()
        assert not self.wrong
        check(self.offloaded)


def run_steps(seed: int, model: torch.nn.Module | None = None, steps: int = 50) -> Kernels:
    chance = random.Random(seed)
    options: dict[str, Any] = {"slots": 1 + seed % 4, "shared": bool(seed % 2), "staging_slots": 2 + seed % 3}
    if seed % 5:
        options |= {"prefetch": AnyGuesses(chance), "prefetch_slots": 1 + seed % 4}
    kernels = Kernels(make_model(3) if model is None else model, seed, chance, **options)
    other = kernels.device.other_stream()
    for step in range(steps):
        kernels.reader.late = chance.random() < 0.7
        ids = torch.randint(-1, E, (chance.choice((1, 1, 1, 4)), 2), dtype=torch.int32)
        predicts = chance.random() > 0.3
        stream = other if seed % 7 == 0 and chance.random() < 0.3 else kernels.device.streams[1]
        with kernels.device.on_stream(stream):
            kernels.read_on()
            kernels.call(step % 3 if chance.random() < 0.8 else chance.randrange(3), ids, predicts=predicts)
        check(kernels.offloaded)
    kernels.finish()
    return kernels


@pytest.mark.parametrize("seed", range(24))
def test_each_kernel_finds_its_records(seed: int) -> None:
    torch.manual_seed(seed)
    kernels = run_steps(seed)
    assert kernels.count > 50


@pytest.mark.parametrize("seed", range(4))
def test_experts_of_different_bits(seed: int) -> None:
    torch.manual_seed(seed)
    model = make_model(3, size=128)
    switchgear.store(model, "groups", bits=[1, 4, 2, 3, 4, 2], group_size=32)
    assert run_steps(seed, model).count > 50


def test_needed_reads_go_before_guesses() -> None:
    """Guesses take half of the buffers, and wait longer."""
    reader, arena = MemoryReader([torch.zeros(1 << 16, dtype=torch.uint8)]), torch.zeros(16, PAGE, dtype=torch.uint8)
    staging = Staging(reader, QueuedDevice(1), arena, 4)

    def submit(row: int, urgent: bool) -> int:
        return staging.submit((0, row * PAGE, PAGE, None), arena.data_ptr() + row * PAGE, urgent)

    for row in range(3):
        submit(row, urgent=False)
    needed = [submit(row, urgent=True) for row in range(3, 7)]
    late = submit(7, urgent=False)
    assert [offset // PAGE for _, offset, _ in reader.begun] == [0, 1, 3, 4]
    for ticket in needed:
        staging.wait(ticket, 1.0)
    assert [offset // PAGE for _, offset, _ in reader.begun][4:6] == [5, 6]
    staging.promote(late)
    staging.wait(late, 1.0)
    assert staging.cancel(3)  # the third guess, which has no buffer yet
    with raises(ValueError, "ticket"):
        staging.is_done(3)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.file in FILES], ids=lambda mistake: mistake.name)
def test_a_mistake_is_detected(mistake: Mistake) -> None:
    with planted(mistake):
        assert any(map(fails, range(24)))


def fails(seed: int) -> bool:
    try:
        test_each_kernel_finds_its_records(seed)
        if seed == 1:
            test_experts_of_different_bits(seed)
            test_needed_reads_go_before_guesses()
    except (AssertionError, KeyError, ValueError):
        return True
    return False
