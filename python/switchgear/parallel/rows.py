# SPDX-License-Identifier: BSD-3-Clause
"""Rows on their way to the ranks of their experts and back, chunk by chunk: straight to each rank (Direct).

two_level.py has the other way, once per node. On the way rows look as they are, or have 8 bits with a scale per row:

    fp8    [R,H] → [R,H+4] bytes: float8 e4m3 of row / scale, then the scale = max |row| / 448 in float32

e4m3 has 3 fraction bits and a smallest step of 2^-9, so an element x of a row with largest magnitude m comes out as
x' with |x' - x| ≤ max(2^-4 |x|, 2^-10 · m / 448) (1 + 2^-22), plus the rounding to the dtype of the row. A row with an
element that is not finite comes out as NaN. A rank's rows for itself are encoded too, so results do not depend on the
placement.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from switchgear.parallel.layout import Sending
from switchgear.parallel.transport import Done, Work

if TYPE_CHECKING:
    from switchgear.parallel.group import ExpertParallel


_LARGEST = 448.0  # of e4m3fn
_SCALE_BYTES = 4


# ---- formats ---------------------------------------------------------------------------------------------------------


class Format:
    """Rows as they are."""

    exact = True

    def row_bytes(self, hidden_size: int, item: int) -> int:
        """Bytes of a row on its way; item: of an element."""
        return hidden_size * item

    def encode(self, rows: Tensor) -> Tensor:
        """[R,H] → what is sent: [R, …], contiguous."""
        return rows.contiguous()

    def decode(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows again."""
        return sent

    def empty(self, count: int, like: Tensor) -> Tensor:
        """A buffer for `count` rows as wide as those of like, as they are sent."""
        return like.new_empty(count, like.shape[1])


class Fp8(Format):
    """8 bits and a scale per row."""

    exact = False

    def row_bytes(self, hidden_size: int, item: int) -> int:
        return hidden_size + _SCALE_BYTES

    def encode(self, rows: Tensor) -> Tensor:
        wide = rows.float()
        largest = wide.abs().amax(1, keepdim=True) if rows.shape[1] else wide.new_zeros(len(rows), 1)
        # Not below the smallest normal number, whose quotients are finite; a row of zeros stays one.
        scale = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        values = (wide / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return torch.cat((values.view(torch.uint8), scale.view(torch.uint8)), 1)

    def decode(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        values = sent[:, :-_SCALE_BYTES].view(torch.float8_e4m3fn).float()
        scale = sent[:, -_SCALE_BYTES:].reshape(-1).clone().view(torch.float32)  # a copy is aligned
        return (values * scale[:, None]).to(dtype)

    def empty(self, count: int, like: Tensor) -> Tensor:
        return like.new_empty(count, like.shape[1] + _SCALE_BYTES, dtype=torch.uint8)


class Wire(NamedTuple):
    """The formats of rows on their way to the experts and back, in forward and in backward."""

    out: Format
    back: Format


WIRES = {
    "exact": Wire(Format(), Format()),
    "fp8": Wire(Fp8(), Fp8()),
    "fp8_dispatch": Wire(Fp8(), Format()),  # results are summed and cost more if rounded
}


# ---- transfers -------------------------------------------------------------------------------------------------------


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


class Transfers:
    """Starts, awaits and counts the transfers of one exchange."""

    def __init__(self, parallel: ExpertParallel, device: torch.device) -> None:
        self.parallel, self.record, self.device = parallel, parallel.record, device
        self._alone = parallel.size == 1

    def start(
        self, kind: str, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int],
        channel: str = "",
    ) -> Work:  # fmt: skip
        """Sends input_rows[r] rows to each rank r. channel: "" for all ranks, or one of nodes.CHANNELS."""
        parallel = self.parallel
        row = input.shape[1:].numel() * input.element_size()
        node_of = parallel.nodes.node_of
        here = node_of[parallel.rank]
        self.record.bytes[kind] += (sum(input_rows) - input_rows[parallel.rank]) * row
        far = sum(rows for rank, rows in enumerate(input_rows) if node_of[rank] != here)
        if far:
            self.record.between_nodes[kind] += far * row
        if self._alone:
            output.copy_(input)
            return Done()
        work = parallel.transport_for(self.device, channel).all_to_all(output, input, output_rows, input_rows)
        if self.record.events is not None:
            work = _Timed(work, "near" if channel.startswith("within") else "link", kind, self.record.events)
        return work

    def exchange(self, kind: str, rows: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """Sends sent[r] rows to each rank r, in order, and returns the received[r] rows of each."""
        output = rows.new_empty(sum(received), *rows.shape[1:])
        self.wait(self.start(kind, output, rows, received, sent))
        return output

    def wait(self, work: Work) -> None:
        begin = time.monotonic()
        self.parallel.peers.wait(work)
        self.record.waited += time.monotonic() - begin


class _Timed:
    """Records a transfer when its end is noticed (or at the end that a throttled link computes)."""

    def __init__(self, work: Work, lane: str, name: str, events: list[Event]) -> None:
        self._work, self._lane, self._name, self._events = work, lane, name, events
        self._begin = time.monotonic()

    def wait_for(self, seconds: float) -> bool:
        done = self._work.wait_for(seconds)
        if done:
            begin = getattr(self._work, "started", self._begin)
            end = getattr(self._work, "ready_at", time.monotonic())
            self._events.append(Event(self._lane, self._name, begin, end))
        return done


class Leg:
    """The transfers of all chunks in one direction over one channel; chunks are consecutive in `output`."""

    def __init__(
        self, transfers: Transfers, kind: str, output: Tensor, received: list[list[int]], sent: list[list[int]],
        channel: str = "",
    ) -> None:  # fmt: skip
        self._transfers, self._kind, self._channel, self._output = transfers, kind, channel, output
        self._received, self._sent = received, sent
        self.edges = [0, *accumulate(map(sum, received))]
        self._works: list[Work | None] = []  # None: has arrived

    @property
    def started(self) -> int:
        return len(self._works)

    def start(self, rows: Tensor) -> None:
        """Sends the rows of the next chunk."""
        c = len(self._works)
        counts = self._received[c], self._sent[c]
        self._works.append(self._transfers.start(self._kind, self.chunk(c), rows, *counts, self._channel))

    def chunk(self, c: int) -> Tensor:
        return self._output[self.edges[c] : self.edges[c + 1]]

    def has_arrived(self, c: int, seconds: float = 0.0) -> bool:
        if c >= len(self._works):
            return False
        work = self._works[c]
        if work is not None and work.wait_for(seconds):
            self._works[c] = work = None
        return work is None

    def wait(self, c: int, progress: Callable[[], None] | None = None) -> None:
        """progress: a turn of other work, called once at least and while this waits."""
        if progress is not None:
            self._transfers.wait(Waiting(partial(self._take_turns, c, progress)))
        elif self._works[c] is not None:
            self._transfers.wait(Waiting(partial(self.has_arrived, c)))

    def _take_turns(self, c: int, progress: Callable[[], None], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while True:
            progress()
            if self.has_arrived(c, _TURN):
                return True
            if time.monotonic() > end:
                return False


class Waiting(NamedTuple):
    """A Work of this function. What it does fails as any transfer does."""

    wait_for: Callable[[float], bool]


_TURN = 5e-4  # seconds between two turns of other work


# ---- all rows of an exchange -----------------------------------------------------------------------------------------


class Direct:
    """The rows of one exchange in one direction of autograd: one transfer per chunk each way. Several chunks overlap.

    buffer [R,H]: what has arrived, all chunks. returning [C][W]: the rows that go back to each rank, set before the
    first does.
    """

    def __init__(
        self, transfers: Transfers, sending: Sending, like: Tensor, each: bool, received: list[list[int]],
        returning: list[list[int]] | None,
    ) -> None:  # fmt: skip
        """like: [*,H] of the rows' dtype. received [C][W]: the rows that come from each rank."""
        self._wire = WIRES[transfers.parallel.wire]
        self._sending, self._each, self._transfers = sending, each, transfers
        self._received, self.returning = received, returning
        count = sum(map(sum, received))
        self.buffer = like.new_empty(count, like.shape[1])
        self._arriving = self.buffer if self._wire.out.exact else self._wire.out.empty(count, like)
        table = sending.pair_table if each else sending.row_table  # `combine` wants as many rows, and reads few
        self._results = like.new_empty(table.numel(), like.shape[1])
        self._out = self._open_out()
        self._back: Leg | None = None  # on which results reach this rank

    def _open_out(self) -> Leg:
        return Leg(self._transfers, "dispatch", self._arriving, self._received, self._sending.rows)

    def _open_back(self, sent: list[list[int]], channel: str = "") -> Leg:
        """sent [C][W]: the results that this rank sends to each."""
        returned = self._sending.pairs_of_chunk if self._each else self._sending.rows
        count = sum(map(sum, returned))
        form = self._wire.back
        self._returned = self._results[:count] if form.exact else form.empty(count, self._results)
        self._back = Leg(self._transfers, "combine", self._returned, returned, sent, channel)
        return self._back

    def _decode(self, leg: Leg, c: int) -> None:
        if not self._wire.out.exact:
            begin, end = leg.edges[c : c + 2]
            self.buffer[begin:end] = self._wire.out.decode(leg.chunk(c), self.buffer.dtype)

    def send(self, x: Tensor) -> None:
        """Starts to send the rows of tokens x [T,H]."""
        rows = self._wire.out.encode(x[self._sending.row_tokens])
        for part in torch.split(rows, [sum(counts) for counts in self._sending.rows]):
            self._out.start(part)

    def receive(self, c: int) -> None:
        """Waits until chunk c is in the buffer."""
        self._out.wait(c)
        self._decode(self._out, c)

    def give_back(self, rows: Tensor) -> None:
        """Starts to return the next chunk's results."""
        if self._back is None:
            assert self.returning is not None
            self._open_back(self.returning)
        assert self._back is not None
        self._back.start(self._wire.back.encode(rows))

    def look(self) -> None:
        """Between products: passes on what has arrived for other ranks."""

    def flush(self) -> None:
        """Before work in which nothing would be passed on: waits until all results are on their last way."""

    def finish(self) -> Tensor:
        """Waits for all results: the rows returned to this rank, then unused ones."""
        self.flush()
        if self._back is not None:
            for c in range(self._back.started):
                self._back.wait(c)
            if not self._wire.back.exact:
                self._results[: len(self._returned)] = self._wire.back.decode(self._returned, self._results.dtype)
        return self._results
