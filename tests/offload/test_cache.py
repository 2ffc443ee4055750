# SPDX-License-Identifier: BSD-3-Clause
"""A model whose experts are offloaded: the bits of the resident one, the hits of an independent simulator."""

from __future__ import annotations

import itertools

import pytest
import torch
from memory_store import MemoryStore
from offload_cases import check, make_model, outputs_of, same_bits, steps_of
from replayed import Replay, as_sets

import switchgear
from errors import raises
from switchgear import diagnostics, offload
from switchgear.offload import LFRU, LFU, LIFO, LRU, Accesses, FrequencyDistance, LeastStale

pytestmark = pytest.mark.usefixtures("memory")
POLICIES = (LRU(), LFU(), LFRU(), LIFO(), LeastStale(), FrequencyDistance())


@torch.no_grad()
def recorded(model: torch.nn.Module, steps: list[torch.Tensor]) -> tuple[list[torch.Tensor], Accesses]:
    """What the resident model answers, and which experts each step uses."""
    runs = []
    for x in steps:
        with diagnostics.collect(model) as choices:
            model(x)
        runs.append(Accesses.of(choices, prompt=None))
    return outputs_of(model, steps), Accesses.join(runs)


@torch.no_grad()
def test_row41_hits_are_those_of_an_independent_lru() -> None:
    """On a recorded run; the output has the bits of the resident model, and bytes are misses × record."""
    model, steps = make_model(), steps_of()
    wanted, accesses = recorded(model, steps)
    for slots, shared, policy in itertools.product((1, 2, 3, 5), (False, True), POLICIES):
        store = MemoryStore(model)
        cache = offload.offload(model, store, slots=slots, shared=shared, policy=policy)
        got = outputs_of(model, steps)
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True)), (slots, shared, policy)
        replay = Replay(policy.name, as_sets(accesses), slots, shared)
        found = cache.statistics
        assert [layer.hits for layer in found.layers] == replay.hits, (slots, shared, policy)
        assert [layer.misses for layer in found.layers] == replay.misses
        simulated = offload.simulate(accesses, policy, slots=slots, shared=shared)
        assert (found.hits, found.misses) == (simulated.hits, simulated.misses)
        record = store.layers["0.experts"].record_bytes
        assert found.bytes == found.misses * record == store.reader.bytes - record  # one more was read at the start
        check(cache)
        cache.close()


@torch.no_grad()
def test_experts_of_different_bits() -> None:
    """Only the bytes of an expert's own record are read; the simulator counts them, too."""
    model, steps = make_model(size=128), steps_of(size=128)
    switchgear.store(model, "groups", bits=[1, 4, 2, 3, 4, 2], group_size=32)
    wanted, accesses = recorded(model, steps)
    for slots, shared, policy in itertools.product((1, 2, 3), (False, True), POLICIES):
        store = MemoryStore(model)
        sizes = [records.sizes for records in store.layers.values()]
        assert len(set(sizes[0])) > 2
        cache = offload.offload(model, store, slots=slots, shared=shared, policy=policy)
        got = outputs_of(model, steps)
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True)), (slots, shared, policy)
        found = cache.statistics
        simulated = offload.simulate(accesses, policy, slots=slots, shared=shared, record_bytes=sizes)
        assert (found.hits, found.misses) == (simulated.hits, simulated.misses)
        assert found.bytes == simulated.bytes == store.reader.bytes - sizes[0][0]  # one more was read at the start
        check(cache)
        cache.close()
        assert all(same_bits(a, b) for a, b in zip(outputs_of(model, steps), wanted, strict=True))


def test_whatever_reads_the_absent_parameters_is_told_of_close() -> None:
    """`restore` would be refused."""
    model = make_model(1)
    with (
        offload.offload(model, MemoryStore(model), slots=2),
        raises(AttributeError),
    ):
        len(model[0].experts.down_proj)  # type: ignore[union-attr]
