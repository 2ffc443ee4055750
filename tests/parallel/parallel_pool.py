# SPDX-License-Identifier: BSD-3-Clause
"""Processes that start once and run one function after another: importing torch takes longer than most tests."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from forked import CTX


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Pool:
    """`size` ranks of a torch.distributed job, with its store in this process so that it survives every rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        port = free_port()
        self._store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = CTX.Pipe()
            process = CTX.Process(target=_worker, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Runs function(rank, *args) on every rank."""
        for pipe in self._pipes:
            pipe.send((function, args))

    def results(self, ranks: Sequence[int] | None = None, timeout: float = 60.0) -> list[Any]:
        """The ranks' return values. AssertionError, with the traceback, if a rank raises or hangs."""
        end = time.monotonic() + timeout
        results: list[Any] = []
        errors: list[str] = []
        for rank in range(self.size) if ranks is None else ranks:
            if not self._pipes[rank].poll(max(0.0, end - time.monotonic())):
                raise AssertionError(f"rank {rank} did not finish within {timeout} s")
            try:
                done, value = self._pipes[rank].recv()
            except EOFError:
                raise AssertionError(f"rank {rank} is gone") from None
            results.append(value)
            if not done:
                errors.append(f"rank {rank}:\n{value}")
        # When one rank fails, the others report its failure.
        errors.sort(key=lambda text: "ExpertParallelError" in text)
        assert not errors, errors[0]
        return results

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        self.start(function, *args)
        return self.results(timeout=timeout)

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):  # it has ended, and the server that started it has not said so yet
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
        for pipe in self._pipes:
            pipe.close()


_groups: dict[int, Any] = {}


def subgroup(size: int) -> Any:
    """For workers: the group of the first `size` ranks."""
    return _groups[size]


def _worker(rank: int, size: int, port: int, pipe: Any) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a worker that hangs does not outlive the fork server
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    for count in range(1, size + 1):
        _groups[count] = dist.new_group(list(range(count)))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = (True, function(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
