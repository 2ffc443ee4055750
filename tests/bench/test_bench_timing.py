# SPDX-License-Identifier: BSD-3-Clause
"""Calls that are timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from switchgear_bench.timing import FEWEST_TURNS, Timed, interleave


def test_interleaved_calls_stop_far_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("switchgear_bench.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("switchgear_bench.timing.wait_for_quiet", lambda longest: None)

    def slow(_: int) -> None:
        now[0] += 2.0

    assert len(interleave({"a": slow}, 0.5)["a"].seconds) == 1  # a second turn would exceed three times the budget
    assert 25 <= len(interleave({"a": slow}, 61.0)["a"].seconds) <= 30  # calls of two seconds


def test_interleaved_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0.0], list[str]()
    monkeypatch.setattr("switchgear_bench.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("switchgear_bench.timing.wait_for_quiet", lambda longest: None)

    def call(name: str) -> None:
        called.append(name)
        now[0] += 0.001

    times = interleave({"a": lambda n: call(f"a{n}"), "b": lambda n: call(f"b{n}")}, 0.0)
    turns = [name for i, name in enumerate(c[0] for c in called) if i == 0 or called[i - 1][0] != name]
    assert turns == ["a", "b"] * FEWEST_TURNS
    assert [c for c in called if c[0] == "a"] == [f"a{n}" for n in range(sum(c[0] == "a" for c in called))]
    assert times["a"].turns == FEWEST_TURNS


def test_no_competitor_pays_for_the_memory_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even for long calls, the call that frees another competitor's memory is not timed."""
    now, held = [0.0], [""]
    monkeypatch.setattr("switchgear_bench.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("switchgear_bench.timing.wait_for_quiet", lambda longest: None)

    def training(name: str) -> Callable[[int], None]:
        def call(_: int) -> None:
            now[0] += 1.0 + {"": 0.0, "kept": 0.0, "freed": 0.5}[held[0]]
            held[0] = name

        return call

    calls = {name: training(name) for name in ("kept", "freed")}
    times = interleave(calls, 20.0, leaves_memory=True)
    assert set(times["kept"].seconds) == {1.0}
    assert set(times["freed"].seconds) == {1.5}


def test_turns_that_others_disturb_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, elsewhere, calls = [0.0], [0.0], [0]
    monkeypatch.setattr("switchgear_bench.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("switchgear_bench.timing.busy_seconds_elsewhere", lambda: elsewhere[0])
    monkeypatch.setattr("switchgear_bench.timing.wait_for_quiet", lambda longest: None)

    def call(_: int) -> None:
        calls[0] += 1
        disturbed = calls[0] == 2  # the first call is not timed; this is the first turn's
        now[0] += 3.0 if disturbed else 1.0
        elsewhere[0] += 2.0 if disturbed else 0.0

    assert interleave({"a": call}, 4.5)["a"] == ([1.0, 1.0], 2, 3, [2, 3])


def test_ceilings_are_those_of_the_turns_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from switchgear_bench import worker

    rates = iter((5e12, 1e12, 2e12, 9e12))

    def third_counts(calls: dict[str, Callable[[int], object]], *_: Any, **__: Any) -> dict[str, Timed]:
        for call in calls.values():
            for number in range(4):
                call(number)
        return {name: Timed([1.0], 1, 4, [2]) for name in calls}

    monkeypatch.setattr(worker, "multiply_rate", lambda *_: next(rates))
    monkeypatch.setattr(worker, "interleave", third_counts)
    task = worker.Task("tiny", "fp32", "forward", 1, "balanced", "default", "default", ("switchgear",), False, 1.0, 1)
    (row,) = worker.measure(task, lambda text: None).rows
    assert row["multiply_rate"] == 2e12
