# SPDX-License-Identifier: BSD-3-Clause
"""The rate at which a disk gives records: what no reader can beat. Plain Python, apart from the reader it judges."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

BLOCK = 4096


def read_rate(files: Sequence[Path], record_bytes: int, threads: int, most_bytes: int) -> float:
    """Bytes per second of records in random order, each read once with O_DIRECT, past the page cache."""
    record_bytes = -(-record_bytes // BLOCK) * BLOCK
    places = [
        (number, offset)
        for number, path in enumerate(files)
        for offset in range(0, path.stat().st_size - record_bytes + 1, record_bytes)
    ]
    random.Random(0).shuffle(places)
    places = places[: max(1, most_bytes // record_bytes)]
    if not places:
        raise ValueError(f"files: expected at least one record of {record_bytes} bytes, got none")
    handles = [os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)) for path in files]
    try:
        shares = [places[i::threads] for i in range(threads)]

        def read(share: list[tuple[int, int]]) -> int:
            total = 0
            with mmap.mmap(-1, record_bytes) as memory, memoryview(memory) as view:  # on a page
                for number, offset in share:
                    total += os.preadv(handles[number], [view], offset)
            return total

        begin = perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            total = sum(pool.map(read, shares))
        return total / (perf_counter() - begin)
    finally:
        for handle in handles:
            os.close(handle)
