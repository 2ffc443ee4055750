# SPDX-License-Identifier: BSD-3-Clause
"""Transfers between GPUs of one machine: a kernel writes into the other GPUs' memory (csrc/cuda/exchange.cuh).

Each rank has a segment that all ranks map (CUDA IPC, through torch's tensor sharing): flags, and a window per source. A
transfer is one kernel on a separate stream, which ends when all rows have arrived. Data between two ranks is cut into
pieces that both number alike, so the window size does not depend on the data.

This module never blocks: Peers waits and detects lost ranks. `abort` sets a word in pinned memory that kernels poll.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from switchgear import cuda
from switchgear.parallel.connect import never, share
from switchgear.parallel.transport import Transport, Work, poll

SLOT_BYTES = 1 << 20
_DRAIN_SECONDS = 2.0
_READ_AT = 4 * 16  # offset of the words `read` in a segment's Flags


class CudaDevice:
    """Allocates segments and runs the kernel, on a stream of its own. Tests have others."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        cuda.require(index)
        self._device, self.index = torch.device("cuda", index), index
        self._module = cuda.module()
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._execution = cuda.Execution(self._module, index)

    def allocate(self, size: int) -> Tensor:
        """[size] uint8, zeros."""
        segment = torch.zeros(size, dtype=torch.uint8, device=self._device)
        torch.cuda.synchronize(self._device)  # must be zero before other ranks write
        return segment

    def share(self, segment: Tensor) -> str:
        _, *handles = segment.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
        return json.dumps([handle.hex() if isinstance(handle, bytes) else handle for handle in handles])

    def open(self, shared: str) -> Tensor:
        handles = [bytes.fromhex(handle) if isinstance(handle, str) else handle for handle in json.loads(shared)]
        # Opened on this device whatever the owner, so that this device's kernels can write there.
        storage = torch.UntypedStorage._new_shared_cuda(self.index, *handles)
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def stop_word(self) -> Tensor:
        """[1] int32, zero; visible to host and kernels."""
        return torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def segment_bytes(self, num_ranks: int, slot_bytes: int) -> int:
        return int(self._module.exchange_segment_bytes(num_ranks, slot_bytes))

    def multiprocessors(self, num_ranks: int) -> int:
        """Those that the kernel needs beside others."""
        with cuda.current(self.index):
            return int(self._module.exchange_multiprocessors(num_ranks))

    def exchange(self, inputs: Any, options: Any, outputs: Any, *, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        """Calls `_cuda.exchange` once `tensors` are ready; returns a function that tells whether it has ended."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._module.exchange(inputs, options, outputs, self._execution())
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ended.record(self._stream)
        for tensor in tensors:
            tensor.record_stream(self._stream)
        return ended.query


class PeerMemoryTransport(Transport):
    """See Transport. store: for the rendezvous; all ranks must be on this machine."""

    def __init__(
        self, rank: int, size: int, store: Any, device: CudaDevice, slot_bytes: int = SLOT_BYTES,
        is_over: Callable[[], bool] = never,
    ) -> None:  # fmt: skip
        """is_over: whether this object is no longer needed."""
        self._rank, self._size, self._device, self._slot_bytes = rank, size, device, slot_bytes
        own = device.allocate(device.segment_bytes(size, slot_bytes))
        shared = share(store, "segment", rank, size, device.share(own), is_over)
        self._segments = [own if r == rank else device.open(segment) for r, segment in enumerate(shared)]
        share(store, "mapped", rank, size, "", is_over)
        self._stop = device.stop_word()
        self._sent, self._received = [0] * size, [0] * size  # counted in pieces
        self._under_way: list[Callable[[], bool]] = []
        self._multiprocessors = device.multiprocessors(size)
        self._works: weakref.WeakSet[_KernelWork] = weakref.WeakSet()

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        for name, tensor in (("output", output), ("input", input)):
            if not tensor.is_contiguous():  # the kernel would get a copy, which nothing keeps until it has ended
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
        row = input.shape[1:].numel() * input.element_size()
        send_bytes, receive_bytes = ([rows * row for rows in counts] for counts in (input_rows, output_rows))
        ended = self._device.exchange(
            (_bytes_of(input), send_bytes, receive_bytes, self._sent, self._received),
            ([s.data_ptr() for s in self._segments], self._rank, self._slot_bytes, self._stop.data_ptr()),
            (_bytes_of(output),),
            tensors=(input, output),
        )
        self._sent, self._received = (
            [(count + -(-size // self._slot_bytes)) % 2**32 for count, size in zip(counts, sizes, strict=True)]
            for counts, sizes in ((self._sent, send_bytes), (self._received, receive_bytes))
        )
        self._under_way = [*(other for other in self._under_way if not other()), ended]
        work = _KernelWork(ended, self._stop, self._multiprocessors, input, output)
        self._works.add(work)
        return work

    def abort(self) -> None:
        self._stop.fill_(1)
        for work in list(self._works):
            work.release()

    def close(self) -> None:
        """Waits until the others have read what was sent, so that no rank writes here any more; for a short time only,
        and not after a failure."""
        end = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < end and not all(ended() for ended in self._under_way):
            time.sleep(1e-3)
        others = [r for r in range(self._size) if r != self._rank]
        while time.monotonic() < end and not int(self._stop):
            read = self._segments[self._rank][_READ_AT:][: 4 * self._size].cpu().view(torch.int32).tolist()
            if all((read[r] - self._sent[r]) % 2**32 == 0 for r in others):
                break
            time.sleep(1e-3)
        self._segments, self._under_way = [], []


class _KernelWork:
    """Until its end is noticed, grouped GEMMs leave the kernel its multiprocessors: on all of them it would wait for
    a GEMM's end, and chunks would not overlap."""

    def __init__(self, ended: Callable[[], bool], stop: Tensor, multiprocessors: int, *tensors: Tensor) -> None:
        self._ended, self._stop, self._tensors = ended, stop, tensors
        reserved = ExitStack()
        reserved.enter_context(cuda.reserved_multiprocessors(multiprocessors))
        self.release = weakref.finalize(self, reserved.close)

    def wait_for(self, seconds: float) -> bool:
        if not poll(self._ended, seconds):
            return False
        self.release()
        if int(self._stop):
            raise RuntimeError("aborted")
        self._tensors = ()
        return True


def _bytes_of(rows: Tensor) -> Tensor:
    return rows.detach().reshape(-1).view(torch.uint8)
