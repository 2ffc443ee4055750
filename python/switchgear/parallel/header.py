# SPDX-License-Identifier: BSD-3-Clause
"""The header that ranks exchange before data: one row of numbers to each rank; all but the sizes must agree.

Every rank sees the arguments of all ranks and identifies a deviating one by the same rule. So all raise the same error,
before any data is sent and without another message.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.parallel.errors import Failure
from switchgear.parallel.layout import PIECES

MAGIC = 0x73774570_0002  # with the version of this format
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Terms(NamedTuple):
    """What must be equal on all ranks, in order of comparison."""

    magic: int
    exchange: int  # its number; fixes the order of layers, forward and backward
    layer: int
    backward: int
    dtype: int
    hidden_size: int
    num_experts: int
    top_k: int
    options: int  # digest of the experts' options
    placement: int  # digest
    sharing: int  # digest: which ranks hold the same tokens
    gradients: int  # bits: which gradients are needed; -1: none are recorded
    invariant: int
    num_chunks: int  # 0: automatic
    levels: int
    wire: int  # the format of rows on the way
    capacity: int  # rows per pair of ranks; 0: any number


def digest(value: object) -> int:
    return zlib.crc32(repr(value).encode())


def _show(name: str, value: int) -> str:
    if name == "dtype":
        return str(DTYPES[value]) if 0 <= value < len(DTYPES) else str(value)
    if name == "backward":
        return "backward" if value else "forward"
    if name == "gradients":
        return "none recorded" if value < 0 else f"for inputs {bin(value)}"
    return f"{value:#x}" if name in ("options", "placement", "sharing", "magic") else str(value)


class Sizes(NamedTuple):
    num_tokens: int  # of the sender, to choose the number of chunks; equal on ranks that hold the same tokens
    pairs: int
    rows: list[int]  # [PIECES] for the receiver's experts
    relayed: list[int] = [0] * PIECES  # that the receiver gets to pass on within its node, its own included


NUM_TERMS = len(Terms._fields)
LENGTH = NUM_TERMS + 2 + 2 * PIECES


def encode(
    terms: Terms, num_tokens: int, pairs: Sequence[int], rows: Sequence[Sequence[int]],
    relayed: Sequence[Sequence[int]] | None = None,
) -> Tensor:  # fmt: skip
    """[W, LENGTH] int64; pairs [W], rows [PIECES][W] and relayed [PIECES][W] are per destination rank."""
    pieces = [*rows, *(relayed or [[0] * len(pairs)] * PIECES)]
    return torch.tensor([[*terms, num_tokens, pairs[r], *(piece[r] for piece in pieces)] for r in range(len(pairs))])


def decode(received: Tensor) -> tuple[list[Terms], list[Sizes]]:
    lines = received.tolist()
    terms = [Terms(*line[:NUM_TERMS]) for line in lines]
    sizes = [line[NUM_TERMS:] for line in lines]
    return terms, [Sizes(size[0], size[1], size[2 : 2 + PIECES], size[2 + PIECES :]) for size in sizes]


def disagreement(terms: Sequence[Terms]) -> Failure | None:
    """The first field that differs, and the lowest rank that differs from the majority (or from the lowest rank, if
    there is no majority)."""
    for index, name in enumerate(Terms._fields):
        values = [line[index] for line in terms]
        if len(set(values)) == 1:
            continue
        counts = Counter(values)
        usual = max(values, key=lambda value: (counts[value], -values.index(value)))
        rank = next(r for r, value in enumerate(values) if value != usual)
        reason = f"{name}: expected {_show(name, usual)} as most ranks have, got {_show(name, values[rank])}"
        return _disagrees(rank, terms[rank], reason)
    return None


def unequal_tokens(terms: Sequence[Terms], sizes: Sequence[Sizes], twins: Sequence[Sequence[int]]) -> Failure | None:
    """The first rank whose number of tokens differs from that of the lowest rank with the same tokens."""
    for ranks in twins:
        for rank in ranks[1:]:
            want, got = sizes[ranks[0]].num_tokens, sizes[rank].num_tokens
            if want != got:
                reason = f"num_tokens: expected {want} as on rank {ranks[0]}, which holds the same tokens, got {got}"
                return _disagrees(rank, terms[rank], reason)
    return None


def impossible_sizes(terms: Sequence[Terms], sizes: Sequence[Sizes]) -> Failure | None:
    """The first rank that announces more than its tokens can have. Only the rank that receives the sizes can see it,
    before it allocates memory for them."""
    for rank, (term, size) in enumerate(zip(terms, sizes, strict=True)):
        rows = sum(size.rows)
        wrong = min(*size.rows, *size.relayed, size.pairs) < 0 or sum(size.relayed) > size.num_tokens
        if wrong or rows > size.num_tokens or not rows <= size.pairs <= rows * term.top_k:
            reason = f"sizes: expected rows of {size.num_tokens} tokens, got {rows} with {size.pairs} choices"
            return _disagrees(rank, term, reason)
    return None


def _disagrees(rank: int, terms: Terms, reason: str) -> Failure:
    return Failure(rank, "disagrees", "backward agree" if terms.backward else "agree", terms.exchange, reason)
