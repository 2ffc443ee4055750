# SPDX-License-Identifier: BSD-3-Clause
"""How rows get from rank to rank: all-to-all with a size for each pair of ranks, in the background.

Sizes have been agreed before (see header.py), and waiting is done by Peers, so a transport neither checks nor times
out. What it must do is `abort`: leave nothing behind that waits for a peer that is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    def wait_for(self, seconds: float) -> bool:
        """Waits at most so long; whether it is done. Raises what went wrong."""
        ...


class Transport(Protocol):
    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        """Starts to send input_rows[r] rows of input to each rank r, in order, and to receive output_rows[r] from it.

        Both tensors are contiguous and stay as they are until the work is done. Every rank starts in the same order.
        """
        ...

    def abort(self) -> None:
        """Ends everything that is under way with an error. On any thread."""
        ...

    def close(self) -> None: ...


class _Done:
    def wait_for(self, seconds: float) -> bool:
        return True


def poll(has_ended: Callable[[], bool], seconds: float) -> bool:
    """Waits at most so long; whether it has ended."""
    end = time.monotonic() + seconds
    pause = 1e-5
    while not has_ended():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(1e-3, 1.5 * pause)
    return True


class _TorchWork:
    """A torch.distributed Work, which keeps its tensors alive."""

    def __init__(self, work: Any, *tensors: Tensor) -> None:
        self._work, self._tensors = work, tensors
        self._on_cpu = all(map(on_cpu, tensors))

    def wait_for(self, seconds: float) -> bool:
        if not self._on_cpu:  # NCCL's own wait lets the stream wait, not the host, which would never hear of a failure
            if not poll(self._work.is_completed, seconds):
                return False
        elif not self._work.is_completed():
            try:
                self._work.wait(timedelta(seconds=seconds))
            except RuntimeError:  # a timeout of this call, or the end of the work
                if not self._work.is_completed():
                    return False
        self._work.wait()
        self._tensors = ()
        return True


class GlooTransport:
    """gloo, for tensors on the CPU. Its own process group: nobody else's collectives come in between.

    Gloo has no way to cancel: what waits for a stopped peer keeps the process from ending until its timeout. Hence
    `abort` shuts the connections down beneath it, which ends all of it at once.
    """

    def __init__(self, rank: int, size: int, store: Any, timeout: float) -> None:
        before = _socket_files()
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=max(timeout, 1.0)))
        store.set_timeout(timedelta(seconds=max(timeout, 1.0)))
        self._connections = _connections_between(_new_sockets(before), rank, size, store)

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        work = self._group.alltoall_base(output, input, list(output_rows), list(input_rows))
        return _TorchWork(work, output, input)

    def abort(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._group = None
        for connection in self._connections:
            connection.close()
        self._connections = []


class GroupTransport:
    """The collectives of a given process group: NCCL, for tensors on a GPU."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        work = dist.all_to_all_single(
            output, input, list(output_rows), list(input_rows), group=self._group, async_op=True
        )
        return _TorchWork(work, output, input)

    def abort(self) -> None:
        with contextlib.suppress(Exception):
            self._group.abort()

    def close(self) -> None:
        pass


class ThrottledTransport:
    """Another transport behind a link of a given speed, for measurements on one machine.

    Each rank has one link, full duplex, on which its transfers follow each other: one is done when the transport below
    is, and not before latency + bytes / bandwidth after the link was free for it. Waiting costs no processor time, as
    with a network card. A rank's rows for itself do not pass the link.
    """

    def __init__(self, below: Transport, rank: int, bandwidth: float, latency: float = 0.0) -> None:
        self.below, self._rank, self.bandwidth, self.latency = below, rank, bandwidth, latency
        self._free_at = 0.0

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        row_bytes = (input[0].numel() if len(input) else output[0].numel() if len(output) else 0) * input.element_size()
        rows = max(sum(counts) - counts[self._rank] for counts in (output_rows, input_rows))
        start = max(time.monotonic(), self._free_at)
        self._free_at = start + self.latency + rows * row_bytes / self.bandwidth
        return _ThrottledWork(self.below.all_to_all(output, input, output_rows, input_rows), start, self._free_at)

    def abort(self) -> None:
        self.below.abort()

    def close(self) -> None:
        self.below.close()


class _ThrottledWork:
    def __init__(self, below: Work, started: float, ready_at: float) -> None:
        self._below, self.started, self.ready_at = below, started, ready_at

    def wait_for(self, seconds: float) -> bool:
        left = self.ready_at - time.monotonic()
        if left > 0:
            time.sleep(min(left, seconds))
        return left <= seconds and self._below.wait_for(seconds)


# ---- the connections of a process group ------------------------------------------------------------------------------


def _socket_files() -> set[str]:
    return set(_sockets())


def _sockets() -> dict[str, int]:
    """The open sockets of this process by inode; none where there is no /proc."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for file in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/self/fd/{file}")
                if name.startswith("socket:"):
                    found[name] = int(file)
    return found


def _new_sockets(before: set[str]) -> list[socket.socket]:
    """Second handles on the connected TCP sockets that were not there before."""
    connections = []
    for name, file in _sockets().items():
        if name in before:
            continue
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=os.dup(file))
            try:
                connection.getpeername()
            except OSError:
                connection.close()
                continue
            connections.append(connection)
    return connections


def _connections_between(candidates: list[socket.socket], rank: int, size: int, store: Any) -> list[socket.socket]:
    """Those whose other end is a candidate of another rank: what another thread opened meanwhile is left alone."""
    own = {str((c.getsockname()[:2], c.getpeername()[:2])): c for c in candidates if c.family != socket.AF_UNIX}
    store.set(f"sockets/{rank}", "\n".join(str((c.getpeername()[:2], c.getsockname()[:2])) for c in own.values()))
    mirrored = {line for peer in range(size) if peer != rank
                for line in bytes(store.get(f"sockets/{peer}")).decode().split("\n")}  # fmt: skip
    kept = [connection for pair, connection in own.items() if pair in mirrored]
    for connection in candidates:
        if connection not in kept:
            connection.close()
    return kept


def on_cpu(tensor: Tensor) -> bool:
    return tensor.device == torch.device("cpu")
