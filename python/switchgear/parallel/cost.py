# SPDX-License-Identifier: BSD-3-Clause
"""The cost of an exchange: bytes from a routing, seconds from bytes, and the number of chunks that hides most of it.

Bytes are counted as exchange.py sends them, from a trace of topk_ids. Seconds come from a pipeline model: each rank has
one full-duplex link, which serialises transfers in each direction, and one worker for experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.parallel.placement import Placement

CHUNKS = (1, 2, 4, 8)
PAIR_BYTES = 8  # expert id and float32 weight


@dataclass(frozen=True)
class Link:
    """A rank's connection to the others.

    bandwidth: bytes/s in each direction. overhead: seconds per additional chunk, for its two messages and for smaller
    products. The defaults are on the slow side for gloo between processes of one machine.
    """

    bandwidth: float = 1e9
    overhead: float = 0.5e-3


def rows_per_token(top_k: int, num_ranks: int) -> float:
    """The expected number of other ranks that a token is sent to, if it chooses top_k experts uniformly."""
    return (num_ranks - 1) * (1 - (1 - 1 / num_ranks) ** top_k)


def choose_chunks(num_tokens: int, top_k: int, num_ranks: int, row_bytes: int, link: Link) -> int:
    """The number of chunks C, from CHUNKS, for the rank with the most tokens.

    If compute takes at least as long as communication, the exposed time is the arrival of the first chunk, the return
    of the last one, and the overheads: t(C) = t_rows / C + C · overhead, minimal at √(t_rows / overhead).
    """
    seconds = 2 * num_tokens * rows_per_token(top_k, num_ranks) * row_bytes / link.bandwidth
    best = math.sqrt(seconds / link.overhead) if link.overhead > 0 else CHUNKS[-1]
    return min(CHUNKS, key=lambda chunks: (abs(math.log2(max(best, 1.0)) - math.log2(chunks)), chunks))


# ---- bytes -----------------------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Counts of one forward. [s][r]: from rank s to rank r, including a rank's own."""

    rows: Tensor  # [W,W] int64: distinct tokens of s with an expert on r
    pairs: Tensor  # [W,W] int64: their choices there


def count(topk_ids: list[Tensor], placement: Placement) -> Traffic:
    """Traffic of each rank's tokens with ids topk_ids[s] [T_s,K]; -1 is an empty choice."""
    size = placement.num_ranks
    rows = torch.zeros(size, size, dtype=torch.int64)
    pairs = torch.zeros(size, size, dtype=torch.int64)
    for source, ids in enumerate(topk_ids):
        ranks = torch.where(ids >= 0, placement.routes(source)[0][ids.clamp(min=0).long()], size)
        pairs[source] = torch.bincount(ranks.flatten(), minlength=size + 1)[:size]
        present = torch.zeros(len(ids), size + 1, dtype=torch.bool).scatter_(1, ranks, True)
        rows[source] = present[:, :size].sum(0)
    return Traffic(rows, pairs)


def draw_routing(num_tokens: int, num_experts: int, top_k: int, skew: float = 0.0, seed: int = 0) -> Tensor:
    """[T,K] int32 distinct ids; the n-th expert of a random order is n^-skew times as likely as the first."""
    generator = torch.Generator().manual_seed(seed)
    odds = torch.arange(1, num_experts + 1, dtype=torch.float64).pow(-skew)
    odds = odds[torch.randperm(num_experts, generator=generator)]
    # Gumbel top-k: the largest of log odds + Gumbel noise are a draw without replacement.
    noise = torch.rand(num_tokens, num_experts, generator=generator).clamp_(min=1e-30).log_().neg_().log_().neg_()
    return (odds.log().float() + noise).topk(top_k, 1).indices.int()


# ---- seconds ---------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    lane: str  # "link" or "experts"
    name: str
    begin: float
    end: float


class Timeline(NamedTuple):
    intervals: list[Interval]
    seconds: float
    link: float  # time during which the link is busy
    experts: float
    exposed: float  # seconds - experts: communication that is not hidden

    @property
    def hidden(self) -> float:
        """The fraction of the link's time that is hidden."""
        return 1 - self.exposed / self.link if self.link else 1.0


def pipeline(
    dispatch: float, experts: float, combine: float, num_chunks: int, *, tail: float = 0.0, overhead: float = 0.0
) -> Timeline:
    """Timeline of equal chunks that take seconds on the link, in the experts, and on the link again. tail: work of the
    experts after the last chunk (weight gradients). overhead: added to each chunk's time in the experts."""
    intervals: list[Interval] = []
    arrived = []
    free = 0.0
    for c in range(num_chunks):
        intervals.append(Interval("link", f"dispatch {c}", free, free + dispatch / num_chunks))
        free = intervals[-1].end
        arrived.append(free)
    done = 0.0
    for c in range(num_chunks):
        begin = max(done, arrived[c])
        done = begin + experts / num_chunks + overhead
        intervals.append(Interval("experts", f"experts {c}", begin, done))
        start = max(free, done)
        free = start + combine / num_chunks
        intervals.append(Interval("link", f"combine {c}", start, free))
    if tail:
        intervals.append(Interval("experts", "weight gradients", done, done + tail))
        done += tail
    total = max(done, free)
    busy = experts + num_chunks * overhead + tail
    return Timeline(intervals, total, dispatch + combine, busy, total - busy)


class Machine(NamedTuple):
    """Speed of a rank and of its connections."""

    flops: float  # flop/s of its experts
    bandwidth: float  # bytes/s to ranks of other nodes, in each direction
    local_bandwidth: float  # to ranks of its node
    ranks_per_node: int
    overhead: float = 0.0  # seconds per chunk


class Layer(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


class Prediction(NamedTuple):
    """For one layer and its slowest rank; bytes are those that the busiest sender sends to other ranks."""

    forward: Timeline
    backward: Timeline
    bytes_forward: int
    bytes_backward: int
    bytes_between_nodes: int  # of bytes_forward
    rows_without_sharing: float  # rows if each choice were sent separately, relative to what is sent
    load: float  # choices on the busiest rank, relative to the mean
    weight_bytes: int
    activation_bytes: int  # kept for backward


def predict(
    layer: Layer, traffic: Traffic, placement: Placement, machine: Machine, item: int, num_chunks: int
) -> Prediction:
    """item: bytes of an element of rows and weights."""
    row = layer.hidden_size * item
    size = placement.num_ranks
    node = torch.arange(size) // machine.ranks_per_node
    same = node[:, None] == node[None, :]
    away = ~torch.eye(size, dtype=torch.bool)

    def link_seconds(rows: Tensor) -> float:
        """For the rank that sends or receives longest; the two networks work in parallel."""
        times = []
        for near, speed in ((same & away, machine.local_bandwidth), (~same, machine.bandwidth)):
            moved = (rows * near).double() * row
            times.append(torch.maximum(moved.sum(1), moved.sum(0)) / speed)
        return float(torch.maximum(times[0], times[1]).max())

    choices = traffic.pairs.sum(0)
    flops = 6.0 * float(choices.max()) * layer.hidden_size * layer.intermediate_size  # gate, up and down
    dispatch, combine = link_seconds(traffic.rows), link_seconds(traffic.rows.T)
    forward = pipeline(dispatch, flops / machine.flops, combine, num_chunks, overhead=machine.overhead)
    backward = pipeline(
        dispatch, flops / machine.flops, combine, num_chunks, tail=flops / machine.flops, overhead=machine.overhead
    )
    sent, returned = ((rows * away).sum(1) for rows in (traffic.rows, traffic.rows.T))
    pairs, owed = ((counts * away).sum(1) for counts in (traffic.pairs, traffic.pairs.T))
    busiest = int(choices.argmax())
    local = len(placement.experts_of_rank[busiest])
    rows_kept = int(traffic.rows[:, busiest].sum())
    return Prediction(
        forward,
        backward,
        int(((sent + returned) * row + pairs * PAIR_BYTES).max()),
        int(((sent + returned) * row + owed * 4).max()),
        int(
            (((traffic.rows + traffic.rows.T) * ~same).sum(1) * row + (traffic.pairs * ~same).sum(1) * PAIR_BYTES).max()
        ),
        float((traffic.pairs * away).sum() / (traffic.rows * away).sum().clamp(min=1)),
        float(choices.max() / choices.double().mean()),
        3 * local * layer.hidden_size * layer.intermediate_size * item,
        rows_kept * row + int(choices.max()) * (2 * layer.intermediate_size * item + PAIR_BYTES),
    )
