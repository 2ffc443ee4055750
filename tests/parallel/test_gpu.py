# SPDX-License-Identifier: BSD-3-Clause
"""Ranks on GPUs, or several on one GPU, compute what one process computes on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_pool import Pool

import switchgear
from switchgear.parallel import ExpertParallel
from switchgear.parallel.transport import _TorchWork

SIZE, TOKENS, HIDDEN = 2, 40, 64
gpus = torch.cuda.device_count()


@pytest.fixture(scope="module")
def pair() -> Any:
    pool = Pool(SIZE)
    yield pool
    pool.close()


def compare(rank: int, device_transport: str) -> None:
    torch.cuda.set_device(rank % gpus)
    group = dist.new_group(backend="nccl") if device_transport == "group" else None
    with ExpertParallel(group, timeout=60, num_chunks=2, device_transport=device_transport) as parallel:
        torch.manual_seed(1)
        whole = switchgear.MoE(HIDDEN, 48, 6, 3)
        torch.manual_seed(1)
        moe = switchgear.MoE(HIDDEN, 48, 6, 3, parallel=parallel).cuda()
        torch.manual_seed(2)
        x = torch.randn(SIZE * TOKENS, HIDDEN)
        mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
        for _ in range(3):
            y, want = moe(x[mine].cuda()), whole(x)
            torch.testing.assert_close(y.cpu(), want[mine], rtol=1e-4, atol=1e-5)
            y.square().sum().backward()
            (want.square().sum() / SIZE).backward()
        held = list(parallel.placement(6).experts_of_rank[rank])
        for got, expected in zip(moe.experts.parameters(), whole.experts.parameters(), strict=True):
            torch.testing.assert_close(got.grad.cpu(), expected.grad[held], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(gpus == 0, reason="needs a GPU")
def test_peer_memory(pair: Pool) -> None:
    pair.run(compare, "peer_memory", timeout=120)


@pytest.mark.gpu
@pytest.mark.skipif(gpus < SIZE, reason="NCCL needs a GPU for each rank")
def test_nccl(pair: Pool) -> None:
    pair.run(compare, "group", timeout=120)


@pytest.mark.gpu
@pytest.mark.skipif(gpus == 0, reason="needs a GPU")
def test_a_capacity_in_a_cuda_graph() -> None:
    """One rank: nothing in the layer needs the host. Replayed with other tokens, it computes and counts as it does
    without a graph."""
    with ExpertParallel(capacity=TOKENS, overflow="drop") as parallel:
        torch.manual_seed(1)
        moe = switchgear.MoE(HIDDEN, 48, 6, 3, parallel=parallel).cuda()
        x = torch.randn(TOKENS + 8, HIDDEN, device="cuda")
        with torch.no_grad():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                moe(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = moe(x)
            before = parallel.overflow.count()
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert parallel.overflow.count() == before + 8
            torch.testing.assert_close(y, moe(x), rtol=1e-4, atol=1e-5)


class Queued:
    """A Work like NCCL's: `wait` makes the stream wait, and returns."""

    looks = 0

    def is_completed(self) -> bool:
        self.looks += 1
        return self.looks > 5

    def wait(self) -> None:
        assert self.looks > 5


def test_the_host_waits_for_works_that_only_the_stream_would_wait_for() -> None:
    work = _TorchWork(Queued(), torch.empty(1, device="meta"))
    assert not work.wait_for(0.0)
    assert work.wait_for(1.0)
