# SPDX-License-Identifier: BSD-3-Clause
"""Exchanges of a fixed size: with a capacity per pair of ranks no host reads a size.

    rows [W·C,H]   C rows for each rank, in the order of tokens; those that no token fills are zeros
    ids [W·C,K]    local experts of each row, -1 for none      weights [W·C,K]   0 for none

Of a rank's tokens with experts on any one rank, its own too, the first C go there. Later ones are *overflow*: their
choices there are dropped, or an error is raised. Shapes depend on nothing but the number of tokens, so torch.compile
traces a layer as a whole, and a CUDA graph can hold it. Results are summed rank by rank, as by default.

Before each transfer the hosts compare headers, so that a mistake or a lost rank raises the usual error. They do not
while a CUDA graph is captured, nor can they when it is replayed.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from switchgear.functional.gradients import apply
from switchgear.parallel import exchange
from switchgear.parallel.rows import Transfers
from switchgear.reference import weight_dtype

if TYPE_CHECKING:
    from switchgear.parallel.exchange import Layer
    from switchgear.parallel.local import Module

_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Buckets(NamedTuple):
    """Where a rank's tokens go."""

    token_of_row: Tensor  # [W·C] int64; T for none
    ids: Tensor  # [W·C,K] int32 local experts; -1 for none
    choice_of_row: Tensor  # [W·C,K] bool: whether the token's choice is for this row
    row_table: Tensor  # [T, min(K,W)] int64: the rows of each token, ranks ascending; W·C for none
    overflow: Tensor  # [W+1] int64: tokens that did not fit, by rank; and ids out of range, which count as empty


def fill_buckets(topk_ids: Tensor, rank_of: Tensor, local_of: Tensor, num_ranks: int, capacity: int) -> Buckets:
    """topk_ids [T,K] (-1 for none); rank_of and local_of [E] from Placement.routes. Reads nothing on the host."""
    num_tokens, top_k = topk_ids.shape
    device = topk_ids.device
    valid = (topk_ids >= 0) & (topk_ids < len(rank_of))
    wrong = (~valid & (topk_ids != -1)).sum()
    ids = topk_ids.clamp(0, len(rank_of) - 1).long()
    ranks = torch.where(valid, rank_of[ids], num_ranks)
    present = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=device).scatter(1, ranks, True)
    present = present[:, :num_ranks]
    place = present.cumsum(0) - 1
    kept = present & (place < capacity)
    none = num_ranks * capacity
    slot = torch.where(kept, torch.arange(num_ranks, device=device) * capacity + place, none)
    tokens = torch.arange(num_tokens, device=device)[:, None].expand(num_tokens, num_ranks)
    filled = torch.full((none + 1,), num_tokens, dtype=torch.int64, device=device)
    token_of_row = filled.scatter(0, slot.flatten(), tokens.flatten())[:none]
    rank_of_row = torch.arange(num_ranks, device=device).repeat_interleave(capacity)[:, None]
    padded_ranks = torch.cat((ranks, ranks.new_full((1, top_k), num_ranks)))
    padded_experts = torch.cat((local_of[ids], ids.new_zeros(1, top_k)))
    choice_of_row = padded_ranks[token_of_row] == rank_of_row
    return Buckets(
        token_of_row=token_of_row,
        ids=torch.where(choice_of_row, padded_experts[token_of_row], -1).int(),
        choice_of_row=choice_of_row,
        row_table=slot.sort(1).values[:, : min(top_k, num_ranks)],
        overflow=torch.cat(((present & ~kept).sum(0), wrong[None])),
    )


def exchange_with_capacity(
    layer: Layer, number: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, module: Module
) -> Tensor:  # fmt: skip
    """y [T,H] of x [T,H]; module(x, local ids, weights) runs this rank's experts. Differentiable, and traceable.
    number: of register(layer)."""
    parallel = layer.parallel
    capacity = parallel.capacity
    assert capacity is not None
    buckets = fill_buckets(topk_ids, *_routes(layer, topk_ids.device), parallel.size, capacity)
    rows = torch.cat((x, x.new_zeros(1, x.shape[1])))[buckets.token_of_row]
    padded = torch.cat((topk_weights, topk_weights.new_zeros(1, topk_weights.shape[1])))
    weights = torch.where(buckets.choice_of_row, padded[buckets.token_of_row], 0.0)
    rows, weights, ids = apply(_Dispatch, rows, weights, buckets.ids, buckets.overflow, number)
    share = 1.0 / len(parallel.twins) if parallel.average_gradients else 1.0
    rows, weights = (apply(_ScaledGrad, tensor, 1 / share) for tensor in (rows, weights))
    results = apply(_ScaledGrad, module(rows, ids, weights), share)
    returned: Tensor = apply(_Combine, results, number)
    padded_rows = torch.cat((returned, returned.new_zeros(1, x.shape[1])))
    wide = weight_dtype(x.dtype)
    total = padded_rows[buckets.row_table[:, 0]].to(wide)
    for column in range(1, buckets.row_table.shape[1]):
        total = total + padded_rows[buckets.row_table[:, column]].to(wide)
    y: Tensor = total.to(x.dtype)
    return y


def _routes(layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
    """rank_of and local_of, copied once to a device: a CUDA graph cannot hold a copy from the host."""
    if device.type == "cpu":
        return layer.rank_of, layer.local_of
    if device not in layer.routes_on:
        layer.routes_on[device] = (layer.rank_of.to(device), layer.local_of.to(device))
    return layer.routes_on[device]


def register(layer: Layer) -> int:
    """A number for the layer, which an op can take. No other layer ever has it."""
    number = next(_numbers)
    _layers[number] = layer
    return number


# ---- transfers -------------------------------------------------------------------------------------------------------


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ids: Tensor, overflow: Tensor, layer: int) -> Any:
        ctx.layer = layer
        rows, weights, ids = exchange_rows([rows, weights, ids], layer, "dispatch", overflow)
        ctx.mark_non_differentiable(ids)
        return rows, weights, ids

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Any) -> Any:
        return *exchange_rows([grad_rows, grad_weights], ctx.layer, "backward combine", None), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: int) -> Tensor:
        ctx.layer = layer
        (returned,) = exchange_rows([rows], layer, "combine", None)
        return returned  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return exchange_rows([grad], ctx.layer, "backward combine", None)[0], None


class _ScaledGrad(torch.autograd.Function):
    """The same tensor, whose gradient is scaled: by 1/W after the experts and W before them, so that gradients of the
    parameters are means and those of the rows sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad if ctx.scale == 1.0 else grad * ctx.scale, None


@torch.library.custom_op("switchgear_parallel::exchange_rows", mutates_args=())
def exchange_rows(parts: list[Tensor], number: int, phase: str, overflow: Tensor | None) -> list[Tensor]:
    """Each rank's C rows of every part, to all ranks. number: of the layer."""
    layer = _layers[number]
    parallel = layer.parallel
    device = parts[0].device
    parts = [part.contiguous() for part in parts]
    counts = [parallel.capacity or 0] * parallel.size
    moved = [torch.empty_like(part) for part in parts]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if overflow is not None:
            parallel.overflow.add(overflow[:-1], captured=True)
        for into, part in zip(moved, parts, strict=True):
            if parallel.size == 1:
                into.copy_(part)
                continue
            transport = parallel.transport_for(device)
            transport.all_to_all(into, part, counts, counts).join()  # type: ignore[attr-defined]
        return moved
    with parallel.peers.exchange():
        transfers = Transfers(parallel, device)
        backward = phase.startswith("backward")
        rows, is_dispatch = parts[0], overflow is not None
        terms = exchange.terms_of(layer, rows.dtype, rows.shape[1], len(parts), -2 - is_dispatch, backward)
        exchange.exchange_headers(transfers, terms, 0, "backward agree" if backward else "agree")
        parallel.peers.enter(phase)
        if overflow is not None:
            if device.type == "cpu" and int(overflow[-1]):
                raise ValueError(
                    f"topk_ids: expected -1 to {layer.placement.num_experts - 1}, got {int(overflow[-1])} others"
                )
            parallel.overflow.add(overflow[:-1])
        pairs = zip(moved, parts, strict=True)
        for work in [transfers.start(phase, into, part, counts, counts) for into, part in pairs]:
            transfers.wait(work)
    return moved


@exchange_rows.register_fake
def _make_fake(parts: list[Tensor], number: int, phase: str, overflow: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]


# ---- tokens that did not fit -----------------------------------------------------------------------------------------


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
