# SPDX-License-Identifier: BSD-3-Clause
"""Losses against their formulas as plain loops, their gradients, and the properties that each paper claims."""

from __future__ import annotations

import math
import socket
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

import switchgear
from errors import raises
from switchgear.functional import Routing
from switchgear.papers.parts import losses as paper_losses
from switchgear.papers.parts.auxiliary import (
    GradientConflict,
    consistency_loss,
    gradient_conflict_loss,
    gradient_conflicts,
    output_regularization,
)
from switchgear.routing import (
    AdaptiveCoefficient,
    AdaptiveSparsity,
    Linear,
    LossFreeBias,
    Masked,
    PerSequence,
    RunningCap,
    Sum,
    TopK,
    TopP,
    balance,
    losses,
)
from switchgear.routing.context import NOTHING_KNOWN, Context

T, E, K = 12, 6, 2


def routing(logits: Tensor, top_k: int = K) -> Routing:
    return switchgear.route(logits, top_k)


def counts_of(ids: Tensor) -> list[int]:
    return [int((ids == e).sum()) for e in range(E)]


@pytest.fixture
def p() -> Tensor:
    return torch.randn(T, E, dtype=torch.float64).softmax(-1)


@pytest.fixture
def ids() -> Tensor:
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    ids[3, 1] = ids[7, 0] = -1
    return ids


# ---- the formulas ----------------------------------------------------------------------------------------------------


def test_counts_skip_holes(ids: Tensor) -> None:
    counts = balance.count_tokens(ids, E)
    assert counts.tolist() == counts_of(ids)
    assert counts.sum() == T * K - 2
    assert balance.count_tokens(ids[:0], E).tolist() == [0] * E


def test_switch_loss(p: Tensor, ids: Tensor) -> None:
    counts = balance.count_tokens(ids, E)
    wanted = E * sum(counts_of(ids)[e] / T * sum(p[t, e] for t in range(T)) / T for e in range(E))
    torch.testing.assert_close(balance.switch_loss(p, counts, T), wanted)
    logits = torch.randn(T, E)
    routed = routing(logits)
    ours = balance.switch_loss(logits.softmax(-1), balance.count_tokens(routed.topk_ids, E), T)
    torch.testing.assert_close(ours, switchgear.load_balancing_loss(logits, routed.topk_ids))
    assert balance.switch_loss(p[:0], counts * 0, 0) == 0


def test_sequence_loss_is_the_mean_of_the_sequences(p: Tensor, ids: Tensor) -> None:
    sequence = torch.tensor([2, 0, 2, 2, 0, 0, 2, 0, 0, 0, 2, 2])  # sequence 1 is empty
    parts = []
    for s in range(3):
        mine = sequence == s
        parts.append(balance.switch_loss(p[mine], balance.count_tokens(ids[mine], E), int(mine.sum())))
    wanted = torch.stack(parts).mean()
    torch.testing.assert_close(balance.sequence_switch_loss(p, ids, sequence, 3), wanted)


def test_device_loss(p: Tensor, ids: Tensor) -> None:
    groups = torch.tensor([0, 1, 0, 2, 2, 2])
    wanted = torch.zeros((), dtype=torch.float64)
    for g in range(3):
        mine = [e for e in range(E) if groups[e] == g]
        f = sum(E / sum(counts_of(ids)) * counts_of(ids)[e] for e in mine) / len(mine)
        wanted = wanted + f * sum(p[:, e].mean() for e in mine)
    torch.testing.assert_close(paper_losses.device_loss(p, ids, groups), wanted)
    even = torch.arange(2 * E, dtype=torch.int32).view(E, 2) % E
    torch.testing.assert_close(paper_losses.device_loss(torch.full((E, E), 1 / E), even, groups), torch.tensor(1.0))


def test_null_experts_share_one_load(p: Tensor, ids: Tensor) -> None:
    counts = balance.count_tokens(ids, E)
    assert torch.equal(balance.null_aware_switch_loss(p, counts, T, 0), balance.switch_loss(p, counts, T))
    shared = counts.double()
    shared[4:] = shared[4:].mean()
    torch.testing.assert_close(balance.null_aware_switch_loss(p, counts, T, 2), balance.switch_loss(p, shared, T))
    swapped = counts[[0, 1, 2, 3, 5, 4]]  # the real experts' terms do not change, nor does anything else
    assert torch.equal(
        balance.null_aware_switch_loss(p, swapped, T, 2), balance.null_aware_switch_loss(p, counts, T, 2)
    )


def test_parameter_penalty(p: Tensor, ids: Tensor) -> None:
    widths = torch.tensor([1.0, 1, 2, 4, 8, 3])
    wanted = E * sum(counts_of(ids)[e] / T * widths[e] * p[:, e].mean() for e in range(E))
    torch.testing.assert_close(paper_losses.parameter_penalty(p, ids, widths), wanted)
    counts = balance.count_tokens(ids, E)
    equal = paper_losses.parameter_penalty(p, ids, torch.full((E,), 5.0))
    torch.testing.assert_close(equal, 5 * balance.switch_loss(p, counts, T))


def test_importance_and_load(ids: Tensor) -> None:
    weights = torch.rand(T, K)
    importance = torch.tensor([weights[ids == e].sum() for e in range(E)])
    wanted = importance.var(correction=0) / importance.mean() ** 2
    torch.testing.assert_close(balance.importance_loss(ids, weights, E), wanted)
    assert balance.squared_variation(torch.full((5,), 3.0)) == 0

    logits = torch.randn(T, E, dtype=torch.float64)
    load = torch.zeros(E, dtype=torch.float64)
    for t in range(T):
        for e in range(E):
            others = torch.cat((logits[t, :e], logits[t, e + 1 :])).sort(descending=True).values
            z = (logits[t, e] - others[K - 1]) / 0.7
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    torch.testing.assert_close(balance.smooth_load(logits, K, 0.7), load)
    assert balance.smooth_load(logits, E).tolist() == [T] * E
    hard = balance.smooth_load(logits, K, 1e-9)
    assert torch.equal(hard.long(), balance.count_tokens(logits.topk(K).indices.int(), E))
    counts = torch.arange(T) % (E + 1)  # from no expert to all
    of_each = sum(balance.smooth_load(logits[t : t + 1], int(counts[t]), 0.7) for t in range(T))
    torch.testing.assert_close(balance.smooth_load(logits, counts, 0.7), of_each)
    assert balance.smooth_load(logits, 0).tolist() == [0] * E
    (grad,) = torch.autograd.grad(balance.smooth_load(logits.requires_grad_(), counts, 0.7)[0], logits)
    assert grad.isfinite().all()
    assert grad[1:E].any(1).all()


@pytest.mark.parametrize("normalize", [None, "zscore"])
def test_the_load_under_learned_noise_is_that_of_its_equations(normalize: str | None) -> None:
    """Σ_t Φ((x·w_e - kth_excluding(H, K, e)) / softplus(x·n_e)), H with noise (arXiv:1701.06538, equations 8 to 10),
    over the experts that are open; values, and gradients of both weights."""
    width, closed = 5, 1
    score = partial(Linear, noise=True, normalize=normalize)
    select, loss = partial(Masked, TopK(K), _closing(closed)), losses.ImportanceLoad(0.0, 0.5)
    router = switchgear.Router(width, E, score=score, select=select, balance=[loss]).double()
    weights = router.score.weight, router.score.noise_weight
    nn.init.normal_(router.score.noise_weight)
    x, generator = torch.randn(T, width, dtype=torch.float64), torch.Generator().manual_seed(0)
    found = router(x, Context(generator=generator)).losses["importance_load"]
    noise = torch.empty(T, E, dtype=torch.float64).normal_(generator=generator.manual_seed(0))

    load = [torch.zeros((), dtype=torch.float64) for _ in range(E)]
    for t in range(T):
        clean, deviation = (w @ x[t] for w in weights)
        deviation = (1 + deviation.exp()).log()
        noisy = clean + deviation * noise[t]
        for e in set(range(E)) - {closed}:
            others = sorted((noisy[i] for i in range(E) if i not in (e, closed)), reverse=True)
            z = (clean[e] - others[K - 1]) / deviation[e]
            load[e] = load[e] + 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    total = torch.stack(load)
    wanted = 0.5 * total.var(correction=0) / total.mean() ** 2
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for grad, expected in zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def _closing(expert: int) -> Any:
    def mask(logits: Tensor, context: Context) -> Tensor:
        return torch.arange(logits.shape[1]).expand_as(logits) != expert

    return mask


@pytest.mark.parametrize(
    "score", [partial(Sum, partial(Linear, noise=True), Linear), partial(PerSequence, partial(Linear, noise=True))]
)
def test_noise_of_a_part_of_a_score_is_not_that_of_its_logits(score: Any) -> None:
    router = switchgear.Router(5, E, score=score, select=TopK(K), balance=[losses.ImportanceLoad(0.0, 1.0)])
    routed = router(torch.randn(3, 4, 5))
    load = balance.smooth_load(routed.router_logits, K)
    assert torch.equal(routed.losses["importance_load"], balance.squared_variation(load))


@pytest.mark.parametrize("raw", [-1e3, -1e30, 1e30])
def test_gradients_of_the_load_are_finite_for_any_deviation(raw: float) -> None:
    logits = torch.randn(T, E, requires_grad=True)
    deviation = torch.full((T, E), raw, requires_grad=True)
    for top_k in (0, K, E):
        load = balance.smooth_load(logits, top_k, nn.functional.softplus(deviation), logits * 2)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(load.sum(), (logits, deviation)))


def test_entropies(p: Tensor) -> None:
    wanted = -sum(p[t, e] * p[t, e].log() for t in range(T) for e in range(E)) / T
    torch.testing.assert_close(paper_losses.entropy_loss(p), wanted)
    mean = p.mean(0)
    torch.testing.assert_close(paper_losses.batch_entropy_loss(p), (mean * mean.log()).sum())
    one_hot = torch.eye(E, requires_grad=True)
    (grad,) = torch.autograd.grad(paper_losses.entropy_loss(one_hot), one_hot)
    assert grad.isfinite().all()


def test_locality(p: Tensor) -> None:
    local = torch.tensor([True, False, True, False, False, False])
    everything = p.mean(0)
    inside = everything * local / (everything * local).sum()
    divergence = (inside[local] * (inside[local] / everything[local]).log()).sum()
    torch.testing.assert_close(paper_losses.locality_loss(p, local), divergence)
    stays = p * local / (p * local).sum(-1, keepdim=True)
    assert paper_losses.locality_loss(stays, local).abs() < 1e-12
    assert paper_losses.locality_loss(p[:0], local) == 0


def test_cluster_variance() -> None:
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    alike = torch.tensor([[0.3, 0.3, 0.1, 0.1, 0.1, 0.1], [0.05, 0.05, 0.05, 0.05, 0.4, 0.4]])
    within = torch.tensor([[0.3, 0.1, 0.3, 0.1, 0.1, 0.1]])
    assert paper_losses.cluster_variance_loss(alike, groups).abs() < 1e-6
    assert paper_losses.cluster_variance_loss(torch.eye(E), groups).abs() < 1e-6  # sure of each token, even over all
    a = within.double()[0]
    torch.testing.assert_close(
        paper_losses.cluster_variance_loss(within.double(), groups), E * a.view(3, 2).var(1).mean(), rtol=1e-12, atol=0
    )
    is_open = torch.tensor([[True, False, True, True, False, False]])  # one, two and none stay
    torch.testing.assert_close(
        paper_losses.cluster_variance_loss(within.double(), groups, is_open), E * a[2:4].var() / 2, rtol=1e-12, atol=0
    )


def test_localized_balance() -> None:
    expert_types, sequence_types = torch.tensor([0, 0, 1]), torch.tensor([0, 1])
    ids = torch.arange(3).repeat(4, 1).int()  # dense: each expert has two tokens in each of two sequences
    sequence = torch.tensor([0, 1, 1, 0])
    weights = torch.rand(4, 3).double()
    z = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(4):
        for e in range(3):
            z[sequence[t], e] += weights[t, e] * (1.1 if expert_types[e] == sequence_types[sequence[t]] else 0.9)
    loss = paper_losses.localized_balance_loss(ids, weights, expert_types, sequence_types, sequence, 0.1)
    torch.testing.assert_close(loss, z.var(correction=0) / z.mean())
    even = torch.where(expert_types == sequence_types[sequence][:, None], 1 / 1.1, 1 / 0.9)
    even = paper_losses.localized_balance_loss(ids, even, expert_types, sequence_types, sequence, 0.1)
    assert even.abs() < 1e-12


def test_totals_of_many_weights_lose_no_digits() -> None:
    tokens, eps = 200_000, torch.finfo(torch.float32).eps
    ids, weights = torch.arange(E).repeat(tokens, 1).int(), torch.rand(tokens, E) + 0.5  # loads are nearly even
    expert_types, sequence_types = torch.arange(E) % 2, torch.tensor([0, 1])
    sequence = torch.arange(tokens) % 2
    exact = weights.double()
    totals = torch.tensor([float(exact[:, e].sum()) for e in range(E)], dtype=torch.float64)
    of_sequence = torch.stack([exact[sequence == s].sum(0) for s in range(2)])
    z = of_sequence * (0.9 + 0.2 * (expert_types == sequence_types[:, None]).double())
    importance = balance.importance_loss(ids, weights, E)
    of_one = balance.sequence_switch_loss(weights, ids[:, :1], torch.zeros(tokens), 1)
    localized = paper_losses.localized_balance_loss(ids, weights, expert_types, sequence_types, sequence, 0.1)
    assert importance.dtype is localized.dtype is of_one.dtype is torch.float32
    for found, wanted in (
        (importance, totals.var(correction=0) / totals.mean() ** 2),
        (localized, z.var(correction=0) / z.mean()),
        (of_one, E * totals[0] / tokens),
    ):
        assert abs(float(found) / float(wanted) - 1) < 2 * eps


def test_losses_of_half_precision_are_those_in_float32(ids: Tensor) -> None:
    p = torch.randn(T, E).softmax(-1).half()
    weights, groups, sequence = p.gather(1, ids.clamp(min=0).long()), torch.arange(E) % 2, torch.arange(T) % 3
    counts = torch.full((E,), 70_000)  # infinite in float16

    def all_of_them(p: Tensor, weights: Tensor) -> list[Tensor]:
        return [
            balance.switch_loss(p, counts, 6 * 70_000),
            balance.null_aware_switch_loss(p, counts, 6 * 70_000, 2),
            balance.sequence_switch_loss(p, ids, sequence, 3),
            paper_losses.device_loss(p, ids, groups),
            paper_losses.alignment_loss(p, ids, groups),
            paper_losses.parameter_penalty(p, ids, torch.arange(E) * 20_000),
            balance.importance_loss(ids, weights, E),
            paper_losses.entropy_loss(p),
            paper_losses.batch_entropy_loss(p),
            paper_losses.locality_loss(p, groups == 1),
            paper_losses.cluster_variance_loss(p, groups),
            paper_losses.localized_balance_loss(ids, weights, groups, torch.tensor([0, 1, 1]), sequence),
        ]

    assert all(map(torch.equal, all_of_them(p, weights), all_of_them(p.float(), weights.float())))


def test_gradients_in_float64(ids: Tensor) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    groups, sequence = torch.tensor([0, 1, 0, 2, 2, 2]), torch.arange(T) % 3
    counts = balance.count_tokens(ids, E)
    types = torch.tensor([0, 1, 1])

    def all_of_them(logits: Tensor) -> tuple[Tensor, ...]:
        p = logits.softmax(-1)
        weights = p.gather(1, ids.clamp(min=0).long())
        return (
            balance.switch_loss(p, counts, T),
            balance.sequence_switch_loss(p, ids, sequence, 3),
            paper_losses.device_loss(p, ids, groups),
            paper_losses.parameter_penalty(p, ids, torch.arange(E) + 1.0),
            balance.importance_loss(ids, weights, E),
            balance.squared_variation(balance.smooth_load(logits, K)),
            paper_losses.entropy_loss(p),
            paper_losses.batch_entropy_loss(p),
            paper_losses.locality_loss(p, groups == 2),
            paper_losses.cluster_variance_loss(p, groups),
            paper_losses.localized_balance_loss(ids, weights, groups, types, sequence),
        )

    assert torch.autograd.gradcheck(all_of_them, (logits,))


def test_probabilities() -> None:
    logits = torch.randn(T, E)
    plain = routing(logits)
    torch.testing.assert_close(balance.router_probabilities(plain), logits.softmax(-1))
    told = plain._replace(scores=logits.sigmoid())
    wanted = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    torch.testing.assert_close(balance.router_probabilities(told), wanted)
    torch.testing.assert_close(balance.router_probabilities(plain, "sigmoid"), wanted)
    torch.testing.assert_close(balance.router_probabilities(told, "softmax"), logits.softmax(-1))
    with raises(ValueError, "score_function"):
        balance.router_probabilities(plain, "relu")


def test_max_violation() -> None:
    assert balance.max_violation(torch.tensor([[4, 4], [6, 2], [0, 0]])).tolist() == [0, 0.5, 0]


# ---- as options of a router ------------------------------------------------------------------------------------------


def test_uniform_routing_costs_the_coefficient() -> None:
    """L_aux = α for top-1, and for any K with per_choice."""
    for top_k in (1, 3):
        ids = torch.arange(E * top_k, dtype=torch.int32).view(E, top_k) % E
        even = Routing(ids, torch.ones(E, top_k), torch.zeros(E, E), E)
        torch.testing.assert_close(losses.SwitchLoss(1e-2)(even, NOTHING_KNOWN), torch.tensor(1e-2 * top_k))
        loss = losses.SwitchLoss(1e-2, per_choice=True)(even, NOTHING_KNOWN)
        torch.testing.assert_close(loss, torch.tensor(1e-2))


@pytest.mark.parametrize(
    "loss",
    [
        losses.SwitchLoss(per_choice=True),
        losses.SwitchLoss(scope="sequence", per_choice=True),
        losses.SwitchLoss(scope="global", per_choice=True),
        losses.ImportanceLoad(),
        paper_losses.DeviceBalance([0, 0, 1, 1, 2, 2]),
    ],
    ids=lambda loss: f"{type(loss).__name__} {getattr(loss, 'scope', '')}",
)
def test_empty_columns_change_no_loss(loss: Any) -> None:
    """As many as a wider token, or a compiled graph, adds."""
    logits = torch.randn(T, E)
    routed = TopP(0.4)(logits)
    widened = routed._replace(
        topk_ids=nn.functional.pad(routed.topk_ids, (0, 3), value=-1),
        topk_weights=nn.functional.pad(routed.topk_weights, (0, 3)),
    )
    context = Context(sequence_length=T // 2, training=True)
    assert torch.equal(loss(widened, context), loss(routed, context))


def test_per_choice_divides_by_the_mean_number_of_choices() -> None:
    """Tokens with one and with three experts, evenly loaded: α for each sequence and for all."""
    ids = torch.full((2 * E, 3), -1, dtype=torch.int32)
    ids[:E, 0] = torch.arange(E)
    ids[E:] = torch.arange(3 * E).view(E, 3) % E
    even = Routing(ids, torch.ones(2 * E, 3), torch.zeros(2 * E, E), E)
    context = Context(sequence_length=E)
    for scope in ("micro", "sequence", "global"):
        loss = losses.SwitchLoss(1e-2, scope, per_choice=True)(even, context)
        torch.testing.assert_close(loss, torch.tensor(1e-2))
        torch.testing.assert_close(losses.SwitchLoss(1e-2, scope)(even, context), torch.tensor(2e-2))


def test_sequence_scope_is_stricter_than_the_batch_on_skewed_domains() -> None:
    """Each sequence uses half of the experts evenly; together they use all."""
    logits = torch.full((40, 4), -9.0)
    logits[torch.arange(20), torch.arange(20) % 2] = 9.0
    logits[torch.arange(20, 40), 2 + torch.arange(20) % 2] = 9.0
    routed, context = routing(logits, 1), Context(sequence_length=20)
    batch = losses.SwitchLoss(1.0)(routed, context)
    sequence = losses.SwitchLoss(1.0, "sequence")(routed, context)
    torch.testing.assert_close(batch, torch.tensor(1.0))
    torch.testing.assert_close(sequence, torch.tensor(2.0))


GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


LOSSES = [
    losses.SwitchLoss(),
    losses.SwitchLoss(scope="sequence", per_choice=True),
    losses.SwitchLoss(scope="global", accumulate=True),
    paper_losses.NullAwareSwitchLoss(num_null=2),
    losses.ZLoss(),
    losses.ImportanceLoad(),
    paper_losses.EntropyLoss(),
    paper_losses.BatchEntropy(),
    paper_losses.ChoiceLoss(),
    paper_losses.ParamPenalty([1.0] * E),
    paper_losses.DeviceBalance(GROUPS),
    paper_losses.AlignmentLoss(GROUPS),
    paper_losses.LocalityLoss(GROUPS, 0),
    paper_losses.ClusterVariance(GROUPS),
    paper_losses.LocalizedBalance(GROUPS),
    AdaptiveSparsity(2, E),
]


@pytest.mark.parametrize("shape", [(1, 0, 8), (0, 5, 8)])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_losses_of_no_tokens_are_zero(loss: Any, shape: tuple[int, int, int]) -> None:
    moe = switchgear.MoE(8, 6, E, K, balance=[loss])
    moe(torch.zeros(shape), embedding=torch.zeros(shape[0], dtype=torch.int64))
    (value,) = moe.losses.values()
    assert value == 0
    value.backward()
    assert not moe.gate.weight.grad.any()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_token_costs_as_much_as_several_like_it(loss: Any) -> None:
    """Losses are means over tokens; but LoRAMoE's is of total weights."""
    moe, x = switchgear.MoE(8, 6, E, K, balance=[loss]), torch.randn(1, 1, 8)
    found = []
    for times in (1, 3):
        moe(x.expand(1, times, 8), embedding=torch.zeros(1, dtype=torch.int64))
        found += moe.losses.values()
    factor = 3 if isinstance(loss, paper_losses.LocalizedBalance) else 1
    torch.testing.assert_close(found[1], factor * found[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (losses.SwitchLoss, "coefficient"),
        (losses.ZLoss, "coefficient"),
        (paper_losses.EntropyLoss, "coefficient"),
        (paper_losses.BatchEntropy, "coefficient"),
        (paper_losses.ChoiceLoss, "coefficient"),
        (losses.ImportanceLoad, "importance"),
        (lambda value: losses.ImportanceLoad(load=value), "load"),
        (lambda value: losses.ImportanceLoad(noise_std=value), "noise_std"),
        (partial(paper_losses.DeviceBalance, GROUPS), "coefficient"),
        (lambda value: paper_losses.LocalizedBalance(GROUPS, delta=value), "delta"),
        (LossFreeBias, "rate"),
        (AdaptiveCoefficient, "xi"),
        (lambda value: AdaptiveCoefficient(alpha_max=value), "alpha_max"),
        (lambda value: AdaptiveCoefficient(beta=value), "beta"),
        (lambda value: AdaptiveCoefficient(initial=value), "initial"),
        (lambda value: AdaptiveSparsity(value, E), "top_k"),
        (lambda value: AdaptiveSparsity(2, E, initial=value), "initial"),
        (lambda value: AdaptiveSparsity(2, E, rate=value), "rate"),
    ],
)
def test_coefficients_are_finite_numbers(make: Any, name: str) -> None:
    with raises(TypeError, name):
        make("x")
    with raises(ValueError, name):
        make(math.nan)


def test_controllers_refuse_numbers_out_of_range() -> None:
    for beta in (-0.1, 2.0):
        with raises(ValueError, "beta"):
            AdaptiveCoefficient(beta=beta)
    with raises(TypeError, "margin"):
        RunningCap(TopK(2), "x", E)
    for name, value in (("top_k", 0), ("top_k", E + 1), ("rate", 1.0), ("initial", 1e29)):
        with raises(ValueError, name):
            AdaptiveSparsity(**{"top_k": 2, "num_experts": E, name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (paper_losses.DeviceBalance, "groups"),
        (paper_losses.AlignmentLoss, "groups"),
        (paper_losses.ClusterVariance, "groups"),
        (partial(paper_losses.LocalityLoss, node=0), "placement"),
    ],
)
def test_groups_of_experts_are_checked(make: Any, name: str) -> None:
    for wrong, error in (
        ([-1, 0, 0, 0, 1, 1], ValueError),
        ([0.5, 0, 0, 0, 1, 1], TypeError),
        ([[0, 1]], ValueError),
        (2, ValueError),
    ):
        with raises(error, name):
            make(wrong)
    with raises(ValueError, name):
        make([0, 1], num_experts=E)
    if name == "groups":
        with raises(ValueError, "groups"):
            make([0, 0, 0, 0, 1, 6])


@pytest.mark.parametrize(
    "make",
    [
        paper_losses.ParamPenalty,
        paper_losses.DeviceBalance,
        paper_losses.AlignmentLoss,
        paper_losses.ClusterVariance,
        partial(paper_losses.LocalityLoss, node=0),
        paper_losses.LocalizedBalance,
    ],
)
def test_a_vector_has_a_number_for_each_expert(make: Any) -> None:
    moe = switchgear.MoE(8, 6, E, K, balance=[make([0, 0, 1, 1, 1])])
    with raises(ValueError, moe.gate.balance[0].name):
        moe(torch.randn(2, 3, 8), embedding=torch.arange(2))


def test_a_number_of_null_experts_is_not_negative() -> None:
    with raises(ValueError, "num_null"):
        losses.SwitchLoss(num_null=-1)


def test_micro_batches_of_a_step_are_counted_together() -> None:
    logits = torch.randn(4, 10, E)
    loss = losses.SwitchLoss(1.0, "global", accumulate=True)
    for _ in range(2):
        for m in range(4):
            seen = torch.cat(list(logits[: m + 1]))
            counts = balance.count_tokens(routing(seen).topk_ids, E)
            wanted = balance.switch_loss(logits[m].softmax(-1), counts, len(seen))
            torch.testing.assert_close(loss(routing(logits[m]), NOTHING_KNOWN), wanted)
        loss.after_step(counts, nn.Identity())
    alone = losses.SwitchLoss(1.0, "global")  # of one process and call
    for part in logits:
        assert torch.equal(alone(routing(part), NOTHING_KNOWN), losses.SwitchLoss(1.0)(routing(part), NOTHING_KNOWN))


def test_a_loop_without_steps_keeps_a_bounded_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchgear.routing.losses._MOST_CALLS", 3)
    loss = losses.SwitchLoss(1.0, "global", accumulate=True)
    for _ in range(5):
        loss(routing(torch.randn(4, E)), NOTHING_KNOWN)
    assert len(loss._calls) == 3
    assert loss._counts is not None
    assert loss._counts[-1] == 5 * 4  # tokens


@pytest.mark.parametrize(
    ("loss", "better"),
    [
        (losses.SwitchLoss(1.0), lambda r: -balance.max_violation(balance.count_tokens(r.topk_ids, E))),
        (losses.ZLoss(1.0), lambda r: -r.router_logits.float().logsumexp(-1).abs().mean()),
        (paper_losses.EntropyLoss(1.0), lambda r: -paper_losses.entropy_loss(r.router_logits.softmax(-1))),
        (paper_losses.LocalityLoss([0, 0, 0, 1, 1, 1], 1, 1.0), lambda r: (r.topk_ids >= 3).float().mean()),
        (paper_losses.ParamPenalty([8, 8, 8, 1, 1, 1], 1.0), lambda r: (r.topk_ids >= 3).float().mean()),
    ],
    ids=["switch", "z", "entropy", "locality", "parameters"],
)
def test_descending_a_loss_does_what_it_is_for(loss: Any, better: Any) -> None:
    router, x = switchgear.Router(16, E, K), torch.randn(200, 16) + 1
    nn.init.normal_(router.weight, std=0.5)
    before = better(router(x))
    optimizer = torch.optim.Adam(router.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(router(x), NOTHING_KNOWN).backward()
        optimizer.step()
    assert better(router(x)) > before + 0.1


# ---- two processes ---------------------------------------------------------------------------------------------------


def _half(rank: int, port: int, logits: Tensor, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loss = losses.SwitchLoss(1.0, "global")(routing(logits[rank]), NOTHING_KNOWN)
    queue.put((rank, loss.item()))
    dist.destroy_process_group()


def test_global_counts_of_two_processes() -> None:
    """The mean of the losses of two halves is the loss of the whole."""
    logits = torch.randn(2, 16, E)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_half, args=(rank, port, logits, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    whole = losses.SwitchLoss(1.0)(routing(logits.flatten(0, 1)), NOTHING_KNOWN)
    assert (found[0] + found[1]) / 2 == pytest.approx(whole.item(), rel=1e-6)
    assert found[0] != pytest.approx(losses.SwitchLoss(1.0)(routing(logits[0]), NOTHING_KNOWN).item(), rel=1e-4)


# ---- losses of a trainer ---------------------------------------------------------------------------------------------


def test_consistency_is_symmetric_and_zero_for_equal_passes() -> None:
    a, b = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    wanted = 0.0
    for first, second in zip(a.double().flatten(0, 1), b.double().flatten(0, 1), strict=True):
        p, q = first.exp() / first.exp().sum(), second.exp() / second.exp().sum()
        wanted += float(sum(p * (p / q).log()) + sum(q * (q / p).log())) / 2 / 8
    assert float(consistency_loss(a, b)) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(consistency_loss(a, b), consistency_loss(b, a))
    assert consistency_loss(a, a) == 0
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    spoilt = torch.where(mask[..., None] > 0, b, 100 * b)
    torch.testing.assert_close(consistency_loss(a, b, mask), consistency_loss(a, spoilt, mask))


@pytest.mark.parametrize("loss", [consistency_loss, output_regularization])
def test_padding_may_be_nan(loss: Any) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    whole = [torch.randn(2, 4, 9) for _ in range(2)]
    spoilt = [torch.where(mask[..., None] > 0, logits, torch.nan).requires_grad_() for logits in whole]
    value = loss(*spoilt, mask)
    torch.testing.assert_close(value, loss(*whole, mask))
    value.backward()
    assert spoilt[1].grad.isfinite().all()
    assert spoilt[1].grad.any(-1).equal(mask > 0)
    assert loss(*spoilt, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("loss", [consistency_loss, output_regularization])
def test_a_logit_of_minus_infinity_in_both_passes_adds_nothing(loss: Any) -> None:
    """As if the class did not exist; gradients too."""
    without = [torch.randn(2, 8, requires_grad=True) for _ in range(2)]
    given = [nn.functional.pad(logits, (0, 1), value=-torch.inf).detach().requires_grad_() for logits in without]
    wanted, found = loss(*without), loss(*given)
    torch.testing.assert_close(found, wanted)
    wanted.backward()
    found.backward()
    torch.testing.assert_close(given[1].grad, nn.functional.pad(without[1].grad, (0, 1)))


def test_two_opposite_tokens_conflict(backend: str) -> None:
    """Expert 0 has two tokens that agree and one that conflicts with them; expert 1 has one token, expert 2 none."""
    ids = torch.tensor([[0, 1], [0, -1], [0, -1]], dtype=torch.int32)
    grad = torch.randn(8)
    grad_y = torch.stack((grad, 2 * grad, -0.5 * grad))
    logits = torch.randn(3, 3, requires_grad=True)
    routed = Routing(ids, torch.full((3, 2), 0.5), logits, 3)
    conflicts = gradient_conflicts(grad_y, routed)
    assert conflicts.tolist() == [[False, False], [False, False], [True, False]]
    loss = gradient_conflict_loss(routed, conflicts)
    (grad_logits,) = torch.autograd.grad(loss, logits)
    assert grad_logits[2, 0] > 0  # gradient descent lowers the logit of expert 0
    assert not grad_logits[:2].any()
    aligned = gradient_conflicts(grad.expand(3, 8), routed)
    assert not aligned.any()
    assert gradient_conflict_loss(routed, aligned) == 0


def test_the_loss_of_conflicts_leaves_closed_experts_out() -> None:
    """The softmax of -z would be theirs alone. The second token has no expert: its row is closed."""
    is_shut = torch.tensor([[True, False, False, False], [True, True, True, True]])
    logits = torch.randn(2, 4, requires_grad=True)
    masked = Masked(TopK(2), lambda logits, context: ~is_shut)(logits)
    loss = gradient_conflict_loss(masked, masked.topk_ids >= 0)
    best = logits.detach()[0, 1:].double().requires_grad_()
    wanted = -(-best).log_softmax(-1)[masked.topk_ids[0].long() - 1].mean()
    torch.testing.assert_close(loss.double(), wanted)
    (grad,), (wanted_grad,) = torch.autograd.grad(loss, logits), torch.autograd.grad(wanted, best)
    torch.testing.assert_close(grad[0, 1:].double(), wanted_grad)
    assert not grad[is_shut].any()


def test_conflicts_are_cosines_with_the_mean() -> None:
    routed, grad_y = routing(torch.randn(40, 5), 2), torch.randn(40, 8)
    rows = routed.topk_weights[..., None] * grad_y[:, None]
    wanted = torch.zeros(40, 2, dtype=torch.bool)
    for e in range(5):
        mine = routed.topk_ids == e
        if mine.any():
            wanted[mine] = torch.cosine_similarity(rows[mine], rows[mine].mean(0), dim=-1) < 0.1
    assert 0 < wanted.sum() < 80
    assert torch.equal(gradient_conflicts(grad_y, routed, 0.1), wanted)


def test_conflicts_of_negative_weights_are_of_the_gradient_that_arrives() -> None:
    """A token with weight -1 and the opposite gradient agrees."""
    grad = torch.randn(8)
    weights = torch.tensor([[1.0], [-1.0], [1.0], [1.0]])
    routed = Routing(torch.zeros(4, 1, dtype=torch.int32), weights, torch.randn(4, 2), 2)
    conflicts = gradient_conflicts(torch.stack((grad, -grad, grad, -grad)), routed)
    assert conflicts.flatten().tolist() == [False, False, False, True]


def test_gradient_conflict_trains() -> None:
    """Two tasks with opposite targets for nearby inputs: the loss reduces the number of conflicting choices."""

    def rate(coefficient: float) -> float:
        torch.manual_seed(0)
        moe = switchgear.MoE(8, 16, 4, 1, return_routing=True)
        stgc, optimizer = GradientConflict(), torch.optim.Adam(moe.parameters(), 3e-3)
        x = torch.randn(64, 8)
        x[:, 0] = torch.where(torch.arange(64) % 2 == 0, 0.5, -0.5)
        target = torch.where(torch.arange(64)[:, None] % 2 == 0, 1.0, -1.0).expand(64, 8)
        found = 0.0
        for step in range(120):
            y, routed = moe(x)
            loss = (y - target).square().mean()
            extra, conflicts = stgc(loss, y, routed)
            found += conflicts.float().mean().item() if step >= 20 else 0
            optimizer.zero_grad()
            (loss + coefficient * extra).backward()
            optimizer.step()
        return found / 100

    assert rate(0.1) < rate(0.0)
