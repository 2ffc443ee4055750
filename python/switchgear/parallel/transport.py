# SPDX-License-Identifier: BSD-3-Clause
"""How rows get from rank to rank: asynchronous all-to-all with a size for each pair of ranks.

Sizes are agreed before (see header.py), and Peers does the waiting, so a transport neither checks nor times out. But it
must implement `abort`: afterwards nothing may wait for a lost peer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from switchgear.parallel.connect import own_client, share

CLOSE_SECONDS = 0.5  # in which gloo usually ends


class Work(Protocol):
    def wait_for(self, seconds: float) -> bool:
        """Waits up to `seconds`; returns whether it is done. Raises the error if it failed."""
        ...


class Transport:
    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        """Starts sending input_rows[r] rows of input to each rank r, in order, and receiving output_rows[r] from it.

        Both tensors are contiguous and must not change until the work is done. All ranks start in the same order.
        """
        raise NotImplementedError

    def abort(self) -> None:
        """Ends all pending work with an error. May be called on any thread."""

    def close(self) -> None:
        """Frees what it holds."""


class Around(Transport):
    """A transport that changes what another one is asked for."""

    def __init__(self, below: Transport) -> None:
        self.below = below

    def abort(self) -> None:
        self.below.abort()

    def close(self) -> None:
        self.below.close()


class Done:
    def wait_for(self, seconds: float) -> bool:
        return True


def poll(has_ended: Callable[[], bool], seconds: float) -> bool:
    """Waits up to `seconds`; returns whether it has ended."""
    end = time.monotonic() + seconds
    while not has_ended():
        if time.monotonic() > end:
            return False
        time.sleep(5e-5)  # delays the next product by at most this; transfers take several times as long
    return True


class _TorchWork:
    """A torch.distributed Work; keeps its tensors alive."""

    def __init__(self, work: Any, *tensors: Tensor) -> None:
        self._work, self._tensors = work, tensors
        self._on_cpu = all(map(on_cpu, tensors))

    def wait_for(self, seconds: float) -> bool:
        # NCCL's wait blocks the stream, not the host, which would miss failures. Gloo's counts milliseconds, and 0 of
        # them mean no limit.
        if not self._on_cpu or seconds < 2e-3:
            if not poll(self._work.is_completed, seconds):
                return False
        elif not self._work.is_completed():
            try:
                self._work.wait(timedelta(seconds=seconds))
            except RuntimeError:  # this call timed out, or the work failed
                if not self._work.is_completed():
                    return False
        self._work.wait()
        self._tensors = ()
        return True

    def join(self) -> None:
        """The current stream waits, not the host."""
        self._work.wait()


class GroupTransport(Transport):
    """A process group: NCCL, for tensors on a GPU. is_own: it belongs to this object alone, which shuts it down."""

    def __init__(self, group: Any, is_own: bool = False) -> None:
        self._group, self._is_own, self._options = group, is_own, dist.AllToAllOptions()

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        work = self._group.alltoall_base(output, input, list(output_rows), list(input_rows), self._options)
        return _TorchWork(work, output, input)

    def abort(self) -> None:
        with contextlib.suppress(Exception):
            self._group.abort()

    def close(self) -> None:
        if self._is_own:
            with contextlib.suppress(Exception):
                self._group.shutdown()


class GlooTransport(GroupTransport):
    """gloo, for CPU tensors. Uses its own process group, so that no other collectives interleave.

    Gloo cannot cancel: a wait for a stopped peer keeps the process alive until its timeout. So `abort` shuts down the
    reading end of the underlying connections. Gloo sees them end, and ends all waits at once.
    """

    def __init__(self, rank: int, size: int, store: Any, timeout: float, is_over: Callable[[], bool]) -> None:
        """timeout: seconds after which gloo gives up connecting. is_over: whether this object is no longer needed."""
        before = set(_sockets())
        seconds = timeout + 1.0  # Peers, which knows the reason, comes first
        super().__init__(dist.ProcessGroupGloo(own_client(store), rank, size, timedelta(seconds=seconds)), is_own=True)
        self._connections = _connections_between(_new_sockets(before), rank, size, store, is_over)
        # Peers decides who has stalled. If gloo's own timeout ended a transfer first, it would not say whose fault it
        # is. It also counts the time in which this rank's experts work.
        self._options.timeout = timedelta(days=1) if self._connections else timedelta(seconds=2 * seconds)

    def abort(self) -> None:
        # Not the writing end: a send that begins before gloo notices would fail there, and gloo never ends it.
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self.abort()
        # The group's destructor waits for its transfers. Should one not end, it keeps that thread, but not this one.
        group = [self._group]
        self._group = None
        destroying = threading.Thread(target=group.clear, name="switchgear-close", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread starts at exit
            destroying.start()
            destroying.join(CLOSE_SECONDS)
        for connection in self._connections:
            connection.close()
        self._connections = []


class Network:
    """A rank's links, for measurements on one machine: one to other nodes, and one to the ranks of its node."""

    def __init__(self, near: Sequence[bool], bandwidth: float, near_bandwidth: float | None) -> None:
        """near[r]: whether rank r is on this node. near_bandwidth: None if all ranks share the one link."""
        self._near = [False] * len(near) if near_bandwidth is None else near
        self._speeds = {False: bandwidth} if near_bandwidth is None else {False: bandwidth, True: near_bandwidth}
        self._free_at = {(link, direction): 0.0 for link in self._speeds for direction in range(2)}  # in and out

    def send(self, rank: int, output_rows: Sequence[int], input_rows: Sequence[int], row: int) -> tuple[float, float]:
        """Begin and end of a transfer of rows of `row` bytes, in each direction as soon as the link is free."""
        now = time.monotonic()
        spans = [(now, now)]  # end and begin
        for link, speed in self._speeds.items():
            begin = max(now, *(self._free_at[link, direction] for direction in range(2)))
            for direction, counts in enumerate((output_rows, input_rows)):
                rows = sum(count for r, count in enumerate(counts) if r != rank and self._near[r] == link)
                if rows:
                    end = max(now, self._free_at[link, direction]) + rows * row / speed
                    self._free_at[link, direction] = end
                    spans.append((end, min(begin, end)))
        end, begin = max(spans)
        return begin, end


class ThrottledTransport(Around):
    """Wraps another transport in links of a given speed, for measurements on one machine.

    Each rank has full-duplex links that serialise its transfers in each direction. A transfer is done when the
    underlying transport is, but not before bytes / bandwidth after its link became free. Waiting costs no processor
    time, as with a network card. A rank's rows for itself do not use a link.
    """

    def __init__(self, below: Transport, rank: int, network: Network) -> None:
        super().__init__(below)
        self._rank, self._network = rank, network

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        row_bytes = (input[0].numel() if len(input) else output[0].numel() if len(output) else 0) * input.element_size()
        begin, end = self._network.send(self._rank, output_rows, input_rows, row_bytes)
        return _ThrottledWork(self.below.all_to_all(output, input, output_rows, input_rows), begin, end)


class _ThrottledWork:
    def __init__(self, below: Work, started: float, ready_at: float) -> None:
        self._below, self.started, self.ready_at = below, started, ready_at

    def wait_for(self, seconds: float) -> bool:
        left = self.ready_at - time.monotonic()
        if left > 0:
            time.sleep(min(left, seconds))
        return left <= seconds and self._below.wait_for(seconds)


# ---- the connections of a process group ------------------------------------------------------------------------------


def _sockets() -> dict[str, int]:
    """The open sockets of this process by inode; empty without /proc."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for file in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/self/fd/{file}")
                if name.startswith("socket:"):
                    found[name] = int(file)
    return found


def _new_sockets(before: set[str]) -> list[socket.socket]:
    """Duplicate handles of the connected TCP sockets that did not exist before."""
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


def _connections_between(
    candidates: list[socket.socket], rank: int, size: int, store: Any, is_over: Callable[[], bool]
) -> list[socket.socket]:
    """Candidates whose other end is a candidate of another rank; skips what another thread opened meanwhile."""
    own = {str((c.getsockname()[:2], c.getpeername()[:2])): c for c in candidates if c.family != socket.AF_UNIX}
    text = "\n".join(str((c.getpeername()[:2], c.getsockname()[:2])) for c in own.values())
    texts = share(store, "sockets", rank, size, text, is_over)
    mirrored = {line for peer, lines in enumerate(texts) if peer != rank for line in lines.split("\n")}
    kept = [connection for pair, connection in own.items() if pair in mirrored]
    for connection in candidates:
        if connection not in kept:
            connection.close()
    return kept


def on_cpu(tensor: Tensor) -> bool:
    return tensor.device == torch.device("cpu")
