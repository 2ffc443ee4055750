# SPDX-License-Identifier: BSD-3-Clause
"""Pages of weights on the CPU: huge ones, and those of NUMA nodes. Linux provides 2 MB pages on request. With 4 KB
pages, reading the weights also costs page-table walks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from switchgear import ops

HUGE_PAGE = 2 << 20  # bytes


def _in_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and tensor.nbytes >= HUGE_PAGE


def _words(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor as int32 words, for any shape and dtype."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.int32, device="cpu").set_(storage, 0, (storage.nbytes() // 4,), (1,))


def use_huge_pages(weights: nn.Module | Iterable[Tensor]) -> int:
    """Moves weights onto huge pages in place: addresses and contents stay the same.

    Decoding reads each weight once per token; huge pages make it up to 1.5× faster on machines with fast memory.
    The move takes about a second per GB, once, so call it after loading a model. It needs Linux 6.1 or newer.

    Args:
        weights: a module, for its parameters and buffers, or tensors. Tensors smaller than 2 MB, or not in CPU memory,
            are skipped.

    Returns:
        The number of bytes on huge pages afterwards: 0 if the system has none.
    """
    return sum(ops.collapse_into_huge_pages(_words(tensor)) for tensor in _large(weights))


def interleave_nodes(weights: nn.Module | Iterable[Tensor]) -> int:
    """Spreads the pages of weights over all NUMA nodes in place: addresses and contents stay the same.

    Memory belongs to the node of the thread that first writes it. Weights that one thread loaded are all on one node,
    and threads of all nodes then share its bandwidth. Interleaved pages use that of all nodes. Call it once, after
    `use_huge_pages`; it takes about a second per GB. It needs Linux.

    Args:
        weights: a module, for its parameters and buffers, or tensors. Tensors smaller than 2 MB, or not in CPU memory,
            are skipped.

    Returns:
        The number of nodes; 0 if the system does not allow it, or no tensor is large enough.
    """
    return min((ops.interleave_pages(_words(tensor)) for tensor in _large(weights)), default=0)


def _large(weights: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(weights, (nn.Module, Iterable)):
        raise TypeError(f"weights: expected a module or tensors, got {type(weights).__name__}")
    tensors = [*weights.parameters(), *weights.buffers()] if isinstance(weights, nn.Module) else list(weights)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"weights: expected a module or tensors, got {type(tensor).__name__} at {index}")
    return [tensor for tensor in tensors if _in_memory(tensor)]


def advise_huge_pages(tensor: Tensor) -> None:
    """Requests huge pages for a tensor that was not written to yet, which is free."""
    if _in_memory(tensor):
        ops.advise_huge_pages(_words(tensor))
