# SPDX-License-Identifier: BSD-3-Clause
"""How fast a plain loop reads what a cache has read: the yardstick of its reader.

Recorder stands between a cache and its reader, and notes reads and waits. `replay` makes the same reads of the same
files into the same memory, in pieces on as many threads, and waits where the cache waited, but computes nothing and
compares no checksums. Reads into a row keep their order, so memory holds afterwards what it held before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import c_char
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple

THREADS, PIECE = 4, 1 << 20  # those of the cache's reader


class Read(NamedTuple):
    """Submitted: bytes of a file that go to an address."""

    ticket: int
    file: int
    offset: int
    nbytes: int
    address: int


class Recorder:
    """A reader that notes in `events` what it is told: a Read, or the ticket that is waited for."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.events: list[Read | int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def submit(self, record: tuple[int, int, int, int | None], address: int, urgent: bool = True) -> int:
        ticket = int(self._reader.submit(record, address, urgent))
        file, offset, nbytes, _checksum = record
        self.events.append(Read(ticket, file, offset, nbytes, address))
        return ticket

    def wait(self, ticket: int, timeout: float) -> None:
        self._reader.wait(ticket, timeout)
        self.events.append(ticket)


class Replay:
    """Threads that read pieces with O_DIRECT."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._handles = [os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)) for path in files]
        self._pieces: SimpleQueue[tuple[int, int, int, Any] | None] = SimpleQueue()
        self._done: SimpleQueue[int | OSError] = SimpleQueue()
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        for handle in self._handles:
            os.close(handle)

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            ticket, handle, offset, memory = piece
            try:
                if (got := os.preadv(handle, [memory], offset)) != len(memory):
                    raise OSError(f"expected {len(memory)} bytes at {offset}, got {got}")
                self._done.put(ticket)
            except OSError as error:
                self._done.put(error)

    def __call__(self, events: Sequence[Read | int]) -> tuple[int, float]:
        """Bytes and seconds of these reads."""
        open_pieces: dict[int, int] = {}
        plans = [self._pieces_of(event) if isinstance(event, Read) else event for event in events]  # before the clock

        def wait(ticket: int) -> None:
            while open_pieces.get(ticket):
                if isinstance(done := self._done.get(), OSError):
                    raise done
                open_pieces[done] -= 1

        begin = perf_counter()
        for plan in plans:
            if isinstance(plan, int):
                wait(plan)
                continue
            open_pieces[plan[0][0]] = len(plan)
            for piece in plan:
                self._pieces.put(piece)
        for ticket in open_pieces:
            wait(ticket)
        seconds = perf_counter() - begin
        return sum(event.nbytes for event in events if isinstance(event, Read)), seconds

    def _pieces_of(self, read: Read) -> list[tuple[int, int, int, Any]]:
        memory = memoryview((c_char * read.nbytes).from_address(read.address)).cast("B")
        return [
            (read.ticket, self._handles[read.file], read.offset + at, memory[at : at + PIECE])
            for at in range(0, read.nbytes, PIECE)
        ]
