# SPDX-License-Identifier: BSD-3-Clause
"""The cost of an exchange: bytes from a routing, seconds from bytes, and the number of chunks that hides most of it.

Bytes are counted as exchange.py sends them, from a trace of topk_ids. Seconds come from a pipeline model: each rank has
one full-duplex link, which serialises transfers in each direction, and one worker for experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.parallel.nodes import Nodes
from switchgear.parallel.placement import Placement
from switchgear.parallel.rows import WIRES, Event

CHUNKS = (1, 2, 4, 8)
PAIR_BYTES = 8  # expert id and float32 weight
ROUTE_BYTES = 2  # per rank of a node, with each row that goes there


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
    # With two levels, [W,W] int64:
    between: Tensor | None = None  # tokens of s with an expert on the node of relay r
    within: Tensor | None = None  # rows that relay s passes on to rank r of its node

    @property
    def legs(self) -> tuple[Tensor, ...]:
        """The rows of each transfer on the way to the experts."""
        return (self.rows,) if self.between is None or self.within is None else (self.between, self.within)


def count(topk_ids: list[Tensor], placement: Placement, nodes: Nodes | None = None) -> Traffic:
    """Traffic of each rank's tokens with ids topk_ids[s] [T_s,K]; -1 is an empty choice. nodes: with two levels, in
    which copies of an expert on the source's node are used."""
    size = placement.num_ranks
    rows, pairs, between, within = torch.zeros(4, size, size, dtype=torch.int64)
    for source, ids in enumerate(topk_ids):
        near = () if nodes is None else nodes.same(source)
        ranks = torch.where(ids >= 0, placement.routes(source, near)[0][ids.clamp(min=0).long()], size)
        present = torch.zeros(len(ids), size + 1, dtype=torch.bool).scatter_(1, ranks, True)[:, :size]
        pairs[source] = torch.bincount(ranks.flatten(), minlength=size + 1)[:size]
        rows[source] = present.sum(0)
        if nodes is None:
            continue
        for members in nodes.members:
            relay = nodes.relay(source, members[0])
            there = present[:, list(members)]
            between[source, relay] += there.any(1).sum()
            within[relay, list(members)] += there.sum(0)
    return Traffic(rows, pairs) if nodes is None else Traffic(rows, pairs, between, within)


def draw_routing(
    num_tokens: int, num_experts: int, top_k: int, skew: float = 0.0, seed: int = 0, groups: tuple[int, int] = (1, 1)
) -> Tensor:
    """[T,K] int32 distinct ids; the n-th expert of a random order is n^-skew times as likely as the first.

    groups (G,M): a token chooses from M of G groups of consecutive experts, those with the largest sums of their two
    best scores (DeepSeek-V3).
    """
    generator = torch.Generator().manual_seed(seed)
    odds = torch.arange(1, num_experts + 1, dtype=torch.float64).pow(-skew)
    odds = odds[torch.randperm(num_experts, generator=generator)]
    # Gumbel top-k: the largest of log odds + Gumbel noise are a draw without replacement.
    noise = torch.rand(num_tokens, num_experts, generator=generator).clamp_(min=1e-30).log_().neg_().log_().neg_()
    scores = odds.log().float() + noise
    count, most = groups
    if most < count:
        of_groups = scores.view(num_tokens, count, -1)
        best = of_groups.topk(min(2, of_groups.shape[2]), 2).values.sum(2).topk(most, 1).indices
        allowed = torch.zeros(num_tokens, count, dtype=torch.bool).scatter_(1, best, True)
        scores = of_groups.masked_fill(~allowed[..., None], -torch.inf).view(num_tokens, -1)
    return scores.topk(top_k, 1).indices.int()


# ---- seconds ---------------------------------------------------------------------------------------------------------


class Timeline(NamedTuple):
    events: list[Event]
    seconds: float
    link: float  # time during which the links are busy: with two levels that of both together
    experts: float
    exposed: float  # seconds - experts: communication that is not hidden

    @property
    def hidden(self) -> float:
        """The fraction of the link's time that is hidden."""
        return max(0.0, 1 - self.exposed / self.link) if self.link else 1.0


class _Lane:
    """A link that serialises transfers."""

    def __init__(self, lane: str, events: list[Event]) -> None:
        self._lane, self._events, self.free = lane, events, 0.0

    def send(self, name: str, now: float, seconds: float) -> float:
        begin = max(now, self.free)
        self.free = begin + seconds
        self._events.append(Event(self._lane, name, begin, self.free))
        return self.free


def pipeline(
    dispatch: float, experts: float, combine: float, num_chunks: int, *, tail: float = 0.0, overhead: float = 0.0
) -> Timeline:
    """Timeline of equal chunks that take seconds on the link, in the experts, and on the link again. tail: work of the
    experts after the last chunk (weight gradients). overhead: added to each chunk's time in the experts."""
    events: list[Event] = []
    link = _Lane("link", events)
    arrived = [link.send(f"dispatch {c}", 0.0, dispatch / num_chunks) for c in range(num_chunks)]
    done = 0.0
    for c in range(num_chunks):
        begin = max(done, arrived[c])
        done = begin + experts / num_chunks + overhead
        events.append(Event("experts", f"experts {c}", begin, done))
        link.send(f"combine {c}", done, combine / num_chunks)
    return _finish(events, done, tail, link, dispatch + combine, experts + num_chunks * overhead)


def two_level_pipeline(
    between: tuple[float, float], within: tuple[float, float], experts: float, num_chunks: int, *,
    tail: float = 0.0, overhead: float = 0.0, look: float = 0.5,
) -> Timeline:  # fmt: skip
    """As pipeline, with two levels (two_level.py): seconds of all chunks between nodes and within a node, to the
    experts and back. A chunk is passed on while the rank waits, or at the only look during an experts' chunk, after
    this part of it."""
    events: list[Event] = []
    far, near = _Lane("link", events), _Lane("near", events)
    out, inside, inside_back, back = (each / num_chunks for each in (between[0], *within, between[1]))
    came = [far.send(f"dispatch {c}", 0.0, out) for c in range(num_chunks)]
    passed: list[float] = []  # when each chunk is at its experts
    done: list[float] = []  # when its results are at the relay
    returned: list[float] = []

    def pass_on(now: float) -> None:
        while len(passed) < num_chunks and came[len(passed)] <= now:
            passed.append(near.send(f"dispatch within {len(passed)}", now, inside))
        while len(returned) < len(done) and done[len(returned)] <= now:
            returned.append(far.send(f"combine {len(returned)}", now, back))

    def wait(now: float, until: Callable[[], float | None]) -> float:
        """Passes on until the time that `until` gives, which may be known only later."""
        while True:
            pass_on(now)
            end = until()
            if end is not None and end <= now:
                return now
            due = [came[len(passed)]] if len(passed) < num_chunks else []
            due += [done[len(returned)]] if len(returned) < len(done) else []
            due += [] if end is None else [end]
            now = min(due)

    now = 0.0
    for c in range(num_chunks):
        now = wait(now, lambda c=c: passed[c] if c < len(passed) else None)  # type: ignore[misc]
        work = experts / num_chunks + overhead
        events.append(Event("experts", f"experts {c}", now, now + work))
        pass_on(now + look * work)
        now += work
        done.append(near.send(f"combine within {c}", now, inside_back))
    now = wait(now, lambda: done[-1] if len(returned) == num_chunks else None)
    return _finish(events, now, tail, far, sum(between) + sum(within), experts + num_chunks * overhead)


def _finish(events: list[Event], now: float, tail: float, last: _Lane, links: float, experts: float) -> Timeline:
    """The timeline of these events, after the work of the tail. last: the link on which results return."""
    if tail:
        events.append(Event("experts", "weight gradients", now, now + tail))
    total, busy = max(now + tail, last.free), experts + tail
    return Timeline(events, total, links, busy, total - busy)


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


def link_seconds(rows: Tensor, nodes: Nodes, row: int, bandwidth: float, near_bandwidth: float) -> float:
    """Of rows [W,W] of `row` bytes, for the rank that sends or receives longest; both its links work in parallel."""
    node = torch.tensor(nodes.node_of)
    same = node[:, None] == node[None, :]
    away = ~torch.eye(len(node), dtype=torch.bool)
    times = []
    for between, speed in ((same & away, near_bandwidth), (~same, bandwidth)):
        moved = (rows * between).double() * row
        times.append(torch.maximum(moved.sum(1), moved.sum(0)) / speed)
    return float(torch.maximum(times[0], times[1]).max())


class Prediction(NamedTuple):
    """For one layer and its slowest rank; bytes are those that the busiest sender sends to other ranks."""

    forward: Timeline
    backward: Timeline
    bytes_forward: int
    bytes_backward: int
    bytes_between_nodes: int  # of bytes_forward
    rows_without_sharing: float  # rows if each choice were sent separately, relative to those sent to ranks (or nodes)
    load: float  # choices on the busiest rank, relative to the mean
    weight_bytes: int
    activation_bytes: int  # kept for backward


def predict(
    layer: Layer, traffic: Traffic, placement: Placement, machine: Machine, item: int, num_chunks: int, *,
    wire: str = "exact",
) -> Prediction:  # fmt: skip
    """item: bytes of an element of rows and weights. wire: see ExpertParallel."""
    size = placement.num_ranks
    nodes = Nodes(tuple(rank // machine.ranks_per_node for rank in range(size)))
    node = torch.tensor(nodes.node_of)
    far, away = node[:, None] != node[None, :], ~torch.eye(size, dtype=torch.bool)
    out, back = (form.row_bytes(layer.hidden_size, item) for form in WIRES[wire])

    def seconds(rows: Tensor) -> tuple[float, float]:
        speeds = machine.bandwidth, machine.local_bandwidth
        return link_seconds(rows, nodes, out, *speeds), link_seconds(rows.T, nodes, back, *speeds)

    def line(tail: float) -> Timeline:
        options = {"tail": tail, "overhead": machine.overhead}
        first, *second = map(seconds, traffic.legs)
        if not second:
            return pipeline(first[0], experts, first[1], num_chunks, **options)
        return two_level_pipeline(first, second[0], experts, num_chunks, **options)

    def sent(mask: Tensor, backward: bool) -> int:
        """Bytes of the rank that sends most of those that the mask selects."""
        total = torch.zeros(size, dtype=torch.int64)
        for leg in traffic.legs:
            total = total + (leg * mask).sum(1) * out + (leg.T * mask).sum(1) * back
        if traffic.between is not None and not backward:
            total = total + (traffic.between * mask).sum(1) * ROUTE_BYTES * machine.ranks_per_node
        pairs = (traffic.pairs.T * mask).sum(1) * 4 if backward else (traffic.pairs * mask).sum(1) * PAIR_BYTES
        return int((total + pairs).max())

    choices = traffic.pairs.sum(0)
    experts = 6.0 * float(choices.max()) * layer.hidden_size * layer.intermediate_size / machine.flops  # gate, up, down
    busiest = int(choices.argmax())
    local = len(placement.experts_of_rank[busiest])
    rows_kept = int(traffic.rows[:, busiest].sum())
    shared = away if traffic.between is None else far  # where one row serves several choices
    return Prediction(
        forward=line(0.0),
        backward=line(experts),
        bytes_forward=sent(away, False),
        bytes_backward=sent(away, True),
        bytes_between_nodes=sent(far, False),
        rows_without_sharing=float((traffic.pairs * shared).sum() / (traffic.legs[0] * shared).sum().clamp(min=1)),
        load=float(choices.max() / choices.double().mean()),
        weight_bytes=3 * local * layer.hidden_size * layer.intermediate_size * item,
        activation_bytes=rows_kept * layer.hidden_size * item
        + int(choices.max()) * (2 * layer.intermediate_size * item + PAIR_BYTES),
    )


# ---- Failures --------------------------------------------------------------------------------------------------------


_DAY = 86400.0


class Rates(NamedTuple):
    """Of a job; times in seconds."""

    ranks: int  # all of them, those that do not share experts too
    mtbf: float  # between failures of one rank
    step: float
    restart: float  # from a failure to the first step of the restarted job, with the weights of the checkpoint
    checkpoint: float  # between checkpoints
    shrink: float  # from a failure to the first step of the remaining ranks
    join: float  # for which all wait when a rank joins
    repair: float  # until it does


class Losses(NamedTuple):
    """Expected numbers per day."""

    failures: float
    steps_restarting: float  # lost if the job restarts from the last checkpoint
    steps_continuing: float  # lost if the remaining ranks continue, and the lost one joins later
    fraction_restarting: float  # of the day
    fraction_continuing: float
    experts_without_copy: float  # on a lost rank, per failure: they come from the checkpoint


def expected_losses(rates: Rates, placement: Placement) -> Losses:
    """A restart repeats on average half the time between checkpoints. Continuing repeats one step, of which half was
    done, and the batch lacks the tokens of the lost rank until it joins. Failures are independent and rare: their
    costs add up."""
    failures = rates.ranks * _DAY / rates.mtbf
    restarting = failures * (rates.restart + rates.checkpoint / 2)
    continuing = failures * (rates.step / 2 + rates.shrink + rates.join + rates.repair / rates.ranks)
    alone = placement.num_experts - len(placement.replicated)
    return Losses(
        failures, restarting / rates.step, continuing / rates.step, min(1.0, restarting / _DAY),
        min(1.0, continuing / _DAY), alone / placement.num_ranks,
    )  # fmt: skip
