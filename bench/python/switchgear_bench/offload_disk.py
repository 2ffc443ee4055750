# SPDX-License-Identifier: BSD-3-Clause
"""The rate at which a disk gives records: what no reader can beat. Plain Python, apart from the reader it judges."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from ctypes import addressof, c_char
from pathlib import Path
from time import perf_counter

BLOCK, HUGE_PAGE = 4096, 2 << 20


def read_rate(
    files: Sequence[Path], record_bytes: int, threads: int, most_bytes: int, *, in_order: bool = False
) -> float:
    """Bytes per second of records in random order, or that of the files, each read once with O_DIRECT, past the page
    cache."""
    record_bytes = -(-record_bytes // BLOCK) * BLOCK
    places = [
        (number, offset)
        for number, path in enumerate(files)
        for offset in range(0, path.stat().st_size - record_bytes + 1, record_bytes)
    ]
    if not in_order:
        random.shuffle(places)  # other places each time, which no cache below the disk has
    places = places[: max(1, most_bytes // record_bytes)]
    if not places:
        raise ValueError(f"files: expected at least one record of {record_bytes} bytes, got none")
    handles = [os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)) for path in files]
    try:
        shares = [places[i::threads] for i in range(threads)]
        with ExitStack() as stack:
            views = [stack.enter_context(_memory(record_bytes)) for _ in shares]

            def read(share: list[tuple[int, int]], view: memoryview) -> int:
                return sum(os.preadv(handles[number], [view[:record_bytes]], offset) for number, offset in share)

            begin = perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                total = sum(pool.map(read, shares, views))
            return total / (perf_counter() - begin)
    finally:
        for handle in handles:
            os.close(handle)


@contextmanager
def _memory(size: int) -> Iterator[memoryview]:
    """Whole pages, huge ones where the system has them as in our cache: a request to the disk has few parts then. They
    are present: the kernel pins each page that a direct read writes into."""
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    with mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:  # shared: small pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        first = -addressof(c_char.from_buffer(memory)) % HUGE_PAGE
        with memoryview(memory) as whole, whole[first : first + size] as view:
            for begin in range(0, size, BLOCK):
                view[begin] = 0
            yield view


def read_ahead(path: Path) -> int | None:
    """Bytes that Linux reads ahead on the disk of a file, which mapped files depend on; None where it does not say."""
    device = path.stat().st_dev
    file = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    for candidate in (file, file.parent.parent.parent / "queue/read_ahead_kb"):  # of a partition: its disk's
        try:
            return int(candidate.read_text()) << 10
        except (OSError, ValueError):
            continue
    return None
