# SPDX-License-Identifier: BSD-3-Clause
"""Tensor, expert and data parallelism together (arXiv:2303.06318): two groups of two ranks, each with all experts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import switchgear
from switchgear.parallel import ExpertParallel, Placement, expert_parameters

HIDDEN, EXPERTS, TOKENS = 24, 6, 31
HALVES = ((0, 1, 2), (3, 4, 5))


class Block(nn.Module):
    def __init__(self, parallel: ExpertParallel | None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.moe = switchgear.MoE(HIDDEN, 20, EXPERTS, 3, parallel=parallel)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(self.first(x))
        return y


def tokens() -> Tensor:
    """The tokens of both groups."""
    torch.manual_seed(6)
    return torch.randn(2, TOKENS, HIDDEN)


def check(outer: nn.Module, model: Block, mine: tuple[int, ...], group: int) -> None:
    """Forward, and gradients of the mean of both groups' losses, against one process with all tokens."""
    whole, x = Block(None), tokens()
    y, want = outer(x[group]), whole(x)
    torch.testing.assert_close(y, want[group], rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    (want.square().sum() / 2).backward()
    for (name, got), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert got.grad is not None, name
        assert expected.grad is not None, name
        grad = got.grad.full_tensor() if isinstance(got.grad, DTensor) else got.grad
        wanted = expected.grad[list(mine)] if "experts" in name else expected.grad
        # sums over 62 tokens in another order
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def one_group(rank: int) -> dict[str, int]:
    """Ranks 0 and 1 hold the same tokens and share the experts, and so do 2 and 3: one ExpertParallel with replicas."""
    group = rank // 2
    placement = Placement(EXPERTS, HALVES * 2)
    with ExpertParallel(timeout=20, tp_group=[2 * group, 2 * group + 1], placement=placement) as parallel:
        model = Block(parallel)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, expert_parameters(model))
        check(DistributedDataParallel(model), model, HALVES[rank % 2], group)
        chosen = Block(None).moe.gate(Block(None).first(tokens()[group])).topk_ids
        share = TOKENS * (rank % 2) // 2, TOKENS * (rank % 2 + 1) // 2
        away = chosen[slice(*share)] // 3 != rank % 2
        row = HIDDEN * 4
        assert parallel.record.bytes["dispatch"] == 2 * row * int(away.any(1).sum())  # each token once each way
        return dict(parallel.record.bytes)


def test_copies_make_data_parallel_groups(pool: Pool) -> None:
    for sent in pool.run(one_group):
        experts = 3 * 3 * HIDDEN * 20 * 4  # gradients of all local experts, to the other replica
        assert sent["copies"] == experts


def two_groups(rank: int, wrapper: str) -> None:
    """An ExpertParallel per data parallel group; experts are reduced over the ranks that hold the same ones."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "ep"))
    group = rank // 2
    with ExpertParallel(mesh.get_group("ep"), timeout=20, tp_group=[2 * group, 2 * group + 1]) as parallel:
        model = Block(parallel)
        outer: nn.Module
        if wrapper == "fsdp":
            fully_shard(model.moe.experts, mesh=mesh["dp"])
            outer = fully_shard(model)
        else:
            experts = expert_parameters(model)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
            outer = DistributedDataParallel(model)
            for parameter in experts.values():
                parameter.register_post_accumulate_grad_hook(lambda p: mean_over(mesh.get_group("dp"), p))
        check(outer, model, HALVES[rank % 2], group)
        dist.barrier()


def mean_over(group: dist.ProcessGroup, parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad, group=group)
    parameter.grad /= group.size()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_group_for_each_data_parallel_part(pool: Pool, wrapper: str) -> None:
    pool.run(two_groups, wrapper)
