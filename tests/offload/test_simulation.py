# SPDX-License-Identifier: BSD-3-Clause
"""Every policy against a simulator of list scans, on random and on recorded traces; bounds; bad input."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from replayed import Replay, as_sets, random_steps

from errors import raises
from switchgear import MoE, diagnostics, offload, routing
from switchgear.offload import LIFO, LRU, POLICIES, Accesses, Belady, FrequencyDistance, LeastStale, StaticFrequency

SEEDS = range(6)


def policies(accesses: Accesses) -> tuple[Any, ...]:
    return (*POLICIES, StaticFrequency.of(accesses.split(len(accesses.steps) // 2)[0]))


def recorded() -> Accesses:
    """A run of two layers that route by their inputs: prompts of 4 tokens, then token by token."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(MoE(8, 4, num_experts=6, top_k=2) for _ in range(2)))
    with torch.no_grad(), diagnostics.collect(model) as choices:
        model(torch.randn(3, 16, 8).cumsum(1))
    return Accesses.of(choices, prompt=4)


TRACES = {**{str(seed): Accesses.of(random_steps(seed), num_experts=6) for seed in SEEDS}, "recorded": recorded()}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("trace", TRACES)
def test_row38_hits_are_those_of_a_plain_simulator(trace: str, shared: bool) -> None:
    """Slots from less than a set, which runs in waves, to all experts."""
    accesses = TRACES[trace]
    for policy, slots in itertools.product(policies(accesses), (1, 2, 3, 4, 6)):
        hot = dict(policy.counts) if isinstance(policy, StaticFrequency) else None
        wanted = Replay(policy.name, as_sets(accesses), slots, shared, hot)
        found = offload.simulate(accesses, policy, slots=slots, shared=shared)
        assert [layer.hits for layer in found.layers] == wanted.hits, (policy.name, slots)
        assert [layer.misses for layer in found.layers] == wanted.misses, (policy.name, slots)


def test_row38_last_in_first_out_counts_a_step_as_loaded_at_once() -> None:
    """Two slots: a later load leaves first; of 1, 2 and 3, which one step loads, the lowest number does."""
    for wanted, steps in ((1, [{0}, {1}, {2}, {0}]), (0, [{0}, {1}, {2}, {1}]), (0, [{1, 2, 3}, {1}])):
        assert offload.simulate(Accesses.of([[step] for step in steps]), LIFO(), slots=2).hits == wanted
    for kept in (2, 3):
        assert offload.simulate(Accesses.of([[{1, 2, 3}], [{kept}]]), LIFO(), slots=2).hits == 1


@pytest.mark.parametrize("shared", [False, True])
def test_row44_belady_misses_least_on_every_trace(shared: bool) -> None:
    traces = [*TRACES.values(), *(Accesses.of(random_steps(seed, 2, 5, 30)) for seed in range(100, 160))]
    for accesses, slots in itertools.product(traces, (1, 2, 3, 4)):
        found = offload.simulate_all(accesses, policies(accesses), slots=slots, shared=shared)
        assert all(found["belady"].misses <= other.misses for other in found.values()), slots


def test_row44_belady_is_the_optimum_of_all_evictions() -> None:
    """Against every choice of victims, by search, on short traces of single experts and of pairs."""
    for seed in range(30):
        steps = [[experts - {4, 5} or {0}] for (experts,) in random_steps(seed, 1, 6, 9) if len(experts - {4, 5}) < 3]
        states = {frozenset[int](): 0}  # residents: fewest misses so far
        for (wanted,) in steps:
            following: dict[frozenset[int], int] = {}
            for cache, misses in states.items():
                missed = misses + len(wanted - cache)
                others = cache - wanted
                kept = min(len(others), 2 - len(wanted))
                for some in itertools.combinations(sorted(others), kept):
                    state = frozenset(some) | wanted
                    following[state] = min(following.get(state, missed), missed)
            states = following
        assert offload.simulate(Accesses.of(steps), Belady(), slots=2).misses == min(states.values())


def test_row44_a_shared_cache_can_do_no_worse_than_one_per_layer() -> None:
    """Where no set is larger than a layer's own cache."""
    for seed, slots in itertools.product(SEEDS, (3, 4)):
        accesses = Accesses.of([[set(sorted(experts)[:3]) for experts in step] for step in random_steps(seed)])
        shared, alone = (offload.simulate(accesses, Belady(), slots=slots, shared=how) for how in (True, False))
        assert shared.slots == alone.slots
        assert shared.misses <= alone.misses


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_row41_lru_of_each_layer(slots: int) -> None:
    """The paper's cache: k experts per layer, resident ones first; here an OrderedDict. Bytes are misses × record."""
    accesses = TRACES["recorded"].split(3)[1]  # single tokens, of two experts
    decoding = dataclasses.replace(accesses, steps=tuple(s for s in accesses.steps if len(s[0]) <= 2 >= len(s[1])))
    decoding = dataclasses.replace(decoding, tokens=(1,) * len(decoding.steps))
    hits = misses = 0
    for layer in range(2):
        cache: OrderedDict[int, None] = OrderedDict()
        for step in decoding.steps:
            here = [e for e in step[layer] if e in cache]
            for e in here:
                cache.move_to_end(e)
            for e in sorted(set(step[layer]) - set(here)):
                cache[e] = None
                if len(cache) > slots:
                    cache.popitem(last=False)
            hits += len(here)
            misses += len(step[layer]) - len(here)
    found = offload.simulate(decoding, LRU(), slots=slots, record_bytes=1000)
    assert (found.hits, found.misses, found.bytes) == (hits, misses, 1000 * misses)
    assert hits > 12


def test_row42_frequency_and_distance_on_a_hand_trace() -> None:
    """Three layers, three slots. The victim has the fewest uses / layers until its own runs."""
    steps = [[{0}, {0}, {0}], [{0}, {0}, {1}], [{0}, {5}, {1}], [{0}, {0}, {0}]]
    # step 1, layer 2 needs expert 1: (0, 0) 2/1, (1, 0) 2/2, (2, 0) 1/3: (2, 0) leaves
    # step 2, layer 1 needs expert 5: (0, 0) 3/2, (1, 0) 2/3, (2, 1) 1/1: (1, 0) leaves, the most used but for one
    # step 3, layer 1 needs expert 0: (0, 0) 4/2, (1, 5) 1/3, (2, 1) 2/1: (1, 5) leaves
    # step 3, layer 2 needs expert 0: (0, 0) 4/1, (1, 0) 3/2, (2, 1) 2/3: (2, 1) leaves
    plain = Replay("frequency/distance", steps, 1, shared=True)
    assert plain.evicted == [(2, 0), (1, 0), (1, 5), (2, 1)]
    found = offload.simulate(Accesses.of(steps), FrequencyDistance(), slots=1, shared=True)
    assert [(layer.hits, layer.misses) for layer in found.layers] == [(3, 1), (1, 3), (1, 3)]


def test_least_stale_keeps_what_the_next_layers_need() -> None:
    """A walk through 4 layers of one expert each, with 3 slots: LRU always misses; least stale keeps two layers."""
    accesses = Accesses.of([[{0}, {0}, {0}, {0}]] * 20)
    three = {"slots": None, "bytes": 3, "record_bytes": 1, "shared": True}
    found = offload.simulate_all(accesses, (LRU(), LeastStale(), Belady()), **three)
    assert found["lru"].hits == 0
    assert found["least stale"].hits > 30
    assert found["belady"].hits >= found["least stale"].hits


def test_with_room_for_all_there_are_cold_misses_only() -> None:
    for accesses, shared in itertools.product(TRACES.values(), (False, True)):
        different = len(accesses.counts())
        for found in offload.simulate_all(
            accesses, policies(accesses), slots=6, shared=shared, record_bytes=7
        ).values():
            assert (found.misses, found.bytes) == (different, 7 * different)
            assert found.hits + found.misses == accesses.num_uses


def test_speed_and_bytes() -> None:
    accesses = Accesses.of([[{0}], [{1}], [{0}], [{0}]])
    found = offload.simulate(accesses, LRU(), slots=1, record_bytes=50, bandwidth=100.0, compute_seconds=0.25)
    assert (found.hits, found.misses, found.bytes) == (1, 3, 150)
    assert found.hit_rate == 0.25
    assert found.tokens_per_second == pytest.approx(4 / (1.5 + 1.0))
    assert offload.simulate(accesses, LRU(), bytes=149, record_bytes=50).slots == 2
    assert offload.simulate(accesses, LRU(), slots=1).tokens_per_second is None


def test_records_of_different_sizes() -> None:
    """Misses count their own bytes; a slot has room for the largest."""
    accesses = Accesses.of([[{0}, {1}], [{1}, {1}], [{0}, {0}]])
    sizes = [[10, 30], [20, 5]]
    found = offload.simulate(accesses, LRU(), slots=1, record_bytes=sizes, bandwidth=1.0)
    assert (found.misses, found.bytes) == (5, 10 + 30 + 10 + 5 + 20)
    assert found.tokens_per_second == pytest.approx(3 / 75)
    assert offload.simulate(accesses, LRU(), bytes=99, record_bytes=sizes).slots == 2
    assert offload.simulate(accesses, LRU(), bytes=100, record_bytes=sizes).slots == 4
    assert offload.simulate(accesses, LRU(), bytes=100, record_bytes=sizes, shared=True).slots == 3


def test_an_empty_trace() -> None:
    empty = (Accesses.of([]), Accesses.of({}), Accesses.of(TRACES["0"].steps[:0]), TRACES["recorded"].split(0)[0])
    for accesses, shared in itertools.product(empty, (False, True)):
        for found in offload.simulate_all(
            accesses, policies(accesses), slots=2, shared=shared, record_bytes=1
        ).values():
            assert (found.hits, found.misses, found.bytes, found.hit_rate) == (0, 0, 0, 0)
    assert offload.simulate(empty[2], LRU(), slots=1, record_bytes=1, bandwidth=1).tokens_per_second == 0
    assert (
        offload.simulate(Accesses.of([[[]]]), LRU(), slots=1, record_bytes=1, bandwidth=1).tokens_per_second == math.inf
    )


# ---- what is replayed ------------------------------------------------------------------------------------------------


def test_a_record_and_collected_choices_give_the_same_steps() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(MoE(8, 4, num_experts=6, top_k=2) for _ in range(2)))
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), diagnostics.collect(model) as choices, routing.record(model) as record:
        model(x)
    for prompt in (0, 2, 9, None):
        found = Accesses.of(choices, prompt=prompt)
        assert found == Accesses.of(record, prompt=prompt)
        ids = [choices[name].topk_ids.view(3, 5, 2) for name in choices]
        first = 5 if prompt is None else min(prompt, 5)
        wanted = []
        for row in range(3):
            pieces = [slice(0, first)] * (first > 0) + [slice(t, t + 1) for t in range(first, 5)]
            wanted += [[set(layer[row, piece].flatten().tolist()) for layer in ids] for piece in pieces]
        assert as_sets(found) == wanted
        assert (found.num_tokens, found.num_experts) == (15, (6, 6))


def test_classes_without_weights_are_left_out() -> None:
    record = routing.RoutingRecord.of({"a": torch.tensor([[0, 3], [2, 1]])}, [2], 4)
    assert Accesses.of(record).steps == (((0, 3),), ((1, 2),))
    found = Accesses.of(record, num_experts=3)
    assert (found.steps, found.num_experts) == ((((0,),), ((1, 2),)), (3,))


def test_parts_of_a_run() -> None:
    accesses = TRACES["0"]
    assert Accesses.join(accesses.split(7)) == accesses
    assert sum(accesses.counts().values()) == accesses.num_uses
    assert Accesses.of([[[2, -1, 0, 2]]]).steps == (((0, 2),),)


def test_a_list_may_have_tensors() -> None:
    steps = random_steps(0)
    of_tensors = [[torch.tensor(sorted(experts)) for experts in step] for step in steps]
    assert Accesses.of(of_tensors, num_experts=np.int64(6)) == Accesses.of(steps, num_experts=6)  # type: ignore[arg-type]


def test_a_list_may_be_made_while_it_is_read() -> None:
    steps = random_steps(0)
    assert Accesses.of(map(iter, step) for step in steps) == Accesses.of(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "num_experts", "message"),
    [
        ([[{0, 1.5}]], None, "source"),
        ([[torch.tensor([0.0])]], None, "source"),
        ([[{"a"}]], None, "source"),
        ([[{0}]], 2.5, "num_experts"),
    ],
)
def test_experts_are_integers(source: Any, num_experts: Any, message: str) -> None:
    with raises(TypeError, message):
        Accesses.of(source, num_experts=num_experts)


def test_bad_input() -> None:
    accesses = TRACES["0"]
    one = torch.zeros(4, 1, dtype=torch.int64)
    record = routing.RoutingRecord.of({"a": one, "a#1": one}, [4], 2)
    calls: list[tuple[str, Any]] = [
        ("slots", lambda: offload.simulate(accesses, LRU(), slots=0)),
        ("slots", lambda: offload.simulate(accesses, LRU())),
        ("slots", lambda: offload.simulate(accesses, LRU(), slots=1, bytes=1)),
        ("record_bytes", lambda: offload.simulate(accesses, LRU(), bytes=9)),
        ("bytes", lambda: offload.simulate(accesses, LRU(), bytes=29, record_bytes=10)),
        ("record_bytes", lambda: offload.simulate(accesses, LRU(), slots=1, record_bytes=0)),
        ("record_bytes", lambda: offload.simulate(accesses, LRU(), slots=1, record_bytes=[[1]])),
        ("record_bytes", lambda: offload.simulate(accesses, LRU(), slots=1, bandwidth=1)),
        ("bandwidth", lambda: offload.simulate(accesses, LRU(), slots=1, record_bytes=1, bandwidth=math.nan)),
        ("compute_seconds", lambda: offload.simulate(accesses, LRU(), slots=1, compute_seconds=-1)),
        ("policies", lambda: offload.simulate_all(accesses, (LRU(), LRU()), slots=1)),
        ("prompt", lambda: Accesses.of(record, prompt=-1)),
        ("prompt", lambda: Accesses.of([], prompt=1)),
        ("source", lambda: Accesses.of(record)),
        ("source", lambda: Accesses.of([[{0}], [{0}, {0}]])),
        ("source", lambda: Accesses.of([[{4}]], num_experts=4)),
        ("source", lambda: Accesses.of([[{-2, 3}]], num_experts=4)),
        ("steps", lambda: accesses.split(41)),
        ("parts", lambda: Accesses.join([])),
        ("parts", lambda: Accesses.join([accesses, TRACES["recorded"]])),
    ]
    for words, call in calls:
        with raises(ValueError, words):
            call()
    choices = {name: diagnostics.LayerChoices(one[:n], one[:n].float(), 2) for name, n in (("a", 4), ("b", 3))}
    with raises(ValueError, "source"):
        Accesses.of(choices)
    for policy in ("lru", LRU):
        with raises(TypeError, "policy"):
            offload.simulate(accesses, policy, slots=1)  # type: ignore[arg-type]
    with raises(TypeError, "slots"):
        offload.simulate(accesses, LRU(), slots=1.5)  # type: ignore[arg-type]
    with raises(TypeError, "steps"):
        accesses.split(1.5)  # type: ignore[arg-type]
    with raises(TypeError, "accesses"):
        offload.simulate([], LRU(), slots=1)  # type: ignore[arg-type]
    with raises(TypeError, "source"):
        Accesses.of({"a": one})  # type: ignore[dict-item]
