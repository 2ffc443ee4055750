# SPDX-License-Identifier: BSD-3-Clause
"""What a LayerTrace keeps: counts of choices by expert and by pairs of token id and expert, and a sample of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from switchgear.trace.batches import stacked

_KEYS = 2**62  # enough that two tokens hardly ever draw the same key
_CALLS = 64  # that wait to be summed, so that a call costs one scatter_add


class LoadCounts:
    """How many choices each expert served, and how far the load of each call was from even."""

    def __init__(self, num_experts: int, device: torch.device | str) -> None:
        self.num_experts, self.num_calls = num_experts, 0
        self.num_tokens: Tensor | int = 0
        self.max_violation = torch.zeros((), dtype=torch.float64, device=device)
        self.num_dropped = torch.zeros((), dtype=torch.int64, device=device)
        self._total = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self._waiting: list[Tensor] = []  # [E+1] each; the last counts empty choices

    def add(self, slots: Tensor, num_tokens: Tensor | int, num_dropped: Tensor | None) -> None:
        """slots [T,K] int64: ids of experts, E for empty choices."""
        flat = slots.flatten()
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=slots.device)
        self._waiting.append(counts.scatter_add_(0, flat, torch.ones_like(flat)))
        if len(self._waiting) >= _CALLS:
            self.total()
        if num_dropped is not None:
            self.num_dropped = self.num_dropped + num_dropped
        self.num_tokens = self.num_tokens + num_tokens
        self.num_calls += 1

    def total(self) -> Tensor:
        """[E] int64."""
        if self._waiting:
            counts = torch.stack(self._waiting)[:, :-1]
            mean = counts.double().mean(1)
            violations = torch.where(mean > 0, counts.amax(1) / mean - 1, 0)
            self.max_violation = self.max_violation + violations.sum()
            self._total = self._total + counts.sum(0)
            self._waiting = []
        return self._total

    @classmethod
    def of_state(
        cls, num_experts: int, state: Mapping[str, Any], check: Callable[[str, Any, Tensor], None]
    ) -> LoadCounts:
        counts = cls(num_experts, "cpu")
        for name, like in (
            ("tokens_per_expert", counts._total),
            ("max_violation", counts.max_violation),
            ("num_dropped", counts.num_dropped),
        ):
            check(name, state[name], like)
        counts._total, counts.max_violation = state["tokens_per_expert"], state["max_violation"]
        counts.num_dropped = state["num_dropped"]
        counts.num_tokens, counts.num_calls = (int(size) for size in state["sizes"])
        return counts


class PairCounts:
    """How often each key occurred. Parts are merged as they grow, so memory grows with the distinct keys only."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, keys: Tensor) -> None:
        self.parts.append(torch.unique(keys, return_counts=True))
        if len(self.parts) > 16:
            self.total()

    def total(self) -> tuple[Tensor, Tensor]:
        if not self.parts:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        keys, index = torch.unique(torch.cat([keys for keys, _ in self.parts]), return_inverse=True)
        counts = torch.zeros_like(keys).scatter_add(0, index, torch.cat([counts for _, counts in self.parts]))
        self.parts = [(keys, counts)]
        return keys, counts


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
