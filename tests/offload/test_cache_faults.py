# SPDX-License-Identifier: BSD-3-Clause
"""Reads that fail or hang, and interrupts anywhere: a named error; afterwards the model works with the same bits."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import signal
import sys
import threading
import types
from typing import Any

import pytest
import torch
from memory_store import MemoryReader, MemoryStore
from offload_cases import check, make_model, outputs_of, same_bits, steps_of

import switchgear
from errors import raises
from switchgear import Experts, offload
from switchgear.offload import StoreError

pytestmark = pytest.mark.usefixtures("memory")


class Guesses:
    """Predicts any experts."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def predict(self, layer: int, hidden_states: Any, topk_ids: Any) -> list[tuple[int, int]]:
        return [(self.random.randrange(2), self.random.randrange(6)) for _ in range(3)]

    def observe(self, layer: int, topk_ids: Any) -> None:
        pass


def offloaded(seed: int, slots: int = 2) -> Any:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    store = MemoryStore(model)
    shared, prefetch = bool(seed % 2), Guesses(seed) if seed % 3 else None
    cache = offload.offload(
        model,
        store,
        slots=slots,
        shared=shared,
        prefetch=prefetch,
        prefetch_slots=3,
    )
    return model, steps, wanted, cache, store.reader


@pytest.mark.parametrize("seed", range(12))
def test_a_read_that_fails_empties_its_slot(seed: int) -> None:
    """Errors at random reads; some reads go on."""
    model, steps, wanted, cache, reader = offloaded(seed, 1 + seed % 3)
    chance = random.Random(seed)
    errors: list[str] = []

    def fail(ticket: int) -> None:
        if chance.random() < 0.2:
            if chance.random() < 0.5:
                reader.fail(ticket, OSError(5, "Input/output error"), ends=True)
            reader.fail(ticket, TimeoutError("late"), ends=False)

    for _ in range(4):
        reader.on_wait = fail
        for x, y in zip(steps, wanted, strict=True):
            try:
                assert same_bits(outputs_of(model, [x])[0], y)
            except StoreError as error:
                errors.append(str(error))
        reader.on_wait = lambda ticket: None
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        check(cache)
    message = r"\d\.experts(, expert \d: .*Input/output error|: expected expert \d to be read)"
    assert all(re.search(message, error) for error in errors)
    assert len(errors) > 5


@pytest.mark.parametrize("seed", range(6))
def test_an_error_is_raised_once(seed: int) -> None:
    """All reads that a call begins fail, guesses too, and are over when it ends. The next call reads anew."""
    model, steps, wanted, cache, reader = offloaded(seed, 5)
    reader.late, last = False, 10**9
    failed: list[int] = []

    def fail(ticket: int) -> None:
        if ticket <= last:
            failed.append(ticket)
            reader.fail(ticket, OSError(5, "Input/output error"), ends=True)

    reader.on_wait = fail
    with raises(StoreError):
        outputs_of(model, steps[:1])
    last = reader.number
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    assert len(failed) > 1
    check(cache)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.some(8)
def test_an_interrupt_at_any_line(seed: int) -> None:
    """A KeyboardInterrupt is raised at a random line of the cache's files, as a signal would."""
    model, steps, wanted, cache, reader = offloaded(seed, 1 + seed % 3)
    chance = random.Random(seed)
    left = 0

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal left
        name = os.path.basename(frame.f_code.co_filename)
        if event == "call":
            is_traced = name in ("cache.py", "pool.py", "residency.py")
            return trace if is_traced and frame.f_code.co_name not in ("repair", "settle", "others") else None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    interrupts = 0
    for _ in range(60):
        x = chance.randrange(len(steps))
        left = chance.randrange(1, 150)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            got = outputs_of(model, [steps[x]])[0]
        except KeyboardInterrupt:
            interrupts += 1
        else:
            assert same_bits(got, wanted[x])
        finally:
            sys.settrace(before)
        if chance.random() < 0.3:
            assert all(map(same_bits, outputs_of(model, steps), wanted))
            check(cache)
            assert not cache._cache.lock.locked()
    assert interrupts > 20
    outputs_of(model, steps)
    known = {ticket for _, ticket in [*cache._cache.pending.values(), *cache._cache.guesses.values()]}
    known |= {ticket for layer in cache._cache.layers for ticket in layer.pool.draining.values()}
    if (staging := cache._cache.layers[0].pool.staging) is not None:
        assert set(staging.reads) == known
        known = set(staging.begun.values())
    assert set(reader.tickets) == known  # no read is lost


def test_gradients_while_reads_go_on() -> None:
    """No row is free before reads end that nothing needs any more: the step waits for its own experts."""
    model, steps = make_model(), steps_of()
    switchgear.store(model, "int8")

    def gradient() -> torch.Tensor:
        x = steps[1].clone().requires_grad_()
        model(x).float().square().sum().backward()
        assert x.grad is not None
        return x.grad

    wanted = gradient()
    store = MemoryStore(model)
    cache = offload.offload(model, store, slots=2)
    reader, pool = store.reader, cache._cache.layers[0].pool
    reader.cancel = lambda ticket: False  # type: ignore[method-assign]
    reader.is_done = lambda ticket: False  # type: ignore[method-assign]
    reader.on_wait = lambda ticket: reader.fail(ticket, TimeoutError("late"), ends=False)
    for x in steps * 2:
        with contextlib.suppress(StoreError):
            outputs_of(model, [x])
    assert len(pool.draining) > 2
    assert not pool.free
    reader.on_wait = lambda ticket: None
    assert same_bits(gradient(), wanted)
    check(cache)


def test_a_model_that_is_dropped_ends_its_reads() -> None:
    model, steps = make_model(), steps_of()
    store = MemoryStore(model)
    cache = offload.offload(model, store, slots=2, prefetch=Guesses(1))
    outputs_of(model, steps)
    del cache
    gc.collect()
    outputs_of(model, steps)
    assert store.reader.tickets
    assert not store.reader.closed
    del model
    gc.collect()
    assert store.reader.closed


def test_a_reader_without_tickets() -> None:
    """`submit` fails: too many reads, a closed reader."""
    model, steps, wanted, cache, reader = offloaded(0)
    original, calls = reader.submit, 0

    def submit(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise OSError("too many tickets")
        return original(*args)

    reader.submit = submit
    errors = []
    for x, y in zip(steps * 3, wanted * 3, strict=True):
        try:
            assert same_bits(outputs_of(model, [x])[0], y)
        except StoreError as error:
            errors.append(str(error))
    assert len(errors) > 2
    assert all("too many tickets" in error for error in errors)
    reader.submit = original
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    check(cache)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_during_a_wait() -> None:
    model, steps, wanted, cache, reader = offloaded(0)

    def interrupt(_: int) -> None:
        signal.raise_signal(signal.SIGINT)

    reader.on_wait = interrupt
    with pytest.raises(KeyboardInterrupt):
        outputs_of(model, steps)
    reader.on_wait = lambda ticket: None
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    check(cache)


def test_ids_that_change_during_a_call() -> None:
    """The experts that were loaded are those that are used: topk_ids are read once."""
    experts = Experts(32, 16, 6).requires_grad_(False)
    x, ids, weights = torch.randn(5, 32), torch.arange(5, dtype=torch.int32)[:, None], torch.ones(5, 1)
    wanted, kept = experts(x, ids, weights), ids.clone()
    store = MemoryStore(experts)
    cache = offload.offload(experts, store, slots=2)

    def change(_: int) -> None:
        ids.fill_(5)

    store.reader.on_wait = change
    assert same_bits(experts(x, ids, weights), wanted)
    assert not torch.equal(ids, kept)
    cache.close()


def test_a_store_that_cannot_be_read_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for slots in (2, 6):
        model, steps = make_model(), steps_of()
        wanted = outputs_of(model, steps)
        store = MemoryStore(model)

        def wait(self: MemoryReader, ticket: int, timeout: float) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(MemoryReader, "wait", wait)
            with raises(StoreError):
                offload.offload(model, store, slots=slots)
        assert store.reader.closed
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        cache = offload.offload(model, store, slots=slots)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryReader, "wait", wait)
            with raises(StoreError):
                cache.close()
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        cache.close()
        assert all(map(same_bits, outputs_of(model, steps), wanted))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child() -> None:
    """Even if another thread ran the model at the fork."""
    model, steps, wanted, cache, _ = offloaded(0)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with cache._cache.lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    if (child := os.fork()) == 0:
        for call in (lambda: outputs_of(model, steps[:1]), cache.close, lambda: cache.close(restore=False)):
            try:
                call()
            except StoreError as error:
                if "the cache belongs to process" not in str(error):
                    os._exit(2)
            else:
                os._exit(3)
        try:
            with cache:
                raise RuntimeError("the block's")
        except RuntimeError:
            os._exit(0)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()
    assert all(map(same_bits, outputs_of(model, steps), wanted))


@pytest.mark.slow
def test_ten_thousand_steps_leak_nothing() -> None:
    model, steps, wanted, cache, reader = offloaded(1)

    def footprint() -> tuple[int, int, int]:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        return pages, len(os.listdir("/proc/self/fd")), threading.active_count()

    for i in range(10_000 // len(steps)):
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        if i == 100:
            before = footprint()
        reader.begun.clear()
    after = footprint()
    assert after[0] < before[0] + 500  # 2 MB
    assert after[1:] == before[1:]
    check(cache)
