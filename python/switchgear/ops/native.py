# SPDX-License-Identifier: BSD-3-Clause
"""The native modules that ops run on, each with its execution argument: a stream or a number of threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch  # first: it brings the OpenMP runtime that the native module then shares
from torch import Tensor

from switchgear import cuda
from switchgear.reference.formats import FORMATS, ON_CUDA

try:
    from switchgear import _C
except ImportError as error:
    if str(error).startswith("SWITCHGEAR_CPU_ISA"):  # the module is there
        raise ValueError(str(error)) from None
    raise ImportError(
        "switchgear's native module `switchgear._C` is missing or does not load; build it with "
        f"`pip install .` in a checkout of the repository ({error})"
    ) from error

__all__ = [
    "Kernels", "advise_huge_pages", "available_cpu_isas", "check_capsule", "collapse_into_huge_pages", "cpu_isa",
    "encode_weight", "expand_compact", "host", "interleave_pages", "pack_compact", "panel_layout", "set_cpu_isa",
    "version",
]  # fmt: skip

advise_huge_pages = _C.advise_huge_pages
available_cpu_isas = _C.available_cpu_isas
"""() -> list[str]: the instruction sets that were built and that this machine runs, best last."""
check_capsule = _C.check_capsule
collapse_into_huge_pages = _C.collapse_into_huge_pages
interleave_pages = _C.interleave_pages
cpu_isa = _C.cpu_isa
"""() -> str: the instruction set in use."""
encode_weight = _C.encode_weight
expand_compact = _C.expand_compact
pack_compact = _C.pack_compact
panel_layout = _C.panel_layout
set_cpu_isa = _C.set_cpu_isa
"""(isa: str) -> None: sets the instruction set to use, in all threads. ValueError for one that is not available."""
version: str = _C.version


@dataclass(slots=True, eq=False)
class Kernels:
    """A native module, `_C` or `_cuda`, the last argument of its functions, the allocator of weight gradients, and the
    weight formats that its kernels support."""

    module: Any  # its functions, (inputs, options, outputs, execution) -> None, are named like the ops
    execution: Callable[[], Any]
    empty_weight: Callable[[Tensor], Tensor] = torch.empty_like
    formats: frozenset[str] = frozenset({"plain"})


_KEPT_BYTES = 1 << 20  # malloc keeps the memory of smaller tensors anyway


def _kept_like(tensor: Tensor) -> Tensor:
    """torch.empty_like in memory that `_C` keeps for the next tensor of this size. Otherwise the pages of a weight
    gradient would be faulted in and zeroed at each step."""
    transposed = not tensor.is_contiguous()
    dense = tensor.mT if transposed else tensor
    if tensor.nbytes < _KEPT_BYTES or not dense.is_contiguous():
        return torch.empty_like(tensor)
    memory = torch.frombuffer(_C.Buffer(tensor.nbytes), dtype=tensor.dtype).view(dense.shape)
    return memory.mT if transposed else memory


# The others, panels and compact, have the order of a processor's kernels.
host = Kernels(_C, torch.get_num_threads, _kept_like, frozenset(FORMATS))


@functools.cache
def cuda_kernels_of(index: int) -> Kernels:
    module = cuda.module()
    return Kernels(module, cuda.Execution(module, index), formats=frozenset(ON_CUDA))
