# SPDX-License-Identifier: BSD-3-Clause
"""The memory of a cache: rows of an arena, each for one record, and the reads that write into them. On a GPU, these go
through a Staging, which has the methods of the reader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from switchgear.offload.staging import Staging
from switchgear.weights.pages import HUGE_PAGE, advise_huge_pages


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
