# SPDX-License-Identifier: BSD-3-Clause
"""Which experts are used together, and how long the same ones stay in use: whether a model suits an expert cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements of a temporary


def coactivation(topk_ids: Tensor, num_experts: int, *, conditional: bool = False) -> Tensor:
    """How many tokens choose both experts, [E,E] float64, symmetric; the diagonal counts the tokens of each expert.

    conditional: divide each row by its diagonal, so that [i,j] is the fraction of the tokens of i that choose j too.
    """
    result = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=topk_ids.device)
    for ids in torch.split(topk_ids, max(_CHUNK // max(num_experts, 1), 1)):
        chosen = one_hot(ids, num_experts).float()  # sums of ones are exact below 2^24 tokens
        result += chosen.T @ chosen
    return result / result.diagonal()[:, None].clamp(min=1) if conditional else result


@dataclass(frozen=True)
class Cacheability:
    """How local the routing of a layer is (arXiv:2505.16056)."""

    segment: int  # consecutive tokens m
    slots: int  # experts in the cache
    srp: float  # segment routing best performance, 0 to 1
    sch: float  # segment cache best hit rate, 0 to 1
    experts_per_segment: float  # distinct ones, on average


def cacheability(
    topk_ids: Tensor,
    num_experts: int,
    *,
    segment: int = 16,
    slots: int | None = None,
    sequence_length: int | None = None,
) -> Cacheability:
    """Whether segments of consecutive tokens use few experts, so that a cache of them works (arXiv:2505.16056).

    All segments of `segment` tokens inside a sequence count.

    - SRP: the best F1 of a router that picks one set of experts for each segment, against the choices of its tokens.
      A pick is right for the tokens of the segment that chose the expert. The best sets are the experts that at least
      t of the segment's tokens chose, for the best t. 1 if tokens of a segment choose alike.
    - SCH: the fraction of choices that hit a cache of `slots` experts, filled for each segment with those that it
      uses most. A bound for a cache that is refilled once per segment.

    Args:
        topk_ids: [T,K] in the order of the text, -1 for none.
        slots: 2·K if None, which the paper finds a good size.
        sequence_length: tokens per sequence; T if None.
    """
    num_tokens, top_k = topk_ids.shape
    length = num_tokens if sequence_length is None else sequence_length
    if length < 1 or num_tokens % length:
        raise ValueError(f"sequence_length: expected a divisor of {num_tokens} tokens, got {length}")
    if not 1 <= segment <= length:
        raise ValueError(f"segment: expected 1 to {length} tokens, got {segment}")
    slots = min(2 * top_k, num_experts) if slots is None else slots
    if not 1 <= slots <= num_experts:
        raise ValueError(f"slots: expected 1 to {num_experts} experts, got {slots}")
    histogram = torch.zeros(segment + 1, dtype=torch.int64)  # of the counts of all (segment, expert)
    hits = segments = 0
    for ids in topk_ids.view(-1, length, top_k).unbind():
        counts = _segment_counts(one_hot(ids, num_experts), segment)
        histogram += torch.bincount(counts.flatten().cpu(), minlength=segment + 1)
        hits += int(counts.topk(slots, 1).values.sum())
        segments += counts.shape[0]
    values = torch.arange(segment + 1)
    activations = int((histogram * values).sum())
    matches = (histogram * values).flip(0).cumsum(0).flip(0)  # by threshold t: of the picks with a count >= t
    picks = histogram.flip(0).cumsum(0).flip(0) * segment
    f1 = 2 * matches.double() / (picks + activations).clamp(min=1)
    return Cacheability(
        segment, slots, float(f1[1:].max()), hits / max(activations, 1), int(histogram[1:].sum()) / segments
    )


def one_hot(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[T,E] uint8: whether each token chose the expert."""
    ids = torch.where((topk_ids < 0) | (topk_ids >= num_experts), num_experts, topk_ids).long()
    chosen = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.uint8, device=ids.device)
    return chosen.scatter(1, ids, 1)[:, :-1]


def _segment_counts(chosen: Tensor, segment: int) -> Tensor:
    """[L - segment + 1, E] int64: how many tokens of each segment chose each expert."""
    sums = torch.nn.functional.pad(chosen.long().cumsum(0), (0, 0, 1, 0))
    return sums[segment:] - sums[:-segment]
