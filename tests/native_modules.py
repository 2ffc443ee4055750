# SPDX-License-Identifier: BSD-3-Clause
"""Runs ops on CPU tensors with the CUDA kernels, so that the shared tests run on them unchanged.

simt: the module _simt (tests/simt), which runs the kernels on the CPU; SWITCHGEAR_SIMT is its path.
cuda: the module _cuda on a CUDA device. Each call copies the storages of its tensors there and back, so tests of
strides, of memory behind rows and of unwritten elements are valid there too.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from switchgear import cuda, ops

SIMT_PATH = os.environ.get("SWITCHGEAR_SIMT")
# 0.2 multiply-adds per nanosecond, a quarter of that under sanitizers: some seconds per call.
MOST_MULTIPLICATIONS = int(float(os.environ.get("SWITCHGEAR_SIMT_MULTIPLICATIONS", "3e8")))


@contextmanager
def ops_on(module: Any, execution: Callable[[], Any]) -> Iterator[None]:
    """Makes the ops on CPU tensors call `module` instead of `_C`."""
    host = ops.host
    before = host.module, host.execution, host.empty_weight
    host.module, host.execution, host.empty_weight = module, execution, torch.empty_like
    try:
        yield
    finally:
        host.module, host.execution, host.empty_weight = before


# ---- simt ------------------------------------------------------------------------------------------------------------


@functools.cache
def load_simt() -> Any:
    spec = importlib.util.spec_from_file_location("_simt", SIMT_PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def poisoned(size: int) -> Tensor:
    """Temporary memory that contains NaN and -1 until a kernel writes it."""
    return torch.full((size,), 0xFF, dtype=torch.uint8)


def multiplications(name: str, inputs: Sequence[Any], options: Sequence[Any], outputs: Sequence[Any]) -> int:
    """The number of multiplications of a call, if it has expensive products."""
    if name == "grouped_gemm":
        return int(outputs[0].numel()) * int(inputs[0].shape[1])
    if name == "grouped_gemm_wgrad":
        return int(inputs[0].numel()) * int(inputs[1].shape[1])
    if name in ("moe_forward", "moe_backward"):
        layer = ops.Layer(*options)
        return int(layer.topk_ids.numel()) * layer.gate_up_proj[0][0].numel() * (2 if name == "moe_forward" else 5)
    return 0


class SkipsLongCalls:
    """A module wrapper that skips the test if a call would take too long."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._module, name)

        def call(*args: Any) -> None:
            count = 0 if name.startswith("exchange") else multiplications(name, *args[:3])
            if count > MOST_MULTIPLICATIONS:
                pytest.skip(f"{name} with {count / 1e9:.1f}e9 multiplications takes too long on simt")
            op(*args)

        return call


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers, not the right results of a call before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def simt_kernels(device: str) -> Iterator[None]:
    module = load_simt()
    module.set_device(device)
    with poisoned_outputs(), ops_on(SkipsLongCalls(module), lambda: module.Execution(0, poisoned, cuda.allow_tf32())):
        yield


# ---- cuda ------------------------------------------------------------------------------------------------------------


class Copying:
    """A wrapper that lets a device module take CPU tensors."""

    def __init__(self, module: Any, device: str) -> None:
        self._module, self._device = module, device

    def _there(self, tensor: Tensor) -> Tensor:
        flat = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).to(self._device)
        whole = flat.view(torch.uint8)
        moved = torch.empty(0, dtype=tensor.dtype, device=self._device).set_(
            whole.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        return moved

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._module, name)

        def call(*args: Any) -> None:
            pairs: list[tuple[Tensor, Tensor]] = []

            def there(value: Any) -> Any:
                if isinstance(value, (list, tuple)):
                    items = [there(item) for item in value]
                    return tuple(items) if isinstance(value, tuple) else items
                if not isinstance(value, Tensor):
                    return value
                pairs.append((value, self._there(value)))
                return pairs[-1][1]

            op(*(there(value) for value in args))
            for here, moved in pairs:
                memory = torch.empty(0, dtype=torch.uint8).set_(here.detach().untyped_storage())
                result = torch.empty(0, dtype=torch.uint8, device=self._device).set_(moved.untyped_storage()).cpu()
                if not torch.equal(memory, result):  # unchanged inputs may be read-only
                    memory.copy_(result)

        return call


@contextmanager
def cuda_kernels() -> Iterator[None]:
    cuda.require()
    with ops_on(Copying(cuda.module(), "cuda:0"), cuda.Execution(cuda.module(), 0)):
        yield
