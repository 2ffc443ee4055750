# SPDX-License-Identifier: BSD-3-Clause
"""Counts of choices: by expert, and by pairs of token id and expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

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
