# SPDX-License-Identifier: BSD-3-Clause
"""Papers in which experts choose tokens, against float64 loops and by their claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import switchgear
from loops import E, H, assert_agrees, best, counts_of, expert, layer_of, linear, mixture
from switchgear import presets
from switchgear.routing import Context, ExpertChoice


def chosen_tokens(scores: Tensor, count: int) -> list[list[int]]:
    """The tokens of each expert: the `count` largest of its column, ties to the lowest token."""
    return [best(scores[:, e], count) for e in range(scores.shape[1])]


def pairs_to_rows(tokens: list[list[int]], scores: Tensor) -> tuple[list[list[int]], list[list[Tensor]]]:
    ids: list[list[int]] = [[] for _ in scores]
    weights: list[list[Tensor]] = [[] for _ in scores]
    for e, column in enumerate(tokens):
        for t in column:
            ids[t].append(e)
            weights[t].append(scores[t, e])
    return ids, weights


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_row2_expert_choice_is_a_loop_over_experts(backend: str, scope: str) -> None:
    layer = layer_of(presets.expert_choice(scope=scope))

    def loop(layer: Any, x: Tensor) -> Tensor:
        outputs = []
        for rows in x if scope == "sequence" else [x.reshape(-1, H)]:
            s = linear(layer, rows).softmax(-1)
            ids, weights = pairs_to_rows(chosen_tokens(s, 2 * len(rows) // E), s)
            outputs.append(mixture(layer.experts, rows, ids, weights))
        return torch.cat(outputs).view(x.shape)

    assert_agrees(layer, loop, torch.randn(3, 16, H))


def test_row2_expert_choice_fills_every_expert_alike(backend: str) -> None:
    logits = torch.randn(40, E)
    routing = ExpertChoice(2.0)(logits)
    assert counts_of(routing.topk_ids) == [10] * E
    wanted = logits.softmax(-1).T.topk(10).indices
    for e in range(E):
        assert set(wanted[e].tolist()) == set((routing.topk_ids == e).any(1).nonzero().flatten().tolist())
    for row in routing.topk_ids.tolist():
        chosen = [e for e in row if e >= 0]
        assert chosen == sorted(set(chosen))


@pytest.mark.parametrize("weights", ["score", "logit"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_row2_expert_choice_weighs_in_evaluation_as_in_training(weights: str, scale: float) -> None:
    logits = torch.randn(9, E, dtype=torch.float64)
    select = ExpertChoice(2.0, weights=weights, scale=scale, evaluation=2)
    values = logits.softmax(-1) if weights == "score" else logits
    for training in (True, False):
        routing = select(logits, Context(training=training))
        kept = routing.topk_ids >= 0
        wanted = scale * values.gather(1, routing.topk_ids.clamp(min=0).long())
        torch.testing.assert_close(routing.topk_weights[kept], wanted[kept])
    assert routing.topk_ids.tolist() == [best(row, 2) for row in values]
    bias = torch.zeros(E).index_fill(0, torch.tensor([3]), 100.0)
    assert (select(logits, Context(), bias).topk_ids[:, 0] == 3).all()


def test_row2_expert_choice_gives_ties_to_the_lowest_token() -> None:
    routing = ExpertChoice(1.0)(torch.zeros(24, 4))
    assert (routing.topk_ids[:6] >= 0).all()
    assert (routing.topk_ids[6:] < 0).all()
    drawn = ExpertChoice(1.0, ties="random")(torch.zeros(24, 4), Context(generator=torch.Generator().manual_seed(1)))
    assert counts_of(drawn.topk_ids, 4) == [6] * 4
    assert not torch.equal((drawn.topk_ids >= 0).any(1), (routing.topk_ids >= 0).any(1))


def test_row2_expert_choice_gradients() -> None:
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    for select in (ExpertChoice(2.0), ExpertChoice(tokens_per_expert=3, weights="softmax_over_tokens")):
        assert torch.autograd.gradcheck(lambda z, select=select: select(z).topk_weights, (logits,))


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_row2_expert_choice_caps_the_experts_of_a_token_near_the_optimum(backend: str, cap: int) -> None:
    """No token exceeds the cap and no expert its k. The assignment loses far fewer pairs than a cut, and its value is
    near the optimum by linear programming."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    num_tokens, count = 64, 64 * cap // E  # total capacity equals the maximum number of choices
    logits = torch.randn(num_tokens, E) + 2 * torch.randn(num_tokens, 1) * torch.randn(1, E)
    lost, value = {}, {}
    for iterations in (0, 100):
        routing = ExpertChoice(tokens_per_expert=count, max_experts_per_token=cap, cap_iterations=iterations)(logits)
        assert routing.topk_ids.shape[1] == cap
        assert max(counts_of(routing.topk_ids)) <= count
        lost[iterations] = 1 - float((routing.topk_ids >= 0).sum()) / (count * E)
        value[iterations] = float(routing.topk_weights.sum())
    assert lost[0] > 0.1
    assert lost[100] < 0.02
    per_expert = torch.eye(E).repeat_interleave(num_tokens, 1).numpy()
    per_token = torch.eye(num_tokens).repeat(1, E).numpy()
    found = optimize.linprog(
        -logits.softmax(-1).T.double().flatten().numpy(), A_ub=per_token, b_ub=[cap] * num_tokens, A_eq=per_expert,
        b_eq=[count] * E, bounds=(0, 1),
    )  # fmt: skip
    assert value[0] < value[100] <= -found.fun + 1e-4
    assert value[100] > -0.97 * found.fun


def test_row2_expert_choice_caps_ragged_sequences_apart() -> None:
    logits = torch.randn(26, E)
    sequence = torch.tensor([0] * 10 + [1] * 16)
    select = ExpertChoice(1.0, scope="sequence", max_experts_per_token=2)
    routing = select(logits, Context(sequence_ids=sequence))
    for s in range(2):
        alone = ExpertChoice(1.0, max_experts_per_token=2)(logits[sequence == s])
        assert torch.equal(routing.topk_ids[sequence == s], alone.topk_ids)


def test_row2_expert_choice_with_room_for_all_caps_nothing() -> None:
    logits = torch.randn(32, E)
    free = ExpertChoice(2.0)(logits)
    width = free.topk_ids.shape[1]
    for iterations in (0, 30):
        capped = ExpertChoice(2.0, max_experts_per_token=E, cap_iterations=iterations)(logits)
        assert torch.equal(capped.topk_ids[:, :width], free.topk_ids)
        assert (capped.topk_ids[:, width:] < 0).all()


def test_row2_expert_choice_falls_back_for_decoders() -> None:
    layer, x = layer_of(presets.expert_choice(evaluation=2), return_routing=True).eval(), torch.randn(9, H)
    routing, alone = layer(x)[1], layer(x[3:4])[1]
    assert torch.equal(routing.topk_ids, switchgear.route(linear(layer, x), 2).topk_ids)
    assert torch.equal(alone.topk_ids[0], routing.topk_ids[3])


def test_row2_expert_choice_of_ragged_sequences_is_that_of_each() -> None:
    logits = torch.randn(23, E)
    sequence = torch.tensor([5] * 9 + [2] * 14)[torch.randperm(23)]
    routing = ExpertChoice(2.0, scope="sequence")(logits, Context(sequence_ids=sequence))
    for s in (2, 5):
        mine = sequence == s
        alone = ExpertChoice(2.0)(logits[mine])
        width = alone.topk_ids.shape[1]
        assert torch.equal(routing.topk_ids[mine][:, :width], alone.topk_ids)
        torch.testing.assert_close(routing.topk_weights[mine][:, :width], alone.topk_weights)
        assert (routing.topk_ids[mine][:, width:] < 0).all()


def test_row33_pmoe_averages_the_best_patches_of_each_sample(backend: str) -> None:
    layer = layer_of(presets.pmoe(patches=3), activation="relu", gated=False)

    def loop(layer: Any, x: Tensor) -> Tensor:
        outputs = []
        for sample in x:
            z = linear(layer, sample)
            y = torch.zeros_like(sample)
            for e in range(E):
                patches = best(z[:, e], 3)
                share = z[patches, e].softmax(0)
                for g, t in zip(share, patches, strict=True):
                    one_hot = torch.eye(len(sample), dtype=x.dtype)[t][:, None]
                    y = y + one_hot * (g / 3 * expert(layer.experts, e, sample[t]))
            outputs.append(y)
        return torch.stack(outputs)

    assert_agrees(layer, loop, torch.randn(3, 7, H))


def test_row33_pmoe_of_all_patches_is_a_dense_mixture() -> None:
    logits = torch.randn(2 * 6, E)
    select = ExpertChoice(tokens_per_expert=6, scope="sequence", weights="softmax_over_tokens", scale=1 / 6)
    routing = select(logits, Context(sequence_length=6))
    assert torch.equal(routing.topk_ids, torch.arange(E, dtype=torch.int32).expand(12, E))
    torch.testing.assert_close(routing.topk_weights, logits.view(2, 6, E).softmax(1).view(12, E) / 6)
    for patches in (1, 4):
        select = ExpertChoice(tokens_per_expert=patches, scope="sequence", weights="softmax_over_tokens")
        ids = select(logits, Context(sequence_length=6)).topk_ids.view(2, -1)
        assert all(counts_of(sample) == [patches] * E for sample in ids)
    select = ExpertChoice(tokens_per_expert=4, weights="softmax_over_tokens")
    of_batch = select(logits)
    of_one = replace(select, scope="sequence")(logits, Context(sequence_length=12))
    assert torch.equal(of_batch.topk_ids, of_one.topk_ids)
    torch.testing.assert_close(of_batch.topk_weights, of_one.topk_weights)


@pytest.mark.parametrize(
    ("factor", "num_experts", "tokens"), [(0.29, 1, 29), (1.1, 10, 11), (1.0, 3, 33), (0.289, 1, 28)]
)
def test_a_share_is_that_of_the_factor_as_written(factor: float, num_experts: int, tokens: int) -> None:
    """In binary, 0.29 · 100 is below 29."""
    routing = ExpertChoice(factor)(torch.randn(100, num_experts))
    assert int((routing.topk_ids == 0).sum()) == tokens
