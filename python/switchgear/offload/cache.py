# SPDX-License-Identifier: BSD-3-Clause
"""The cache of a running model: loads the experts of a layer's call, and keeps them as its policy says.

An expert is a key, layer · width + number, as in residency.py, which alone decides what is resident. The dictionaries
here say where experts are: `rows` (in memory, or being read), `pending` (being read: row and ticket), `guesses` (read
for a prediction; resident only once they are used).

Any exception, a KeyboardInterrupt too, can leave these behind what residency.py says. Such a call leaves the cache
marked as disturbed, and the next one repairs it. A row is never reused while a read may write into it: each read is in
`pending`, `guesses` or the pool's `draining` from its submission until it is over.

On a GPU, reads and copies of records run while kernels do (pool.py). A row is released once the kernels that read it
are queued, and the slots of a layer are uploaded before the kernels that use them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from ctypes import c_int32
from typing import Any

import torch
from torch import Tensor

from switchgear.offload.device import CudaDevice, Stream
from switchgear.offload.pool import Pool, knows
from switchgear.offload.predictors import Predictor, read_predictions
from switchgear.offload.projections import Wave
from switchgear.offload.residency import LayerStatistics, Residency
from switchgear.offload.store_records import StoreError
from switchgear.offload.waves import LoadsExperts
from switchgear.utils.modules import has_proxies

_FEW = 256  # ids, up to which a set of Python is faster than torch.unique


class Cache:
    """What the layers of a model share. device: that has the rows; None: the host. num_routed: the experts that a
    predictor may name of each layer; virtual ones follow those of the store."""

    def __init__(
        self,
        reader: Any,
        width: int,
        predictor: Predictor | None,
        timeout: float,
        device: CudaDevice | None,
        num_routed: Sequence[int],
    ) -> None:
        self.reader, self.width, self.predictor, self.timeout, self.device = reader, width, predictor, timeout, device
        self.num_routed = num_routed
        self.stream: Stream | None = None if device is None else device.compute()  # of the last call
        self.layers: list[CachedLayer] = []
        self.rows: dict[int, int] = {}
        self.pending: dict[int, tuple[int, int]] = {}  # (row, ticket)
        self.guesses: dict[int, tuple[int, int]] = {}
        self.lock = threading.Lock()  # held while a layer runs, so that its experts stay
        self.process = os.getpid()
        self.moment = 0
        self.is_disturbed = self.is_closed = False

    def refuse_fork(self, name: str) -> None:
        """Raises StoreError in a forked child. It comes before the lock, which a thread may have held at the fork."""
        if os.getpid() != self.process:
            raise StoreError(f"{name}: the cache belongs to process {self.process}; offload in this one")

    def layer_of(self, key: int) -> CachedLayer:
        return self.layers[key // self.width]

    def release(self, key: int) -> None:
        """Frees the row of an expert that is not resident any more."""
        row, pool = self.rows[key], self.layer_of(key).pool
        if (read := self.pending.get(key)) is None:
            del self.rows[key]
            pool.release(row)
        else:
            pool.draining[row] = read[1]
            del self.pending[key], self.rows[key]
            pool.give_up(row, read[1])

    def drop_guess(self, key: int) -> None:
        layer = self.layer_of(key)
        row, ticket = self.guesses[key]
        layer.pool.draining[row] = ticket
        del self.guesses[key]
        if not layer.pool.give_up(row, ticket):
            layer.counts.wasted_bytes += layer.reads[key - layer.first][2]

    def repair(self) -> None:
        """After a call that was interrupted anywhere."""
        pools = {id(layer.pool): layer.pool for layer in self.layers}.values()
        for pool in pools:
            held = [read for reads in (self.pending, self.guesses) for read in self._of(pool, reads)]
            pool.settle({ticket for _, ticket in held})
        for key, (row, ticket) in list(self.pending.items()):
            pool = self.layer_of(key).pool
            self.guesses.pop(key, None)
            if row in pool.draining or key not in self.rows:
                self.rows.pop(key, None)
                pool.draining[row] = ticket
                del self.pending[key]
            elif not knows(pool.reader, ticket):  # it was waited for, and the outcome is lost
                del self.pending[key], self.rows[key]
            elif pool.is_over(ticket):  # the next call must not raise what went wrong in this one
                try:
                    pool.reader.wait(ticket, 0.0)
                except TimeoutError:
                    continue
                except OSError:
                    del self.rows[key]
                del self.pending[key]
        for key, (row, ticket) in list(self.guesses.items()):
            pool = self.layer_of(key).pool
            if row in pool.draining or not knows(pool.reader, ticket):
                del self.guesses[key]
            elif pool.is_over(ticket):  # it may have failed, too
                self.drop_guess(key)
        for key in list(self.rows):
            if key not in self.layer_of(key).residency:
                self.release(key)
        for layer in self.layers:
            for key in list(layer.residency.last):
                if key not in self.rows:
                    layer.residency.forget(key)
        for pool in pools:
            mine = [key for key in self.rows if self.layer_of(key).pool is pool]
            pool.rebuild({*(self.rows[key] for key in mine), *(row for row, _ in self._of(pool, self.guesses))})

    def _of(self, pool: Pool, reads: dict[int, tuple[int, int]]) -> list[tuple[int, int]]:
        """Those into rows of a pool."""
        return [read for key, read in reads.items() if self.layer_of(key).pool is pool]

    def follow(self) -> None:
        """A call on another stream than the last one waits for that one, which may use or have waited for the rows."""
        assert self.device is not None
        stream = self.device.compute()
        if self.stream is not None and stream != self.stream:
            stream.wait_event(self.stream.record_event())
        self.stream = stream

    def guess(self, layer: int, x: Tensor, topk_ids: Tensor) -> None:
        """Begins reads of experts that are predicted to be needed next."""
        assert self.predictor is not None
        if (staging := self.layers[layer].pool.staging) is not None:
            staging.advance()
        for number, expert in read_predictions("prefetch", self.predictor.predict(layer, x, topk_ids), self.num_routed):
            target = self.layers[number]
            if expert >= target.num_experts:
                continue
            target.predictions.add(expert)
            key, pool = target.first + expert, target.pool
            if key in self.rows or key in self.guesses:
                continue
            pool.drain()
            if sum(self.layer_of(k).pool is pool for k in self.guesses) + len(pool.draining) >= pool.guess_rows:
                continue
            if (row := pool.take()) is not None:
                target.read((key,), (row,), self.guesses, is_urgent=False)
        self.predictor.observe(layer, topk_ids)


class CachedLayer(LoadsExperts):
    """The experts of one layer: the source of its two weights.

    reads: (file, offset, bytes, checksum) of each expert's record.
    slots: [E] int32 of the weights, shared with the kernels of the host.
    place: tells the weights which expert's record is in a row, where they must know.
    tables: on a GPU, what its kernels read, and of what it is a copy: slots, and what `place` writes.
    """

    def __init__(
        self,
        cache: Cache,
        name: str,
        pool: Pool,
        residency: Residency,
        reads: Sequence[tuple[int, int, int, int | None]],
        slots: Tensor,
        place: Callable[[int, int], None] | None = None,
        tables: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self.cache, self.name, self.pool, self.residency, self.reads = cache, name, pool, residency, reads
        self.index, self.num_experts, self._place = len(cache.layers), len(reads), place
        self.first = self.index * cache.width
        self.slots = slots
        self._row_of = (c_int32 * len(slots)).from_address(slots.data_ptr())  # torch takes µs to write an element
        self._tables, self._is_stale = tables, True
        self.counts = LayerStatistics(name)
        self.predictions: set[int] = set()
        cache.layers.append(self)

    # ---- a call ------------------------------------------------------------------------------------------------------

    def run(
        self,
        x: Tensor,
        topk_ids: Tensor,
        compute: Callable[[Iterator[Wave] | None], Any],
        *,
        predicts: bool = True,
    ) -> Any:
        cache = self.cache
        cache.refuse_fork(self.name)
        if cache.device is not None and cache.device.is_capturing():
            raise RuntimeError(f"{self.name}: expected no capture of a CUDA graph, which cannot load experts, got one")
        if _is_traced():
            raise ValueError(
                f"{self.name}: expected no trace or export of offloaded experts, whose graph would use those of this "
                "call for ever, got one; call close() of what offload returned first"
            )
        experts = _distinct(topk_ids, self.num_experts)
        with cache.lock:
            if cache.is_closed:
                raise RuntimeError(f"{self.name}: the cache is closed")
            if cache.is_disturbed:
                cache.repair()
            cache.is_disturbed = True
            if cache.device is not None:
                cache.follow()
            result = self._run(experts, x, topk_ids, compute, predicts)
            cache.is_disturbed = False
            return result

    def _run(
        self,
        experts: list[int],
        x: Tensor,
        topk_ids: Tensor,
        compute: Callable[[Iterator[Wave] | None], Any],
        predicts: bool,
    ) -> Any:
        cache, counts = self.cache, self.counts
        turn = self.residency.run(self.index, experts, cache.moment)
        cache.moment += 1
        counts.hits += len(turn.hits)
        counts.misses += len(turn.misses)
        counts.bytes += sum(self.reads[key - self.first][2] for key in turn.misses)
        begins_guesses = cache.predictor is not None and predicts
        if not turn.misses and not cache.pending and not cache.guesses and not begins_guesses:
            return self._compute(compute)
        needed = {self.first + expert for expert in experts}
        passing = set()  # they leave after they ran: there are more experts than slots
        for key in turn.evicted:
            if key in needed:
                passing.add(key)
            else:
                cache.release(key)
        if cache.predictor is not None:
            self._judge_predictions(experts, needed)
        begun = self._begin(turn.misses)
        if begins_guesses:
            cache.guess(self.index, x, topk_ids)
        if not turn.misses and not any(key in cache.pending for key in needed):
            return self._compute(compute)
        result = compute(self._waves(experts, turn.misses[begun:], passing))
        for key in passing:
            if key in cache.rows:
                cache.release(key)
        return result

    def _compute(self, compute: Callable[[Iterator[Wave] | None], Any]) -> Any:
        """With all experts in memory."""
        self._upload()
        return compute(None)

    def _upload(self) -> None:
        """Kernels that are queued from now on find the experts that are in memory now."""
        if self._tables and self._is_stale:
            device = self.cache.device
            assert device is not None
            for table, source in self._tables:
                device.upload(table, source)
            self._is_stale = False

    def _waves(self, experts: list[int], misses: list[int], passing: Collection[int]) -> Iterator[Wave]:
        """Ranges of experts in memory, ascending. misses: not begun yet."""
        rows, first, at = self.cache.rows, self.first, 0
        while at < len(experts):
            while first + experts[at] not in rows:
                misses = misses[self._begin(misses, needs_one=True) :]
            self._arrive(first + experts[at])
            end = at + 1
            while end < len(experts) and self._has_arrived(first + experts[end]):
                end += 1
            self._upload()
            yield Wave(experts[at], experts[end - 1], at == 0 and end == len(experts))
            for expert in experts[at:end]:
                if first + expert in passing:
                    self.cache.release(first + expert)
            if misses:
                misses = misses[self._begin(misses) :]
            at = end

    # ---- reads -------------------------------------------------------------------------------------------------------

    def _begin(self, keys: Sequence[int], needs_one: bool = False) -> int:
        """Begins the reads of the first of these experts, as far as there are rows. Returns how many."""
        cache, pool = self.cache, self.pool
        fresh: list[int] = []
        rows: list[int] = []
        count = 0
        for key in keys:
            if (guess := cache.guesses.get(key)) is not None:
                cache.pending[key], cache.rows[key] = guess, guess[0]
                del cache.guesses[key]
                if not pool.is_over(guess[1]):
                    pool.reader.promote(guess[1])
                self.counts.prefetched += 1
            else:
                row = pool.take()
                if row is None and needs_one and count == 0:
                    row = self._row_by_force()
                if row is None:
                    break
                fresh.append(key)
                rows.append(row)
            count += 1
        if fresh:
            self.read(fresh, rows, cache.pending, is_urgent=True)
            cache.rows.update(zip(fresh, rows, strict=True))
        return count

    def read(
        self, keys: Sequence[int], rows: Sequence[int], into: dict[int, tuple[int, int]], *, is_urgent: bool
    ) -> None:
        """Submits reads of experts into rows; `into` gets (row, ticket) of each."""
        self._is_stale = True
        reads = [self.reads[key - self.first] for key in keys]
        for key, row in zip(keys, rows, strict=True):
            self._row_of[key - self.first] = row
            if self._place is not None:
                self._place(key - self.first, row)
        addresses = [self.pool.address + row * self.pool.record_bytes for row in rows]
        urgent = [is_urgent] * len(keys)
        # One call of C, which no signal interrupts: a read that began is always in `into`.
        tickets = map(self.pool.reader.submit, reads, addresses, urgent)
        try:
            into.update(zip(keys, zip(rows, tickets, strict=False), strict=False))
        except OSError as error:  # a closed reader, too many tickets
            raise StoreError(f"{self.name}: {error}") from error

    def _row_by_force(self) -> int | None:
        """A row for an expert without which the layer cannot continue."""
        while (row := self.pool.take()) is None:
            if self.pool.draining:
                if not self.pool.drain(self.cache.timeout):
                    raise StoreError(f"{self.name}: expected a read to end in {self.cache.timeout} s, none did")
            else:
                key = next(key for key in self.cache.guesses if self.cache.layer_of(key).pool is self.pool)
                self.cache.drop_guess(key)
        return row

    def _has_arrived(self, key: int) -> bool:
        cache = self.cache
        if (read := cache.pending.get(key)) is None:
            return key in cache.rows
        if not self.pool.reader.is_done(read[1]):
            return False
        self._arrive(key)
        return True

    def _arrive(self, key: int) -> None:
        """Waits for an expert. Raises StoreError if it cannot be read; then its slot is empty."""
        cache = self.cache
        if (read := cache.pending.get(key)) is None:
            return
        row, ticket = read
        begin = time.perf_counter()
        try:
            self.pool.reader.wait(ticket, cache.timeout)
        except TimeoutError as error:
            raise StoreError(
                f"{self.name}: expected expert {key - self.first} to be read in {cache.timeout} s; the read continues"
            ) from error
        except OSError as error:
            del cache.pending[key], cache.rows[key]
            self.pool.free.append(row)
            self.residency.forget(key)
            raise StoreError(f"{self.name}, expert {key - self.first}: {error}") from error
        finally:
            self.counts.wait_seconds += time.perf_counter() - begin
        del cache.pending[key]

    def _judge_predictions(self, experts: list[int], needed: Collection[int]) -> None:
        """Counts what was predicted for this call, and drops reads that it does not need."""
        self.counts.predicted += sum(expert in self.predictions for expert in experts)
        self.counts.used += len(experts)
        self.predictions.clear()
        for key in [key for key in self.cache.guesses if self.cache.layer_of(key) is self and key not in needed]:
            self.cache.drop_guess(key)


def _is_traced() -> bool:
    """Whether torch.jit.trace, make_fx or torch.export writes down the operations of this call."""
    is_exported = has_proxies() or torch.compiler.is_exporting()
    return is_exported or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _distinct(topk_ids: Tensor, num_experts: int) -> list[int]:
    """The experts of topk_ids, ascending, without -1."""
    flat = topk_ids.flatten()
    found = set((flat if flat.numel() <= _FEW else torch.unique(flat)).tolist())
    found.discard(-1)
    experts = sorted(found)
    if experts and not 0 <= experts[0] <= experts[-1] < num_experts:
        wrong = experts[0] if experts[0] < 0 else experts[-1]
        raise ValueError(f"topk_ids: expected ids from -1 to {num_experts - 1}, got {wrong}")
    return experts
