# SPDX-License-Identifier: BSD-3-Clause
"""A predictor's reads: they begin early, change neither results nor hits, and are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore
from offload_cases import check, make_model, outputs_of, same_bits, steps_of
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from errors import raises
from switchgear import diagnostics, offload

pytestmark = pytest.mark.usefixtures("memory")


class Script:
    """Predicts for the next layer what a list says."""

    def __init__(self, choices: list[set[int]]) -> None:
        self.choices, self.at, self.observed = choices, 0, 0

    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Any:
        assert hidden_states.shape == (topk_ids.shape[0], 32)
        self.at += 1
        if self.at == len(self.choices):
            return
        for expert in sorted(self.choices[self.at]):
            yield (layer + 1) % 2, expert

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        self.observed += 1


@torch.no_grad()
def recorded(model: torch.nn.Module, steps: list[Tensor]) -> list[set[int]]:
    """The experts of each layer's call, in order."""
    found = []
    for x in steps:
        with diagnostics.collect(model) as choices:
            model(x)
        found += [set(layer.topk_ids.flatten().tolist()) for layer in choices.values()]
    return found


def test_row41_an_oracle_has_a_recall_of_one_and_wastes_nothing() -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    choices = recorded(model, steps)
    store = MemoryStore(model)
    with offload.offload(model, store, slots=2) as cache:
        outputs_of(model, steps)
        plain = cache.statistics
    script = Script(choices)
    with offload.offload(model, store, slots=2, prefetch=script) as cache:
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        found = cache.statistics
        assert [(a.hits, a.misses, a.bytes) for a in found.layers] == [
            (a.hits, a.misses, a.bytes) for a in plain.layers
        ]
        first = len(choices[0])
        assert found.layers[1].recall == 1
        assert found.layers[0].predicted == found.layers[0].used - first
        assert found.wasted_bytes == 0
        assert sum(layer.prefetched for layer in found.layers) == found.misses - first
        assert script.observed == 2 * len(steps)
        assert store.reader.bytes == found.bytes + store.layers["0.experts"].record_bytes
        check(cache)


def test_row41_wrong_predictions_are_wasted_bytes() -> None:
    """Those whose reads began; a read that did not begin is cancelled."""
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    choices = [set(range(6)) - experts for experts in recorded(model, steps)]
    for late in (False, True):
        store = MemoryStore(model, late)
        with offload.offload(model, store, slots=2, prefetch=Script(choices), prefetch_slots=4) as cache:
            assert all(map(same_bits, outputs_of(model, steps), wanted))
            found, reader = cache.statistics, store.reader
            assert found.recall == 0
            assert sum(layer.prefetched for layer in found.layers) == 0
            guessed = sum(not urgent for _, _, urgent in reader.begun)
            still = len(cache._cache.guesses)
            wasted = found.wasted_bytes // store.layers["0.experts"].record_bytes
            assert guessed > 20
            assert (wasted, reader.cancelled) == ((0, guessed - still) if late else (guessed - still, 0))
            check(cache)


def test_predictions_take_no_more_rows_than_they_may() -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    everything = [set(range(6))] * (2 * len(steps))
    for rows in (1, 2, 5):
        for shared in (False, True):
            store = MemoryStore(model, late=rows == 2)
            options: dict[str, Any] = {"slots": 1, "shared": shared, "prefetch_slots": rows}
            with offload.offload(model, store, prefetch=Script(everything), **options) as cache:
                for x, y in zip(steps, wanted, strict=True):
                    assert same_bits(outputs_of(model, [x])[0], y)
                    assert len(cache._cache.guesses) <= rows
                    check(cache)
            assert cache.statistics.recall is not None


class Answers:
    """Predicts the same for each layer."""

    def __init__(self, *experts: Any) -> None:
        self.experts = experts

    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Any:
        return self.experts

    def observe(self, layer: int, topk_ids: Tensor) -> None: ...


def test_predictions_are_integers_of_any_type_and_minus_one_is_none() -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    answers = Answers((1, -1), (torch.tensor(1), torch.tensor(2)), (np.int64(0), np.int64(3)), (0, torch.tensor(3)))
    with offload.offload(model, MemoryStore(model), slots=2, prefetch=answers) as cache:
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        assert all(type(key) is int for key in (*cache._cache.rows, *cache._cache.guesses))
        check(cache)


def test_virtual_experts_are_predicted_and_not_read() -> None:
    model, steps = make_model(null_experts=2), steps_of()
    with diagnostics.collect(model) as choices:
        wanted = outputs_of(model, steps)
    assert all(int(layer.topk_ids.max()) > 5 for layer in choices.values())
    follows = offload.Follows.of(choices)
    with offload.offload(model, MemoryStore(model), slots=2, prefetch=follows) as cache:
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        assert cache.statistics.recall is not None
        check(cache)
    inner: Any = model[1].experts
    inner.experts = checkpoint_wrapper(inner.experts)
    with (
        offload.offload(model, MemoryStore(model), slots=2, prefetch=Answers((1, 8))),
        raises(ValueError, "prefetch"),
    ):
        outputs_of(model, steps)


@pytest.mark.parametrize(
    ("expert", "error", "message"),
    [
        ((1, -2), ValueError, r"expected experts 0 to 5 of layer 1, got -2"),
        ((0, 6), ValueError, r"expected experts 0 to 5 of layer 0, got 6"),
        ((-1, 0), ValueError, r"expected experts of layers 0 to 1, got layer -1"),
        ((2, 0), ValueError, r"expected experts of layers 0 to 1, got layer 2"),
        ((0, 1.0), TypeError, "expected int"),
        ((True, 0), TypeError, "expected int"),
    ],
)
def test_predictions_of_no_expert_are_errors(expert: Any, error: type[Exception], message: str) -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    answers = Answers((0, 1), expert)
    with offload.offload(model, MemoryStore(model), slots=2, prefetch=answers) as cache:
        with raises(error, "prefetch"):
            outputs_of(model, steps)
        assert not cache._cache.guesses
        answers.experts = ()
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        check(cache)
    with raises(error, "experts"):
        offload.Recall(["a", "b"], [6, 6]).predicted([expert])


def test_the_table() -> None:
    model, steps = make_model(), steps_of()
    with offload.offload(model, MemoryStore(model), slots=2, prefetch=Script([set()] * 99)) as cache:
        outputs_of(model, steps)
        lines = str(cache).splitlines()
    assert " ".join(lines[0].split()) == "layer hits misses hit rate MB read s waited recall MB wasted"
    assert [line.split()[0] for line in lines[1:]] == ["0.experts", "1.experts", "all"]
    assert len({len(line) for line in lines}) == 1
    assert int(lines[3].split()[1]) == cache.statistics.hits
