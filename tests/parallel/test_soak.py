# SPDX-License-Identifier: BSD-3-Clause
"""Nothing grows with the number of steps, nor with the number of groups that were created and failed.

pytest -m slow tests/parallel/test_soak.py     10,000 steps and 300 groups
"""

from __future__ import annotations

import gc
import os
import re
from typing import NamedTuple

import pytest
import torch
from parallel_pool import Pool

import switchgear
from switchgear.parallel import ExpertParallel, ExpertParallelError

# Shared memory blocks written by a rank: their number and size depend on which ranks are late.
LATE_BLOCKS = 8
BLOCK_BYTES = 2**16


class Resources(NamedTuple):
    """Resources of a process, as the system counts them."""

    private_bytes: int  # resident, not shared with other ranks
    files: int
    threads: int  # including those of libraries
    segments: int  # mapped shared memory
    segment_bytes: int
    names: int  # in /dev/shm, of all processes: this library must never add one

    @staticmethod
    def now() -> Resources:
        gc.collect()
        with open("/proc/self/status") as file:
            status = file.read()
        with open("/proc/self/maps") as file:
            ends = re.findall(r"^(\w+)-(\w+) .*/memfd:switchgear", file.read(), re.MULTILINE)
        kilobytes = int(re.search(r"RssAnon:\s*(\d+) kB", status)[1])  # type: ignore[index]
        threads = int(re.search(r"Threads:\s*(\d+)", status)[1])  # type: ignore[index]
        sizes = [int(end, 16) - int(begin, 16) for begin, end in ends]
        names = [name for name in os.listdir("/dev/shm") if "switchgear" in name]
        return Resources(
            1024 * kilobytes, len(os.listdir("/proc/self/fd")), threads, len(sizes), sum(sizes), len(names)
        )


def step(moe: switchgear.MoE, number: int, rank: int) -> None:
    """Numbers of tokens vary between steps, and some steps have no backward."""
    moe.experts.parallel.num_chunks = (1, 2, 4, 8)[number // 7 % 4]  # type: ignore[union-attr]
    x = torch.randn((number * 37 + rank * 11) % 50, 16)
    with torch.set_grad_enabled(number % 3 > 0):
        y = moe(x)
    if number % 3:
        y.square().sum().backward()
        moe.zero_grad()


def steps(rank: int, count: int, transport: str) -> tuple[Resources, Resources]:
    """Resources after a quarter of the steps, when caches are warm, and after all."""
    with ExpertParallel(timeout=60, transport=transport) as parallel:
        moe = switchgear.MoE(16, 8, 8, 2, parallel=parallel)
        for number in range(count // 4):
            step(moe, number, rank)
        first = Resources.now()
        for number in range(count // 4, count):
            step(moe, number, rank)
        return first, Resources.now()


def check_steps(seen: list[tuple[Resources, Resources]], bytes_allowed: int) -> None:
    print(*seen, sep="\n")
    for first, last in seen:
        assert last.private_bytes - first.private_bytes < bytes_allowed
        assert last.threads == first.threads
        # a block is mapped by the rank that writes it and by the three that read it
        assert last.segments - first.segments <= 4 * LATE_BLOCKS
        # each mapping holds a file, and the writing rank holds another
        assert last.files - first.files <= last.segments - first.segments + LATE_BLOCKS
        assert last.segment_bytes - first.segment_bytes <= 4 * LATE_BLOCKS * BLOCK_BYTES
        assert last.names == 0


transports = pytest.mark.parametrize("transport", ["gloo", "shared_memory"])


@transports
@pytest.mark.some(1)
def test_some_steps(pool: Pool, transport: str) -> None:
    check_steps(pool.run(steps, 200, transport, timeout=120), bytes_allowed=2**22)


@pytest.mark.slow  # two minutes each
@transports
def test_ten_thousand_steps(pool: Pool, transport: str) -> None:
    check_steps(pool.run(steps, 10_000, transport, timeout=1800), bytes_allowed=2**20)


def fail(moe: switchgear.MoE, number: int, rank: int) -> None:
    step(moe, number, rank)  # a late rank learns of the failure here
    ids = torch.full((3, 2), 8 if rank == number % 4 else 0, dtype=torch.int32)
    moe.experts(torch.randn(3, 16), ids, torch.ones(3, 2))


def groups(rank: int, count: int, transport: str) -> tuple[Resources, Resources]:
    """Each group fails in its second step, in which one rank raises. Resources after the first quarter, and at the
    end."""
    first = None
    for number in range(count):
        parallel = ExpertParallel(timeout=20, transport=transport)
        moe = switchgear.MoE(16, 8, 8, 2, parallel=parallel)
        with pytest.raises((ValueError, ExpertParallelError)):
            fail(moe, number, rank)
        parallel.close()
        if number == count // 4:
            first = Resources.now()
    assert first is not None
    return first, Resources.now()


def check_groups(seen: list[tuple[Resources, Resources]], bytes_allowed: int) -> None:
    print(*seen, sep="\n")
    for first, last in seen:
        assert last.private_bytes - first.private_bytes < bytes_allowed
        assert last[1:] == first[1:]


@transports
def test_some_groups(pool: Pool, transport: str) -> None:
    check_groups(pool.run(groups, 8, transport, timeout=60), bytes_allowed=2**22)


@pytest.mark.slow  # a minute each
@transports
def test_three_hundred_groups(pool: Pool, transport: str) -> None:
    check_groups(pool.run(groups, 300, transport, timeout=900), bytes_allowed=2**20)
