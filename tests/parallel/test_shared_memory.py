# SPDX-License-Identifier: BSD-3-Clause
"""The shared memory between ranks under random interleavings of their steps, all in one process."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from switchgear.parallel import shared_memory
from switchgear.parallel.shared_memory import SharedMemoryTransport

pytestmark = pytest.mark.skipif(not shared_memory.available(), reason="needs Linux on x86-64")
SIZE, COLUMNS = 3, 5


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[SharedMemoryTransport]]:
    store = HashStore()
    made: list[SharedMemoryTransport | None] = [None] * SIZE

    def make(rank: int) -> None:
        made[rank] = SharedMemoryTransport(rank, SIZE, store)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield made  # type: ignore[misc]
    for transport in made:
        assert transport is not None
        transport.aborted = True  # no drain
        transport.close()


def rows_of(source: int, target: int, number: int, count: int) -> Tensor:
    """The rows that `source` sends to `target`, different for every transfer."""
    base = float(((number * SIZE + source) * SIZE + target) * 1000)
    return base + torch.arange(count * COLUMNS, dtype=torch.float32).view(count, COLUMNS)


def interleave(ranks: list[SharedMemoryTransport], choose: random.Random) -> None:
    """A few transfers whose steps on all ranks run in random order: a start, or a check of one source."""
    transfers = choose.randint(1, 4)
    counts = [[[choose.choice((0, 1, 2, 7)) for _ in range(SIZE)] for _ in range(SIZE)] for _ in range(transfers)]
    big = choose.random() < 0.1
    started = [0] * SIZE
    works: list[list[tuple[shared_memory._SharedWork, Tensor, int]]] = [[] for _ in range(SIZE)]
    base = ranks[0]._number
    while any(number < transfers for number in started) or any(work._pending for own in works for work, _, _ in own):
        rank = choose.randrange(SIZE)
        pending = [entry for entry in works[rank] if entry[0]._pending]
        if started[rank] < transfers and (not pending or choose.random() < 0.5):
            number = started[rank]
            table = counts[number]
            rows_in = [count * (4000 if big else 1) for count in table[rank]]
            rows_out = [table[source][rank] * (4000 if big else 1) for source in range(SIZE)]
            sent = torch.cat([rows_of(rank, target, base + number, rows) for target, rows in enumerate(rows_in)])
            received = torch.full((sum(rows_out), COLUMNS), -1.0)
            work = ranks[rank].all_to_all(received, sent, rows_out, rows_in)
            sent.fill_(-2.0)  # the sender may reuse its memory at once
            works[rank].append((work, received, number))
            started[rank] += 1
        elif pending:
            work, _, _ = choose.choice(pending)
            source, target = choose.choice(work._pending)
            if ranks[rank].receive(source, work._number, target):
                work._pending.remove(next(entry for entry in work._pending if entry[0] == source))
    for rank, own in enumerate(works):
        for _, received, number in own:
            factor = 4000 if big else 1
            sizes = [counts[number][source][rank] * factor for source in range(SIZE)]
            want = [rows_of(source, rank, base + number, size) for source, size in enumerate(sizes)]
            assert torch.equal(received, torch.cat(want)), (rank, number)


def interleave_often(ranks: list[SharedMemoryTransport], times: int, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(times):
        interleave(ranks, choose)


def test_interleavings(ranks: list[SharedMemoryTransport]) -> None:
    interleave_often(ranks, 1500, seed=0)


@pytest.mark.slow  # two minutes
def test_many_interleavings(ranks: list[SharedMemoryTransport]) -> None:
    interleave_often(ranks, 100_000, seed=1)
    assert len(ranks[0]._free) + len(ranks[0]._used) < 20  # blocks are reused


def test_blocks_are_used_again_only_when_read(
    ranks: list[SharedMemoryTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted bug, not waiting for the readers' marks, is detected by the interleavings."""

    def careless(self: SharedMemoryTransport) -> None:
        self._free += [block for _, block in self._used]
        self._used = []

    monkeypatch.setattr(SharedMemoryTransport, "_reclaim", careless)
    with pytest.raises(AssertionError):
        interleave_often(ranks, 1500, seed=2)
