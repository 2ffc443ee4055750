# SPDX-License-Identifier: BSD-3-Clause
"""Rows go once between nodes, however many ranks of the other node have experts of the token.

    between    source → relay: a row per (token, node), to the rank of the node with the source's index (nodes.py)
    within     relay → ranks:  a row per (token, rank), over the links inside the node
    experts    as with one level
    within     rank → relay:   a row per (token, rank)
    between    relay → source: the rows of a token are summed, ranks ascending, and a row per (token, node) returns

A rank relays its own tokens within its node. With `invariant`, results are not summed on the way: a row per choice
returns, since the sum of one process runs over a token's experts in order and cannot be split by node.

Pairs and headers go directly, as with one level. With the first rows each relay gets their routes: the number of a
token's choices on each rank of the node, 2 bytes per rank of the largest node.

A chunk is relayed when its transfer is noticed: while the rank waits, and between the products of its experts. So each
of the four kinds of transfers has a channel of its own, in which only chunks ascend (nodes.py). On other devices
than the CPU the order over all channels is fixed, as NCCL requires.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from switchgear.parallel import layout
from switchgear.parallel.layout import Choice, Sending
from switchgear.parallel.local import sum_rows
from switchgear.parallel.rows import Direct, Leg, Transfers, Waiting
from switchgear.parallel.transport import Work, on_cpu

_ROUTE = torch.int16


@dataclass(frozen=True)
class Relaying:
    """What a rank passes on within its node, and back. Rows of the relay are in the order (chunk, source, token)."""

    rows: list[list[int]]  # [C][W] from each source
    starts: list[int]  # [C+1] of chunks
    sent: list[list[int]]  # [C][W] rows to each rank of the node
    sent_rows: Tensor  # [R'] int64: row of the chunk that each one copies, in the order (chunk, rank, source, token)
    table: Tensor  # [R,L] int32: the results of each row within the chunk's, ranks ascending; -1 for none
    pairs_in: list[list[int]]  # [C][W] rows that each rank of the node returns with `invariant`
    pairs_out: list[list[int]]  # [C][W] and that each source gets
    pair_order: Tensor  # [P] int64: for each of the latter, which of the chunk's former it is


def plan_relaying(rows: list[list[int]], routes: Tensor, members: tuple[int, ...]) -> Relaying:
    """rows [C][W] as announced by each source; routes [R,L] in the order (source, chunk, token): the number of choices
    on each of `members`.

    Raises:
        ValueError: routes that no rows can have.
    """
    num_chunks, num_ranks, num_members = len(rows), len(rows[0]), len(members)
    device = routes.device
    place, starts = layout.rows_in_buffer(rows, range(num_ranks), device)
    choices = torch.empty_like(routes, dtype=torch.int64)
    choices[place] = routes.long()
    wrong = (choices < 0).sum()
    choices.clamp_(min=0)
    chunk_of_row = layout.chunk_numbers(rows, device)
    counts = torch.tensor(rows, device=device).flatten()
    source_of_row = torch.repeat_interleave(torch.arange(num_ranks, device=device).repeat(num_chunks), counts)

    row, member = choices[:, :num_members].nonzero().unbind(1)
    order = (chunk_of_row[row] * num_members + member).argsort(stable=True)
    row, member = row[order], member[order]
    chunk = chunk_of_row[row]
    per_member = torch.bincount(chunk * num_members + member, minlength=num_chunks * num_members)
    first = torch.nn.functional.pad(per_member.view(num_chunks, -1).sum(1).cumsum(0), (1, 0))
    position = torch.arange(len(row), device=device) - first[chunk]
    column = (choices[:, :num_members] > 0).cumsum(1) - 1
    table = torch.full((len(choices), num_members), -1, dtype=torch.int32, device=device)
    table[row, column[row, member]] = position.int()

    lengths = choices[row, member]
    pair = torch.repeat_interleave(torch.arange(len(row), device=device), lengths)
    back = (chunk[pair] * num_ranks + source_of_row[row[pair]]).argsort(stable=True)
    pairs_in = torch.zeros(num_chunks * num_members, dtype=torch.int64, device=device)
    pairs_in.index_add_(0, chunk * num_members + member, lengths)
    pairs_out = torch.bincount(chunk[pair] * num_ranks + source_of_row[row[pair]], minlength=num_chunks * num_ranks)
    pair_first = torch.nn.functional.pad(pairs_in.view(num_chunks, -1).sum(1).cumsum(0), (1, 0))
    check = torch.stack((wrong, (table[:, :1] < 0).sum(), choices[:, num_members:].sum()))
    sizes = torch.cat((per_member, pairs_in, pairs_out, check)).tolist()  # the only device-to-host read here
    if any(sizes[-3:]):
        raise ValueError(f"routes: expected choices on {num_members} ranks for each row")
    size = num_chunks * num_members

    def spread(flat: list[int]) -> list[list[int]]:
        """[C][W] of [C·L]."""
        chunks = torch.zeros(num_chunks, num_ranks, dtype=torch.int64)
        chunks[:, list(members)] = torch.tensor(flat).view(num_chunks, num_members)
        found: list[list[int]] = chunks.tolist()
        return found

    flat_out = sizes[2 * size : 2 * size + num_chunks * num_ranks]
    starts_on_device = torch.tensor(starts, device=device)
    return Relaying(
        rows=rows,
        starts=starts,
        sent=spread(sizes[:size]),
        sent_rows=row - starts_on_device[chunk],
        table=table,
        pairs_in=spread(sizes[size : 2 * size]),
        pairs_out=[flat_out[c * num_ranks : (c + 1) * num_ranks] for c in range(num_chunks)],
        pair_order=back - pair_first[chunk[pair[back]]],
    )


def start_routes(
    transfers: Transfers, choice: Choice, sending: Sending, rows: list[list[int]]
) -> tuple[Tensor, Work]:  # fmt: skip
    """Sends the routes of this rank's rows to their relays; rows [C][W] as announced by each source. Returns those
    [R,L] that this rank gets, and when."""
    parallel = transfers.parallel
    nodes = parallel.nodes
    width = max(map(len, nodes.members))
    num_ranks = parallel.size
    device = choice.ranks.device
    per_rank = torch.zeros(len(choice.ranks), num_ranks + 1, dtype=torch.int64, device=device)
    per_rank.scatter_add_(1, choice.ranks, torch.ones_like(choice.ranks))
    relay, token = choice.sent.T.nonzero().unbind(1)
    members = torch.full((num_ranks, width), num_ranks, dtype=torch.int64)  # of each relay's node; W for none
    for rank in range(num_ranks):
        same = nodes.same(rank)
        members[rank, : len(same)] = torch.tensor(same)
    per_rank[:, num_ranks] = 0
    sent = per_rank[token[:, None], members.to(device)[relay]].to(_ROUTE)
    to_each = [sum(column) for column in zip(*sending.rows, strict=True)]
    from_each = [sum(column) for column in zip(*rows, strict=True)]
    received = sent.new_empty(sum(from_each), width)
    work = transfers.start(
        "routes", received.view(torch.uint8), sent.view(torch.uint8), from_each, to_each, "between dispatch"
    )  # fmt: skip
    return received, work


class TwoLevel(Direct):
    """The same, once per node."""

    def __init__(
        self, transfers: Transfers, sending: Sending, like: Tensor, each: bool, received: list[list[int]],
        returning: list[list[int]] | None, relayed: list[list[int]], plan: Relaying | Choice,
    ) -> None:  # fmt: skip
        """As Direct. relayed [C][W]: rows that each source sends through this rank. plan: how it relays them, or the
        choice by which the ranks find out when they send."""
        self._relayed, self._plan = relayed, plan
        self._like = like[:0]
        self._within: Leg | None = None
        self._within_back: Leg | None = None
        self._free_order = on_cpu(like)
        super().__init__(transfers, sending, like, each, received, returning)

    def _open_out(self) -> Leg:
        passing = self._wire.out.empty(sum(map(sum, self._relayed)), self._like)
        return Leg(self._transfers, "dispatch", passing, self._relayed, self._sending.rows, "between dispatch")

    @property
    def relaying(self) -> Relaying:
        """Known when rows have been sent."""
        assert isinstance(self._plan, Relaying)
        return self._plan

    def send(self, x: Tensor) -> None:
        if isinstance(self._plan, Relaying):
            super().send(x)
            return
        routes, work = start_routes(self._transfers, self._plan, self._sending, self._relayed)
        super().send(x)
        self._transfers.wait(work)
        parallel = self._transfers.parallel
        self._plan = plan_relaying(self._relayed, routes, parallel.nodes.same(parallel.rank))

    def receive(self, c: int) -> None:
        within = self._dispatch()
        while (following := within.started) <= c:
            self._out.wait(following, self.progress)
            if within.started == following:  # else `progress` has passed it on
                self._pass_on(within)
        within.wait(c, self.progress)
        self._decode(within, c)

    def give_back(self, rows: Tensor) -> None:
        back = self._combine()
        back.start(self._wire.back.encode(rows))
        if self._free_order:
            return
        within = self._dispatch()
        if within.started < len(self._received):
            self._out.wait(within.started)
            self._pass_on(within)
        if back.started > 1:
            self._pass_back(back, wait=True)

    def look(self) -> None:
        def take_turn(_: float) -> bool:
            self.progress()
            return True

        self._transfers.wait(Waiting(take_turn))

    def flush(self) -> None:
        back = self._within_back
        while back is not None and self._between_back.started < back.started:
            self._pass_back(back, wait=True)

    def progress(self) -> None:
        """Passes on what has arrived."""
        if not self._free_order:
            return
        within, back = self._dispatch(), self._within_back
        while within.started < self._out.started and self._out.has_arrived(within.started):
            self._pass_on(within)
        while back is not None and self._between_back.started < back.started:
            if not back.has_arrived(self._between_back.started):
                break
            self._pass_back(back, wait=False)

    def _dispatch(self) -> Leg:
        if self._within is None:
            sent = self.relaying.sent
            self._within = Leg(
                self._transfers, "dispatch within", self._arriving, self._received, sent, "within dispatch"
            )
            self._sent_edges = [0, *accumulate(map(sum, sent))]
        return self._within

    def _pass_on(self, within: Leg) -> None:
        c = within.started
        which = self.relaying.sent_rows[self._sent_edges[c] : self._sent_edges[c + 1]]
        within.start(self._out.chunk(c)[which])

    def _combine(self) -> Leg:
        if self._within_back is None:
            plan = self.relaying
            assert self.returning is not None
            inside, outside = (plan.pairs_in, plan.pairs_out) if self._each else (plan.sent, plan.rows)
            within = self._wire.back.empty(sum(map(sum, inside)), self._like)
            self._within_back = Leg(self._transfers, "combine within", within, inside, self.returning, "within combine")
            self._between_back = self._open_back(outside, "between combine")
        return self._within_back

    def _pass_back(self, back: Leg, wait: bool) -> None:
        c = self._between_back.started
        plan, form = self.relaying, self._wire.back
        if wait:
            back.wait(c, self.progress if self._free_order else None)
            if self._between_back.started > c:  # `progress` has passed it back
                return
        rows = back.chunk(c)
        if self._each:
            begin = sum(map(sum, plan.pairs_in[:c]))
            self._between_back.start(rows[plan.pair_order[begin : begin + len(rows)]])
            return
        table = plan.table[plan.starts[c] : plan.starts[c + 1]]
        if not len(table):
            self._between_back.start(rows)
            return
        summed = sum_rows(form.decode(rows, self._like.dtype), table, None)
        self._between_back.start(form.encode(summed))
