# SPDX-License-Identifier: BSD-3-Clause
"""What an exchange costs, and the number of chunks that hides most of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

CHUNKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Link:
    """A rank's connection to the others.

    bandwidth: bytes/s in each direction. overhead: seconds that one more chunk costs, for its two messages and for
    products of fewer rows. The defaults are those of gloo between processes of one machine, on the slow side.
    """

    bandwidth: float = 1e9
    overhead: float = 0.5e-3


def rows_per_token(top_k: int, num_ranks: int) -> float:
    """The expected number of other ranks that a token goes to, of top_k experts chosen with equal odds."""
    return (num_ranks - 1) * (1 - (1 - 1 / num_ranks) ** top_k)


def choose_chunks(num_tokens: int, top_k: int, num_ranks: int, row_bytes: int, link: Link) -> int:
    """The number of chunks C, of CHUNKS, for the rank with the most tokens.

    With compute at least as long as communication, what stays visible of it is the first chunk on its way in, the last
    on its way out, and the overheads: t(C) = t_rows / C + C · overhead, least at √(t_rows / overhead).
    """
    seconds = 2 * num_tokens * rows_per_token(top_k, num_ranks) * row_bytes / link.bandwidth
    best = math.sqrt(seconds / link.overhead) if link.overhead > 0 else CHUNKS[-1]
    return min(CHUNKS, key=lambda chunks: (abs(math.log2(max(best, 1.0)) - math.log2(chunks)), chunks))
