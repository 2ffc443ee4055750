# SPDX-License-Identifier: BSD-3-Clause
"""A rank is killed, stopped, raises or leaves, in every phase, with and without overlap: all others raise the same
error in time, and can continue without it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from itertools import product
from typing import Any

import pytest
import torch
from parallel_pool import Pool
from peer_memory_on_cpu import make_parallel

import switchgear
from switchgear import cuda
from switchgear.parallel import ExpertParallel, ExpertParallelError, errors
from switchgear.parallel.errors import PHASES
from switchgear.parallel.transport import GlooTransport

FAULTS = ("kill", "stop", "raise", "exit")
KIND = {"kill": "died", "stop": "stalled", "raise": "raised", "exit": "died"}
# Seconds. On busy processors a healthy rank may be late. Only a rank that stops is waited for until the timeout.
TIMEOUT, LONG = 5.0, 20.0
AIR = 2.0


def misbehave(fault: str) -> None:
    if fault == "raise":
        raise ArithmeticError("planted")
    if fault == "exit":
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def step(parallel: ExpertParallel) -> None:
    torch.manual_seed(0)
    moe = switchgear.MoE(16, 8, 8, 2, parallel=parallel)
    moe(torch.randn(40, 16)).square().sum().backward()


def resources() -> tuple[int, int]:
    """Open files, and Python threads. (torch keeps some threads of its own.)"""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def trial(rank: int, culprit: int, fault: str, phase: str, num_chunks: int, transport: str) -> dict[str, Any]:
    """Runs on every rank. Returns what survivors saw, and that they can continue; the culprit may never return."""
    timeout = TIMEOUT if fault == "stop" else LONG
    parallel = make_parallel(None, transport, timeout=timeout, num_chunks=num_chunks)
    step(parallel)
    before = resources()
    enter = parallel.peers.enter

    def planted(name: str) -> None:
        enter(name)
        if name == phase:
            misbehave(fault)

    if rank == culprit:
        parallel.peers.enter = planted  # type: ignore[method-assign]
    begin = time.monotonic()
    seen: dict[str, Any] = {}
    try:
        step(parallel)
        step(parallel)  # a rank that already had all data of the last phase notices here
    except ExpertParallelError as error:
        seen = {"failure": error.failure, "message": str(error), "alone": error.__context__ is None}
    except ArithmeticError:
        seen = {"own": True}
    seen["seconds"] = time.monotonic() - begin
    seen["reserved"] = cuda.num_reserved()
    with pytest.raises(ExpertParallelError):  # the failure is permanent
        parallel.peers.check()
    parallel.close()
    seen["grown"] = resources()[0] - before[0] > 0 or resources()[1] > before[1]
    left = [r for r in range(torch.distributed.get_world_size()) if r != culprit]
    if rank in left:
        with make_parallel(left, transport, timeout=LONG) as again:
            step(again)
    return seen


def run_trial(culprit: int, fault: str, phase: str, num_chunks: int, transport: str, size: int = 4) -> None:
    pool = Pool(size)
    try:
        pool.run(_ready)
        pool.start(trial, culprit, fault, phase, num_chunks, transport)
        left = [r for r in range(size) if r != culprit]
        seen = pool.results(left, timeout=2 * LONG)
        if fault == "raise":
            assert pool.results([culprit], timeout=LONG)[0]["own"]
    finally:
        pool.close()
    failures = {entry["failure"] for entry in seen}
    assert len(failures) == 1, failures
    failure = failures.pop()
    assert (failure.rank, failure.kind, failure.phase) == (culprit, KIND[fault], phase)
    assert len({entry["message"] for entry in seen}) == 1
    assert all(entry["alone"] for entry in seen)  # no error of a transport is printed before it
    limit = TIMEOUT + AIR if fault == "stop" else LONG / 2  # the others are noticed at once, not by the timeout
    assert max(entry["seconds"] for entry in seen) < limit
    assert not any(entry["grown"] or entry["reserved"] for entry in seen)


def _ready(rank: int) -> int:
    return rank


SOME = [
    (1, "kill", "agree", 1), (0, "kill", "experts", 4), (3, "kill", "backward combine", 4),
    (2, "stop", "dispatch", 1), (0, "stop", "combine", 4),
    (3, "raise", "experts", 4), (0, "raise", "backward dispatch", 1),
    (1, "exit", "combine", 1), (0, "exit", "backward experts", 4),
]  # fmt: skip
transports = pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
ALL = [case for case in product(range(4), FAULTS, PHASES, (1, 4)) if case not in SOME]


@transports
@pytest.mark.parametrize(("culprit", "fault", "phase", "num_chunks"), SOME)
@pytest.mark.some(9)
def test_faults(culprit: int, fault: str, phase: str, num_chunks: int, transport: str) -> None:
    run_trial(culprit, fault, phase, num_chunks, transport)


@pytest.mark.parametrize(("culprit", "fault", "phase", "num_chunks"), SOME[1:7:2])
def test_faults_with_peer_memory(culprit: int, fault: str, phase: str, num_chunks: int) -> None:
    run_trial(culprit, fault, phase, num_chunks, "peer_memory")


@transports
@pytest.mark.parametrize(
    ("culprit", "fault", "phase"),
    [(1, "stop", "dispatch"), (0, "stop", "experts"), (1, "stop", "backward combine"), (0, "kill", "combine")],
)
@pytest.mark.some(4)
def test_faults_of_one_of_two(culprit: int, fault: str, phase: str, transport: str) -> None:
    """The other is alone: nobody else reports."""
    run_trial(culprit, fault, phase, 1, transport, size=2)


@pytest.mark.slow  # 2 · 247 trials of 1 to 4 seconds
@transports
@pytest.mark.parametrize(("culprit", "fault", "phase", "num_chunks"), ALL)
def test_all_faults(culprit: int, fault: str, phase: str, num_chunks: int, transport: str) -> None:
    run_trial(culprit, fault, phase, num_chunks, transport)


# ---- without a fault in the exchange ---------------------------------------------------------------------------------


def leave_early(rank: int) -> str:
    parallel = ExpertParallel(timeout=10)
    step(parallel)
    if rank == 2:
        parallel.close()
        return "left"
    with pytest.raises(ExpertParallelError) as error:
        step(parallel)
    parallel.close()
    return str(error.value)


def test_a_rank_that_leaves_is_named(pool: Pool) -> None:
    answers = pool.run(leave_early)
    assert answers[0] == answers[1] == answers[3]
    assert answers[0].startswith("rank 2 exited in phase 'agree'")


def busy(rank: int) -> str:
    parallel = ExpertParallel(timeout=TIMEOUT)
    step(parallel)
    if rank == 1:
        time.sleep(2 * TIMEOUT)  # blocked in Python, where the process still answers
    with pytest.raises(ExpertParallelError) as error:
        step(parallel)
    parallel.close()
    return str(error.value)


def test_a_rank_that_does_something_else_has_stalled(pool: Pool) -> None:
    """It answers, so the others blame the rank that is furthest behind; it raises the same error when it returns."""
    answers = pool.run(busy)
    assert len(set(answers)) == 1
    assert answers[0].startswith("rank 1 stalled in phase 'between layers' of exchange 2")


def never_connects(rank: int) -> str:
    if rank == 3:
        return ""
    with pytest.raises(ExpertParallelError) as error:
        ExpertParallel(timeout=TIMEOUT)
    return str(error.value)


def test_a_rank_that_never_comes(pool: Pool) -> None:
    answers = pool.run(never_connects)
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].startswith("rank 3 stalled in phase 'connect'")
    pool.run(_catch_up)


def _catch_up(rank: int) -> None:
    """The missing rank has created one ExpertParallel fewer than the others."""
    if rank == 3:
        with pytest.raises(ExpertParallelError):
            ExpertParallel(timeout=0.1)


def bad_ids(rank: int) -> str:
    x, ids, weights = torch.randn(5, 16), torch.zeros(5, 2, dtype=torch.int32), torch.ones(5, 2)
    if rank == 1:
        ids[3, 1] = 8
    # A slow rank may learn of it while it still connects.
    with pytest.raises((ExpertParallelError, ValueError)) as error, ExpertParallel(timeout=10) as parallel:
        switchgear.MoE(16, 8, 8, 2, parallel=parallel).experts(x, ids, weights)
    return f"{type(error.value).__name__}: {error.value}"


def test_bad_input_on_one_rank(pool: Pool) -> None:
    answers = pool.run(bad_ids)
    assert answers[1] == "ValueError: topk_ids: expected -1 to 7, got 8"
    assert answers[0] == answers[2] == answers[3]
    assert "rank 1 raised" in answers[0]
    assert "topk_ids: " in answers[0]


def test_closing_does_not_wait_for_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo may never end a transfer that was aborted, and its group's destructor waits for all transfers."""
    ended = threading.Event()

    class Stuck:
        def __del__(self) -> None:
            ended.wait(30)

    monkeypatch.setattr("switchgear.parallel.transport.CLOSE_SECONDS", 0.01)
    transport = GlooTransport.__new__(GlooTransport)
    transport._group, transport._connections = Stuck(), []
    transport.close()
    assert not ended.is_set()
    ended.set()


# ---- what is printed -------------------------------------------------------------------------------------------------

DIED = errors.Failure(2, "died", "combine", 17)
LINE = str(ExpertParallelError(DIED))
OTHER = errors.Failure(1, "died", "combine", 18)


class View:
    """What rank 0 knows of its group."""

    def __init__(self, failure: errors.Failure | None, has_decided: bool, has_raised: bool) -> None:
        self.rank, self.failure, self.has_decided, self.has_raised = 0, failure, has_decided, has_raised


@pytest.mark.parametrize(
    ("error", "view", "has_line", "has_traceback"),
    [
        (ExpertParallelError(DIED), View(DIED, True, True), True, True),
        (ExpertParallelError(DIED), View(DIED, False, True), True, False),
        (ExpertParallelError(DIED), View(OTHER, False, True), False, True),  # that of a group that is gone
        (RuntimeError("gloo"), View(DIED, True, False), True, True),
        (RuntimeError("gloo"), View(DIED, False, False), True, False),
        (OSError("broken pipe"), View(DIED, False, False), True, False),
        (RuntimeError("mine"), View(DIED, False, True), False, True),  # the program has got the failure before
        (RuntimeError("mine"), View(errors.Failure(0, "raised", "experts", 17), False, False), False, True),
        (RuntimeError("mine"), View(None, False, False), False, True),
        (ValueError("mine"), View(DIED, False, False), False, True),
    ],
)
def test_what_a_program_prints_that_a_failure_ends(
    error: Exception, view: View, has_line: bool, has_traceback: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The failure first, by each rank, and the traceback by one: that of the failed rank's own error, or else that of
    the rank that has decided."""
    monkeypatch.setattr(errors, "_groups", weakref.WeakSet())
    monkeypatch.setattr(errors, "SETTLE_SECONDS", 0.02)
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("the traceback", file=sys.stderr))
    errors.explain_uncaught(view)
    errors.explain_uncaught(view)  # of another group
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == f"{LINE}\n" * has_line + "the traceback\n" * has_traceback


def test_every_kind_of_failure_says_what_to_do() -> None:
    assert errors.REMEDIES.keys() == errors.KINDS.keys()
    for kind in errors.KINDS:
        message = str(ExpertParallelError(errors.Failure(1, kind, "agree", 3)))
        assert message.startswith(f"rank 1 {kind} in phase 'agree' of exchange 3: {errors.KINDS[kind]}; ")
        assert errors.REMEDIES[kind] in message
