# SPDX-License-Identifier: BSD-3-Clause
"""DistributedDataParallel and FSDP2 around layers with distributed experts give the gradients of one process."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
import torch.distributed as dist
from parallel_pool import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import switchgear
from errors import raises
from switchgear import adapters, finetune, optim
from switchgear.layers import HeterogeneousExperts, SoftMoE
from switchgear.parallel import ExpertParallel, expert_parameters

HIDDEN = 24


def make(parallel: ExpertParallel | None) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(HIDDEN, HIDDEN),
        switchgear.MoE(HIDDEN, 20, 6, 2, parallel=parallel, normalize=True, shared_intermediate_size=8),
        switchgear.MoE(HIDDEN, 12, 5, 2, parallel=parallel),
    )


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    experts = expert_parameters(model)
    if wrapper == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
        return DistributedDataParallel(model)
    return fully_shard(model, ignored_params=set(experts.values()))


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(rank: int, wrapper: str, absent: tuple[int, ...], num_chunks: int) -> None:
    tokens = [0 if r in absent else 6 + r for r in range(4)]
    with ExpertParallel(timeout=20, num_chunks=num_chunks, invariant=True) as parallel:
        model, whole = make(parallel), make(None)
        placements = {name: module.placement for name, module in model.named_modules() if hasattr(module, "placement")}
        outer = wrapped(model, wrapper)
        torch.manual_seed(4)
        x = torch.randn(sum(tokens), HIDDEN)
        mine = x[sum(tokens[:rank]) : sum(tokens[: rank + 1])]
        y, want = outer(mine), whole(x)
        limit = want.detach().abs().amax().item() if len(want) else 0.0
        bound = 1e-5 * max(1.0, limit)  # three layers with sums of 24 terms, one of them torch's
        assert len(mine) == 0 or (y - want[sum(tokens[:rank]) : sum(tokens[: rank + 1])]).abs().max() < bound
        y.square().sum().backward()
        (want.square().sum() / 4).backward()  # the mean over ranks
        wanted = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            grad, want_grad = full(parameter.grad), wanted[name].grad
            layer = name.rpartition(".")[0]
            if layer in placements:
                want_grad = want_grad[list(placements[layer].experts_of_rank[rank])]
            size = max(1.0, float(want_grad.abs().max()) if want_grad.numel() else 0.0)
            difference = float((grad - want_grad).abs().max()) if grad.numel() else 0.0
            assert difference < 2e-5 * size, f"{name}: {difference} of {size}"


def all_subsets(rank: int, wrapper: str) -> int:
    sets = [absent for count in range(5) for absent in combinations(range(4), count)]
    for absent in sets:
        compare(rank, wrapper, absent, 2 if len(absent) % 2 else 1)
    dist.barrier()
    return len(sets)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_with_and_without_tokens(pool: Pool, wrapper: str) -> None:
    """All 16 sets of ranks without tokens."""
    assert pool.run(all_subsets, wrapper, timeout=120) == [16] * 4


def checkpointed(rank: int) -> None:
    """The recomputation of forward sends rows again, with the same results; they are not kept meanwhile."""
    with ExpertParallel(timeout=20) as parallel:
        moe = make(parallel)[1]
        torch.manual_seed(rank)
        x, grad_y = torch.randn(2, 9 + rank, HIDDEN)
        grads = []
        kept: list[tuple[int, ...]] = []
        for how in (None, False, True):
            moe.zero_grad()
            leaf = x.clone().requires_grad_()
            if how is None:
                with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
                    y = moe(leaf)
            else:
                y = checkpoint(moe, leaf, use_reentrant=how)
            y.backward(grad_y)
            grads.append([leaf.grad, *(parameter.grad.clone() for parameter in moe.parameters())])
        assert any(shape[1:] == (40,) for shape in kept)  # autograd saves h
    for other in grads[1:]:  # the bits of torch's products depend on the memory addresses
        torch.testing.assert_close(other, grads[0], rtol=1e-5, atol=1e-6)
        names = ["x", *dict(moe.named_parameters())]
        changed = [n for n, a, b in zip(names, grads[0], other, strict=True) if not torch.equal(a, b)]
        assert not [name for name in changed if name.startswith("experts")], changed


def test_checkpointing(pool: Pool) -> None:
    pool.run(checkpointed)


def autocast(rank: int) -> None:
    with ExpertParallel(timeout=20) as parallel:
        moe, whole = make(parallel)[1], make(None)[1]
        torch.manual_seed(7)
        x = torch.randn(12, HIDDEN)
        with torch.autocast("cpu", torch.bfloat16):
            y, want = moe(x), whole(x)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y, want, rtol=0.05, atol=0.02)  # a few roundings to 8 bits
        y.float().square().sum().backward()
        assert all(parameter.grad.dtype is torch.float32 for parameter in moe.parameters())


def test_autocast(pool: Pool) -> None:
    pool.run(autocast)


class Stack(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def muon(rank: int) -> None:
    for shape in ((6, 8, 12), (1, 12, 8), (16, 8), (3, 2, 8, 8)):
        plain, sharded = Stack(*shape), fully_shard(Stack(*shape))
        optimizers = [optim.Muon(model.parameters(), 0.1) for model in (plain, sharded)]
        for _ in range(2):
            x = torch.randn(shape)
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                model(x).backward()
                optimizer.step()
                optimizer.zero_grad()
        bound = 15 * torch.finfo(torch.bfloat16).eps * 2 * 0.1  # of 5 steps of 3 products, in batches of other sizes
        assert (full(sharded.weight) - plain.weight).abs().max() <= bound * (shape[-2] / shape[-1]) ** 0.5 * 2


def test_muon_of_shards(pool: Pool) -> None:
    """With experts that are not a multiple of the ranks, and one expert for all."""
    pool.run(muon)


def made_on_meta(rank: int) -> None:
    """The widths are 2, 1 and 4 units of 8; values are within ±1/√width."""
    model = nn.Sequential(HeterogeneousExperts(HIDDEN, [16, 8, 32], device="meta"))
    fully_shard(model).to_empty(device="cpu")
    model[0].reset_parameters()
    largest = full(model[0].slices.down_proj).abs().amax((1, 2))
    for one, width in zip(largest.tolist(), (16, 16, 8, 32, 32, 32, 32), strict=True):
        assert 0.8 < one * width**0.5 <= 1


def test_experts_of_other_widths_on_meta(pool: Pool) -> None:
    pool.run(made_on_meta)


def soft(rank: int) -> None:
    torch.manual_seed(0)
    plain = SoftMoE(switchgear.Experts(HIDDEN, 8, 4))
    sharded, x = fully_shard(copy.deepcopy(plain)), torch.randn(2, 5, HIDDEN)
    for layer in (plain, sharded):
        layer(x).square().sum().backward()
    for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(one.grad), other.grad)


def test_soft_moe_is_sharded(pool: Pool) -> None:
    pool.run(soft)


def selected(rank: int) -> None:
    for forward in (True, False):
        model, x = make(None), torch.randn(5, HIDDEN)
        finetune.freeze_except(model, {"1": [1, 4]})
        fully_shard(model)
        with raises(ValueError, "model"):
            model(x) if forward else model.state_dict()
        with raises(ValueError, "model"):
            finetune.unfreeze(model)
        assert finetune.selected_experts(model) == {"1.experts": [1, 4]}
    sharded = fully_shard(make(None))
    with raises(ValueError, "selection"):
        finetune.freeze_except(sharded, {"1": [1, 4]})
    assert not finetune.selected_experts(sharded)


def test_fsdp_of_selected_experts_is_refused(pool: Pool) -> None:
    pool.run(selected)


def adapted(rank: int) -> None:
    """Before a forward, and after one, when the root's parameters are whole."""
    model = fully_shard(make(None))
    for _ in range(2):
        with raises(ValueError, "model"):
            adapters.add_lora(model, 2)
        assert not adapters.lora_of(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        model(torch.randn(5, HIDDEN))


def test_fsdp_before_adapters_is_refused(pool: Pool) -> None:
    pool.run(adapted)
