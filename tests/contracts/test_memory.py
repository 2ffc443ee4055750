# SPDX-License-Identifier: BSD-3-Clause
"""Exactly the bytes of the outputs are written, whatever memory contained before. Old buffer contents, for example of
another user, never appear in a result."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from native_calls import ACCUMULATING, OPS, arguments, call, memory, outputs_of, poison, sizes_of, spec_of
from problems import DTYPES, counts, on_kernels
from test_layouts import run
from test_malformed import TENSORS, good_arguments
from torch import Tensor

import switchgear
from switchgear import _C

POISONS = (0xA5, 0xFF, 0x00)


def random_calls(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls of random ops and sizes: no tokens, empty experts and slots, sizes around those of vectors and panels."""
    rng = np.random.default_rng(12)
    for _ in range(count):
        op = str(rng.choice(list(OPS)))
        tokens, top_k, experts = (int(n) for n in rng.integers([0, 1, 1], [12, 5, 9]))
        hidden_size, intermediate_size = (int(rng.choice([n, 16 * n, 70])) for n in rng.integers(1, 9, 2))
        sizes = sizes_of(tokens, min(top_k, experts), experts, hidden_size, intermediate_size)
        yield op, arguments(op, sizes, DTYPES[rng.integers(3)])


def written(op: str, args: dict[str, Any]) -> list[bytes]:
    call(op, args)
    return [memory(args[name]).numpy().tobytes() for name in outputs_of(op)]


@on_kernels
@counts(ci=400, full=20_000)
def test_outputs_do_not_depend_on_what_they_held(backend: str, count: int) -> None:
    """Three poison values give the same bytes. Temporary memory contains what earlier ops left, some of it NaN."""
    for op, args in random_calls(count):
        if op in ACCUMULATING:
            continue
        leave_nan_behind()
        results = []
        for byte in POISONS:
            for name in outputs_of(op):
                poison(args[name], byte)
            results.append(written(op, args))
        assert results[0] == results[1] == results[2], op


@functools.cache
def nan_arguments(op: str) -> dict[str, Any]:
    args = arguments(op, sizes_of(12, 4, 8, 48, 48))
    tensors = [value for value in args.values() if isinstance(value, Tensor) and value.is_floating_point()]
    for tensor in tensors:
        tensor.fill_(torch.nan)
    return args


def leave_nan_behind() -> None:
    """Fills the temporary memory that is kept between calls with NaN."""
    for op in ("moe_forward", "moe_backward"):
        call(op, nan_arguments(op))


# ---- nothing else is written -----------------------------------------------------------------------------------------


def within_guards(tensor: Tensor, layout: str, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Like `tensor`, inside a poisoned buffer, with gaps between rows if the layout allows; also the buffer, and a mask
    of the tensor's elements in it."""
    shape = list(tensor.shape)
    if layout == "matrices" and transposed:
        shape[-1], shape[-2] = shape[-2], shape[-1]
    gap = 0 if layout == "contiguous" else 7
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * (shape[dim + 1] + gap)
    guard = 64
    buffer = poison(tensor.new_empty(2 * guard + strides[0] * max(shape[0], 1)))
    mask = torch.zeros(buffer.shape, dtype=torch.bool)
    inside, inside_mask = (t[guard:].as_strided(shape, strides, guard) for t in (buffer, mask))
    inside_mask.fill_(True)
    return (inside.mT if layout == "matrices" and transposed else inside), buffer, mask


@on_kernels
@counts(ci=300, full=5_000)
def test_nothing_but_outputs_is_written(backend: str, count: int) -> None:
    for index, (op, args) in enumerate(random_calls(count)):
        call(op, args)
        wanted = {name: args[name].clone() for name in outputs_of(op)}
        inputs = {name: memory(args[name]).clone() for name in OPS[op].tensors if name not in wanted}
        guarded = {name: within_guards(args[name], spec_of(op, name).layout, bool(index % 2)) for name in wanted}
        call(op, args | {name: inside for name, (inside, _, _) in guarded.items()})
        for name, (inside, buffer, mask) in guarded.items():
            assert torch.equal(inside.nan_to_num(), wanted[name].nan_to_num()), f"{op}: {name}"
            outside = buffer[~mask]
            assert torch.equal(outside, poison(torch.empty_like(outside))), f"{op}: wrote beside {name}"
        for name, before in inputs.items():
            assert torch.equal(memory(args[name]), before), f"{op}: wrote to {name}"


# ---- fresh memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nan_in_empty_tensors() -> Iterator[None]:
    """Makes torch fill torch.empty with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("function", TENSORS)
def test_no_uninitialised_tensors(backend: str, function: str, request: pytest.FixtureRequest) -> None:
    """The functions and their gradients on memory that torch allocates, including tail rows and empty experts."""
    args = good_arguments(function)
    if "topk_ids" in args:
        args["topk_ids"] = torch.full_like(args["topk_ids"], -1)
        args["topk_ids"][1, 0] = 2
    wanted = run(function, args, lambda t: t)
    request.getfixturevalue("nan_in_empty_tensors")
    for a, b in zip(run(function, args, lambda t: t), wanted, strict=True):
        assert torch.equal(a, b)
        assert not a.is_floating_point() or a.isfinite().all()


def digest() -> str:
    """A digest of the outputs of a fixed series of calls, in a process with fresh temporary memory."""
    torch.manual_seed(0)
    sha = hashlib.sha256()
    for isa in switchgear.available_cpu_isas():
        switchgear.set_cpu_isa(isa)
        for op, args in random_calls(60):
            _C.release_workspaces()
            for part in written(op, args):
                sha.update(part)
    return sha.hexdigest()


def test_fresh_memory_holds_nothing_that_matters() -> None:
    """With MALLOC_PERTURB_, glibc fills the results of malloc, including the memory of std::vector."""
    command = [sys.executable, "-c", "import test_memory; print(test_memory.digest())"]
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join(filter(None, (here, os.path.dirname(here), os.environ.get("PYTHONPATH"))))
    digests = set()
    for perturb in ("0", "165"):
        env = os.environ | {"MALLOC_PERTURB_": perturb, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        digests.add(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    assert len(digests) == 1
