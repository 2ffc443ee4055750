# SPDX-License-Identifier: BSD-3-Clause
"""Measures of routing, on routers with known behaviour."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import MoE, RoutingTrace
from switchgear.diagnostics import (
    dispatch_entropy,
    drop_by_position,
    routing_stability,
    token_id_specialization,
)
from switchgear.routing import Capacity, Context, Lookup, Random, TopK

E, V = 8, 40


def traced(select: object, seed: int = 7, num_tokens: int = 4000) -> dict[int, Tensor]:
    """The counts of a router on random tokens of a vocabulary, as a trace records them."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(V, (num_tokens,), generator=generator)
    routing = select(torch.zeros(num_tokens, E), Context(token_ids=token_ids, training=True))  # type: ignore[operator]
    layer = switchgear.trace.LayerTrace(E)
    layer.add(routing.topk_ids, routing.topk_weights, token_ids=token_ids)
    return layer.tokens_by_id()


def test_openmoe_specialization_of_a_table_and_of_dice() -> None:
    """1 for routing by token id only, nearly 0 for random routing, and in between for a mixture, as a loop computes."""
    by_id, drawn = traced(Lookup(torch.arange(V) % E)), traced(Random())
    assert token_id_specialization(by_id) == pytest.approx(1)
    assert token_id_specialization(drawn) < 0.05
    mixed = {i: by_id[i] + drawn[i] for i in by_id}
    total = [sum(int(mixed[i][e]) for i in mixed) for e in range(E)]
    n = sum(total)
    whole = -sum(c / n * math.log(c / n) for c in total)
    inside = 0.0
    for counts in mixed.values():
        m = int(counts.sum())
        inside -= sum(m / n * c / m * math.log(c / m) for c in counts.tolist() if c)
    assert token_id_specialization(mixed) == pytest.approx(1 - inside / whole)
    assert 0.2 < token_id_specialization(mixed) < 0.8
    assert token_id_specialization({}) == 0
    assert token_id_specialization({3: torch.tensor([5, 0])}) == 0


def test_openmoe_stability_of_tables() -> None:
    table = torch.arange(V) % E
    before = traced(Lookup(table))
    assert routing_stability(before, traced(Lookup(table), seed=8)) == 1  # other tokens, the same table
    moved = table.clone()
    moved[: V // 4] = (moved[: V // 4] + 1) % E
    share = sum(int(before[i].sum()) for i in range(V // 4, V)) / 4000
    assert routing_stability(before, traced(Lookup(moved))) == pytest.approx(share)
    assert routing_stability(before, traced(Lookup((table + 1) % E))) == 0
    assert routing_stability(before, {}) == 0


def test_openmoe_specialization_of_a_model_grows_with_what_its_router_sees_of_the_id() -> None:
    """Through RoutingTrace: a router that sees only the embedding decides by id; noise as large as a token hides it."""

    class Model(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.moe, self.noise = nn.Embedding(V, 16), MoE(16, 8, E, 1), noise

        def forward(self, token_ids: Tensor) -> Tensor:
            x = self.embedding(token_ids)
            y: Tensor = self.moe(x + self.noise * torch.randn_like(x))
            return y

    found = []
    for noise in (0.0, 0.5, 50.0):
        with RoutingTrace(model := Model(noise), by_token_id=True) as trace:
            model(torch.randint(V, (8, 250)))
        found.append(token_id_specialization(trace.layers["moe.gate"].tokens_by_id()))
    assert found[0] == pytest.approx(1)
    assert found[0] > found[1] > found[2]
    assert found[2] < 0.2


def test_openmoe_drops_by_position() -> None:
    logits = torch.randn(32 * 64, E) + torch.linspace(1, -1, E)
    routing = TopK(2)(logits)
    context = Context(sequence_length=64, generator=torch.Generator().manual_seed(1))
    for drop in ("order", "random"):
        ids = Capacity(1.0, drop, scope="sequence")(routing, context).topk_ids
        rates = drop_by_position(ids, 64)
        assert rates.tolist() == [(ids.view(32, 64, 2)[:, p] < 0).double().mean().item() for p in range(64)]
        halves = rates.view(2, 32).mean(1)
        assert (halves[1] > halves[0] + 0.2) == (drop == "order")
    with raises(ValueError, "sequence_length"):
        drop_by_position(ids, 63)


def test_dispatch_entropy_of_known_counts() -> None:
    assert dispatch_entropy(torch.eye(4) * 7) == 0
    assert dispatch_entropy(torch.ones(3, 4)) == pytest.approx(math.log(4))
    assert dispatch_entropy(torch.tensor([[6, 0], [1, 1], [0, 0]])) == pytest.approx(2 / 8 * math.log(2))
    assert dispatch_entropy(torch.zeros(2, 2)) == 0
