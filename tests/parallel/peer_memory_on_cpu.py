# SPDX-License-Identifier: BSD-3-Clause
"""PeerMemoryTransport without a GPU: segments in memory that processes share. The kernel is replaced by its protocol in
Python, or runs on the CPU (tests/simt)."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import native_modules
from switchgear.parallel import ExpertParallel
from switchgear.parallel.peer_memory import PeerMemoryTransport

FLAG_BYTES, MAX_RANKS, SLOTS = 512, 16, 2
MULTIPROCESSORS = 7
SLOT_BYTES = 512  # small, so that most transfers take several pieces


class HostDevice:
    """The protocol of csrc/cuda/exchange.cuh. A transfer advances whenever its end is polled, and transfers end in the
    order in which they started, as on a stream."""

    def __init__(self) -> None:
        self._queue: deque[Iterator[None]] = deque()
        self._mapped: dict[int, Tensor] = {}  # by address
        self._file = -1
        self._stop = torch.zeros(1, dtype=torch.int32)

    def allocate(self, size: int) -> Tensor:
        self._file = os.memfd_create("switchgear-segment")
        os.ftruncate(self._file, size)
        return self._map(self._file, size)

    def share(self, segment: Tensor) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def open(self, shared: str) -> Tensor:
        file = os.open(shared, os.O_RDWR)
        try:
            return self._map(file, 0)
        finally:
            os.close(file)

    def _map(self, file: int, size: int) -> Tensor:
        segment = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        self._mapped[segment.data_ptr()] = segment
        return segment

    def stop_word(self) -> Tensor:
        return self._stop

    def close(self) -> None:
        """Called after all ranks have mapped the segment."""
        os.close(self._file)

    def segment_bytes(self, num_ranks: int, slot_bytes: int) -> int:
        return FLAG_BYTES + num_ranks * SLOTS * slot_bytes

    def multiprocessors(self, num_ranks: int) -> int:
        return MULTIPROCESSORS

    def exchange(self, inputs: Any, options: Any, outputs: Any, *, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        transfer = self._transfer(inputs, options, *outputs)
        self._queue.append(transfer)
        return lambda: self._advance(transfer)

    def _advance(self, transfer: Iterator[None]) -> bool:
        while self._queue and next(self._queue[0], self) is self:
            self._queue.popleft()
        return transfer not in self._queue

    def _transfer(
        self,
        inputs: tuple[Tensor, list[int], list[int], list[int], list[int]],
        options: tuple[list[int], int, int, int],
        received: Tensor,
    ) -> Iterator[None]:
        rows, send_bytes, receive_bytes, first_sent, first_received = inputs
        addresses, rank, slot_bytes, stop = options
        segments = [self._mapped[address] for address in addresses]
        words = [segment[:FLAG_BYTES].view(torch.int32) for segment in segments]  # arrived [16], read [16], …

        def slot(target: int, source: int, piece: int) -> Tensor:
            return segments[target][FLAG_BYTES + (source * SLOTS + piece % SLOTS) * slot_bytes :]

        def below(flag: Tensor, value: int) -> bool:
            return (int(flag) - value) % 2**32 >= 2**31

        def send(target: int, rows: Tensor) -> Iterator[None]:
            for piece, part in enumerate(rows.split(slot_bytes), first_sent[target]):
                while below(words[rank][MAX_RANKS + target], piece + 1 - SLOTS):
                    yield
                slot(target, rank, piece)[: len(part)] = part
                words[target][rank] = piece + 1

        def receive(source: int, rows: Tensor) -> Iterator[None]:
            for piece, part in enumerate(rows.split(slot_bytes), first_received[source]):
                while below(words[rank][source], piece + 1):
                    yield
                part.copy_(slot(rank, source, piece)[: len(part)])
                words[source][MAX_RANKS + rank] = piece + 1

        lanes = []
        for other, (out, into) in enumerate(zip(rows.split(send_bytes), received.split(receive_bytes), strict=True)):
            if other == rank:
                into.copy_(out)
            else:
                lanes += [send(other, out)] if len(out) else []
                lanes += [receive(other, into)] if len(into) else []
        assert stop == self._stop.data_ptr()
        while lanes and not int(self._stop):
            lanes = [lane for lane in lanes if next(lane, self) is not self]
            if lanes:
                yield


class SimtDevice(HostDevice):
    """The kernel itself, which runs on this thread until the other ranks have run theirs."""

    def __init__(self) -> None:
        super().__init__()
        self._module = native_modules.load_simt()
        self._module.set_other_processes(True)

    def segment_bytes(self, num_ranks: int, slot_bytes: int) -> int:
        return int(self._module.exchange_segment_bytes(num_ranks, slot_bytes))

    def multiprocessors(self, num_ranks: int) -> int:
        return int(self._module.exchange_multiprocessors(num_ranks))

    def exchange(self, inputs: Any, options: Any, outputs: Any, *, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        self._module.exchange(inputs, options, outputs, self._module.Execution(0, native_modules.poisoned, False))
        return lambda: True


DEVICES = {"peer_memory": HostDevice, "peer_memory_simt": SimtDevice}


def make_parallel(group: Any, transport: str, **options: Any) -> ExpertParallel:
    """An ExpertParallel that sends CPU tensors through `transport`, which may be a key of DEVICES."""
    if transport not in DEVICES:
        return ExpertParallel(group, transport=transport, **options)
    parallel = ExpertParallel(group, **options)
    if parallel.size > 1:
        device = DEVICES[transport]()
        store = parallel._device_store
        parallel._transports["cpu"].close()
        parallel._transports["cpu"] = PeerMemoryTransport(parallel.rank, parallel.size, store, device, SLOT_BYTES)
        device.close()
    return parallel
