# SPDX-License-Identifier: BSD-3-Clause
"""PreRouter, its training, its choices in a model, and batches of requests that share experts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear import MoE, offload, routing
from switchgear.offload import expert_batches
from switchgear.routing import PreRouter

E, K, H, L, WORDS = 6, 2, 16, 3, 12


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, H)
        self.blocks = torch.nn.ModuleList(MoE(H, 8, E, K) for _ in range(L))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(torch.nn.functional.layer_norm(x, (H,)))
        return x


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


def test_row44_the_router_is_causal_and_sees_its_window() -> None:
    torch.manual_seed(0)
    for layers, window in ((0, 4), (1, 4), (2, 3)):
        pre = PreRouter(H, [E, 4], layers, window=window)
        x = torch.randn(2, 12, H)
        logits = pre(x)
        assert [tuple(part.shape) for part in logits] == [(24, E), (24, 4)]
        for token in range(12):
            changed = x.clone()
            changed[:, token] += torch.randn(H)
            differs = (pre(changed)[0] - logits[0]).abs().view(2, 12, -1).amax((0, 2)) > 1e-4
            reached = differs.nonzero()[:, 0].tolist()
            assert reached == list(range(token, min(12, token + pre.reach)))
        # A row alone, cut to its reach, chooses the same for the last token.
        torch.testing.assert_close(pre(x[0, -pre.reach :])[0][-1], logits[0][11])


def test_row44_distilled_from_recorded_choices() -> None:
    """It learns what the model's layers choose for tokens and their predecessors; the loss is a loop's."""
    model = decoder()
    ids = torch.randint(WORDS, (16, 12))
    with torch.no_grad(), routing.record(model) as record:
        model(ids)
    topk_ids = [layer.topk_ids() for layer in record.layers.values()]
    embeddings = model.embedding(ids).detach()
    pre = PreRouter(H, [E] * L)
    logits = pre(embeddings)
    wanted = sum(
        -own[t].log_softmax(0)[int(e)].item() / (len(own) * K) / L
        for own, chosen in zip(logits, topk_ids, strict=True)
        for t in range(len(own))
        for e in chosen[t]
    )
    assert pre.loss(embeddings, topk_ids).item() == pytest.approx(wanted, rel=1e-5)

    def recall() -> float:
        found = pre.choose(embeddings, K)
        right = sum(int((a[:, :, None] == b[:, None]).sum()) for a, b in zip(found, topk_ids, strict=True))
        return right / (L * 16 * 12 * K)

    before = recall()
    optimizer = torch.optim.Adam(pre.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        pre.loss(embeddings, topk_ids).backward()
        optimizer.step()
    assert before < 0.6 < 0.95 < recall()


@pytest.mark.parametrize("top_k", [1, 2])
def test_row44_the_pre_router_chooses_for_all_layers(top_k: int) -> None:
    """In one call and token by token; each layer weighs the choice by its own router."""
    model, pre = decoder(), PreRouter(H, [E] * L, window=3)
    ids = torch.randint(WORDS, (2, 6))
    plain = model(ids)
    x = model.embedding(ids)
    chosen = pre.choose(x, top_k)
    rows = x.flatten(0, 1)
    for block, experts in zip(model.blocks, chosen, strict=True):
        seen = torch.nn.functional.layer_norm(rows, (H,))
        weights = (seen @ block.gate.weight.T).softmax(-1).gather(1, experts.long())
        y = torch.zeros_like(rows)
        for token, row in enumerate(seen):
            for e, weight in zip(experts[token].tolist(), weights[token], strict=True):
                gate, up = (block.experts.gate_up_proj[e] @ row).chunk(2)
                y[token] += weight * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        rows = rows + y
    with torch.no_grad(), routing.decouple(model, pre, model.embedding, top_k):
        torch.testing.assert_close(model(ids).flatten(0, 1), rows.detach())
    with torch.no_grad(), routing.decouple(model, pre, model.embedding, top_k):
        one_by_one = torch.cat([model(ids[:, t : t + 1]) for t in range(6)], 1)
    torch.testing.assert_close(one_by_one.flatten(0, 1), rows.detach())
    message = "force"
    with routing.decouple(model, pre, model.embedding, top_k), raises(ValueError, message):
        routing.override(model, force=[0]).__enter__()
    assert torch.equal(model(ids), plain)


def test_row44_all_experts_are_predicted_from_the_embedding() -> None:
    model, pre = decoder(), PreRouter(H, [E] * L)
    for layers_ahead in (1, 3):
        predictor = offload.FromPreRouter(pre, model.embedding, K, layers_ahead)
        with (
            torch.no_grad(),
            routing.decouple(model, pre, model.embedding, K),
            offload.watch(model, predictor) as found,
        ):
            for ids in torch.randint(WORDS, (10, 1, 1)):
                model(ids)
                first = list(predictor.predict(-1, torch.empty(1, H), torch.empty(1, K)))
                assert len(first) == K * layers_ahead
                assert first[0][0] == 0
        assert all(layer.right == layer.used == layer.predicted for layer in found.layers[1:])
        predictor.close()
    assert not model.embedding._forward_hooks


def queue_of(seed: int, top_k: int, length: int = 96) -> list[set[int]]:
    """Requests of a few kinds, in random order: each kind prefers experts of its own."""
    rng = random.Random(seed)
    kinds = [rng.sample(range(16), top_k + 1) for _ in range(6)]
    return [set(rng.sample(rng.choice(kinds), top_k)) for _ in range(length)]


def mean_of_unique(queue: list[set[int]], batches: list[list[int]]) -> float:
    return sum(len(set().union(*(queue[r] for r in batch))) for batch in batches) / len(batches)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_row44_batches_by_expert_need_fewer_experts(seed: int, top_k: int) -> None:
    queue = queue_of(seed, top_k)
    batches = expert_batches(queue, 8)
    assert sorted(r for batch in batches for r in batch) == list(range(len(queue)))
    assert all(len(batch) == 8 for batch in batches)
    arrival = [list(range(begin, begin + 8)) for begin in range(0, len(queue), 8)]
    assert mean_of_unique(queue, batches) < 0.8 * mean_of_unique(queue, arrival)


def test_row44_batches_of_a_replayed_run() -> None:
    """Requests are the recorded choices of a model's tokens, as (layer, expert)."""
    model = decoder()
    with torch.no_grad(), routing.record(model) as record:
        model(torch.randint(WORDS, (4, 24)))
    ids = [layer.topk_ids().tolist() for layer in record.layers.values()]
    queue: list[Any] = [{(layer, e) for layer in range(L) for e in ids[layer][t]} for t in range(96)]
    arrival = [list(range(begin, begin + 8)) for begin in range(0, 96, 8)]
    assert mean_of_unique(queue, expert_batches(queue, 8)) < mean_of_unique(queue, arrival)


def test_row44_the_fullest_queue_goes_first() -> None:
    # One expert each: the queue of 7 has three requests, that of 5 two; then room for one of 5, and so on.
    assert expert_batches([{5}, {7}, {5}, {7}, {7}, {1}], 4) == [[1, 3, 4, 0], [2, 5]]
    assert expert_batches([{0}, {0}, {1}], 4, tokens=[1, 2, 9]) == [[2], [0, 1]]  # too long: alone
    assert expert_batches([{0}, {0}, {1}], 3, tokens=[2, 2, 1]) == [[0, 2], [1]]
    assert expert_batches([{0, 1}, {2, 3}, {0, 4}], 2) == [[0, 2], [1]]  # one new expert before two
    assert expert_batches([], 4) == []
    assert expert_batches([(), ()], 4) == [[0, 1]]
    assert expert_batches([*torch.tensor([[0, 1], [2, 3], [0, 4]])], 2) == [[0, 2], [1]]
    assert expert_batches([{(torch.tensor(e), 0)} for e in (5, 7, 5)], 2) == [[0, 2], [1]]


@torch.no_grad()
def test_a_model_of_another_dtype() -> None:
    """A PreRouter in float32, the default, reads the embeddings of a model in bfloat16."""
    model, pre = decoder().bfloat16(), PreRouter(H, [E] * L)
    ids = torch.randint(WORDS, (2, 7))
    assert torch.equal(pre(model.embedding(ids))[0], pre(model.embedding(ids).float())[0])
    with routing.decouple(model, pre, model.embedding, K):
        assert model(ids).dtype is torch.bfloat16


def test_bad_input() -> None:
    model, pre = decoder(), PreRouter(H, [E] * L)
    x = torch.randn(4, H)
    for words, call in [
        ("num_experts", lambda: PreRouter(H, [])),
        ("heads", lambda: PreRouter(H, [E], heads=5)),
        ("embeddings", lambda: pre(torch.randn(4, 8))),
        ("top_k", lambda: pre.choose(x, 7)),
        ("topk_ids", lambda: pre.loss(x, [torch.zeros(4, 1)])),
        ("topk_ids", lambda: pre.loss(x, [torch.zeros(3, 1)] * 3)),
        (
            "pre_router",
            lambda: routing.decouple(model, PreRouter(H, [E]), model.embedding, 1).__enter__(),
        ),
        (
            "pre_router",
            lambda: routing.decouple(model, PreRouter(H, [E, 4, E]), model.embedding, 1).__enter__(),
        ),
        ("max_tokens", lambda: expert_batches([], 0)),
        ("tokens", lambda: expert_batches([{0}], 1, [1, 2])),
    ]:
        with raises(ValueError, words):
            call()
    assert not model.embedding._forward_hooks
