# SPDX-License-Identifier: BSD-3-Clause
"""Tensors beside memory that no one may touch: an access of one element too far ends the process.

A page without access begins right after the tensor, or ends right before it; the hardware catches every access to it,
also by instructions that no sanitizer sees. Under the address sanitizer, the gaps between rows and the rest of the
tensor's own pages are forbidden too, for the kernels that it instruments.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SIDES = ("after", "before")
PAGE = mmap.PAGESIZE
PROT_NONE = 0

_process = ctypes.CDLL(None, use_errno=True)
HAS_ASAN = hasattr(_process, "__asan_poison_memory_region")


def _tell_asan(what: str, begin: int, end: int) -> None:
    """what: "poison" or "unpoison"; nothing without the address sanitizer."""
    if HAS_ASAN and begin < end:
        function = getattr(_process, f"__asan_{what}_memory_region")
        function(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin))


def _forbid(address: int, size: int) -> None:
    if _process.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


class Region:
    """Pages between two pages without access, for one tensor at a time."""

    def __init__(self, size: int = 1 << 23) -> None:
        self.size = size
        self.bytes = torch.frombuffer(mmap.mmap(-1, size + 2 * PAGE), dtype=torch.uint8)[PAGE : PAGE + size]
        self.begin = self.bytes.data_ptr()
        _forbid(self.begin - PAGE, PAGE)
        _forbid(self.begin + size, PAGE)

    def place(self, tensor: Tensor, strides: tuple[int, ...], side: str) -> Tensor:
        """A copy of the tensor with these strides that begins or ends the region; gaps contain NaN."""
        span = span_of(tensor, strides) * tensor.element_size()
        if span > self.size:
            raise ValueError(f"tensor: expected at most {self.size} bytes, got {span}")
        start = 0 if side == "before" else self.size - span
        self.allow()
        inside = self.bytes[start : start + span].fill_(0xFF).view(tensor.dtype)
        return inside.as_strided(tensor.shape, strides).copy_(tensor)

    def allow(self) -> None:
        _tell_asan("unpoison", self.begin, self.begin + self.size)

    def forbid_around(self, placed: Tensor) -> None:
        """Forbids the region's bytes that are no elements of the tensor."""
        end = self.begin
        for start, width in sorted(_runs(placed)):
            _tell_asan("poison", end, start)
            end = start + width
        _tell_asan("poison", end, self.begin + self.size)


def span_of(tensor: Tensor, strides: Iterable[int]) -> int:
    """Elements from the first to the last one."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))


def _runs(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The address and the bytes of each run of adjacent elements."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield tensor.data_ptr(), tensor.nbytes
        return
    inner = tensor.mT if tensor.stride(-1) != 1 and tensor.dim() > 1 else tensor
    for index in itertools.product(*map(range, inner.shape[:-1])):
        yield inner[index].data_ptr(), inner[index].nbytes


def strides_of(shape: Iterable[int], layout: str, gap: int) -> tuple[int, ...]:
    """Of a contiguous tensor, of contiguous "rows" or "columns" with gaps between them, or of contiguous "experts", a
    multiple of 64 elements apart."""
    sizes = list(shape)
    if layout == "experts":
        inner = strides_of(sizes, "contiguous", 0)
        return (inner[0] if gap == 0 else -(-inner[0] // 64) * 64 + 64 * (gap - 1), *inner[1:])
    if layout == "columns":
        sizes[-1], sizes[-2] = sizes[-2], sizes[-1]
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(sizes[dim + 1], 1) + (gap if layout != "contiguous" else 0)
    if layout == "columns":
        strides[-1], strides[-2] = strides[-2], strides[-1]
    return tuple(strides)


class Guards:
    """Regions for the operands of one call at a time."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._used: list[tuple[Region, Tensor]] = []

    def place(self, tensor: Tensor, side: str, layout: str = "contiguous", gap: int = 0) -> Tensor:
        if len(self._used) == len(self._regions):
            self._regions.append(Region())
        region = self._regions[len(self._used)]
        placed = region.place(tensor, strides_of(tensor.shape, layout, gap), side)
        self._used.append((region, placed))
        return placed

    @contextmanager
    def closed(self) -> Iterator[None]:
        """A call of the kernels: no byte but those of the tensors may be used."""
        for region, placed in self._used:
            region.forbid_around(placed)
        try:
            yield
        finally:
            for region, _ in self._used:
                region.allow()
            self._used = []
