# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints written by one number of ranks and read by another, bit for bit; errors name the defect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_pool import Pool, subgroup
from torch import nn

import switchgear
from switchgear.parallel import ExpertParallel, Placement, checkpoint

EXPERTS = 7


def make(parallel: ExpertParallel | None, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [switchgear.MoE(16, 12, EXPERTS, 2, bias=True, parallel=parallel) for _ in range(2)]
    return nn.Sequential(nn.Linear(16, 16), *layers)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """Takes one optimizer step with the same tokens on every rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(5)
    model(torch.randn(20, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def write(rank: int, path: str, size: int, ranks: tuple[tuple[int, ...], ...] | None) -> None:
    if rank >= size:
        return
    placement = None if ranks is None else Placement(EXPERTS, ranks)
    with ExpertParallel(subgroup(size), timeout=20, placement=placement, invariant=True) as parallel:
        model = make(parallel, seed=1)
        optimizer = trained(model)
        checkpoint.save(model, path, optimizer, process_group=subgroup(size))
        dist.barrier(subgroup(size))


def read(rank: int, path: str, size: int, ranks: tuple[tuple[int, ...], ...] | None) -> None:
    """Parameters and optimizer state equal those that one process reads, and those of load_whole."""
    if rank >= size:
        return
    placement = None if ranks is None else Placement(EXPERTS, ranks)
    with ExpertParallel(subgroup(size), timeout=20, placement=placement) as parallel:
        model = make(parallel, seed=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        checkpoint.load(model, path, optimizer, process_group=subgroup(size))
        whole = checkpoint.load_whole(path)
        alone = make(None, seed=3)
        own = torch.optim.AdamW(alone.parameters(), lr=0.01)
        checkpoint.init_optimizer(own)
        tensors = checkpoint.state_dict(alone, own)
        dcp.load(tensors, checkpoint_id=path, process_group=subgroup(size))
        alone.load_state_dict(whole)
        whole_optimizer = own.state_dict()["state"]
        for index, (name, parameter) in enumerate(model.named_parameters()):
            layer = name.rpartition(".")[0]
            chosen = slice(None)
            if layer.endswith("experts"):
                chosen = list(parallel.placement(EXPERTS).experts_of_rank[parallel.rank])  # type: ignore[assignment]
            assert torch.equal(parameter, whole[name][chosen]), name
            for key, value in optimizer.state[parameter].items():
                expected = whole_optimizer[index][key]
                assert torch.equal(value, expected if key == "step" else expected[chosen]), f"{name} {key}"


SIZES = [
    (1, None),
    (2, None),
    (4, None),
    (4, ((6,), (0, 2, 4), (), (1, 3, 5))),
    (4, ((0, 1, 2), (2, 3), (4, 5, 6), (0, 6))),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("written", SIZES)
def test_every_size_reads_every_other(pool: Pool, tmp_path: Path, written: tuple) -> None:  # type: ignore[type-arg]
    pool.run(write, str(tmp_path), *written)
    for size in SIZES[::2] if written in SIZES[::2] else SIZES[1::2]:
        pool.run(read, str(tmp_path), *size)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_huggingface_layout(tmp_path: Path) -> None:
    """From one process: stacked experts under the names of the model."""
    model = make(None, seed=1)
    checkpoint.save(model, tmp_path)
    whole = checkpoint.load_whole(tmp_path)
    assert set(whole) == set(model.state_dict())
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())
    assert whole["1.experts.gate_up_proj"].shape == (EXPERTS, 24, 16)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("1.experts.down_proj[3]"), r"1.experts.down_proj\[3\]: expected in the checkpoint, got none"),
        (lambda e: e.update({"1.experts.down_proj[7]": torch.zeros(16, 12)}), r"down_proj\[7\]: expected 7 experts"),
        (lambda e: e.update({"1.experts.down_proj[3]": torch.zeros(12, 16)}), r"\[3\]: expected .* \[16, 12\], got"),
        (lambda e: e.update({"1.experts.down_proj[3]": torch.zeros(16, 12).half()}), r"\[3\]: .*got torch.float16"),
        (lambda e: e.pop("2.gate.weight"), "2.gate.weight: expected in the checkpoint, got none"),
        (lambda e: e.update({"3.weight": torch.zeros(2)}), "3.weight: expected none in the checkpoint"),
    ],
)  # fmt: skip
def test_defects_are_named(tmp_path: Path, change: object, message: str) -> None:
    model = make(None, seed=1)
    entries = {name: tensor.clone() for name, tensor in checkpoint.state_dict(model).items()}
    change(entries)  # type: ignore[operator]
    dcp.save(entries, checkpoint_id=tmp_path, no_dist=True)
    other = make(None, seed=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        checkpoint.load(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_an_optimizer_without_state_is_refused() -> None:
    model = make(None, seed=1)
    with pytest.raises(ValueError, match=r"optimizer: expected a state of 0\.weight"):
        checkpoint.state_dict(model, torch.optim.AdamW(model.parameters()))
