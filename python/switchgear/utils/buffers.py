# SPDX-License-Identifier: BSD-3-Clause
"""Buffers that stay float32 in a model of another dtype, buffers outside of the state dict, and copies for a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_META = torch.device("meta")


class KeepsFloat32(nn.Module):
    """A module whose own float32 buffers keep their dtype and values in .half(), .double(), .to(dtype) and the like,
    and their dtype in load_state_dict(assign=True).

    16 bits would round away the small steps of a sum. Other conversions, as of devices, are as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self._float32_buffers()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype is not torch.float32:
                self._buffers[name] = buffer.to(after.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self._float32_buffers()
        super()._load_from_state_dict(*args, **kwargs)
        for name in before:
            self._buffers[name] = self._buffers[name].float()  # type: ignore[union-attr]

    def _float32_buffers(self) -> dict[str, Tensor]:
        return {name: b for name, b in self._buffers.items() if b is not None and b.dtype is torch.float32}


class FillsBuffers(nn.Module):
    """A module that knows the values of its buffers outside of the state dict: `fill_buffers`.

    A model that is made on the meta device gets its memory without them. to_empty fills them here;
    load_state_dict(assign=True) leaves them on meta, where `fill_on` finds them before their first use.
    """

    def fill_buffers(self, device: torch.device) -> None:
        """Makes these buffers anew."""
        raise NotImplementedError

    def fill_on(self, device: torch.device) -> None:
        """Makes them anew if they have no values and `device` has some."""
        if device.type != "meta" and _META in self._places():
            self.fill_buffers(device)

    def _places(self) -> list[torch.device]:
        buffers = [self._buffers[name] for name in self._non_persistent_buffers_set]
        return [buffer.device for buffer in buffers if buffer is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        were_empty = _META in self._places()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if were_empty and _META not in (places := self._places()):
            self.fill_buffers(places[0])
        return self


@contextmanager
def on_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, the modules and those in them have copies of their buffers."""
    with ExitStack() as stack:
        for inside in {inside for module in modules for inside in module.modules()}:
            own = dict(inside._buffers)
            stack.callback(inside._buffers.update, own)
            inside._buffers.update({name: None if b is None else b.clone() for name, b in own.items()})
        yield
