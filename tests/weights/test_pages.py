# SPDX-License-Identifier: BSD-3-Clause
"""Huge pages move memory and change nothing else."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import switchgear
from errors import raises
from switchgear.adapters import add_lora
from switchgear.weights.weight import HUGE_PAGE, interleave_nodes, use_huge_pages

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not PAGES.exists() or "[never]" in PAGES.read_text(), reason="the system gives no huge pages"
)
SIZE = 4 * HUGE_PAGE  # at least three whole huge pages, wherever it starts


def mapped_bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """Of the mappings that contain the tensor's memory: the tensor's bytes whose mapping is advised to lie on huge
    pages, and the bytes that do."""
    advised = huge = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = max(0, min(end, tensor.data_ptr() + tensor.nbytes) - max(begin, tensor.data_ptr()))
        elif inside and line.startswith("AnonHugePages:"):
            huge += 1024 * int(line.split()[1])
        elif line.startswith("VmFlags:") and "hg" in line.split():
            advised += inside
    return advised, huge


def huge_bytes(tensor: torch.Tensor) -> int:
    return mapped_bytes(tensor)[1]


def lies_on_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the tensor's whole huge pages were advised, and before they were written: then the kernel gives some,
    though not each when its memory is in pieces."""
    advised, huge = mapped_bytes(tensor)
    return advised >= tensor.nbytes - 2 * HUGE_PAGE and (huge > 0 or not kernel_gives_huge_pages())


def kernel_gives_huge_pages() -> bool:
    with mmap.mmap(-1, 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        tensor = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
        given = huge_bytes(tensor) > 0
        del tensor  # an open view would keep the mapping from being closed
    return given


@needs_huge_pages
def test_weights_move_onto_huge_pages() -> None:
    weight = torch.arange(SIZE // 4, dtype=torch.float32)
    address = weight.data_ptr()
    moved = use_huge_pages([weight])
    if moved == 0:
        pytest.skip("the kernel has no MADV_COLLAPSE (Linux 6.1), or no memory in one piece")
    assert moved % HUGE_PAGE == 0
    assert moved <= SIZE
    assert huge_bytes(weight) >= moved
    assert weight.data_ptr() == address
    assert torch.equal(weight, torch.arange(SIZE // 4, dtype=torch.float32))


def test_modules_lend_parameters_and_buffers() -> None:
    module = nn.Linear(8, 8)
    module.weight = nn.Parameter(torch.ones(SIZE // 4).view(-1, 8))
    module.register_buffer("table", torch.ones(SIZE // 4))
    expected = sum(map(use_huge_pages, ([module.weight], [module.table])))
    assert use_huge_pages(module) == expected
    assert module.weight.requires_grad
    assert (module.weight == 1).all()


def test_what_is_small_or_elsewhere_is_left_alone() -> None:
    meta = torch.empty(SIZE, device="meta")
    assert use_huge_pages([torch.ones(8), torch.empty(0), meta]) == 0
    assert use_huge_pages(nn.Identity()) == 0


def test_views_and_strides() -> None:
    weight = torch.ones(64, SIZE // 4 // 32)
    others = (weight.to(torch.int8).repeat(4, 1), weight.double(), weight.view(2, 2, 2, 2, 4, -1))
    for view in (weight.mT, weight[::2], weight[:, 1:], *others):
        assert 0 <= use_huge_pages([view]) <= view.untyped_storage().nbytes()


def test_what_is_no_tensor_is_refused() -> None:
    with raises(TypeError, "weights"):
        use_huge_pages([torch.ones(2), 3])  # type: ignore[list-item]
    with raises(TypeError, "weights"):
        use_huge_pages(3)  # type: ignore[arg-type]


@needs_huge_pages
def test_fresh_experts_lie_on_huge_pages() -> None:
    experts = switchgear.Experts(512, 512, 16)
    assert lies_on_huge_pages(experts.gate_up_proj)


@needs_huge_pages
def test_fresh_adapters_lie_on_huge_pages() -> None:
    experts = switchgear.Experts(64, 32, 32)
    adapters = add_lora(experts, 4224)
    for adapter in adapters[:2]:  # of one projection, 33 MiB each: malloc maps them anew instead of using old pages
        assert lies_on_huge_pages(adapter)


@needs_huge_pages
def test_plain_moves_all_weights_of_a_model() -> None:
    experts = switchgear.Experts(8, 8, 2)
    table = nn.Parameter(torch.ones(SIZE // 4))
    model = nn.ModuleDict({"experts": experts, "table": nn.ParameterList([table])})
    moved = use_huge_pages([torch.ones(SIZE // 4)])
    switchgear.store(model, "plain")
    assert (huge_bytes(table) > 0) == (moved > 0)


NODES = Path("/sys/devices/system/node/has_memory")


@pytest.mark.skipif(not NODES.exists(), reason="the system has no list of nodes")
def test_weights_are_interleaved_in_place() -> None:
    layer = nn.Linear(1024, SIZE // 4096, bias=False)
    address, before = layer.weight.data_ptr(), layer.weight.detach().clone()
    nodes = interleave_nodes(layer)
    if nodes == 0:
        pytest.skip("the system does not interleave memory")
    assert (nodes == 1) == (NODES.read_text().strip() == "0")
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, before)
    policies = {
        int(line.split()[0], 16): line.split()[1] for line in Path("/proc/self/numa_maps").read_text().splitlines()
    }
    inside = [policy for begin, policy in policies.items() if address <= begin < address + SIZE]
    assert any(policy.startswith("interleave") for policy in inside)


def test_what_is_not_interleaved() -> None:
    assert interleave_nodes([torch.zeros(8), torch.empty(SIZE, device="meta")]) == 0
    with raises(TypeError, "weights"):
        interleave_nodes([1])  # type: ignore[list-item]
