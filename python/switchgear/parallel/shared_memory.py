# SPDX-License-Identifier: BSD-3-Clause
"""Transfers between processes of one machine through shared memory: one copy in, one copy out, no system calls.

Every rank has blocks that it writes and the others read. A board that all map describes the content of each block:

    board[source][slot] = [number + 1, file, capacity, offsets of each rank's rows [W+1], number + 1 of each reader [W]]

A sender fills a block, then the entry, and last the entry's first word, the flag. A reader that sees the flag copies
its rows and sets its mark; a block is reused when all readers have. Flags are plain stores and loads, so the processor
must keep their order (x86-64). After construction this module never blocks: Peers waits and detects lost ranks.

Blocks and board are segments: memory without a name in any file system, so a killed process leaves nothing. A rank
publishes its process, the file's number there, and the name that it gave to the memory. That is not yet proof:
the process may have ended, and its number may belong to another one. So a segment is mapped only if it is anonymous
memory of the same user with exactly this name, which contains a random number, and as large as expected. Seals keep
it so: a file that shrinks later would kill each process that reads its end.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.parallel.connect import never, share
from switchgear.parallel.transport import Transport

SLOTS = 64  # concurrent transfers of one rank; an exchange has at most 8 · 2 + 4
_SMALLEST = 1 << 16
_DRAIN_SECONDS = 2.0
_SPINS = 100  # checks of a flag, yielding the processor in between, before sleeping


def available() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


# ---- segments --------------------------------------------------------------------------------------------------------


class Address(NamedTuple):
    """Where another process finds a segment."""

    process: int
    file: int
    name: str


def random_name(what: str) -> str:
    return f"switchgear-{what}-{secrets.token_hex(8)}"


def create(name: str, size: int) -> tuple[int, mmap.mmap]:
    """A new segment of zeros: its file, and its map."""
    import fcntl  # not on every system, as memfd_create

    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(file, 0o600)
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return file, mmap.mmap(file, size)
    except BaseException:
        os.close(file)
        raise


def attach(address: Address, size: int) -> mmap.mmap:
    """Maps a segment of another process.

    Raises:
        OSError: it cannot be opened, for instance since the process is gone or belongs to another user.
        ValueError: it is something else, or of another size.
    """
    import fcntl

    process, file, name = int(address.process), int(address.file), str(address.name)
    opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.readlink(f"/proc/self/fd/{opened}")
        if found != f"/memfd:{name} (deleted)":
            raise ValueError(f"segment: expected {name} of process {process}, got {found}")
        status = os.fstat(opened)
        if status.st_uid != os.geteuid():
            raise ValueError(f"segment: expected memory of user {os.geteuid()}, got user {status.st_uid}'s")
        if status.st_size != size or not fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError(f"segment: expected {size} bytes that cannot shrink, got {status.st_size}")
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)


# ---- the transport ---------------------------------------------------------------------------------------------------


class _Block:
    """Shared memory, created by this process unless the address of another's is given."""

    def __init__(self, capacity: int, name: str, address: Address | None = None) -> None:
        self.capacity = capacity
        self.file = -1
        if address is None:
            self.file, self.map = create(name, capacity)
        else:
            self.map = attach(address, capacity)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)  # the mapping ends with the last tensor that uses it


class SharedMemoryTransport(Transport):
    """See Transport. store: for the rendezvous; all ranks must be on this machine."""

    def __init__(self, rank: int, size: int, store: Any, is_over: Callable[[], bool] = never) -> None:
        """is_over: whether this object is no longer needed."""
        self._rank, self._size = rank, size
        self._entry = 3 + (size + 1) + size  # in words
        self._name = random_name("rows")
        self._addresses: list[Address] = []
        self._board: _Block | None = None
        self._number = 0
        self._free: list[_Block] = []
        self._used: list[tuple[int, _Block]] = []
        self._theirs: dict[tuple[int, int], _Block] = {}
        self.aborted = False
        try:
            self.problem = self._open(store, is_over)
        except BaseException:
            self.discard()
            raise

    def _open(self, store: Any, is_over: Callable[[], bool]) -> str:
        """Maps the board and a block of each rank. Returns the same on all ranks: the first problem, or ""."""
        length = self._size * SLOTS * self._entry * 8
        offer, problem = {}, ""
        try:
            block = _Block(_SMALLEST, self._name)
            self._free.append(block)
            offer = {"process": os.getpid(), "name": self._name, "block": block.file}
            if self._rank == 0:
                self._board = _Block(length, self._name)
                offer["board"] = self._board.file
        except (OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        me = self._rank, self._size
        offers = [json.loads(text) for text in share(store, "offer", *me, json.dumps(offer), is_over)]
        try:
            if all(offers):
                self._addresses = [Address(o["process"], o["block"], o["name"]) for o in offers]
                for r in self._others():
                    self._block_of(r, offers[r]["block"], _SMALLEST)
                if self._board is None:
                    self._board = _Block(length, "", self._addresses[0]._replace(file=offers[0]["board"]))
                self._words = memoryview(self._board.map).cast("q")
        except (OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        problems = share(store, "opened", *me, problem, is_over)
        return next((f"rank {r}: {problem}" for r, problem in enumerate(problems) if problem), "")

    def all_to_all(
        self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]
    ) -> _SharedWork:
        number = self._number
        self._number += 1
        row = input.shape[1:].numel() * input.element_size()
        self._reclaim()
        offsets = [0]
        for rank, rows in enumerate(input_rows):  # own rows are not transferred
            offsets.append(offsets[-1] + (rows if rank != self._rank else 0) * row)
        block = self._take(offsets[-1])
        begin_in = begin_out = 0
        for rank, rows in enumerate(input_rows):
            part = input[begin_in : begin_in + rows]
            if rank == self._rank:
                begin_out = sum(output_rows[:rank])
                output[begin_out : begin_out + rows] = part
            elif rows:
                block.bytes[offsets[rank] : offsets[rank + 1]] = _bytes_of(part)
            begin_in += rows
        self._used.append((number, block))
        at = self._at(self._rank, number)
        if any(self._words[at + 3 + self._size + 1 + r] < self._words[at] for r in self._others()):
            raise RuntimeError(f"more than {SLOTS} transfers are under way")
        self._words[at + 1], self._words[at + 2] = block.file, block.capacity
        for index, offset in enumerate(offsets):
            self._words[at + 3 + index] = offset
        self._words[at] = number + 1  # the flag
        return _SharedWork(self, number, output, output_rows, row)

    def receive(self, source: int, number: int, target: Tensor) -> bool:
        """Copies the rows of `source` into target if they have arrived."""
        at = self._at(source, number)
        if self._words[at] != number + 1:
            return False
        if len(target):
            begin = self._words[at + 3 + self._rank]
            block = self._block_of(source, self._words[at + 1], self._words[at + 2])
            into = _bytes_of(target)
            into.copy_(block.bytes[begin : begin + len(into)])
        self._words[at + 3 + self._size + 1 + self._rank] = number + 1
        return True

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        """Waits until the others have read what was sent, since it disappears with the files; for a short time only,
        and not after a failure."""
        end = time.monotonic() + _DRAIN_SECONDS
        while self._used and not self.aborted and time.monotonic() < end:
            self._reclaim()
            time.sleep(1e-3 if self._used else 0)
        self.discard()

    def discard(self) -> None:
        """Closes all files at once."""
        if hasattr(self, "_words"):
            self._words.release()
        board = [self._board] if self._board is not None else []
        for block in (*self._free, *(block for _, block in self._used), *self._theirs.values(), *board):
            block.close()
        self._free, self._used, self._theirs, self._board = [], [], {}, None

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _at(self, source: int, number: int) -> int:
        return (source * SLOTS + number % SLOTS) * self._entry

    def _block_of(self, rank: int, file: int, capacity: int) -> _Block:
        """A block of another rank, mapped once."""
        if (rank, file) not in self._theirs:
            self._theirs[rank, file] = _Block(capacity, "", self._addresses[rank]._replace(file=file))
        return self._theirs[rank, file]

    def _reclaim(self) -> None:
        kept = []
        for number, block in self._used:
            marks = self._at(self._rank, number) + 3 + self._size + 1
            if all(self._words[marks + r] >= number + 1 for r in self._others()):
                self._free.append(block)
            else:
                kept.append((number, block))
        self._used = kept

    def _take(self, size: int) -> _Block:
        fitting = [block for block in self._free if block.capacity >= size]
        if not fitting:
            return _Block(max(_SMALLEST, 1 << (size - 1).bit_length() if size else 0), self._name)
        block = min(fitting, key=lambda block: block.capacity)
        self._free.remove(block)
        return block


class _SharedWork:
    def __init__(
        self, transport: SharedMemoryTransport, number: int, output: Tensor, output_rows: Sequence[int], row: int
    ) -> None:
        self._transport, self._number = transport, number
        self._pending: list[tuple[int, Tensor]] = []
        begin = 0
        for source, rows in enumerate(output_rows):
            if source != transport._rank:
                self._pending.append((source, output[begin : begin + rows]))
            begin += rows

    def wait_for(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        spins = 0
        while True:
            if self._transport.aborted:
                raise RuntimeError("aborted")
            before = len(self._pending)
            self._pending = [
                (source, target)
                for source, target in self._pending
                if not self._transport.receive(source, self._number, target)
            ]
            if not self._pending:
                return True
            if len(self._pending) == before:
                spins += 1
                if time.monotonic() > end:
                    return False
                if spins < _SPINS:
                    os.sched_yield()
                else:
                    time.sleep(min(1e-3, 2e-5 * (spins - _SPINS + 1)))


def _bytes_of(rows: Tensor) -> Tensor:
    return rows.reshape(-1).view(torch.uint8)
