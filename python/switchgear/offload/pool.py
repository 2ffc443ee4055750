# SPDX-License-Identifier: BSD-3-Clause
"""The memory of a cache: rows of an arena, each for one record, and the reads that write into them.

On a GPU, records are read into rows through a few buffers of pinned host memory.

    file ──reader──► buffer ──copy stream──► row ──caller's stream──► kernels

A Staging has the methods of the reader, so that a cache submits reads, waits for them and drops them as on the host;
the address is that of a row. A read without a free buffer waits in a queue, needed ones before guessed ones. Four rules
give the order; the host waits for the GPU only if a needed read finds no free buffer:

    1. A buffer is read into again once the copy out of it is done.
    2. A copy into a row waits for the kernels that read what the row held before (`release`).
    3. Kernels that read a row wait for the copy into it (`wait`).
    4. Copies into a row are in the order of its reads: there is one copy stream.

An exception anywhere, a KeyboardInterrupt too, loses no buffer: which are in use follows from `reads`, `begun` and
`copying`. After one, `settle` waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchgear.offload.device import CudaDevice, Event
from switchgear.weights.weight import HUGE_PAGE, advise_huge_pages


@dataclass
class _Read:
    """copied: the event behind its copy. error: of the reader. is_unwanted: nothing will use the row."""

    row: int
    request: tuple[int, int, int, int | None]  # file, offset, bytes, checksum
    is_urgent: bool
    buffer: int = -1
    copied: Event | None = None
    error: OSError | None = None
    is_unwanted: bool = False


class Staging:
    """count: of buffers. Guesses take at most half of them, so that they never delay a needed read."""

    def __init__(self, reader: Any, device: CudaDevice, arena: Tensor, count: int) -> None:
        self.reader, self.device = reader, device
        self.arena = arena.data  # autograd must not count our copies as changes of weights that it has saved
        self.buffers = device.buffers(count, arena.shape[1])
        self.reads: dict[int, _Read] = {}  # by ticket, in the order of `submit`
        self.begun: dict[int, int] = {}  # of them, those whose buffer is being filled: the reader's ticket
        self.copying: dict[int, Event] = {}  # by buffer: the copy out of it
        self.last_use: dict[int, Event] = {}  # by row: the kernels that read what it held
        self._number = 0
        # Kernels that used this memory before the allocator gave it to us may still run.
        device.copies.wait_event(device.compute().record_event())

    # ---- the reader's methods ----------------------------------------------------------------------------------------

    def submit(self, record: tuple[int, int, int, int | None], address: int, urgent: bool = True) -> int:
        row = (address - self.arena.data_ptr()) // self.arena.stride(0)
        self._number += 1
        ticket = self._number
        self.reads[ticket] = _Read(row, record, urgent)
        self.advance()
        return ticket

    def wait(self, ticket: int, timeout: float) -> None:
        """Returns once the copy is queued: the caller's stream waits for it, the host does not."""
        read = self._known(ticket)
        self._begin_now(ticket, timeout)
        self._finish(ticket, timeout)
        if read.copied is not None and not read.is_unwanted:
            self.device.compute().wait_event(read.copied)
        self._forget(ticket)
        if read.error is not None:
            raise read.error

    def is_done(self, ticket: int) -> bool:
        read = self._known(ticket)
        if self._is_over(read):
            return True
        if ticket not in self.begun:
            self.advance()
            return False
        return bool(self.reader.is_done(self.begun[ticket]))

    def promote(self, ticket: int) -> None:
        self._known(ticket).is_urgent = True
        if ticket in self.begun:
            self.reader.promote(self.begun[ticket])
        else:
            self.advance()

    def cancel(self, ticket: int) -> bool:
        read = self._known(ticket)
        is_waiting = ticket not in self.begun and not self._is_over(read)
        if is_waiting or (ticket in self.begun and self.reader.cancel(self.begun[ticket])):
            self._forget(ticket)
            return True
        read.is_unwanted = True
        return False

    # ---- rows --------------------------------------------------------------------------------------------------------

    def release(self, row: int) -> None:
        """All kernels that read what is in the row are queued."""
        self.last_use[row] = self.device.compute().record_event()

    def settle(self) -> None:
        """After an exception: the host waits for the GPU, and reads whose outcome is lost are forgotten."""
        self.device.synchronize()
        self.copying.clear()
        self.last_use.clear()
        for ticket in list(self.begun):
            if self._is_over(self.reads[ticket]):
                del self.begun[ticket]
            elif not knows(self.reader, self.begun[ticket]):
                self._forget(ticket)

    def others(self, tickets: Collection[int]) -> dict[int, int]:
        """The rows of reads that are not among these, which an exception has lost, and their tickets."""
        return {read.row: ticket for ticket, read in self.reads.items() if ticket not in tickets}

    # ---- buffers -----------------------------------------------------------------------------------------------------

    def advance(self, first: int | None = None) -> None:
        """Queues the copies of records that have arrived, and begins reads into free buffers: `first`, then needed
        ones, then guesses."""
        for ticket in list(self.begun):
            if self.reader.is_done(self.begun[ticket]):
                self._finish(ticket, 0.0)
        for buffer, event in list(self.copying.items()):
            if event.query():
                del self.copying[buffer]
        taken = {self.reads[ticket].buffer for ticket in self.begun} | self.copying.keys()
        free = [buffer for buffer in range(len(self.buffers)) if buffer not in taken]
        guesses = sum(not self.reads[ticket].is_urgent for ticket in self.begun)
        waiting = [
            ticket for ticket, read in self.reads.items() if ticket not in self.begun and not self._is_over(read)
        ]
        for ticket in sorted(waiting, key=lambda t: (t != first, not self.reads[t].is_urgent)):
            is_guess = not self.reads[ticket].is_urgent and ticket != first
            if not free or (is_guess and guesses >= len(self.buffers) // 2):
                break
            guesses += is_guess
            self._begin(ticket, free.pop())

    def _begin(self, ticket: int, buffer: int) -> None:
        read = self.reads[ticket]
        read.buffer = buffer
        given = (read.request, self.buffers[buffer].data_ptr(), read.is_urgent)
        try:  # one call of C, which no signal interrupts: a read that began is in `begun`
            self.begun.update(zip((ticket,), map(self.reader.submit, *((value,) for value in given)), strict=True))
        except OSError as error:
            read.error = error

    def _begin_now(self, ticket: int, timeout: float) -> None:
        """Begins a read that waits for a buffer."""
        read = self.reads[ticket]
        self.advance(ticket)
        while ticket not in self.begun and not self._is_over(read):
            if self.copying:
                next(iter(self.copying.values())).synchronize()
            else:
                self._finish(next(iter(self.begun)), timeout)
            self.advance(ticket)

    def _finish(self, ticket: int, timeout: float) -> None:
        """Waits for the reader, and queues the copy."""
        read = self.reads[ticket]
        if self._is_over(read):
            return
        try:
            self.reader.wait(self.begun[ticket], timeout)
        except TimeoutError:
            raise
        except OSError as error:
            read.error = error
        if read.error is None:
            self._copy(read)
        del self.begun[ticket]

    def _copy(self, read: _Read) -> None:
        copies, nbytes = self.device.copies, read.request[2]
        if (last := self.last_use.get(read.row)) is not None:
            copies.wait_event(last)
        self.device.copy(self.arena[read.row, :nbytes], self.buffers[read.buffer, :nbytes])
        read.copied = self.copying[read.buffer] = copies.record_event()

    # ---- tickets -----------------------------------------------------------------------------------------------------

    def _is_over(self, read: _Read) -> bool:
        return read.copied is not None or read.error is not None

    def _known(self, ticket: int) -> _Read:
        if (read := self.reads.get(ticket)) is None:
            raise ValueError(f"ticket: expected one in use, got {ticket}")
        return read

    def _forget(self, ticket: int) -> None:
        self.begun.pop(ticket, None)
        self.reads.pop(ticket, None)


def knows(reader: Any, ticket: int) -> bool:
    """Whether a read was not waited for yet. If it was, an exception has lost the outcome."""
    try:
        reader.is_done(ticket)
    except ValueError:
        return False
    return True


# ---- Rows ------------------------------------------------------------------------------------------------------------


def arena(rows: int, record_bytes: int) -> Tensor:
    """[rows, record_bytes] uint8, aligned for direct reads and huge pages. Rows take memory once they are written."""
    memory = torch.empty(rows * record_bytes + HUGE_PAGE, dtype=torch.uint8, device="cpu")
    advise_huge_pages(memory)
    begin = -memory.data_ptr() % HUGE_PAGE
    return memory[begin : begin + rows * record_bytes].view(rows, record_bytes)


class Pool:
    """Which rows are free. A row whose read was given up is drained: free again once nothing writes into it.

    guess_rows: how many rows reads may take that nothing needs yet.
    """

    def __init__(self, reader: Any, arena: Tensor, guess_rows: int) -> None:
        self.reader, self.arena, self.guess_rows = reader, arena, guess_rows
        self.record_bytes = arena.shape[1]
        self.staging = reader if isinstance(reader, Staging) else None
        self.address = self.arena.data_ptr()
        self.free = list(reversed(range(len(arena))))
        self.draining: dict[int, int] = {}  # row: ticket

    def is_over(self, ticket: int) -> bool:
        """Whether a read has ended. A ticket that the reader does not know has."""
        try:
            return bool(self.reader.is_done(ticket))
        except ValueError:
            return True

    def release(self, row: int) -> None:
        """Frees a row of which all uses have been computed, or queued on the device."""
        if self.staging is not None:
            self.staging.release(row)
        self.free.append(row)

    def take(self) -> int | None:
        """A free row."""
        if not self.free and self.draining:
            self.drain()
        return self.free.pop() if self.free else None

    def give_up(self, row: int, ticket: int) -> bool:
        """Ends a read into a row. Returns whether it had not begun."""
        self.draining[row] = ticket
        try:
            is_cancelled = bool(self.reader.cancel(ticket))
        except ValueError:
            is_cancelled = True
        if is_cancelled:
            del self.draining[row]
            self.free.append(row)
        return is_cancelled

    def drain(self, timeout: float = 0.0) -> bool:
        """Frees rows whose reads are over; if there are none, waits for one. Returns whether it freed any."""
        before = len(self.free)
        for row, ticket in list(self.draining.items()):
            if self.is_over(ticket) or (timeout > 0 and len(self.free) == before):
                try:
                    self.reader.wait(ticket, timeout)
                except TimeoutError:
                    continue
                except (OSError, ValueError):  # the record is not needed
                    pass
                del self.draining[row]
                self.free.append(row)
        return len(self.free) > before

    def settle(self, tickets: set[int]) -> None:
        """After an exception on a GPU: drains the rows of reads that are not among these."""
        if self.staging is not None:
            self.staging.settle()
            self.draining |= self.staging.others(tickets | set(self.draining.values()))

    def rebuild(self, used: set[int]) -> None:
        """All rows are free that are neither used nor drained."""
        self.free = [row for row in reversed(range(len(self.arena))) if row not in used and row not in self.draining]
