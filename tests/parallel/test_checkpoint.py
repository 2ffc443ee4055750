# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints written by one number of ranks and read by another, bit for bit; errors name the defect."""

from __future__ import annotations

import copy
import copyreg
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_pool import Pool, subgroup
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

import switchgear
from errors import raises
from switchgear.parallel import ExpertParallel, Placement, Training, checkpoint, elastic_step, rebalance

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
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


@pytest.mark.parametrize("written", SIZES)
def test_every_size_reads_every_other(pool: Pool, tmp_path: Path, written: tuple) -> None:  # type: ignore[type-arg]
    pool.run(write, str(tmp_path), *written)
    for size in SIZES[::2] if written in SIZES[::2] else SIZES[1::2]:
        pool.run(read, str(tmp_path), *size)


def test_huggingface_layout(tmp_path: Path) -> None:
    """From one process: stacked experts under the names of the model."""
    model = make(None, seed=1)
    checkpoint.save(model, tmp_path)
    whole = checkpoint.load_whole(tmp_path)
    assert set(whole) == set(model.state_dict())
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())
    assert whole["1.experts.gate_up_proj"].shape == (EXPERTS, 24, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("1.experts.down_proj[3]"), "1.experts.down_proj[3]"),
        (lambda e: e.update({"1.experts.down_proj[7]": torch.zeros(16, 12)}), "1.experts.down_proj[7]"),
        (lambda e: e.update({"1.experts.down_proj[3]": torch.zeros(12, 16)}), "1.experts.down_proj[3]"),
        (lambda e: e.update({"1.experts.down_proj[3]": torch.zeros(16, 12).half()}), "1.experts.down_proj[3]"),
        (lambda e: e.pop("2.gate.weight"), "2.gate.weight"),
        (lambda e: e.update({"3.weight": torch.zeros(2)}), "3.weight"),
    ],
)  # fmt: skip
def test_defects_are_named(tmp_path: Path, change: object, message: str) -> None:
    model = make(None, seed=1)
    entries = {name: tensor.clone() for name, tensor in checkpoint.state_dict(model).items()}
    change(entries)  # type: ignore[operator]
    dcp.save(entries, checkpoint_id=tmp_path, no_dist=True)
    other = make(None, seed=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with raises(ValueError, message):
        checkpoint.load(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_an_optimizer_with_state_of_some_parameters_is_refused() -> None:
    model = make(None, seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model[2](torch.randn(3, 16)).sum().backward()
    optimizer.step()
    with raises(ValueError, "optimizer"):
        checkpoint.state_dict(model, optimizer)


def test_an_optimizer_without_state(tmp_path: Path) -> None:
    """Plain SGD has none. A state in the checkpoint has no place in it."""
    model, other = make(None, seed=1), make(None, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(model, tmp_path / "sgd", optimizer)
    checkpoint.load(other, tmp_path / "sgd", torch.optim.SGD(other.parameters(), lr=0.1))
    loaded = other.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    checkpoint.save(model, tmp_path / "adam", trained(model))
    with raises(ValueError):
        checkpoint.load(model, tmp_path / "adam", optimizer)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def refuse_unplain(rank: int, path: str, form: str) -> list[str]:
    """What state_dict, save and load say."""
    with ExpertParallel(timeout=20) as parallel:
        model = make(parallel, seed=1)
        checkpoint.save(model, f"{path}/plain")
        if form == "parametrized":
            nn.utils.parametrize.register_parametrization(model[1].experts, "down_proj", Doubled())
        else:
            switchgear.store(model, form)
        messages = []
        for call in (
            lambda: checkpoint.state_dict(model),
            lambda: checkpoint.save(model, f"{path}/none"),
            lambda: checkpoint.load(model, f"{path}/plain"),
        ):
            try:
                call()
            except ValueError as error:
                messages.append(str(error))
        assert not Path(f"{path}/none").exists()
        return messages


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("int8", "1.experts.gate_up_proj_values"),
        ("nf4", "1.experts.gate_up_proj_codes"),
        ("parametrized", "1.experts.parametrizations.down_proj.original"),
    ],
)
def test_distributed_experts_that_are_not_plain_are_refused(pool: Pool, tmp_path: Path, form: str, name: str) -> None:
    """Their tensors have one name on all ranks, so that one rank's would be kept."""
    for messages in pool.run(refuse_unplain, str(tmp_path), form):
        assert len(messages) == 3
        for message in messages:
            assert message.startswith(f"{name}: expected plain weights of distributed experts")
            assert "switchgear.restore(model) first" in message


def keep_names(rank: int, path: str) -> None:
    """An activation checkpoint's wrapper, and experts that two blocks share, keep their rows."""
    with ExpertParallel(timeout=20, invariant=True) as parallel:
        model = make(parallel, seed=1)
        names = list(checkpoint.state_dict(model))
        model[1] = checkpoint_wrapper(model[1])
        optimizer = trained(model)
        assert list(checkpoint.state_dict(model)) == names
        checkpoint.save(model, f"{path}/wrapped", optimizer)
        plain = make(parallel, seed=2)
        checkpoint.load(plain, f"{path}/wrapped", other := torch.optim.AdamW(plain.parameters()))
        for old, new in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(old, new)
            assert torch.equal(optimizer.state[old]["exp_avg"], other.state[new]["exp_avg"])
        plain[2].experts = plain[1].experts
        mine = parallel.placement(EXPERTS).experts_of_rank[rank]
        assert all(f"2.experts.down_proj[{expert}]" in checkpoint.state_dict(plain) for expert in mine)


def test_wrapped_and_shared_experts(pool: Pool, tmp_path: Path) -> None:
    pool.run(keep_names, str(tmp_path))


def reload_factors(rank: int, path: str) -> None:
    """Adafactor keeps a row and a column per expert."""
    with ExpertParallel(timeout=20, invariant=True) as parallel:
        torch.manual_seed(1)
        model = switchgear.MoE(16, 12, EXPERTS, 2, parallel=parallel)
        optimizer = torch.optim.Adafactor(model.parameters())
        model(torch.randn(20, 16)).square().mean().backward()
        optimizer.step()
        state = optimizer.state[model.experts.down_proj]
        before = {key: value.clone() for key, value in state.items()}
        assert before["row_var"].shape[1:] == (16, 1)
        checkpoint.save(model, path, optimizer)
        for key in ("row_var", "col_var"):
            state[key].zero_()
        checkpoint.load(model, path, optimizer)
        assert all(torch.equal(value, before[key]) for key, value in state.items())
        state["blocks"] = torch.zeros(4)
        with raises(ValueError):
            checkpoint.save(model, path, optimizer)


@pytest.mark.parametrize("num_experts", [4, 1])
def test_means_over_experts_are_refused(num_experts: int) -> None:
    """Adafactor's of their biases, which look like rows where a rank has one expert."""
    with ExpertParallel(timeout=20) as parallel:
        model = switchgear.MoE(16, 12, num_experts, 1, bias=True, parallel=parallel)
        optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
        training = Training(model, optimizer)

        def closure() -> torch.Tensor:
            loss = model(torch.randn(20, 16)).square().mean()
            loss.backward()
            return loss

        elastic_step(training, closure)
        before = copy.deepcopy(model.state_dict())
        for call in (
            lambda: checkpoint.state_dict(model, optimizer),
            lambda: Training(model, optimizer),
            lambda: elastic_step(training, closure),
            lambda: rebalance(training, {"experts": [1.0] * num_experts}),
        ):
            with raises(ValueError, "optimizer/experts.gate_up_proj_bias"):
                call()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_state_that_has_a_row_per_expert(pool: Pool, tmp_path: Path) -> None:
    pool.run(reload_factors, str(tmp_path))


# ---- checkpoints of unknown origin -----------------------------------------------------------------------------------


def saved(path: Path) -> Metadata:
    checkpoint.save(make(None, seed=1), path)
    return FileSystemReader(path).read_metadata()


def refused(path: Path, message: str) -> None:
    """Both readers refuse the checkpoint, and neither changes a thing."""
    model = make(None, seed=2)
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for read in (lambda: checkpoint.load(model, path, optimizer), lambda: checkpoint.load_whole(path)):
        with raises(ValueError, message):
            read()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizer.state


class Runs:
    """A pickle of it calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("where", ["instead", "planner_data", "storage_meta", "name", "shape"])
def test_metadata_runs_no_code(tmp_path: Path, where: str) -> None:
    metadata = saved(tmp_path)
    ran = tmp_path / "ran"
    attack: Any = Runs(os.mkdir, str(ran))
    whole: Any = metadata
    if where == "instead":
        whole = attack
    elif where == "name":
        metadata.state_dict_metadata[attack] = BytesStorageMetadata()
    elif where == "shape":
        metadata.state_dict_metadata["0.weight"].size = attack
    else:
        setattr(metadata, where, attack)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(whole))
    refused(tmp_path, "posix.mkdir")
    assert not ran.exists()


def test_a_pickle_of_several_steps_runs_no_code(tmp_path: Path) -> None:
    """Attributes of attributes, and functions that a pickle sets as methods of what it may name."""
    saved(tmp_path)
    for name in ("Metadata.__init__.__globals__", "pickle", "os.system"):
        stream = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c" + bytes([len(name)]) + name.encode()
        (tmp_path / ".metadata").write_bytes(stream + b"\x93.")
        refused(tmp_path, f"torch.distributed.checkpoint.metadata.{name}")
    pickler = pickle.Pickler(stream := io.BytesIO())
    pickler.dispatch_table = copyreg.dispatch_table.copy()
    pickler.dispatch_table[Runs] = lambda _: (Metadata, (), (None, {"__init__": Metadata}))  # BUILD with slots
    pickler.dump([Metadata, Runs(print)])
    (tmp_path / ".metadata").write_bytes(stream.getvalue())
    refused(tmp_path, ".metadata")
    assert Metadata.__init__ is not Metadata


DAMAGED = {
    "empty": b"",
    "cut off": b"\x80\x04",
    "a list": b"(lp0\n.",
    "bytes of a length of 2^64": b"\x80\x04\x8e" + b"\xff" * 8,
    "a bytearray of a length of 2^40": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "a memo of 2^31 entries": b"\x80\x04]r\xff\xff\xff\x7f.",
    "a call of None": b"\x80\x04N\x85R.",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_metadata(tmp_path: Path, data: bytes) -> None:
    saved(tmp_path)
    (tmp_path / ".metadata").write_bytes(data)
    refused(tmp_path, ".metadata")


def outside(metadata: Metadata, path: str) -> None:
    index = MetadataIndex("0.weight", [0, 0])
    metadata.storage_data[index] = replace(metadata.storage_data[index], relative_path=path)


def resized(metadata: Metadata, size: int) -> None:
    entry = metadata.state_dict_metadata["0.weight"]
    chunk = replace(entry.chunks[0], sizes=torch.Size([size, 16]))  # type: ignore[union-attr]
    entry.size, entry.chunks = torch.Size([size, 16]), [chunk]  # type: ignore[union-attr]


def cut(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["0.weight"]
    entry.chunks = [replace(entry.chunks[0], sizes=torch.Size([15, 16]))]  # type: ignore[union-attr]


def shifted(metadata: Metadata) -> None:
    index = MetadataIndex("0.weight", [0, 0])
    metadata.storage_data[index] = replace(metadata.storage_data[index], offset=2**40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: outside(m, "../other/__0_0.distcp"), "0.weight"),
        (lambda m: outside(m, "/etc/passwd"), "0.weight"),
        (lambda m: outside(m, ".."), "0.weight"),
        (lambda m: outside(m, "none"), "0.weight"),
        (lambda m: resized(m, 2**50), "0.weight"),
        (lambda m: resized(m, -1), "0.weight"),
        (cut, "0.weight"),
        (shifted, "0.weight"),
        (lambda m: m.state_dict_metadata.update({"0.weight": BytesStorageMetadata()}), "0.weight"),
        (lambda m: m.storage_data.pop(MetadataIndex("0.weight", [0, 0])), "0.weight"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit_its_files(
    tmp_path: Path, change: Callable[[Metadata], object], message: str
) -> None:
    metadata = saved(tmp_path)
    change(metadata)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(tmp_path, message)


def test_damaged_tensors(tmp_path: Path) -> None:
    """torch raises a BaseException, which `except Exception` would miss."""
    saved(tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    for read in (lambda: checkpoint.load(make(None, seed=2), tmp_path), lambda: checkpoint.load_whole(tmp_path)):
        with raises(ValueError, "path"):
            read()


def test_bytes_are_not_unpickled(tmp_path: Path) -> None:
    """torch reads bytes with pickle, so an entry that should be a tensor must not become one."""
    entries: dict[str, Any] = dict(checkpoint.state_dict(make(None, seed=1)))
    entries["0.weight"] = Runs(os.mkdir, str(tmp_path / "ran"))
    dcp.save(entries, checkpoint_id=tmp_path, no_dist=True)
    refused(tmp_path, "0.weight")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ({"a[0]": torch.zeros(2), "a[99999]": torch.zeros(2)}, "a[1]"),
        ({"a[0]": torch.zeros(2), "a[1]": torch.zeros(3)}, "a"),
        ({"a[0]": torch.zeros(2), "a": torch.zeros(3)}, "a"),
    ],
)
def test_experts_that_do_not_stack(tmp_path: Path, add: dict[str, torch.Tensor], message: str) -> None:
    dcp.save(add, checkpoint_id=tmp_path, no_dist=True)
    with raises(ValueError, message):
        checkpoint.load_whole(tmp_path)
