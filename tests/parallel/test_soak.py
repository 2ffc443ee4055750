# SPDX-License-Identifier: BSD-3-Clause
"""Nothing grows with the number of steps."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from parallel_pool import Pool

import switchgear
from switchgear.parallel import ExpertParallel

# of shared memory: how many transfers are under way at once, and of what size, depends on who is late
LATE_BLOCKS = 8


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def steps(rank: int, count: int, transport: str) -> dict[str, int]:
    """Tokens vary from step to step; memory is looked at from the first quarter on, when caches are warm."""
    with ExpertParallel(timeout=60, transport=transport) as parallel:
        moe = switchgear.MoE(16, 8, 8, 2, parallel=parallel)
        seen = {}
        for step in range(count):
            parallel.num_chunks = (1, 2, 4, 8)[step // 7 % 4]
            x = torch.randn((step * 37 + rank * 11) % 50, 16)
            with torch.set_grad_enabled(step % 3 > 0):
                y = moe(x)
            if step % 3:
                y.square().sum().backward()
                moe.zero_grad()
            if step in (count // 4, count - 1):
                seen[step] = (resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count())
    first, last = seen.values()
    return {"bytes": last[0] - first[0], "files": last[1] - first[1], "threads": last[2] - first[2]}


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
def test_some_steps(pool: Pool, transport: str) -> None:
    for grown in pool.run(steps, 200, transport, timeout=120):
        assert grown["files"] <= LATE_BLOCKS
        assert grown["threads"] == 0


@pytest.mark.slow  # two minutes each
@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
def test_ten_thousand_steps(pool: Pool, transport: str) -> None:
    for grown in pool.run(steps, 10_000, transport, timeout=900):
        assert grown["bytes"] < 2**20
        assert grown["files"] <= LATE_BLOCKS
        assert grown["threads"] == 0
