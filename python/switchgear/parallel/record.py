# SPDX-License-Identifier: BSD-3-Clause
"""Record: what exchanges did, in bytes and seconds."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple


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
