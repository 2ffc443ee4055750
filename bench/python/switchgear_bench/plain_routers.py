# SPDX-License-Identifier: BSD-3-Clause
"""Routing policies in ordinary torch ops: the baseline of `switchgear bench routers`.

Logits [T,E] in, topk_ids and topk_weights [T,K] out, -1 for an empty slot. There are no loops over experts. Policies
sort where they need to, and ties break as in torch. The auction and rerouting are those of reference/policies.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from switchgear.papers.parts.selections import BalancedAssignment
from switchgear.reference import policies
from switchgear.routing import Context, ranking


def plan(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """expert_offsets, token_indices, slot_indices: a stable sort and its inverse."""
    flat = torch.where(ids < 0, num_experts, ids).flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:-1]
    offsets = F.pad(counts.cumsum(0), (1, 0))
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


def sqrt_softplus(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids = logits.topk(k).indices
    return ids, F.softplus(logits.float()).sqrt().gather(1, ids)


def masked(logits: Tensor, k: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.masked_fill(~allowed, -torch.inf).softmax(-1, dtype=torch.float32).topk(k)
    return _kept(ids, weights, weights > 0)


def lookup(table: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    ids = table[token_ids]
    return ids, torch.full(ids.shape, 1 / ids.shape[1])


def broadcast(logits: Tensor, k: int, fraction: float) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1, dtype=torch.float32)
    weights, ids = scores.topk(k)
    entropy = -(scores * scores.log()).sum(-1)
    unsure = torch.zeros_like(entropy, dtype=torch.bool)
    unsure[entropy.topk(round(fraction * len(entropy))).indices] = True
    everyone, missing = torch.arange(scores.shape[1]).expand_as(scores), scores.shape[1] - k
    ids = torch.where(unsure[:, None], everyone, F.pad(ids, (0, missing), value=-1))
    return ids, torch.where(unsure[:, None], scores, F.pad(weights, (0, missing)))


def running_cap(logits: Tensor, k: int, totals: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Adds the weights to totals [E]."""
    ahead = totals - totals.mean() > margin
    ids, weights = top_k(logits.masked_fill(ahead, torch.finfo(logits.dtype).min), k)
    totals += torch.zeros_like(totals).index_add(0, ids.flatten(), weights.flatten())
    return ids, weights


# ---- draws -----------------------------------------------------------------------------------------------------------


class Draws:
    """Random numbers by the usual torch code, or, if `shared`, the same ones that switchgear draws, to compare."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.shared = False

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def gumbel(self, logits: Tensor) -> Tensor:
        if self.shared:
            return ranking.gumbel(tuple(logits.shape), Context(generator=self.generator), logits.device)
        return -torch.empty_like(logits).exponential_(generator=self.generator).log()

    def one_of(self, logits: Tensor) -> Tensor:
        """[T,1], by the softmax of logits [T,E]."""
        if self.shared:
            return ranking.draw(logits.softmax(-1), Context(generator=self.generator))
        return (logits + self.gumbel(logits)).argmax(-1, keepdim=True)


def noisy_top_k(logits: Tensor, k: int, draws: Draws) -> tuple[Tensor, Tensor]:
    ids = (logits + draws.uniform(*logits.shape)).topk(k).indices
    return ids, logits.softmax(-1, dtype=torch.float32).gather(1, ids)


def sampled_top_k(logits: Tensor, k: int, share: float, draws: Draws) -> tuple[Tensor, Tensor]:
    drawn = logits + draws.gumbel(logits)
    ids = torch.where(draws.uniform(len(logits), 1) < share, drawn, logits).topk(k).indices
    return ids, logits.softmax(-1, dtype=torch.float32).gather(1, ids)


def gumbel_softmax(logits: Tensor, draws: Draws, hard: bool = False) -> tuple[Tensor, Tensor]:
    weights = (logits + draws.gumbel(logits)).softmax(-1)
    if hard:
        ids = weights.argmax(-1, keepdim=True)
        return ids, torch.ones(ids.shape)
    return torch.arange(logits.shape[1]).expand_as(logits), weights


def sparse_mixer(logits: Tensor, k: int, jitter: float, draws: Draws) -> tuple[Tensor, Tensor]:
    ids, weights, open_logits = [], [], logits
    for _ in range(k):
        best, argmax = open_logits.max(-1, keepdim=True)
        near = open_logits.masked_fill((best - logits) / logits.abs().maximum(best) > 2 * jitter, -torch.inf)
        drawn = draws.one_of(near)
        exact = (drawn == argmax) | (draws.uniform(len(logits), 1) > 0.75)
        weights.append(near.softmax(-1).gather(1, drawn) * torch.where(exact, 1.0, 1 / 3))
        ids.append(drawn)
        open_logits = open_logits.scatter(1, drawn, -torch.inf)
    return torch.cat(ids, 1), torch.cat(weights, 1)


def random(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    ids = torch.randint(logits.shape[1], (len(logits), 1), generator=draws.generator)
    return ids, torch.ones(len(logits), 1)


# ---- experts choose, or have limited capacity ------------------------------------------------------------------------


def expert_choice(logits: Tensor, factor: int, length: int) -> tuple[Tensor, Tensor]:
    """Within each group of `length` tokens; a token's experts are in ascending order."""
    num_experts = logits.shape[1]
    scores = logits.softmax(-1, dtype=torch.float32)
    best = scores.view(-1, length, num_experts).transpose(1, 2).topk(max(length * factor // num_experts, 1)).indices
    taken = torch.zeros(len(best), num_experts, length, dtype=torch.bool).scatter(2, best, True)
    taken = taken.transpose(1, 2).reshape(-1, num_experts)
    ids = taken.to(torch.int8).sort(descending=True, stable=True).indices
    return _trimmed(*_kept(ids, scores.gather(1, ids), taken.gather(1, ids)))


def capped_expert_choice(logits: Tensor, factor: int, cap: int, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """At most `cap` experts per token, by alternating prices of experts and of tokens, each from a sort."""

    def price(values: Tensor, total: int) -> Tensor:
        descending = values.sort(-1, descending=True).values
        rest = descending.flip(-1).logcumsumexp(-1).flip(-1)
        left = total - torch.arange(values.shape[-1])
        found = left.clamp(min=1e-30).log() - rest
        first = ((descending + found <= 0) & (left > 0)).to(torch.int8).argmax(-1, keepdim=True)
        return found.gather(-1, first)

    num_tokens, num_experts = logits.shape
    scores = logits.softmax(-1, dtype=torch.float32)
    each = max(num_tokens * factor // num_experts, 1)
    worth, of_token = scores.T / 1e-3, torch.zeros(1, num_tokens)
    for _ in range(rounds):
        of_expert = price(worth - of_token, each)
        of_token = (-price((worth + of_expert).T, cap)).clamp(min=0).T
    worth = worth + price(worth - of_token, each) - of_token
    taken = torch.zeros(num_experts, num_tokens, dtype=torch.bool).scatter(1, worth.topk(each).indices, True).T
    best = worth.T.masked_fill(~taken, -torch.inf).topk(cap).indices
    return _kept(best, scores.gather(1, best), taken.gather(1, best))


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
    kept = policies.fit_capacity(ids.int(), None, scores, None, limits, num_experts, "order", num_experts)
    return kept, scores.gather(1, kept.clamp(min=0).long()).masked_fill(kept < 0, 0)


def balanced_assignment(logits: Tensor) -> tuple[Tensor, Tensor]:
    ids = policies.assign_balanced(logits.float(), None, 1, -1.0, BalancedAssignment.max_iterations)[:, None]
    return ids, logits.float().sigmoid().gather(1, ids.long())
