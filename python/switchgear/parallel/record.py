# SPDX-License-Identifier: BSD-3-Clause
"""What exchanges did, in bytes and seconds, and the tokens that did not fit."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Event(NamedTuple):
    """An interval of a timeline, in seconds (of time.monotonic(), if it was measured)."""

    lane: str  # "link", "near" (within a node, with two levels) or "experts"
    name: str
    begin: float
    end: float


@dataclass
class Record:
    """What an exchange did: bytes sent to other ranks by kind, and those of them that went to another node, seconds
    spent waiting, and events if requested."""

    bytes: Counter[str] = field(default_factory=Counter)
    between_nodes: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    events: list[Event] | None = None

    def clear(self) -> None:
        self.bytes.clear()
        self.between_nodes.clear()
        self.waited = 0.0
        if self.events is not None:
            self.events = []

    @contextmanager
    def event(self, lane: str, name: str) -> Any:
        begin = time.monotonic()
        yield
        if self.events is not None:
            self.events.append(Event(lane, name, begin, time.monotonic()))


# ---- Tokens that did not fit -----------------------------------------------------------------------------------------


class Overflow:
    """Counts the tokens that did not fit. With "raise" it raises ValueError at once on the CPU; on other devices, where
    no host waits for the count, at a later exchange, once it has arrived."""

    def __init__(self, capacity: int | None, action: str) -> None:
        self._capacity, self._action = capacity, action
        self._totals: dict[torch.device, Tensor] = {}
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None
        self._raised = 0

    def count(self) -> int:
        """Tokens of this rank that did not fit so far, counted once for each rank. Waits for the device."""
        return sum(int(total) for total in self._totals.values())

    def add(self, overflow: Tensor, captured: bool = False) -> None:
        """overflow [W]. captured: in a CUDA graph, which adds and does not raise."""
        device = overflow.device
        if device not in self._totals:
            self._totals[device] = torch.zeros((), dtype=torch.int64, device=device)
        total = self._totals[device]
        total.add_(overflow.sum())
        if captured or self._action == "drop":
            return
        if device.type == "cpu":
            self._check(int(total))
            return
        if self._arriving is not None and self._arriving[1].query():  # type: ignore[no-untyped-call]
            self._check(int(self._arriving[0]))
            self._arriving = None
        if self._arriving is None:
            there = torch.empty((), dtype=torch.int64, pin_memory=True)
            there.copy_(total, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._arriving = there, event

    def _check(self, total: int) -> None:
        new, self._raised = total - self._raised, total
        if new:
            raise ValueError(f"capacity: expected at most {self._capacity} tokens for each rank, {new} did not fit")
