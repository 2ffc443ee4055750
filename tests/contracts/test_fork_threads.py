# SPDX-License-Identifier: BSD-3-Clause
"""Calls from many threads, and from forked children of a process that has run threads: same bits, and no hang.

torch's own thread pool does not survive a fork (a child that uses two threads waits forever), so children compute only
on the calling thread."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from native_calls import ACCUMULATING, call, outputs_of
from problems import bits_of, counts, on_kernels
from test_memory import random_calls, written
from torch.utils.data import DataLoader, Dataset

import switchgear
from errors import raises
from switchgear import ops
from switchgear.testing import Case, GluOptions, make_layer

SECONDS = 5.0  # a child's limit for a millisecond of work
OPTIONS = GluOptions()


@functools.cache
def layer() -> Any:
    """Enough rows for two threads to share the work."""
    torch.manual_seed(0)
    return make_layer(Case("two threads", 256, 2, 4, 64, 48), torch.bfloat16)


def digest(_: object = None) -> str:
    """A digest of a forward and a backward pass, a route and a plan."""
    x, *rest = layer().arguments()
    y, h = ops.moe_forward(x, *rest, *OPTIONS, True)
    grads = ops.moe_backward(y, x, h, *rest, *OPTIONS, [True, True, True, False, False, True])
    routing = switchgear.route(x, 4)
    outputs = (y, h, *grads, routing.topk_ids, routing.topk_weights, *switchgear.plan(routing.topk_ids, 64))
    sha = hashlib.sha256()
    for tensor in outputs:
        sha.update(bits_of(tensor).numpy().tobytes())
    return sha.hexdigest()


def in_forked_child(function: Callable[[], str]) -> str:
    """The result of `function` in a child, which may take SECONDS."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, function().encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], SECONDS)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        result = pipe.read().decode()
    assert ready, f"a forked child did not finish within {SECONDS} s"
    return result


@pytest.fixture
def wanted() -> str:
    """The parent's digest, computed with two threads."""
    torch.set_num_threads(2)
    return digest()


@counts(ci=20, full=100)
def test_fork(wanted: str, count: int) -> None:
    for _ in range(count):
        assert in_forked_child(digest) == wanted


@counts(ci=20, full=100)
def test_fork_while_another_thread_is_inside_an_op(wanted: str, count: int) -> None:
    """The other thread may hold locks at the fork; the child has no such thread to release them."""
    stop = threading.Event()

    def work() -> None:
        torch.set_num_threads(2)
        while not stop.is_set():
            digest()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for trial in range(count):
            time.sleep(0.0007 * (trial % 10))  # varies the moment of the fork
            assert in_forked_child(digest) == wanted
    finally:
        stop.set()
        worker.join()


def test_fork_in_a_forked_child(wanted: str) -> None:
    assert in_forked_child(lambda: in_forked_child(digest)) == wanted


def test_the_parent_goes_on(wanted: str) -> None:
    in_forked_child(digest)
    assert digest() == wanted


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_multiprocessing(wanted: str, method: str) -> None:
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map_async(digest, range(4)).get(timeout=SECONDS if method == "fork" else 120) == [wanted] * 4


class Digests(Dataset[str]):
    """Items that call the ops in the worker that loads them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> str:
        return digest()


def test_data_loader_workers(wanted: str) -> None:
    loader = DataLoader(Digests(), num_workers=2, timeout=SECONDS, multiprocessing_context="fork")
    assert [digest for batch in loader for digest in batch] == [wanted] * 4


# ---- threads ---------------------------------------------------------------------------------------------------------


@on_kernels
@counts(ci=50, full=1_000)
def test_eight_threads(backend: str, count: int) -> None:
    """Each thread makes all calls, starting at a different one, with occasional bad calls; all share their inputs."""
    calls = [(op, args | {"num_threads": 2}) for op, args in random_calls(count) if op not in ACCUMULATING]
    wanted = [written(op, args) for op, args in calls]

    def work(first: int) -> None:
        for step in range(len(calls)):
            index = (first * len(calls) // 8 + step) % len(calls)
            op, args = calls[index]
            own = args | {name: torch.empty_like(args[name]) for name in outputs_of(op)}
            assert written(op, own) == wanted[index], op
            if step % 10 == 0:
                with raises(ValueError, "num_threads"):
                    call(op, own | {"num_threads": -1})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
