# SPDX-License-Identifier: BSD-3-Clause
"""Papers about which experts a token gets, against float64 loops and by their claims."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import switchgear
from errors import raises
from loops import E, H, I, assert_agrees, best, counts_of, expert, layer_of, linear, mixture, switch_loss
from switchgear import presets
from switchgear.functional import Routing
from switchgear.routing import (
    BalancedAssignment,
    Broadcast,
    Context,
    GumbelSoftmax,
    NoisyTopK,
    Random,
    RankK,
    RunningThreshold,
    SampledTopK,
    SkipBelow,
    SparseMixer,
    Threshold,
    TopK,
    TopP,
    consistency_loss,
)
from switchgear.routing.context import NOTHING_KNOWN

TRAINING = Context(training=True)


# ---- Switch ----------------------------------------------------------------------------------------------------------


def test_row1_switch_transformer_is_a_loop_with_buffers(backend: str) -> None:
    layer = layer_of(presets.switch(capacity_factor=1.0, jitter=0.0, balance=0.1))

    def loop(layer: Any, x: Tensor) -> Any:
        p = linear(layer, x).softmax(-1)
        ids = [best(row, 1) for row in p]
        room, kept = [math.ceil(len(x) / E)] * E, []
        for (e,) in ids:
            kept.append([e] if room[e] > 0 else [-1])
            room[e] -= 1
        assert [-1] in kept
        return mixture(layer.experts, x, kept, p.amax(-1, keepdim=True)), 0.1 * switch_loss(p, ids)

    assert_agrees(layer, loop, torch.randn(30, H))


def test_row1_switch_transformer_keeps_the_first_and_passes_the_others_through() -> None:
    layer = layer_of(presets.switch(capacity_factor=1.25, jitter=0.0), return_routing=True)
    x = torch.randn(100, H)
    y, routing = layer(x)
    wanted = linear(layer, x).argmax(-1)
    capacity = math.ceil(1.25 * 100 / E)
    for e in range(E):
        mine = (wanted == e).nonzero().flatten()
        kept = (routing.topk_ids[:, 0] == e).nonzero().flatten()
        assert torch.equal(kept, mine[:capacity])
    dropped = routing.topk_ids[:, 0] < 0
    assert routing.num_dropped == dropped.sum() > 0
    assert not y[dropped].any()
    assert torch.equal((x + y)[dropped], x[dropped])
    with torch.no_grad():
        layer.gate.score.weight.zero_()
    assert layer(torch.zeros(40, H))[1].num_dropped == 40 - math.ceil(1.25 * 40 / E)  # ties: all to expert 0


@pytest.mark.parametrize(("tokens", "room"), [(3, 4), (8, 4), (24, 4), (40, 7)])
def test_row1_switch_transformer_experts_take_four_tokens_at_least(tokens: int, room: int) -> None:
    layer = layer_of(presets.switch(), return_routing=True)
    with torch.no_grad():
        layer.gate.score.weight.zero_()  # ties: all to expert 0
    assert layer(torch.randn(tokens, H))[1].num_dropped == max(tokens - room, 0)


def test_row1_switch_transformer_costs_alpha_under_a_uniform_load() -> None:
    ids = torch.arange(4 * E, dtype=torch.int32)[:, None] % E
    routing = Routing(ids, torch.ones(4 * E, 1), torch.zeros(4 * E, E), E)
    loss = switchgear.MoE(H, I, E, **presets.switch(balance=0.25)).gate.balance[0]
    assert loss(routing, NOTHING_KNOWN) == 0.25


def test_gshard_finds_places_for_first_choices_first(backend: str) -> None:
    layer = layer_of(presets.gshard(balance=0.1))

    def loop(layer: Any, x: Tensor) -> Any:
        p = linear(layer, x).softmax(-1)
        ids = [best(row, 2) for row in p]
        room, kept = [math.ceil(2 * len(x) / E)] * E, [[-1, -1] for _ in ids]
        for k in range(2):
            for t, choice in enumerate(ids):
                if room[choice[k]] > 0:
                    kept[t][k] = choice[k]
                room[choice[k]] -= 1
        weights = [p[t, choice] / p[t, choice].sum() for t, choice in enumerate(ids)]
        return mixture(layer.experts, x, kept, weights), 0.1 * switch_loss(p, ids)

    assert_agrees(layer, loop, torch.randn(30, H))


# ---- BASE ------------------------------------------------------------------------------------------------------------


def test_row6_base_layer_weighs_the_assigned_expert_by_a_sigmoid(backend: str) -> None:
    layer = layer_of(presets.base_layer())
    assigned: list[int] = []

    def loop(layer: Any, x: Tensor) -> Tensor:
        z = linear(layer, x)
        if not assigned:  # the assignment itself is tested below
            assigned.extend(BalancedAssignment()(z.detach().float(), TRAINING).topk_ids[:, 0].tolist())
        return mixture(layer.experts, x, [[e] for e in assigned], z.sigmoid()[range(len(x)), assigned][:, None])

    assert_agrees(layer, loop, torch.randn(40, H))
    weight = layer.gate.score.weight
    torch.testing.assert_close(weight @ weight.T, 0.01 * torch.eye(E))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "skew"), [(64, 8, 0), (96, 12, 0), (256, 16, 0), (512, 16, 0), (256, 32, 20)]
)
def test_row6_base_layer_is_near_the_optimum(backend: str, num_tokens: int, num_experts: int, skew: float) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    logits = torch.randn(num_tokens, num_experts) + skew * torch.randn(num_experts)
    ids = BalancedAssignment()(logits, TRAINING).topk_ids[:, 0].long()
    assert counts_of(ids, num_experts) == [num_tokens // num_experts] * num_experts
    places = logits.double().repeat_interleave(num_tokens // num_experts, 1)
    rows, columns = optimize.linear_sum_assignment(places.numpy(), maximize=True)
    optimum = float(places[rows, columns].sum())
    eps = max(float(logits.max() - logits.min()) / 50, 1e-4)
    found = float(logits.double().gather(1, ids[:, None]).sum())
    assert optimum - num_tokens * eps <= found <= optimum + 1e-6
    room, greedy = [num_tokens // num_experts] * num_experts, 0.0
    for row in logits.double():
        e = best(row, 1, [e for e in range(num_experts) if room[e]])[0]
        room[e] -= 1
        greedy += float(row[e])
    assert found >= greedy
    torch.testing.assert_close(BalancedAssignment(max_iterations=10**5)(logits, TRAINING).topk_ids[:, 0].long(), ids)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_row6_base_layer_ends_on_any_logits(value: float) -> None:
    logits = torch.full((24, 4), value)
    assert counts_of(BalancedAssignment()(logits, TRAINING).topk_ids, 4) == [6] * 4
    logits = torch.randn(26, 4).masked_fill(torch.rand(26, 4) < 0.3, value)
    assert counts_of(BalancedAssignment()(logits, TRAINING).topk_ids, 4) == [7, 7, 6, 6]


def test_row6_base_layer_takes_the_best_expert_in_evaluation() -> None:
    layer, x = layer_of(presets.base_layer(), return_routing=True).eval(), torch.randn(30, H)
    assert torch.equal(layer(x)[1].topk_ids[:, 0].long(), linear(layer, x).argmax(-1))


# ---- top-p -----------------------------------------------------------------------------------------------------------


def test_row7_dynamic_top_p_is_a_loop_to_the_boundary(backend: str) -> None:
    layer = layer_of(presets.dynamic_top_p(balance=0.1, entropy=0.1))

    def loop(layer: Any, x: Tensor) -> Any:
        p = linear(layer, x).softmax(-1)
        ids = []
        for row in p:
            chosen, total = [], 0.0
            for e in best(row, E):
                chosen.append(e)
                total += float(row[e].detach())
                if total >= 0.4:
                    break
            ids.append(chosen)
        entropy = -sum(q * q.log() for row in p for q in row) / len(x)
        y = mixture(layer.experts, x, ids, [p[t, choice] for t, choice in enumerate(ids)])
        return y, 0.1 * switch_loss(p, ids) + 0.1 * entropy

    assert_agrees(layer, loop, 3 * torch.randn(20, H))


def test_row7_dynamic_top_p_between_one_expert_and_all(backend: str) -> None:
    logits = torch.randn(300, E)
    assert torch.equal(TopP(0.0)(logits).topk_ids, switchgear.route(logits, 1).topk_ids)
    for p in (1.0, 1.5):
        assert torch.equal(TopP(p)(logits).topk_ids, switchgear.route(logits, E).topk_ids)
    means = [(TopP(p)(logits).topk_ids >= 0).sum(1).float().mean().item() for p in torch.linspace(0, 1, 11).tolist()]
    assert means == sorted(means)
    best_first = torch.sort(logits.softmax(-1), dim=-1, descending=True, stable=True)
    for p in (0.2, 0.4, 0.8):
        routing = TopP(p)(logits)
        before = best_first.values.cumsum(-1) < p  # an expert is added while the better ones sum to less than p
        wanted = torch.cat((torch.ones(300, 1, dtype=torch.bool), before[:, :-1]), 1)[:, : routing.topk_ids.shape[1]]
        assert torch.equal(routing.topk_ids >= 0, wanted)
        assert torch.equal(routing.topk_ids[wanted].long(), best_first.indices[:, : wanted.shape[1]][wanted])
        torch.testing.assert_close(routing.topk_weights[wanted], best_first.values[:, : wanted.shape[1]][wanted])
    assert (TopP(0.9, max_experts=3)(logits).topk_ids >= 0).sum(1).max() == 3


def test_row7_dynamic_top_p_keeps_the_expert_that_meets_p_exactly() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for p, count in {0.5: 1, 0.500001: 2, 0.75: 2, 0.750001: 3, 0.875: 3}.items():
        assert (TopP(p)(logits).topk_ids >= 0).sum() == count


def test_row7_dynamic_top_p_gradients() -> None:
    logits = torch.randn(9, E, dtype=torch.float64, requires_grad=True)
    for select in (TopP(0.6), TopP(0.6, normalize=True, scale=2.0), Threshold(0.15, normalize=True)):
        assert torch.autograd.gradcheck(lambda z, select=select: select(z).topk_weights, (logits,))


# ---- GRIN ------------------------------------------------------------------------------------------------------------


def test_row12_grin_in_evaluation_is_the_router_of_phimoe(backend: str) -> None:
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe", reason="transformers is not installed")
    for logits in (torch.randn(50, 16), 0.01 * torch.randn(50, 16) + 1, torch.randn(50, 16) * 20):
        weights, ids = phimoe.sparsemixer(logits, jitter_eps=0.01, training=False)
        routing = SparseMixer(2, 0.01)(logits)
        assert torch.equal(routing.topk_ids.long(), ids)
        torch.testing.assert_close(routing.topk_weights, weights)


def masked_softmax(row: Tensor, taken: list[int], jitter: float) -> Tensor:
    """Softmax over the experts that are close to the best one not taken."""
    values = row.detach().tolist()
    top = max(z for e, z in enumerate(values) if e not in taken)
    out = [e in taken or (z != top and (top - z) / max(abs(z), top) > 2 * jitter) for e, z in enumerate(values)]
    return row.masked_fill(torch.tensor(out), -math.inf).softmax(-1)


def test_row12_grin_gradient_is_the_published_one() -> None:
    logits = (1 + 0.05 * torch.randn(200, 6, dtype=torch.float64)).requires_grad_()
    routing = SparseMixer(2, 0.02)(logits, TRAINING)
    direction = torch.randn(200, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad((routing.topk_weights * direction).sum(), logits)
    thirds = 0
    for t, row in enumerate(logits.detach()):
        wanted, taken = torch.zeros(6, dtype=torch.float64), []
        for k, e in enumerate(routing.topk_ids[t].tolist()):
            p = masked_softmax(row, taken, 0.02)
            factor = float(routing.topk_weights[t, k].detach() / p[e])
            assert factor == pytest.approx(1) or factor == pytest.approx(1 / 3)
            if factor < 0.5:
                assert e != int(p.argmax())
                thirds += 1
            w = direction[t, k] * p[e]
            wanted = wanted - p * w
            wanted[e] += w
            taken.append(e)
        torch.testing.assert_close(grad[t], wanted)
    assert thirds > 20


def test_row12_grin_draws_from_the_masked_softmax() -> None:
    logits = torch.tensor([1.0, 1.01, 0.98, 0.5]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(5)
    context = Context(training=True, generator=generator)
    routing = SparseMixer(1, 0.02)(logits, context)
    shares = torch.bincount(routing.topk_ids.flatten().long(), minlength=4) / 20_000
    p = masked_softmax(logits[0], [], 0.02)
    torch.testing.assert_close(shares, p, atol=0.01, rtol=0)
    factor = routing.topk_weights / p[routing.topk_ids.long()]
    others = factor[routing.topk_ids != 1]  # the best one always has its full weight
    assert (factor[routing.topk_ids == 1] == 1).all()
    assert (others < 0.5).float().mean().item() == pytest.approx(0.75, abs=0.02)
    generator.manual_seed(5)
    again = SparseMixer(1, 0.02)(logits, context)
    assert torch.equal(again.topk_ids, routing.topk_ids)
    assert torch.equal(again.topk_weights, routing.topk_weights)


def test_row12_phimoe_jitters_no_input_by_default() -> None:
    for jitter in (0.0, 0.3):
        options = presets.phimoe(input_jitter=jitter) if jitter else presets.phimoe()
        router, x = layer_of(options).gate, torch.randn(6, H)
        assert torch.equal(router(x).router_logits, router.logits(x)) == (not jitter)


def test_row12_grin_without_jitter_takes_the_best() -> None:
    logits = torch.randn(40, E)
    for context in (TRAINING, NOTHING_KNOWN):
        routing = SparseMixer(2, 0.0)(logits, context)
        assert torch.equal(routing.topk_ids, switchgear.route(logits, 2).topk_ids)
        torch.testing.assert_close(routing.topk_weights, torch.ones(40, 2))


def test_row12_grin_in_evaluation_is_a_loop_of_masked_softmaxes(backend: str) -> None:
    layer = layer_of(presets.grin(jitter=0.3)).eval()

    def loop(layer: Any, x: Tensor) -> Tensor:
        ids, weights = [], []
        for row in linear(layer, x):
            taken: list[int] = []
            weights.append([])
            for _ in range(2):
                p = masked_softmax(row, taken, 0.3)
                taken.append(best(p, 1)[0])
                weights[-1].append(p[taken[-1]])
            ids.append(taken)
        return mixture(layer.experts, x, ids, weights)

    assert_agrees(layer, loop, torch.randn(20, H))


def test_row12_grin_with_a_bias_in_evaluation_is_the_phimoe_of_the_overrides() -> None:
    """The bias chooses; the weights are softmaxes of the logits over the chosen expert and those near the best."""
    logits, bias = 1 + 0.1 * torch.randn(50, 8), torch.linspace(-0.2, 0.2, 8)
    bias[3], bias[6] = -math.inf, math.inf
    routing = SparseMixer(2, 0.05)(logits, NOTHING_KNOWN, bias)
    other = (logits + bias).index_fill(1, torch.tensor([6]), -math.inf).argmax(1).tolist()
    assert routing.topk_ids.tolist() == [[6, e] for e in other]
    for row, ids, weights in zip(logits.double(), routing.topk_ids.tolist(), routing.topk_weights, strict=True):
        for k, e in enumerate(ids):
            p = masked_softmax(row, ids[:k], 0.05)
            near = p > 0
            near[e] = True
            wanted = row.masked_fill(~near, -math.inf).softmax(-1)[e]
            torch.testing.assert_close(weights[k], wanted.float())


@pytest.mark.parametrize("select", [SparseMixer(1, 2.0), SampledTopK(1, 1.0), Random(1)], ids=str)
def test_draws_add_a_bias_to_the_logarithm_of_the_odds(select: Any) -> None:
    logits, bias = torch.tensor([0.5, 1.0, 0.8, 0.2]), torch.tensor([0.3, -math.inf, -0.4, 0.0])
    draws = 20_000
    ids = select(logits.expand(draws, 4), Context(training=True), bias).topk_ids.flatten().long()
    shares = torch.bincount(ids, minlength=4) / draws
    wanted = ((0 if isinstance(select, Random) else logits) + bias).softmax(-1)
    assert shares[1] == 0
    assert (shares - wanted).abs().max() < 5 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_noise_is_added_to_logits_with_a_bias_too(score_function: str) -> None:
    """A bias of zeros changes no choice; another is added to the scores of the noisy logits."""
    logits, bias, seed = torch.randn(200, 4), torch.tensor([0.3, 0.0, -0.2, 0.1]), 3

    def chosen(given: Tensor | None) -> Tensor:
        context = Context(training=True, generator=torch.Generator().manual_seed(seed))
        return NoisyTopK(1, 2.0, score_function)(logits, context, given).topk_ids[:, 0].long()

    noisy = logits.double() + 2 * torch.rand(200, 4, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(chosen(torch.zeros(4)), chosen(None))
    scores = noisy.softmax(-1) if score_function == "softmax" else noisy.sigmoid()
    assert torch.equal(chosen(bias), (scores + bias).argmax(1))


def test_row12_grin_layer_trains_through_the_estimate() -> None:
    layer = layer_of(presets.grin(jitter=0.5))
    layer(torch.randn(30, H)).square().sum().backward()
    assert layer.gate.weight.grad.any()
    assert set(layer.losses) == {"switch"}


def test_row12_grin_in_training_is_a_loop_of_what_it_drew(backend: str) -> None:
    """The estimate's value is factor · p and its gradient that of p, for the drawn experts and factors."""
    layer = layer_of(presets.grin(jitter=0.5, balance=0.1), return_routing=True)
    generator = torch.Generator()
    layer.register_forward_pre_hook(lambda module, args: generator.manual_seed(4) and None)
    x = torch.randn(20, H)
    routing = layer(x, generator=generator)[1]
    assert (routing.topk_ids[:, 0].long() != linear(layer, x).argmax(1)).any()

    def loop(layer: Any, x: Tensor) -> Any:
        ids, weights, z = routing.topk_ids.tolist(), [], linear(layer, x)
        for t, choice in enumerate(ids):
            weights.append([])
            for k, e in enumerate(choice):
                p = masked_softmax(z[t], choice[:k], 0.5)[e]
                factor = 1 if routing.topk_weights[t, k] / p > 0.5 else 1 / 3
                weights[-1].append(p + (factor - 1) * p.detach())
        return mixture(layer.experts, x, ids, weights), 0.1 * switch_loss(z.softmax(-1), ids)

    assert_agrees(layer, loop, x, generator=generator)


# ---- THOR ------------------------------------------------------------------------------------------------------------


def test_row18_thor_draws_every_expert_alike() -> None:
    draws = 8000
    ids = Random(1)(torch.empty(draws, E), TRAINING).topk_ids.flatten().long()
    expected, deviation = draws / E, math.sqrt(draws / E * (1 - 1 / E))
    assert (torch.bincount(ids, minlength=E) - expected).abs().max() < 4 * deviation
    context = Context(training=True, sequence_length=5)
    for level, groups in {"batch": 1, "sequence": 8}.items():
        chosen = Random(1, level)(torch.empty(40, E), context).topk_ids.view(groups, -1)
        assert (chosen == chosen[:, :1]).all()


@pytest.mark.parametrize("evaluation", ["token", "sequence"])
def test_row18_thor_draws_per_batch_in_training_and_per_token_or_sequence_in_evaluation(evaluation: str) -> None:
    """8 sequences of 40 tokens. Eight draws of eight experts are all the same once in 2 million runs."""
    select = presets.thor(**({} if evaluation == "token" else {"evaluation": evaluation}))["select"]
    logits = torch.empty(320, E)
    trained = select(logits, Context(training=True, sequence_length=40)).topk_ids
    assert (trained == trained[0]).all()
    drawn = select(logits, Context(sequence_length=40)).topk_ids.view(8, 40)
    assert len(drawn.unique()) > 1
    assert (drawn == drawn[:, :1]).all() == (evaluation == "sequence")


def test_random_names_a_wrong_evaluation() -> None:
    with raises(ValueError, "evaluation"):
        Random(1, evaluation="mean")


def test_row18_thor_is_the_drawn_expert_or_the_mean_of_all(backend: str) -> None:
    layer = layer_of(presets.thor(evaluation="ensemble"), return_routing=True)
    x = torch.randn(6, H)
    y, routing = layer(x)
    e = int(routing.topk_ids[0, 0])
    torch.testing.assert_close(y, expert(layer.experts, e, x), rtol=1e-4, atol=1e-6)
    assert not [*layer.gate.parameters()]  # no router

    def mean(layer: Any, x: Tensor) -> Tensor:
        return torch.stack([expert(layer.experts, e, x) for e in range(E)]).mean(0)

    assert_agrees(layer.eval(), mean, x)


def test_row18_thor_passes_agree_by_a_loss() -> None:
    layer, head = layer_of(presets.thor()), torch.nn.Linear(H, 10)
    x = torch.randn(2, 9, H)
    first, second = head(layer(x)), head(layer(x))
    loss = consistency_loss(first, second)
    assert loss >= 0
    assert consistency_loss(first, first) == 0
    torch.testing.assert_close(loss, consistency_loss(second, first))
    loss.backward()
    assert head.weight.grad.isfinite().all()


# ---- GW-MoE ----------------------------------------------------------------------------------------------------------


def test_row19_gw_moe_broadcasts_uncertain_tokens(backend: str) -> None:
    layer = layer_of(presets.gw_moe(top_k=2, max_fraction=0.25))

    def loop(layer: Any, x: Tensor) -> Tensor:
        p = linear(layer, x).softmax(-1)
        entropy = torch.stack([-sum(q * q.log() for q in row) for row in p])
        unsure = best(entropy, 5)
        ids = [list(range(E)) if t in unsure else best(row, 2) for t, row in enumerate(p)]
        return mixture(layer.experts, x, ids, [p[t, choice] for t, choice in enumerate(ids)])

    assert_agrees(layer, loop, torch.randn(20, H))


def test_row19_gw_moe_thresholds() -> None:
    logits, plain = torch.randn(40, E), TopK(2)(torch.zeros(1, E))
    never, always = Broadcast(TopK(2), math.inf, 1.0), Broadcast(TopK(2), 0.0, 1.0)
    plain = TopK(2)(logits)
    assert torch.equal(never(logits, TRAINING).topk_ids, plain.topk_ids)
    dense = always(logits, TRAINING)
    assert torch.equal(dense.topk_ids, torch.arange(E, dtype=torch.int32).expand(40, E))
    torch.testing.assert_close(dense.topk_weights, logits.softmax(-1))
    assert torch.equal(always(logits, NOTHING_KNOWN).topk_ids, plain.topk_ids)
    some = Broadcast(TopK(2), 0.0, 0.1)(logits, TRAINING)
    assert (some.topk_ids >= 0).sum() == 40 * 2 + 4 * (E - 2)  # FLOPs grow by fraction · (E - k) / k
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    cut = float(entropy.median())
    chosen = (Broadcast(TopK(2), cut, 1.0)(logits, TRAINING).topk_ids >= 0).sum(1) == E
    assert torch.equal(chosen, entropy >= cut)


@pytest.mark.parametrize("tokens", range(1, 11))
def test_row19_a_running_threshold_broadcasts_in_batches_of_any_size(tokens: int) -> None:
    """The share of a batch is none of ten tokens. Over n steps of rate 1 that of the threshold is within
    (ln E + 2) / n of the fraction, whatever comes."""
    none = Broadcast(TopK(2), 0.0, 0.05)(torch.randn(tokens, E), TRAINING)
    assert (none.topk_ids >= 0).sum() == 2 * tokens
    threshold = RunningThreshold(0.05, num_experts=E, rate=1.0)
    select, steps, unsure = Broadcast(TopK(2), threshold, 1.0), 300, 0
    for _ in range(steps):
        logits, limit = torch.randn(tokens, E), float(threshold.value)
        chosen = (select(logits, TRAINING).topk_ids >= 0).sum(1) == E
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        assert torch.equal(chosen, entropy > limit)
        unsure += int(chosen.sum())
        threshold.after_step(None, None)
    assert abs(unsure / (steps * tokens) - 0.05) < (math.log(E) + 2) / steps


def test_row19_after_step_moves_the_threshold_of_a_layer() -> None:
    layer, x = switchgear.MoE(H, 8, E, **presets.gw_moe(running=True)), torch.randn(4, H)
    threshold = layer.gate.select.entropy_above
    assert threshold.value == pytest.approx(math.log(E))
    threshold.value.zero_()
    layer(x)
    layer(x[:1])
    switchgear.after_step(layer)
    assert threshold.value == pytest.approx(0.1 * (1 - 0.05))
    switchgear.after_step(layer)  # without a call
    layer.eval()(x)
    switchgear.after_step(layer)
    assert threshold.value == pytest.approx(0.1 * (1 - 0.05))
    assert any(name.endswith(".value") for name in layer.state_dict())


# ---- GG MoE ----------------------------------------------------------------------------------------------------------


def test_row25_gumbel_gate_without_noise_is_a_softmax_mixture(backend: str) -> None:
    layer = layer_of(presets.gumbel_gate(tau=0.5, samples=0)).eval()

    def loop(layer: Any, x: Tensor) -> Tensor:
        g = ((linear(layer, x) + layer.gate.bias) / 0.5).softmax(-1)
        return mixture(layer.experts, x, [list(range(E))] * len(x), g)

    assert_agrees(layer, loop, torch.randn(12, H))
    x = torch.randn(5, H)
    assert torch.equal(layer(x), layer(x))


def test_row25_gumbel_gate_averages_five_draws_in_evaluation() -> None:
    torch.manual_seed(0)
    router = layer_of(presets.gumbel_gate()).eval().gate.double()
    x = 6 * torch.randn(1, H, dtype=torch.float64)
    z = x @ router.weight.T + router.bias
    weights = router(x.expand(4000, H)).topk_weights
    draws = torch.nn.functional.gumbel_softmax(z.expand(20_000, E), tau=1.0)
    error = 6 * (2 * draws.var(0) / 20_000).sqrt()  # six deviations of a difference of two means
    assert ((weights.mean(0) - draws.mean(0)).abs() <= error).all()
    assert ((z.softmax(-1)[0] - draws.mean(0)).abs() > error).any()
    torch.testing.assert_close(weights.var(0).sum() * 5, draws.var(0).sum(), rtol=0.1, atol=0)


def test_row25_gumbel_gate_sums_to_one_and_is_straight_through() -> None:
    logits = torch.randn(4000, E, dtype=torch.float64, requires_grad=True)
    for context in (TRAINING, NOTHING_KNOWN):
        for samples in (0, 3):
            torch.testing.assert_close(
                GumbelSoftmax(0.7, samples=samples)(logits, context).topk_weights.sum(1),
                torch.ones(4000, dtype=torch.float64),
            )
    generator = torch.Generator().manual_seed(2)
    context = Context(training=True, generator=generator)
    soft = GumbelSoftmax(0.7)(logits, context)
    generator.manual_seed(2)
    hard = GumbelSoftmax(0.7, hard=True)(logits, context)
    assert torch.equal(hard.topk_ids[:, 0].long(), soft.topk_weights.argmax(1))
    assert (hard.topk_weights == 1).all()
    chosen = soft.topk_weights.gather(1, hard.topk_ids.long())
    (grad,) = torch.autograd.grad(hard.topk_weights.sum(), logits)
    (wanted,) = torch.autograd.grad(chosen.sum(), logits)
    torch.testing.assert_close(grad, wanted)
    drawn = torch.bincount(
        GumbelSoftmax(hard=True)(logits[:1].expand(20_000, E), TRAINING).topk_ids.flatten().long(), minlength=E
    )
    torch.testing.assert_close(drawn / 20_000, logits[0].softmax(-1).float(), atol=0.015, rtol=0)


# ---- selections of papers without a preset ---------------------------------------------------------------------------


def test_row57_ladimo_threshold_hits_an_average_number() -> None:
    logits = torch.randn(500, E)
    threshold = Threshold.calibrate(logits, 2.5)
    routing = Threshold(threshold)(logits)
    assert (routing.topk_ids >= 0).sum() == 1250
    p = logits.softmax(-1)
    extra = (p >= threshold).sum(1).clamp(min=1)
    assert torch.equal((routing.topk_ids >= 0).sum(1), extra)
    assert (Threshold(2.0, min_experts=0)(logits).topk_ids < 0).all()
    assert (Threshold(0.0, max_experts=3)(logits).topk_ids >= 0).sum(1).eq(3).all()


def test_row78_self_contrast_takes_ranks() -> None:
    logits = torch.randn(30, E)
    order = logits.argsort(1, descending=True)
    assert torch.equal(RankK((2,))(logits).topk_ids[:, 0].long(), order[:, 2])
    two, plain = RankK((0, 1))(logits), TopK(2)(logits)
    assert torch.equal(two.topk_ids, plain.topk_ids)
    assert torch.equal(two.topk_weights, plain.topk_weights)


def test_row45_expert_skipping_between_nothing_and_all_but_the_best() -> None:
    logits = torch.randn(60, E)
    plain = TopK(2, normalize=True)(logits)
    never = SkipBelow(TopK(2, normalize=True), 0.0)(logits)
    assert torch.equal(never.topk_ids, plain.topk_ids)
    torch.testing.assert_close(never.topk_weights, plain.topk_weights)
    assert torch.equal(SkipBelow(TopK(2), 1.0)(logits).topk_ids[:, 0], plain.topk_ids[:, 0])
    beta = SkipBelow.calibrate(plain)
    some_empty = plain._replace(topk_weights=torch.cat((plain.topk_weights, torch.zeros(100, 2))))
    assert SkipBelow.calibrate(some_empty) == beta
    half = SkipBelow(TopK(2, normalize=True), beta)(logits)
    assert 25 <= (half.topk_ids < 0).sum() <= 35
    torch.testing.assert_close(half.topk_weights.sum(1), torch.ones(60))
    importance = torch.randn(60)
    spared = SkipBelow(TopK(2), 1.0, protect=0.1)(logits, Context(importance=importance)).topk_ids
    assert torch.equal((spared >= 0).all(1).nonzero().flatten(), importance.topk(6).indices.sort().values)


def test_row51_knowledge_augmentation_samples_without_replacement() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, 4)
    ids = SampledTopK(2, p_sample=1.0)(logits, TRAINING).topk_ids.long()
    assert (ids[:, 0] != ids[:, 1]).all()
    p = logits[0].softmax(-1)
    first = torch.bincount(ids[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(first, p, atol=0.015, rtol=0)
    second = torch.tensor([sum(float(p[i] * p[j] / (1 - p[i])) for i in range(4) if i != j) for j in range(4)])
    torch.testing.assert_close(torch.bincount(ids[:, 1], minlength=4) / 20_000, second, atol=0.015, rtol=0)
    some = SampledTopK(2, p_sample=0.05)(torch.randn(1, 8).expand(4000, 8), TRAINING).topk_ids
    assert 0 < (some != some.mode(0).values).any(1).float().mean() < 0.06
    for options in ({"score_function": "sigmoid"}, {"normalize": True, "scale": 2.5}):
        best, wanted = SampledTopK(2, p_sample=0.0, **options)(logits), TopK(2, **options)(logits)
        assert torch.equal(best.topk_ids, wanted.topk_ids)
        torch.testing.assert_close(best.topk_weights, wanted.topk_weights)


def test_deepseek_v3_chooses_within_groups_by_bias(backend: str) -> None:
    layer = presets.build(H, I, 16, **presets.deepseek_v3(top_k=3, num_groups=4, topk_groups=2, balance=0.1))
    with torch.no_grad():
        layer.gate.e_score_correction_bias.copy_(0.3 * torch.randn(16))

    def loop(layer: Any, x: Tensor) -> Any:
        rows = x.reshape(-1, H)
        s = (rows @ layer.gate.weight.T).sigmoid()
        biased = s + layer.gate.e_score_correction_bias
        ids, weights = [], []
        for score, value in zip(s, biased, strict=True):
            group = torch.stack([value[4 * g : 4 * g + 4].topk(2).values.sum() for g in range(4)])
            allowed = [e for g in best(group, 2) for e in range(4 * g, 4 * g + 4)]
            ids.append(best(value, 3, sorted(allowed)))
            weights.append(2.5 * score[ids[-1]] / score[ids[-1]].sum())
        shared = layer.shared_experts
        h = torch.nn.functional.silu(rows @ shared.gate_proj.weight.T) * (rows @ shared.up_proj.weight.T)
        y = mixture(layer.experts, rows, ids, weights) + h @ shared.down_proj.weight.T
        p = s / s.sum(-1, keepdim=True)
        losses = [switch_loss(p[b * 6 : b * 6 + 6], ids[b * 6 : b * 6 + 6]) / 3 for b in range(3)]
        return y.view(x.shape), 0.1 * sum(losses) / 3

    assert_agrees(layer, loop, torch.randn(3, 6, H))
