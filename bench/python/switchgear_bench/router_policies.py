# SPDX-License-Identifier: BSD-3-Clause
"""The policies that `switchgear bench routers` times, each beside the same policy in torch ops (plain_routers.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import routing as r
from switchgear.functional import Routing

from . import plain_routers as plain
from .shapes import Shape

SEQUENCE, VOCABULARY = 256, 32_000
MARGIN = 1e9  # of RunningCap: no expert leads by that much, so none closes, but the masking still runs
TOP_K, OTHERS = 3.0, 10.0  # at most, in percent of the layer


class Policy(NamedTuple):
    """ours: logits [T,E] -> Routing. plain: the same in torch ops, -> topk_ids and topk_weights [T,K'] in any order, of
    any width. limit: of the cost, in percent of the layer."""

    name: str
    ours: Callable[[Tensor], Routing]
    plain: Callable[[Tensor], tuple[Tensor, Tensor]]
    limit: float = OTHERS


def policies(shape: Shape, num_tokens: int, draws: plain.Draws) -> list[Policy]:
    """Both sides use the random numbers of `draws`, in the same order."""
    k, experts = shape.top_k, shape.num_experts
    data = torch.Generator().manual_seed(1)
    token_ids = torch.randint(VOCABULARY, (num_tokens,), generator=data)
    visible = torch.rand(VOCABULARY, experts, generator=data) < 0.5
    table = r.Lookup.hashed(VOCABULARY, experts, k, data)
    totals = torch.zeros(experts)
    context = r.Context(training=True, sequence_length=SEQUENCE, token_ids=token_ids, generator=draws.generator)

    def limited(**options: Any) -> Callable[[Tensor], Routing]:
        limit = r.Capacity(1.25, **options)
        return lambda logits: limit(r.TopK(k)(logits, context), context)

    def selected(select: Any) -> Callable[[Tensor], Routing]:
        return lambda logits: select(logits, context)

    def capacity(drop: str, length: int | None = None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda z: plain.capacity(z, k, 1.25, drop, length)

    return [
        Policy("top-k", selected(r.TopK(k)), lambda z: plain.top_k(z, k), TOP_K),
        Policy("top-k, normalised", selected(r.TopK(k, normalize=True)), lambda z: plain.top_k(z, k, True), TOP_K),
        Policy("top-k, sigmoid in groups", selected(r.TopK(k, "sigmoid", True, 2.5, 8, 4, "top2_sum")),
               lambda z: plain.deepseek(z, k, 8, 4, 2.5), TOP_K),
        Policy("top-k, sqrt-softplus", selected(r.TopK(k, "sqrt_softplus")),
               lambda z: plain.sqrt_softplus(z, k), TOP_K),
        Policy("group of top-k", selected(r.Grouped(k, 8, 2)), lambda z: plain.grouped(z, k, 8, 2)),
        Policy("top-p", selected(r.TopP(0.4)), lambda z: plain.top_p(z, 0.4)),
        Policy("threshold", selected(r.Threshold(2 / experts)), lambda z: plain.threshold(z, 2 / experts)),
        Policy("skip below", selected(r.SkipBelow(r.TopK(k), 0.5)), lambda z: plain.skip_below(z, k, 0.5)),
        Policy("rank-k", selected(r.RankK((2,))), lambda z: plain.rank_k(z, 2)),
        Policy("dense", selected(r.Dense()), plain.dense),
        Policy("masked by token id", selected(r.Masked(r.TopK(k), r.TokenIdMask(visible))),
               lambda z: plain.masked(z, k, visible[token_ids])),
        Policy("lookup by token id", selected(table), lambda z: plain.lookup(table.table, token_ids)),
        Policy("broadcast", selected(r.Broadcast(r.TopK(k), 0.0, 0.05)), lambda z: plain.broadcast(z, k, 0.05)),
        Policy("running cap", selected(r.RunningCap(r.TopK(k), MARGIN, experts)),
               lambda z: plain.running_cap(z, k, totals, MARGIN)),
        Policy("noisy top-k", selected(r.NoisyTopK(k)), lambda z: plain.noisy_top_k(z, k, draws)),
        Policy("sampled top-k", selected(r.SampledTopK(k, 0.05)), lambda z: plain.sampled_top_k(z, k, 0.05, draws)),
        Policy("SparseMixer", selected(r.SparseMixer(2, 0.1)), lambda z: plain.sparse_mixer(z, 2, 0.1, draws)),
        Policy("Gumbel softmax", selected(r.GumbelSoftmax()), lambda z: plain.gumbel_softmax(z, draws)),
        Policy("Gumbel softmax, hard", selected(r.GumbelSoftmax(hard=True)),
               lambda z: plain.gumbel_softmax(z, draws, hard=True)),
        Policy("random", selected(r.Random()), lambda z: plain.random(z, draws)),
        Policy("expert choice", selected(r.ExpertChoice(float(k))), lambda z: plain.expert_choice(z, k, len(z))),
        Policy("expert choice, by sequence", selected(r.ExpertChoice(float(k), scope="sequence")),
               lambda z: plain.expert_choice(z, k, SEQUENCE)),
        Policy("expert choice, capped", selected(r.ExpertChoice(float(k), max_experts_per_token=k + 2)),
               lambda z: plain.capped_expert_choice(z, k, k + 2)),
        Policy("capacity, by order", limited(), capacity("order")),
        Policy("capacity, by score", limited(drop="score"), capacity("score")),
        Policy("capacity, by sequence", limited(drop="score", scope="sequence"), capacity("score", SEQUENCE)),
        Policy("capacity, rerouted", limited(overflow="reroute"), lambda z: plain.rerouted(z, k, 1.25)),
        Policy("balanced assignment", selected(r.BalancedAssignment()), plain.balanced_assignment),
    ]  # fmt: skip
