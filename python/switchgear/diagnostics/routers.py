# SPDX-License-Identifier: BSD-3-Clause
"""How routers choose: how sure and how stable they are, which experts are used together and how long, and whether the
token id, the position or the cluster decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements of a temporary


# ---- which experts are used together, and how long -------------------------------------------------------------------


def coactivation(topk_ids: Tensor, num_experts: int, *, conditional: bool = False) -> Tensor:
    """How many tokens choose both experts, [E,E] float64, symmetric; the diagonal counts the tokens of each expert.

    conditional: divide each row by its diagonal, so that [i,j] is the fraction of the tokens of i that choose j too.
    """
    result = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=topk_ids.device)
    for ids in torch.split(topk_ids, max(_CHUNK // max(num_experts, 1), 1)):
        chosen = encode_one_hot(ids, num_experts).float()  # sums of ones are exact below 2^24 tokens
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
    histogram = torch.zeros(segment + 1, dtype=torch.int64)  # counts of (segment, expert)
    hits = segments = 0
    for ids in topk_ids.view(-1, length, top_k).unbind():
        sums = torch.nn.functional.pad(encode_one_hot(ids, num_experts).long().cumsum(0), (0, 0, 1, 0))
        counts = sums[segment:] - sums[:-segment]  # [segments, E]: how many tokens of each segment chose the expert
        histogram += torch.bincount(counts.flatten().cpu(), minlength=segment + 1)
        hits += int(counts.topk(slots, 1).values.sum())
        segments += counts.shape[0]
    values = torch.arange(segment + 1)
    activations = int((histogram * values).sum())
    matches = (histogram * values).flip(0).cumsum(0).flip(0)  # matches[t]: picks with a count >= t
    picks = histogram.flip(0).cumsum(0).flip(0) * segment
    f1 = 2 * matches.double() / (picks + activations).clamp(min=1)
    return Cacheability(
        segment, slots, float(f1[1:].max()), hits / max(activations, 1), int(histogram[1:].sum()) / segments
    )


def encode_one_hot(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[T,E] uint8: whether each token chose the expert."""
    ids = torch.where((topk_ids < 0) | (topk_ids >= num_experts), num_experts, topk_ids).long()
    chosen = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.uint8, device=ids.device)
    return chosen.scatter(1, ids, 1)[:, :-1]


# ---- how decided and how stable a router is (OLMoE, arXiv:2409.02060) ------------------------------------------------


# LibMoE (arXiv:2411.00918) measures margin and change too; the definitions here are ours. Its margin is the largest
# weight of a token minus the second one, its change the fraction of choices that differ, place by place.


def router_margin(router_logits: Tensor, top_k: int = 1) -> Tensor:
    """The probability of the last chosen expert minus that of the first one left out, [T] float64. Near 0, a small
    change of x changes the choice. top_k = 1 is the margin between the best two."""
    num_experts = router_logits.shape[-1]
    if not 1 <= top_k < num_experts:
        raise ValueError(f"top_k: expected 1 to {num_experts - 1}, got {top_k}")
    best = router_logits.double().softmax(-1).topk(top_k + 1, -1).values
    return best[..., top_k - 1] - best[..., top_k]


def router_saturation(topk_ids: Tensor, final_ids: Tensor, num_experts: int) -> float:
    """The fraction of the final checkpoint's choices that an earlier checkpoint makes too, for the same tokens: 1 if
    routing no longer changes (OLMoE). Choices [T,K], in any order within a token."""
    before, after = encode_one_hot(topk_ids, num_experts), encode_one_hot(final_ids, num_experts)
    if before.shape != after.shape:
        raise ValueError(f"final_ids: expected {topk_ids.shape[0]} tokens, got {final_ids.shape[0]}")
    return int((before & after).sum()) / max(int(after.sum()), 1)


def routing_change(topk_ids: Tensor, next_ids: Tensor, num_experts: int) -> float:
    """The fraction of tokens whose set of experts differs between two checkpoints or two runs; bit-equal replay
    has 0."""
    before, after = encode_one_hot(topk_ids, num_experts), encode_one_hot(next_ids, num_experts)
    if before.shape != after.shape:
        raise ValueError(f"next_ids: expected {topk_ids.shape[0]} tokens, got {next_ids.shape[0]}")
    return float((before != after).any(-1).double().mean()) if before.shape[0] else 0.0


# ---- what decides the choice -----------------------------------------------------------------------------------------


TokensById = Mapping[int, Tensor]
"""For each token id, how often each expert served it, [E]: `LayerTrace.tokens_by_id()`."""


def token_id_specialization(tokens_by_id: TokensById) -> float:
    """How far the token id determines the choice: 1 - H(expert | id) / H(expert), from 0 (not at all) to 1 (each id has
    its own expert). OpenMoE (arXiv:2402.01739) finds that routers decide by the id; this measure of it is ours. 0 if
    all tokens have the same expert.

    With K experts per token, the maximum is 1 - log K / H(expert).
    """
    counts = _tabulate(tokens_by_id)
    whole = float(torch.special.entr(counts.sum(0) / counts.sum().clamp(min=1)).sum())
    return 1 - dispatch_entropy(counts) / whole if whole > 0 else 0.0


def routing_stability(before: TokensById, after: TokensById) -> float:
    """The fraction of choices that two traces of the same tokens share, by token id: Σ min(p(e|id), q(e|id)), averaged
    over ids weighted by their frequency in `before`; 1 if every id goes to the same experts. OpenMoE (arXiv:2402.01739)
    finds that routing is fixed early in training. Ids that occur in only one trace are ignored."""
    ids = sorted(set(before) & set(after))
    if not ids:
        return 0.0
    old, new = (_tabulate({i: trace[i] for i in ids}) for trace in (before, after))
    shares = [counts / counts.sum(1, keepdim=True).clamp(min=1) for counts in (old, new)]
    common = shares[0].minimum(shares[1]).sum(1)
    return float((common * old.sum(1)).sum() / old.sum())


def drop_by_position(topk_ids: Tensor, sequence_length: int) -> Tensor:
    """The fraction of empty choices at each position of a sequence, [sequence_length] float64, for topk_ids [T,K] after
    a capacity limit, -1 for none. With drop="order" it grows towards the end (OpenMoE, arXiv:2402.01739).

    Raises ValueError if T is not a multiple of sequence_length.
    """
    if sequence_length < 1 or len(topk_ids) % sequence_length:
        raise ValueError(f"sequence_length: expected a divisor of {len(topk_ids)} tokens, got {sequence_length}")
    empty = (topk_ids < 0).double()
    return empty.view(-1, sequence_length, topk_ids.shape[1]).mean((0, 2))


def dispatch_entropy(counts: Tensor) -> float:
    """H(cluster | expert) in nats for counts [E,C], the tokens of each cluster per expert. 0 if each expert sees one
    cluster (Towards Understanding Mixture of Experts, arXiv:2208.02813). In general, H(column | row) of a table."""
    counts = counts.double()
    inside = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return float((torch.special.entr(inside).sum(1) * counts.sum(1)).sum() / counts.sum().clamp(min=1))


def _tabulate(tokens_by_id: TokensById) -> Tensor:
    """[ids, E] float64."""
    if not tokens_by_id:
        return torch.zeros(1, 1, dtype=torch.float64)
    return torch.stack([tokens_by_id[i] for i in sorted(tokens_by_id)]).double()
