# SPDX-License-Identifier: BSD-3-Clause
"""Which rows go where: the index computations of an exchange, without communication.

A *row* is a token on its way to a rank. It is sent once, however many of its experts are there. A *pair* is one of its
choices there: a local expert number and a weight. Tokens are cut into PIECES consecutive pieces, and a chunk is one or
more pieces, so that ranks can agree on sizes before the number of chunks is known.

    order of rows:    (chunk, rank, token)    for the sender, (chunk, source, token) for the receiver
    order of pairs:   (rank, token, expert)   and             (source, token, expert)
    order of slots:   (chunk, expert, source, token): those of an expert in a chunk are consecutive

So rows of one source keep the order of its tokens, and sums over them have the same order for any number of chunks.

With two levels (two_level.py) a row goes to a *relay*, a rank of another node, once for all its ranks there; within its
own node a rank is its own relay. `via` names the relays, and rows are in the order of relays then; pairs go directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

PIECES = 8
_FIRST = 1 << 30  # bit in a pair's expert number: the first pair of its row


@dataclass(frozen=True)
class Choice:
    """A rank's own tokens, before the number of chunks is known."""

    ranks: Tensor  # [T,K] rank of each choice; W for none
    experts: Tensor  # [T,K] local expert numbers on those ranks
    present: Tensor  # [T,W] bool: whether the token has a row for the rank
    rows: list[list[int]]  # [PIECES][W]
    pairs: list[int]  # [W]
    via: Tensor  # [W] the relay of each rank: itself with one level
    sent: Tensor  # [T,W] bool: whether the token's row is sent to the rank: `present` with one level
    sent_rows: list[list[int]]  # [PIECES][W]


def choose(
    topk_ids: Tensor, rank_of: Tensor, local_of: Tensor, num_ranks: int, via: Sequence[int] | None = None
) -> Choice:
    """topk_ids [T,K] (-1 for none); rank_of and local_of [E] from Placement.routes; via [W]: the relay of each rank."""
    num_tokens = topk_ids.shape[0]
    rank_of, local_of = rank_of.to(topk_ids.device), local_of.to(topk_ids.device)
    valid = topk_ids >= 0
    ids = topk_ids.clamp(min=0).long()
    ranks = torch.where(valid, rank_of[ids], num_ranks)
    present = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=ids.device).scatter_(1, ranks, True)
    present = present[:, :num_ranks]
    piece = torch.arange(num_tokens, device=ids.device) * PIECES // max(num_tokens, 1)
    rows = torch.zeros(PIECES, num_ranks, dtype=torch.int64, device=ids.device).index_add_(0, piece, present.long())
    pairs = torch.bincount(ranks.flatten(), minlength=num_ranks + 1)[:num_ranks]
    relays = torch.arange(num_ranks, device=ids.device) if via is None else torch.tensor(via, device=ids.device)
    sent, sent_rows = present, rows
    if via is not None:
        sent = torch.zeros_like(present, dtype=torch.int64).index_add_(1, relays, present.long()) > 0
        sent_rows = torch.zeros_like(rows).index_add_(0, piece, sent.long())
    sizes = torch.cat((rows, sent_rows, pairs[None])).tolist()  # the only device-to-host read on this side
    return Choice(
        ranks, local_of[ids], present, sizes[:PIECES], sizes[-1], relays, sent, sizes[PIECES:-1]
    )  # fmt: skip


def merge_pieces(pieces: Sequence[Sequence[int]], num_chunks: int) -> list[list[int]]:
    """[PIECES][W] -> [num_chunks][W]."""
    size = PIECES // num_chunks
    return [[sum(column) for column in zip(*pieces[c * size : (c + 1) * size], strict=True)] for c in range(num_chunks)]


@dataclass(frozen=True)
class Sending:
    """What a rank sends, and in which order. Rows are counted by the rank that they are sent to."""

    rows: list[list[int]]  # [C][W]
    row_tokens: Tensor  # [R] token of each row
    pairs: list[int]  # [W]
    pair_choices: Tensor  # [P] int64: token · K + k
    pair_codes: Tensor  # [P] int32: the local expert number, and _FIRST
    row_table: Tensor  # [T, min(K,W)] int32: the rows of each token, ranks (relays) ascending; -1 for none
    pair_table: Tensor  # [T,K] int32: with a row per pair, the returned rows of each token's choices, experts ascending
    choice_order: Tensor  # [T,K] the choices in that order
    pairs_of_chunk: list[list[int]]  # [C][W]


def plan_sending(choice: Choice, topk_ids: Tensor, num_chunks: int) -> Sending:
    """The orders of rows and pairs of this rank's tokens; `choice` belongs to the same topk_ids."""
    num_tokens, top_k = topk_ids.shape
    num_ranks = choice.present.shape[1]
    device = topk_ids.device
    piece = torch.arange(num_tokens, device=device) * PIECES // max(num_tokens, 1)
    chunk = piece // (PIECES // num_chunks)

    token, rank = choice.sent.nonzero().unbind(1)
    order = (chunk[token] * num_ranks + rank).argsort(stable=True)
    row_tokens = token[order]
    row_of = torch.full((num_tokens, num_ranks), -1, dtype=torch.int32, device=device)
    row_of[row_tokens, rank[order]] = torch.arange(len(order), dtype=torch.int32, device=device)
    position = choice.sent.cumsum(1) - 1
    row_table = torch.full((num_tokens, min(top_k, num_ranks)), -1, dtype=torch.int32, device=device)
    row_table[token, position[token, rank]] = row_of[token, rank]

    flat_rank = choice.ranks.flatten()
    key = flat_rank * max(num_tokens, 1) + torch.arange(num_tokens, device=device).repeat_interleave(top_k)
    key = key * 2**31 + choice.experts.flatten()
    num_pairs = sum(choice.pairs)
    pair_choices = key.argsort(stable=True)[:num_pairs]  # empty choices have rank W and sort last
    row_key = key[pair_choices] >> 31
    first = torch.ones(num_pairs, dtype=torch.bool, device=device)
    first[1:] = row_key[1:] != row_key[:-1]
    pair_codes = (choice.experts.flatten()[pair_choices] + first * _FIRST).int()

    # Where each pair's row returns, in the order (chunk, relay, rank, token, expert).
    pair_chunk = chunk.repeat_interleave(top_k)[pair_choices]
    pair_rank = flat_rank[pair_choices]
    pair_relay = choice.via[pair_rank]
    returned = ((pair_chunk * num_ranks + pair_relay) * num_ranks + pair_rank).argsort(stable=True)
    slot = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=device)
    slot[pair_choices[returned]] = torch.arange(num_pairs, dtype=torch.int32, device=device)
    choice_order = topk_ids.argsort(dim=1, stable=True)
    counts = torch.bincount(pair_chunk * num_ranks + pair_relay, minlength=num_chunks * num_ranks)
    return Sending(
        rows=merge_pieces(choice.sent_rows, num_chunks),
        row_tokens=row_tokens,
        pairs=choice.pairs,
        pair_choices=pair_choices,
        pair_codes=pair_codes,
        row_table=row_table,
        pair_table=slot.view(num_tokens, top_k).gather(1, choice_order),
        choice_order=choice_order,
        pairs_of_chunk=counts.view(num_chunks, num_ranks).tolist(),
    )


@dataclass(frozen=True)
class Receiving:
    """What a rank receives, in the order of its experts. Rows are counted by the rank that they come from."""

    rows: list[list[int]]  # [C][W]
    row_starts: list[int]  # [C+1] into the buffer of all rows
    slot_starts: list[int]  # [C+1] into the slots of all chunks
    pairs: list[int]  # [W]
    pairs_of_chunk: list[list[int]]  # [C][W]
    expert_offsets: Tensor  # [C,E+1] int32, within the chunk
    slot_rows: Tensor  # [P] int32: each slot's row within its chunk
    slot_pairs: Tensor  # [P] int64: each slot's pair, in order of arrival
    row_table: Tensor  # [R,K'] int32: slots of each row within its chunk, experts ascending; -1 for none
    row_pairs: Tensor  # [R,K'] int64: their pairs; 0 for none
    returned_slots: Tensor  # [P,1] int32: slots within their chunks, in the order (chunk, relay, source, token, expert)
    all_offsets: Tensor  # [E+1] int32, over all chunks
    all_rows: Tensor  # [P] int32: rows of slots in the order (expert, source, token), in the buffer of all rows
    all_slots: Tensor  # [P] int64: the position in that order of each slot of a chunk


def expert_of(codes: Tensor) -> Tensor:
    """The local expert numbers of pair_codes."""
    return codes % _FIRST


def rows_in_buffer(rows: list[list[int]], order: Sequence[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """Rows arrive in chunks: [R] where each one of the order (source, chunk, token) lies in the buffer of all rows, in
    which a chunk has the sources in the given order; and where each chunk begins there [C+1]."""
    num_chunks, num_ranks = len(rows), len(order)
    starts = [0, *accumulate(chunk[source] for chunk in rows for source in order)]
    place = {source: number for number, source in enumerate(order)}
    lengths = torch.tensor([rows[c][s] for s in range(num_ranks) for c in range(num_chunks)], device=device)
    begins = torch.tensor(
        [starts[c * num_ranks + place[s]] for s in range(num_ranks) for c in range(num_chunks)], device=device
    )
    shift = begins - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shift, lengths) + torch.arange(starts[-1], device=device), starts[::num_ranks]


def chunk_numbers(rows: list[list[int]], device: torch.device) -> Tensor:
    """[R] the chunk of each row of the buffer."""
    lengths = torch.tensor([sum(chunk) for chunk in rows], device=device)
    return torch.repeat_interleave(torch.arange(len(rows), device=device), lengths)


def merge_sources(rows: list[list[int]], via: Sequence[int]) -> list[list[int]]:
    """Rows [C][W] of sources, counted by the rank via[s] that they come through."""
    merged = torch.zeros(len(rows), len(via), dtype=torch.int64)
    found: list[list[int]] = merged.index_add_(1, torch.tensor(list(via)), torch.tensor(rows)).tolist()
    return found


def plan_receiving(
    rows: list[list[int]], pairs: list[int], codes: Tensor, num_experts: int, via: Sequence[int] | None = None
) -> Receiving:
    """rows [C][W] and pairs [W] as announced by each source; codes [P] in order of arrival; via [W]: the rank that
    sends each source's rows, itself if None.

    Raises:
        ValueError: codes that do not match the sizes, or an expert that is not on this rank.
    """
    num_chunks, num_ranks = len(rows), len(pairs)
    device = codes.device
    num_pairs, num_rows = len(codes), sum(map(sum, rows))
    via = range(num_ranks) if via is None else via
    first, expert = codes >= _FIRST, expert_of(codes).long()
    ordinal = first.cumsum(0) - 1  # rows in the order (source, chunk, token)
    if num_pairs and (int(ordinal[-1]) + 1 != num_rows or not bool(first[0]) or int(expert.max()) >= num_experts):
        raise ValueError(f"codes: expected {num_rows} rows of {num_experts} experts")
    order = sorted(range(num_ranks), key=lambda source: (via[source], source))
    buffer_row, row_starts = rows_in_buffer(rows, order, device)
    chunk_of_row = chunk_numbers(rows, device)
    row = buffer_row[ordinal]
    chunk = chunk_of_row[row]

    key = chunk * num_experts + expert
    by_slot = key.argsort(stable=True)
    counts = torch.bincount(key, minlength=num_chunks * num_experts).view(num_chunks, num_experts)
    slot_starts = [0, *accumulate(counts.sum(1).tolist())]
    first_row = torch.tensor(row_starts, device=device)
    first_slot = torch.tensor(slot_starts, device=device)
    slot_of = torch.empty(num_pairs, dtype=torch.int64, device=device)
    slot_of[by_slot] = torch.arange(num_pairs, device=device)
    slot_in_chunk = (slot_of - first_slot[chunk]).int()

    # A row's pairs are consecutive, so a pair's index in its row is its distance from the row's first pair.
    index = torch.arange(num_pairs, device=device)
    place = index - index[first][ordinal]
    width = int(place.max()) + 1 if num_pairs else 1
    row_table = torch.full((num_rows, width), -1, dtype=torch.int32, device=device)
    row_table[row, place] = slot_in_chunk
    row_pairs = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
    row_pairs[row, place] = index

    source = torch.repeat_interleave(torch.arange(num_ranks, device=device), torch.tensor(pairs, device=device))
    relay = torch.tensor(list(via), device=device)[source]
    returned = ((chunk * num_ranks + relay) * num_ranks + source).argsort(stable=True)
    per_chunk = torch.bincount(chunk * num_ranks + relay, minlength=num_chunks * num_ranks)
    by_expert = expert.argsort(stable=True)
    all_slot_of = torch.empty_like(slot_of)
    all_slot_of[by_expert] = index
    return Receiving(
        rows=merge_sources(rows, via),
        row_starts=row_starts,
        slot_starts=slot_starts,
        pairs=pairs,
        pairs_of_chunk=per_chunk.view(num_chunks, num_ranks).tolist(),
        expert_offsets=torch.nn.functional.pad(counts.cumsum(1), (1, 0)).int(),
        slot_rows=(row - first_row[chunk])[by_slot].int(),
        slot_pairs=by_slot,
        row_table=row_table,
        row_pairs=row_pairs,
        returned_slots=slot_in_chunk[returned][:, None],
        all_offsets=torch.nn.functional.pad(counts.sum(0).cumsum(0), (1, 0)).int(),
        all_rows=row[by_expert].int(),
        all_slots=all_slot_of[by_slot],
    )
