# SPDX-License-Identifier: BSD-3-Clause
"""A model whose experts are offloaded: the bits of the resident one, the hits of an independent simulator."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from memory_store import MemoryStore
from replayed import Replay, as_sets
from torch import Tensor, nn

import switchgear
from switchgear import MoE, diagnostics, offload
from switchgear.offload import LFRU, LFU, LIFO, LRU, Accesses, FrequencyDistance, LeastStale
from switchgear.offload.attach import Offloaded

POLICIES = (LRU(), LFU(), LFRU(), LIFO(), LeastStale(), FrequencyDistance())


def make_model(num_layers: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_experts": 6, "top_k": 2, **options}
    layers = [MoE(32, 32, **sizes) for _ in range(num_layers)]
    return nn.Sequential(*layers).to(dtype).eval()


def steps_of(dtype: torch.dtype = torch.float32, count: int = 16) -> list[Tensor]:
    """A prompt now and then, else one token."""
    torch.manual_seed(1)
    return [torch.randn(1, 5 if i % 6 == 0 else 1, 32).to(dtype) for i in range(count)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@torch.no_grad()
def outputs_of(model: nn.Module, steps: list[Tensor]) -> list[Tensor]:
    return [model(x) for x in steps]


@torch.no_grad()
def test_row41_hits_are_those_of_an_independent_lru() -> None:
    """On a recorded run; the output has the bits of the resident model, and bytes are misses × record."""
    steps = steps_of()
    for slots, shared, policy in itertools.product((1, 2, 3, 5), (False, True), POLICIES):
        model = make_model()
        wanted = outputs_of(model, steps)
        runs = []
        for x in steps:
            with diagnostics.collect(model) as choices:
                model(x)
            runs.append(Accesses.of(choices, prompt=None))
        accesses = Accesses.join(runs)
        store = MemoryStore(model)
        cache = offload.offload(model, store, slots=slots, shared=shared, policy=policy)  # type: ignore[arg-type]
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


def check(cache: Offloaded) -> None:
    """Rows: each has one owner or is free, and residents are where residency.py says."""
    inner = cache._cache
    assert not inner.is_disturbed
    for pool in {id(layer.pool): layer.pool for layer in inner.layers}.values():
        own = [key for key in inner.rows if inner.layer_of(key).pool is pool]
        guessed = [row for key, (row, _) in inner.guesses.items() if inner.layer_of(key).pool is pool]
        rows = [inner.rows[key] for key in own] + guessed + pool.free + list(pool.draining)
        assert sorted(rows) == list(range(len(pool.arena)))
        assert set(own) == {
            key for layer in inner.layers if layer.pool is pool for key in layer.residency.last
        }
    for key, row in inner.rows.items():
        layer = inner.layer_of(key)
        assert int(layer.slots[key - layer.first]) == row
