# SPDX-License-Identifier: BSD-3-Clause
"""Experts of host memory on a GPU for one call, copied while its kernels run."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from switchgear.offload.device import Device, Event

_BUFFERS = 2  # one is filled while the other is copied


class Mover:
    """Copies experts on the stream `copies`: from pinned memory as it is, from other memory through two pinned buffers.

    params [E, …]: of all experts, by name, contiguous.
    """

    @torch.inference_mode(False)
    def __init__(self, device: Device, params: Mapping[str, Tensor]) -> None:
        self.device = device
        self._buffers: Tensor | None = None
        if not all(map(device.is_pinned, params.values())):
            self._buffers = device.buffers(_BUFFERS, max(param[0].nbytes for param in params.values()))
        self._copying: list[Event | None] = [None] * _BUFFERS
        self._next, self._lock = 0, threading.Lock()

    def move(self, params: Mapping[str, Tensor], experts: Sequence[int]) -> dict[str, Tensor]:
        """params[experts] on the device, for later work of the caller's stream."""
        device = self.device
        moved = {name: device.empty((len(experts), *p.shape[1:]), p.dtype) for name, p in params.items()}
        device.copies.wait_event(device.compute().record_event())  # who had this memory may still use it
        with self._lock:
            for name, param in params.items():
                for place, expert in enumerate(experts):
                    self._copy(moved[name][place], param[expert])
        device.compute().wait_event(device.copies.record_event())
        return moved

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self._buffers is None:
            self.device.copy(to, source)
            return
        number = self._next
        self._next = (number + 1) % _BUFFERS
        if (event := self._copying[number]) is not None:
            event.synchronize()
        buffer = self._buffers[number, : source.nbytes].view(source.dtype).view(source.shape)
        buffer.copy_(source)
        self.device.copy(to, buffer)
        self._copying[number] = self.device.copies.record_event()
