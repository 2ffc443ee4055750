# SPDX-License-Identifier: BSD-3-Clause
"""A GPU of tests: streams are queues, and a seed decides which of them goes on when. What no event orders runs in any
order, also as late or as early as it can, so that a missing wait is seen as wrong bytes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from switchgear.offload.store_records import PAGE


class QueuedEvent:
    def __init__(self, device: QueuedDevice) -> None:
        self._device, self.has_passed = device, False

    def query(self) -> bool:
        self._device.go_on()
        return self.has_passed

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.has_passed)

    def pass_by(self) -> None:
        self.has_passed = True


class QueuedStream:
    """works: what is left: (an event to wait for, or None; the work)."""

    def __init__(self, device: QueuedDevice, name: str) -> None:
        self._device, self.name = device, name
        self.works: deque[tuple[QueuedEvent | None, Callable[[], None]]] = deque()

    def run(self, work: Callable[[], None]) -> None:
        self.works.append((None, work))
        self._device.has_queued(self)

    def record_event(self) -> QueuedEvent:
        event = QueuedEvent(self._device)
        self.run(event.pass_by)
        return event

    def wait_event(self, event: QueuedEvent) -> None:
        self.works.append((event, lambda: None))
        self._device.has_queued(self)

    @property
    def can_go_on(self) -> bool:
        return bool(self.works) and (self.works[0][0] is None or self.works[0][0].has_passed)


class QueuedDevice:
    """Its memory is host memory.

    seed: of the order; of three kinds: any stream goes on, copies wait until an event needs them, or run before all
    else. is_eager: kernels are those of the host, which run at once: the caller's stream never lags behind.
    """

    def __init__(self, seed: int = 0, is_eager: bool = False) -> None:
        self._random, self._kind, self._is_eager = random.Random(seed), seed % 3, is_eager
        self.copies = QueuedStream(self, "copies")
        self.streams = [self.copies, QueuedStream(self, "main")]
        self.current = self.streams[1]
        self.is_in_capture = self.has_pinned = False
        self.most_pinned = 0

    # ---- of a Device -------------------------------------------------------------------------------------------------

    def compute(self) -> QueuedStream:
        return self.current

    def synchronize(self) -> None:
        self.run_until(lambda: not any(stream.works for stream in self.streams))

    def is_capturing(self) -> bool:
        return self.is_in_capture

    def rows(self, count: int, nbytes: int) -> Tensor:
        memory = torch.full((count * nbytes + PAGE,), 0xAA, dtype=torch.uint8)  # what the allocator's last user left
        begin = -memory.data_ptr() % PAGE
        rows = memory[begin : begin + count * nbytes].view(count, nbytes)
        self.current.run(lambda: rows.fill_(0x55))  # which may still write
        return rows

    def buffers(self, count: int, nbytes: int) -> Tensor:
        self.most_pinned = max(self.most_pinned, count * nbytes)
        memory = torch.full((count * nbytes + PAGE,), 0xBB, dtype=torch.uint8)
        begin = -memory.data_ptr() % PAGE
        return memory[begin : begin + count * nbytes].view(count, nbytes)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = torch.full(tuple(shape), -77, dtype=dtype)
        self.current.run(lambda: made.fill_(-88))  # the allocator's last user
        return made

    def is_pinned(self, tensor: Tensor) -> bool:
        return self.has_pinned

    def fetch(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], QueuedEvent]:
        found = [torch.full_like(tensor, -99) for tensor in tensors]
        for to, tensor in zip(found, tensors, strict=True):
            self.current.run(lambda to=to, tensor=tensor: to.copy_(tensor))  # type: ignore[misc]
        return found, self.current.record_event()

    def send(self, tensor: Tensor) -> Tensor:
        pinned, to = tensor.clone(), self.empty(tensor.shape, tensor.dtype)
        self.current.run(lambda: to.copy_(pinned))
        return to

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.copies.run(lambda: to.copy_(source))

    def upload(self, to: Tensor, table: Tensor) -> None:
        pinned = table.clone()
        self.current.run(lambda: to.copy_(pinned))

    # ---- the order ---------------------------------------------------------------------------------------------------

    @contextmanager
    def on_stream(self, stream: QueuedStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def other_stream(self) -> QueuedStream:
        self.streams.append(QueuedStream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    def has_queued(self, stream: QueuedStream) -> None:
        if self._is_eager and stream is not self.copies:
            self.run_until(lambda: not stream.works)
        else:
            self.go_on()

    def go_on(self) -> None:
        """Time passes on the host: a random number of works is done."""
        for _ in range(self._random.randrange(4)):
            self._step()

    def run_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            if not self._step(is_forced=True):
                raise AssertionError("the streams wait for each other")

    def _step(self, is_forced: bool = False) -> bool:
        ready = [stream for stream in self.streams if stream.can_go_on]
        others = [stream for stream in ready if stream is not self.copies]
        if self._kind == 1:  # copies late
            ready = others or (ready if is_forced else [])
        elif self._kind == 2:  # copies early
            ready = [stream for stream in ready if stream is self.copies] or (ready if is_forced else [])
        if not ready:
            return False
        self._random.choice(ready).works.popleft()[1]()
        return True
