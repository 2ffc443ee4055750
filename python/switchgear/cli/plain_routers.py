# SPDX-License-Identifier: BSD-3-Clause
"""Routing policies as one writes them in torch ops: what `switchgear bench --routers` compares with.

Logits [T,E] in, topk_ids and topk_weights [T,K] out, -1 for none. No loops over experts, sorts where the policies need
them, ties as torch breaks them. The auction and rerouting are those of reference_policies.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from switchgear import reference_policies


def plan(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """expert_offsets, token_indices, slot_indices: a stable sort and its inverse."""
    flat = torch.where(ids < 0, num_experts, ids).flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:-1]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    slots = torch.empty_like(order).scatter(0, order, torch.arange(len(order))).view_as(ids).masked_fill(ids < 0, -1)
    return offsets, order // ids.shape[1], slots


def _kept(ids: Tensor, weights: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return ids.masked_fill(~keep, -1), weights.masked_fill(~keep, 0)


def _trimmed(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    width = max(int((ids >= 0).sum(1).max()), 1)
    return ids[:, :width], weights[:, :width]


# ---- tokens choose ---------------------------------------------------------------------------------------------------


def top_k(logits: Tensor, k: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(k)
    return ids, weights / weights.sum(-1, keepdim=True) if normalize else weights


def deepseek(logits: Tensor, k: int, num_groups: int, topk_groups: int, scale: float) -> tuple[Tensor, Tensor]:
    scores = logits.float().sigmoid()
    groups = scores.view(len(scores), num_groups, -1)
    best = groups.topk(2).values.sum(-1).topk(topk_groups).indices
    mask = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best, True)
    ids = groups.masked_fill(~mask[:, :, None], 0).flatten(1).topk(k).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * scale


def grouped(logits: Tensor, k: int, num_groups: int, topk_groups: int) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1, dtype=torch.float32)
    groups = scores.view(len(scores), num_groups, -1)
    best = groups.sum(-1).topk(topk_groups).indices
    mask = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best, True)
    weights, ids = groups.masked_fill(~mask[:, :, None], -1).flatten(1).topk(k)
    return ids, weights


def top_p(logits: Tensor, p: float) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1, dtype=torch.float32).sort(descending=True)
    return _trimmed(*_kept(ids, weights, weights.cumsum(-1) - weights < p))


def threshold(logits: Tensor, value: float) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1, dtype=torch.float32).sort(descending=True)
    keep = weights >= value
    keep[:, 0] = True
    return _trimmed(*_kept(ids, weights, keep))


def skip_below(logits: Tensor, k: int, ratio: float) -> tuple[Tensor, Tensor]:
    ids, weights = top_k(logits, k)
    total = weights.sum(-1, keepdim=True)
    ids, weights = _kept(ids, weights, weights >= ratio * weights[:, :1])
    return _trimmed(ids, weights * total / weights.sum(-1, keepdim=True))


def rank_k(logits: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    ids, weights = top_k(logits, rank + 1)
    return ids[:, rank:], weights[:, rank:]


def dense(logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(logits.shape[1]).expand_as(logits), logits.softmax(-1, dtype=torch.float32)


# ---- experts choose, or have room ------------------------------------------------------------------------------------


def expert_choice(logits: Tensor, factor: int, length: int) -> tuple[Tensor, Tensor]:
    """Among each `length` tokens; a token's experts in ascending order."""
    num_experts = logits.shape[1]
    scores = logits.softmax(-1, dtype=torch.float32)
    best = scores.view(-1, length, num_experts).transpose(1, 2).topk(max(length * factor // num_experts, 1)).indices
    taken = torch.zeros(len(best), num_experts, length, dtype=torch.bool).scatter(2, best, True)
    taken = taken.transpose(1, 2).reshape(-1, num_experts)
    ids = taken.to(torch.int8).sort(descending=True, stable=True).indices
    return _trimmed(*_kept(ids, scores.gather(1, ids), taken.gather(1, ids)))


def capacity(logits: Tensor, k: int, factor: float, drop: str, length: int | None = None) -> tuple[Tensor, Tensor]:
    num_experts, length = logits.shape[1], length or len(logits)
    ids, weights = top_k(logits, k)
    limit = math.ceil(factor * k * length / num_experts)
    groups = (ids + torch.arange(len(ids))[:, None] // length * num_experts).flatten()
    order = torch.arange(groups.numel()) if drop == "order" else weights.flatten().argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]  # by group, then by precedence
    counts = torch.bincount(groups)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[groups[order]]
    keep = torch.empty_like(order).scatter(0, order, place) < limit
    return _kept(ids, weights, keep.view_as(ids))


def rerouted(logits: Tensor, k: int, factor: float) -> tuple[Tensor, Tensor]:
    num_experts = logits.shape[1]
    scores = logits.softmax(-1, dtype=torch.float32)
    ids = scores.topk(k).indices
    limits = torch.full((1,), math.ceil(factor * k * len(ids) / num_experts), dtype=torch.int32)
    kept = reference_policies.fit_capacity(ids.int(), None, scores, None, limits, num_experts, "order", num_experts)
    return kept, scores.gather(1, kept.clamp(min=0).long()).masked_fill(kept < 0, 0)


def balanced_assignment(logits: Tensor) -> tuple[Tensor, Tensor]:
    ids = reference_policies.assign_balanced(logits.float(), None, 1, -1.0, 100)[:, None]
    return ids, logits.float().sigmoid().gather(1, ids.long())
