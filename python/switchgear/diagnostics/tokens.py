# SPDX-License-Identifier: BSD-3-Clause
"""What decides the choice: the token id, the position in the sequence, or the cluster. Functions of counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TokensById = Mapping[int, Tensor]
"""For each token id, how often each expert served it, [E]: `LayerTrace.tokens_by_id()`."""


def token_id_specialization(tokens_by_id: TokensById) -> float:
    """How far the token id determines the choice: 1 - H(expert | id) / H(expert), from 0 (not at all) to 1 (each id has
    its own expert). OpenMoE (arXiv:2402.01739) finds that routers decide by the id; this measure of it is ours. 0 if
    all tokens have the same expert.

    With K experts per token, the maximum is 1 - log K / H(expert).
    """
    counts = _table(tokens_by_id)
    whole = float(torch.special.entr(counts.sum(0) / counts.sum().clamp(min=1)).sum())
    return 1 - dispatch_entropy(counts) / whole if whole > 0 else 0.0


def routing_stability(before: TokensById, after: TokensById) -> float:
    """The fraction of choices that two traces of the same tokens share, by token id: Σ min(p(e|id), q(e|id)), averaged
    over ids weighted by their frequency in `before`; 1 if every id goes to the same experts. OpenMoE (arXiv:2402.01739)
    finds that routing is fixed early in training. Ids that occur in only one trace are ignored."""
    ids = sorted(set(before) & set(after))
    if not ids:
        return 0.0
    old, new = (_table({i: trace[i] for i in ids}) for trace in (before, after))
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


def _table(tokens_by_id: TokensById) -> Tensor:
    """[ids, E] float64."""
    if not tokens_by_id:
        return torch.zeros(1, 1, dtype=torch.float64)
    return torch.stack([tokens_by_id[i] for i in sorted(tokens_by_id)]).double()
