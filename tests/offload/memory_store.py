# SPDX-License-Identifier: BSD-3-Clause
"""A store and a reader of tests: records in memory, reads that are late or fail as a test says."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.offload import Records, Store
from switchgear.offload.store_records import fill, lay_out_records
from switchgear.weights import layout_of, stored_of
from switchgear.weights.weight import Weight


class MemoryReader:
    """Reads are done once they are waited for, or at once. Counts what is in flight.

    late: reads wait for `wait`. on_wait: called with the ticket; may raise.
    """

    def __init__(self, files: list[Tensor], late: bool = True) -> None:
        self.files, self.late = files, late
        self.tickets: dict[int, tuple[Any, ...]] = {}
        self.begun: list[tuple[int, int, bool]] = []  # file, offset, urgent
        self.cancelled = 0
        self.bytes = 0
        self.number = 0
        self.closed = False
        self.on_wait: Callable[[int], None] = lambda ticket: None
        self.lock = threading.Lock()

    def submit(self, record: tuple[int, int, int, int | None], address: int, urgent: bool = True) -> int:
        file, offset, nbytes, _checksum = record
        with self.lock:
            self.number += 1
            assert address % 4096 == 0
            self.tickets[self.number] = (file, offset, nbytes, address)
            self.begun.append((file, offset, urgent))
            if not self.late:
                self.fill(self.number)
            return self.number

    def fill(self, ticket: int) -> None:
        """The bytes of a read in flight."""
        file, offset, nbytes, address = self.tickets[ticket]
        ctypes.memmove(address, self.files[file].data_ptr() + offset, nbytes)

    def _known(self, ticket: int) -> None:
        if ticket not in self.tickets:
            raise ValueError(f"ticket: expected one in use, got {ticket}")

    def wait(self, ticket: int, timeout: float) -> None:
        self._known(ticket)
        self.on_wait(ticket)
        with self.lock:
            self.fill(ticket)
            self.bytes += self.tickets.pop(ticket)[2]

    def fail(self, ticket: int, error: BaseException, *, ends: bool) -> None:
        """For on_wait: the read failed, or (not `ends`) goes on."""
        if ends:
            *_, nbytes, address = self.tickets.pop(ticket)
            ctypes.memset(address, 0xAA, nbytes // 2)
        raise error

    def is_done(self, ticket: int) -> bool:
        self._known(ticket)
        return not self.late

    def promote(self, ticket: int) -> None:
        self._known(ticket)

    def cancel(self, ticket: int) -> bool:
        self._known(ticket)
        if not self.late:
            return False
        self.cancelled += 1
        del self.tickets[ticket]
        return True

    def close(self) -> None:
        self.closed = True


class MemoryStore(Store):
    """The experts of a model, plain or stored."""

    path = Path("memory")
    layers: dict[str, Records]
    files: list[Tensor]
    readers: list[MemoryReader]

    def __init__(self, model: nn.Module, late: bool = True) -> None:
        vars(self).update(layers={}, files=[], late=late, readers=[])
        for name, module in model.named_modules():
            if (layout := layout_of(module)) is None:
                continue
            stored = stored_of(module)
            if stored is not None:
                weights = stored.weights(module)
            else:
                plain = [getattr(module, n).detach() for n in layout.names]
                plain = [(p.mT if layout.transposed else p).contiguous() for p in plain]
                weights = tuple(Weight("plain", p, p.shape[1], p.shape[2], p.dtype, is_exact=True) for p in plain)
            records = lay_out_records(name, "", (weights[0], weights[1]))
            data = torch.zeros(records.nbytes, dtype=torch.uint8)
            for expert, (begin, size) in enumerate(zip(records.offsets, records.sizes, strict=True)):
                fill(data[None, begin : begin + size], records, weights, expert)
            self.layers[name] = records
            self.files.append(data)

    @property
    def reader(self) -> MemoryReader:
        return self.readers[-1]

    def open_reader(self, threads: int) -> MemoryReader:
        self.readers.append(MemoryReader(self.files, self.late))
        return self.readers[-1]

    def reads(self, records: Records, is_checked: bool) -> list[tuple[int, int, int, int | None]]:
        file = list(self.layers).index(records.name)
        return [(file, *read, None) for read in zip(records.offsets, records.sizes, strict=True)]
