# SPDX-License-Identifier: BSD-3-Clause
"""TokenSample: a uniform sample of the tokens of a layer, of bounded size."""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear.trace.batches import stacked

_KEYS = 2**62  # enough that two tokens hardly ever draw the same key


class TokenSample:
    """At most `size` tokens, each with the same probability: every token draws a key, and the largest keys stay.

    Attributes:
        inputs [n,H], topk_ids [n,K] int32, topk_weights [n,K]: of the tokens, in no order.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.inputs = torch.zeros(0, 0)
        self.topk_ids = torch.zeros(0, 0, dtype=torch.int32)
        self.topk_weights = torch.zeros(0, 0)
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        keys = torch.randint(_KEYS, (len(x),), generator=self._generator)
        if len(self._keys) == self.size:
            index = (keys > self._keys.min()).nonzero().flatten()  # on the CPU: nothing waits for the device
        else:
            index = torch.arange(len(keys))
        if not len(index):
            return
        best = keys[index].topk(min(self.size, len(index))).indices
        index = index[best]
        at = index.to(x.device)
        new = [keys[index], x.detach()[at].clone(), topk_ids[at].int(), topk_weights.detach()[at].float()]
        old = [self._keys, self.inputs, self.topk_ids, self.topk_weights]
        merged = [_after(a, b) for a, b in zip(old, new, strict=True)]
        if len(merged[0]) > self.size:
            kept = merged[0].topk(self.size).indices
            merged = [merged[0][kept], *(tensor[kept.to(tensor.device)] for tensor in merged[1:])]
        self._keys, self.inputs, self.topk_ids, self.topk_weights = merged

    def state(self) -> list[Tensor]:
        return [tensor.cpu() for tensor in (self._keys, self.inputs, self.topk_ids, self.topk_weights)]

    @classmethod
    def of_state(cls, state: list[Tensor]) -> TokenSample:
        """Raises TypeError or ValueError for anything but a `state`."""
        keys, inputs, ids, weights = state
        if not (keys.dim() == 1 and inputs.dim() == ids.dim() == 2 and ids.shape == weights.shape):
            raise ValueError("inputs: expected a sample of tokens")
        if not len(keys) == len(inputs) == len(ids) or ids.dtype is not torch.int32:
            raise ValueError("inputs: expected as many inputs as choices")
        if keys.is_floating_point():  # in [0, 1), of earlier versions
            keys = (keys.double() * _KEYS).long()
        sample = cls(len(keys))
        sample._keys, sample.inputs, sample.topk_ids, sample.topk_weights = keys, inputs, ids, weights
        return sample


def _after(old: Tensor, new: Tensor) -> Tensor:
    """The rows of both on the device of the new ones."""
    if not len(old):
        return new
    rows = [old.to(new.device), new]
    return torch.cat(rows) if new.dim() == 1 else stacked(rows, -1 if new.dtype is torch.int32 else 0)
