# SPDX-License-Identifier: BSD-3-Clause
"""What offloading needs of a GPU: memory on both sides, a stream that copies, the stream that computes, and events.

Streams and events are those of torch.cuda; tests have others, which run late and in any order. A stream does its work
in order. An event of a stream has passed once the work before it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from switchgear.offload.store_records import PAGE


class Event(Protocol):
    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """The host waits for it."""


class Stream(Protocol):
    def record_event(self) -> Event:
        """An event behind the work so far."""

    def wait_event(self, event: Any) -> None:
        """Later work waits for the event; the host does not."""


class CudaDevice:
    """A CUDA device. copies: the stream on which experts are copied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def compute(self) -> Stream:
        """The caller's stream, on which kernels run."""
        stream: Stream = torch.cuda.current_stream(self.device)
        return stream

    def synchronize(self) -> None:
        """The host waits for the work of all streams."""
        torch.cuda.synchronize(self.device)

    def is_capturing(self) -> bool:
        """Whether the caller's stream records a graph."""
        return bool(torch.cuda.is_current_stream_capturing())

    def rows(self, count: int, nbytes: int) -> Tensor:
        """[count, nbytes] uint8 in device memory."""
        made = torch.empty(count, nbytes, dtype=torch.uint8, device=self.device)
        made.record_stream(self.copies)  # type: ignore[arg-type]  # if it is freed while a copy runs
        return made

    def buffers(self, count: int, nbytes: int) -> Tensor:
        """The same in pinned host memory, aligned for direct reads."""
        memory = torch.empty(count * nbytes + PAGE, dtype=torch.uint8, device="cpu", pin_memory=True)
        begin = -memory.data_ptr() % PAGE
        return memory[begin : begin + count * nbytes].view(count, nbytes)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in device memory."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether its host memory is pinned."""
        return tensor.is_pinned()

    def fetch(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Host tensors, which have the numbers of these on the device once the event has passed."""
        found = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True) for tensor in tensors]
        for to, tensor in zip(found, tensors, strict=True):
            to.copy_(tensor, non_blocking=True)
        return found, self.compute().record_event()

    def send(self, tensor: Tensor) -> Tensor:
        """A host tensor, which may change afterwards, on the device, for later work of the caller's stream."""
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copies pinned memory, which must keep its bytes until the copy is done, on the stream `copies`."""
        with torch.cuda.stream(self.copies):  # type: ignore[arg-type]
            to.copy_(source, non_blocking=True)

    def upload(self, to: Tensor, table: Tensor) -> None:
        """Copies a small table of the host, which may change afterwards, on the caller's stream."""
        # A pinned copy of its own, which torch's allocator does not reuse before the transfer is done.
        to.copy_(table.pin_memory(), non_blocking=True)


def find_device(device: torch.device) -> CudaDevice | None:
    """None: the host, whose memory a record is read into."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch can use, got {device}")
    return CudaDevice(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
