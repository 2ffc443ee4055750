# SPDX-License-Identifier: BSD-3-Clause
"""Guarantees of all selections, capacities and losses, for any logits, shape and device."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import switchgear
from errors import raises
from switchgear import routing
from switchgear.functional import Routing
from switchgear.papers.parts.auxiliary import anchor_loss
from switchgear.routing import (
    BalancedAssignment,
    Broadcast,
    Capacity,
    CapacityByKind,
    ClusterDropout,
    Context,
    Dense,
    DepthChoice,
    ExpertChoice,
    ExpertDropout,
    Grouped,
    GumbelSoftmax,
    Lookup,
    Masked,
    NoisyTopK,
    Random,
    RankK,
    Router,
    RunningCap,
    SampledTopK,
    SkipBelow,
    SparseMixer,
    Threshold,
    TokenIdMask,
    TopK,
    TopP,
)
from switchgear.routing.change import per_expert
from switchgear.routing.ranking import gumbel, scores_of, uniform

T, E = 24, 8

SELECTIONS: dict[str, Any] = {
    "top_k": TopK(3),
    "sigmoid": TopK(3, "sigmoid", normalize=True, scale=2.5),
    "sqrt_softplus": TopK(3, "sqrt_softplus"),
    "groups": TopK(3, num_groups=4, topk_groups=2),
    "sum_of_groups": Grouped(2, 4),
    "best_of_groups": Grouped(3, 2, 1, 3),
    "sqrt_softplus_groups": TopK(3, "sqrt_softplus", num_groups=4, topk_groups=2),
    "rank": RankK((2, 0)),
    "dense": Dense(),
    "top_p": TopP(0.6),
    "threshold": Threshold(0.15),
    "skip": SkipBelow(TopK(3), 0.5),
    "broadcast": Broadcast(TopK(2), 0.0, 0.2),
    "expert_choice": ExpertChoice(2.0),
    "expert_choice_cap": ExpertChoice(2.0, max_experts_per_token=2),
    "expert_choice_tokens": ExpertChoice(tokens_per_expert=3, weights="softmax_over_tokens", scope="sequence"),
    "assignment": BalancedAssignment(),
    "assignment_of_sequences": BalancedAssignment(scope="sequence"),
    "sampled": SampledTopK(3, 0.5),
    "noisy": NoisyTopK(2),
    "sparse_mixer": SparseMixer(2, 0.3),
    "gumbel": GumbelSoftmax(),
    "gumbel_hard": GumbelSoftmax(hard=True),
    "random": Random(2),
    "lookup": Lookup(torch.tensor([[0, 3], [7, -1], [2, 5]])),
    "lookup_scores": Lookup(torch.tensor([[0, 3], [7, -1], [2, 5]]), score_function="sqrt_softplus", normalize=True),
    "masked": Masked(TopK(2), TokenIdMask(torch.eye(3, E) + torch.eye(3, E).roll(1, 1))),
    "dropout": Masked(TopK(2), ExpertDropout(0.4)),
    "cluster_dropout": Masked(TopK(2), ClusterDropout(2, num_experts=E)),
    "running_cap": RunningCap(TopK(2), 3.0, E),
}
selections = pytest.mark.parametrize("name", SELECTIONS)
CAPACITIES = {
    "order": Capacity(0.75),
    "choice": Capacity(0.75, "choice"),
    "reverse": Capacity(0.75, "reverse", scope="sequence"),
    "random": Capacity(0.75, "random"),
    "score": Capacity(0.75, "score"),
    "reroute": Capacity(0.75, "score", "reroute"),
    "reroute_in_sequences": Capacity(0.75, "order", "reroute", scope="sequence"),
}

LOGITS = {
    "normal": lambda: torch.randn(T, E),
    "ties": lambda: torch.zeros(T, E),
    "nan": lambda: torch.full((T, E), torch.nan),
    "inf": lambda: torch.full((T, E), torch.inf),
    "minus_inf": lambda: torch.full((T, E), -torch.inf),
    "anything": lambda: torch.tensor([0.0, -0.0, 1.0, 1e38, -1e38, torch.nan, torch.inf, -torch.inf])[
        torch.randint(8, (T, E))
    ],
    "half": lambda: torch.randn(T, E).half(),
    "bfloat16": lambda: torch.randn(T, E).bfloat16(),
    "double": lambda: torch.randn(T, E).double(),
}


def context_of(num_tokens: int = T, training: bool = True, seed: int = 0) -> Context:
    return Context(
        token_ids=torch.arange(num_tokens) % 3,
        sequence_length=max(num_tokens // 2, 1),
        generator=torch.Generator().manual_seed(seed),
        training=training,
    )


def check(routing: Routing, num_tokens: int, wide: bool = False) -> None:
    ids, weights = routing.topk_ids, routing.topk_weights
    assert ids.dtype is torch.int32
    assert weights.dtype is (torch.float64 if wide else torch.float32)
    assert ids.shape == weights.shape
    assert ids.shape[0] == num_tokens
    assert ((ids >= -1) & (ids < E)).all()
    for row in ids.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)
    assert weights.isfinite().all()
    assert not weights[ids < 0].any()
    assert routing.num_experts == E
    switchgear.plan(ids, E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", ["sigmoid", "sqrt_softplus"])
def test_scores_are_a_loop_and_the_same_at_any_place(function: str, dtype: torch.dtype) -> None:
    """Values and gradients, also at 0 and far from it; bits do not depend on how many tokens there are."""
    ends = torch.tensor([0.0, -0.0, 1e-3, -1e-3, 17.0, -17.0, 60.0, -60.0, 200.0, -200.0, 3e38, -3e38, -torch.inf])
    logits = torch.cat((torch.randn(13 * E) * 4, ends.repeat(E))).view(-1, E).to(dtype).requires_grad_()
    scores = scores_of(logits, function)
    (grad,) = torch.autograd.grad(scores.sum(), logits)
    limits, gradient_eps = torch.finfo(scores.dtype), max(torch.finfo(dtype).eps, torch.finfo(scores.dtype).eps)
    for z, score, slope in torch.stack((logits, scores, grad), -1).flatten(0, 1).double().tolist():
        small = math.exp(-abs(z))
        wanted = (1.0 if z >= 0 else small) / (1 + small)
        gradient = small / (1 + small) ** 2 if math.isfinite(z) else 0.0
        if function == "sqrt_softplus":
            softplus = max(max(z, 0.0) + math.log1p(small), limits.tiny)
            gradient = wanted / (2 * softplus**0.5) if softplus > limits.tiny else 0.0
            wanted = softplus**0.5
        assert score == pytest.approx(wanted, rel=4 * limits.eps, abs=4 * limits.tiny)
        assert slope == pytest.approx(gradient, rel=8 * gradient_eps, abs=4 * limits.tiny)
    for first in range(len(logits)):
        for count in (1, 2, 5):
            part = logits[first : first + count].detach().clone()
            assert torch.equal(scores_of(part, function), scores[first : first + count])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("values", LOGITS)
@selections
@pytest.mark.some(200)
def test_selections_are_total(name: str, values: str, training: bool) -> None:
    logits = LOGITS[values]().requires_grad_()
    select = copy.deepcopy(SELECTIONS[name])
    result = select(logits, context_of(training=training))
    check(result, T, wide=values == "double" and name not in ("random", "lookup"))
    if result.topk_weights.requires_grad:
        (grad,) = torch.autograd.grad(result.topk_weights.sum(), logits, allow_unused=True, materialize_grads=True)
        assert grad.isfinite().all()
        assert grad.dtype is logits.dtype


@pytest.mark.parametrize("limit", CAPACITIES)
@selections
def test_every_capacity_goes_with_every_selection(name: str, limit: str) -> None:
    """An expert gets at most its share, choices are dropped or moved, and drops are counted."""
    router = Router(
        16, E, select=copy.deepcopy(SELECTIONS[name]), capacity=CAPACITIES[limit], balance=[routing.SwitchLoss()]
    )
    context = context_of()
    result = router(torch.randn(T, 16), context)
    check(result, T)
    sequences = 2 if CAPACITIES[limit].scope == "sequence" else 1
    for ids in result.topk_ids.view(sequences, -1):
        most = int(torch.bincount(ids[ids >= 0].long(), minlength=E).max())
        width = result.topk_ids.shape[1]
        assert most <= -(-(0.75 * width * T / sequences) // E)
    assert result.num_dropped >= 0
    assert result.losses["switch"].isfinite()


@selections
def test_no_tokens_and_leading_dimensions(name: str) -> None:
    select = copy.deepcopy(SELECTIONS[name])
    check(select(torch.zeros(0, E), context_of(0)), 0)
    flat, nested = (
        copy.deepcopy(select)(logits, context_of())
        for logits in (torch.arange(T * E).sin().view(T, E), torch.arange(T * E).sin().view(2, T // 2, E))
    )
    assert torch.equal(flat.topk_ids, nested.topk_ids)
    for limit in CAPACITIES.values():
        empty = TopK(2)(torch.zeros(0, E))._replace(scores=torch.zeros(0, E))
        assert limit(empty, context_of(0)).num_dropped == 0


@selections
def test_one_expert(name: str) -> None:
    made: dict[str, Any] = {
        "top_k": TopK(1), "sigmoid": TopK(1, "sigmoid"), "sqrt_softplus": TopK(1, "sqrt_softplus"), "groups": TopK(1),
        "best_of_groups": Grouped(1, 1, 1, 3), "sqrt_softplus_groups": TopK(1, "sqrt_softplus"),
        "sum_of_groups": Grouped(1, 1), "rank": RankK((0,)), "sampled": SampledTopK(1), "noisy": NoisyTopK(1),
        "skip": SkipBelow(TopK(1), 0.5), "broadcast": Broadcast(TopK(1), 0.0), "sparse_mixer": SparseMixer(1),
        "random": Random(1), "lookup": Lookup(torch.zeros(3, dtype=torch.int64)),
        "lookup_scores": Lookup(torch.zeros(3, dtype=torch.int64), score_function="sigmoid"),
        "masked": Masked(TopK(1), TokenIdMask(torch.ones(3, 1))), "dropout": Masked(TopK(1), ExpertDropout(0.4)),
        "cluster_dropout": Masked(TopK(1), ClusterDropout(1, num_experts=1)),
        "running_cap": RunningCap(TopK(1), 3.0, 1),
    }  # fmt: skip
    moe = switchgear.MoE(16, 12, 1, select=made.get(name, SELECTIONS[name]))
    y = moe(torch.randn(6, 16), token_ids=torch.arange(6) % 3, sequence_length=3)
    assert y.isfinite().all()
    y.sum().backward()


@selections
def test_a_generator_decides_all_draws(name: str) -> None:
    logits = torch.randn(T, E)
    results = []
    for seed in (1, 1):
        torch.manual_seed(99 + len(results))
        results.append(copy.deepcopy(SELECTIONS[name])(logits, context_of(seed=seed)))
    assert torch.equal(results[0].topk_ids, results[1].topk_ids)
    assert torch.equal(results[0].topk_weights, results[1].topk_weights)


@pytest.mark.parametrize(
    "options",
    [
        {"select": routing.SampledTopK(2, 1.0)},
        {"select": routing.Random()},
        {"top_k": 2, "jitter": 0.1},
        {"top_k": 2, "score": partial(routing.Linear, noise=True)},
    ],
)
def test_a_draw_that_checkpointing_cannot_repeat_is_refused(options: Any) -> None:
    """Draws from torch's default generator are repeated, and a router that draws nothing may get a generator."""
    x, generator = torch.randn(6, 16, requires_grad=True), torch.Generator()
    moe, plain = switchgear.MoE(16, 12, 8, **options), switchgear.MoE(16, 12, 8, 2)
    checkpoint(moe, x, use_reentrant=False).sum().backward()
    checkpoint(partial(plain, generator=generator), x, use_reentrant=False).sum().backward()
    y = checkpoint(partial(moe, generator=generator), x, use_reentrant=False)
    with raises(ValueError, "generator"):
        y.sum().backward()


@selections
def test_selections_and_capacities_are_copied_and_pickled(name: str) -> None:
    logits, select = torch.randn(T, E), SELECTIONS[name]
    wanted = copy.deepcopy(select)(logits, context_of())
    again = pickle.loads(pickle.dumps(select))(logits, context_of())
    assert torch.equal(again.topk_ids, wanted.topk_ids)
    assert repr(select)
    for limit in CAPACITIES.values():
        assert pickle.loads(pickle.dumps(limit)) == limit


@selections
def test_a_bias_changes_the_choice_and_gets_no_gradient(name: str) -> None:
    """+100 for expert 5 puts it into every choice by scores; the weights do not include the bias."""
    if name in ("dense", "gumbel", "gumbel_hard", "random", "lookup", "masked", "dropout", "cluster_dropout",
                "lookup_scores", "sparse_mixer", "running_cap", "assignment", "assignment_of_sequences",
                "expert_choice", "expert_choice_cap", "expert_choice_tokens", "sampled", "broadcast",
                "skip"):  # fmt: skip
        return  # these do not choose by scores only
    logits, bias = torch.randn(T, E, requires_grad=True), torch.zeros(E).index_fill(0, torch.tensor([5]), 100.0)
    context = context_of(training=False)
    with_bias = SELECTIONS[name](logits, context, bias.requires_grad_())
    assert (with_bias.topk_ids == 5).any(1).all()
    weight = with_bias.topk_weights[with_bias.topk_ids == 5]
    assert not weight.grad_fn or torch.autograd.grad(weight.sum(), bias, allow_unused=True)[0] is None


@pytest.mark.parametrize("isolation", ["batch", "sequence"])
def test_isolation_reaches_every_part(isolation: str) -> None:
    """With isolation, no part of a policy sees another sequence; without it, at least one does."""
    parts: dict[str, dict[str, Any]] = {
        "capacity": {"top_k": 2, "capacity": Capacity(0.5)},
        "reroute": {"top_k": 2, "capacity": Capacity(1.0, "score", "reroute")},
        "expert_choice": {"select": ExpertChoice(1.0)},
        "assignment": {"select": BalancedAssignment(balanced_in_evaluation=True)},
    }
    for options in parts.values():
        router = Router(16, E, isolation=isolation, **options).eval()
        victim, same = torch.randn(12, 16), []
        for stranger in (torch.zeros(12, 16), victim.roll(1, 0), torch.randn(12, 16)):
            result = router(torch.stack((stranger, victim)))
            ids = result.topk_ids.view(2, 12, -1)[1].sort(1, descending=True).values[:, :2].tolist()
            weights = result.topk_weights.view(2, 12, -1)[1].sum(1).tolist()
            same.append((ids, weights))
        assert (same[0] == same[1] == same[2]) == (isolation == "sequence")


def test_sequences_by_ids_of_any_value_are_those_by_length() -> None:
    logits = torch.randn(T, E)
    result = TopK(2)(logits)._replace(scores=logits.softmax(-1))
    contexts = [
        Context(sequence_length=12),
        Context(sequence_ids=torch.tensor([7] * 12 + [-3] * 12)),
        Context(sequence_ids=torch.tensor([1] * 12 + [0] * 12), num_sequences=3),
    ]
    for limit in (Capacity(0.75, scope="sequence"), Capacity(0.75, "score", "reroute", "sequence")):
        ids = [limit(result, context).topk_ids for context in contexts]
        assert torch.equal(ids[0], ids[1])
        assert torch.equal(ids[0], ids[2])


def choose(router_logits: Tensor, context: Context, bias: Tensor | None = None, *, k: int = 1) -> Any:
    return switchgear.route(router_logits, k)


def chi2(routing: Any, context: Context, coefficient: float) -> Tensor:
    shares = routing.router_logits.softmax(-1).mean(0)
    return coefficient * (shares * E - 1).square().sum()


def keep(routing: Any, context: Context, *, limit: int) -> Any:
    return routing._replace(topk_ids=torch.where(routing.topk_ids < limit, routing.topk_ids, -1))


def halve(x: Tensor, context: Context, *, width: int) -> Tensor:
    return x[:, :width] / 2


def test_partials_of_functions_are_parts() -> None:
    """Those of classes, and of functions that return a part, are called instead."""
    router = Router(
        E, E, score=partial(halve, width=E), select=partial(choose, k=3), capacity=partial(keep, limit=E - 1),
        balance=[partial(chi2, coefficient=0.5), partial(routing.ZLoss, 0.5)],
    )  # fmt: skip
    x = torch.randn(7, E)
    got, want = router(x), switchgear.route(x / 2, 3)
    assert torch.equal(got.topk_ids, want.topk_ids.masked_fill(want.topk_ids == E - 1, -1))
    assert set(got.losses) == {"chi2", "z"}
    assert torch.equal(got.losses["chi2"], chi2(want, None, 0.5))
    router.set_policy(select=partial(choose, k=2), balance=[])
    assert router(x).topk_ids.shape == (7, 2)
    hashed = Router(E, E, select=partial(Lookup.hashed, 10, top_k=2))
    assert isinstance(hashed.select, Lookup)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("balance", partial(chi2, coefficients=0.5)),
        ("balance", partial(chi2)),
        ("balance", lambda routing: routing.topk_weights.sum()),
        ("select", partial(choose, experts=3)),
        ("select", lambda router_logits: switchgear.route(router_logits, 2)),
        ("capacity", keep),
        ("score", partial(halve, width=E, depth=1)),
    ],
)
def test_functions_that_do_not_take_the_arguments_of_a_part_are_named(name: str, part: Any) -> None:
    options: dict[str, Any] = {} if name == "select" else {"top_k": 2}
    options[name] = [part] if name == "balance" else part
    with raises(TypeError, name):
        Router(16, E, **options)


@pytest.mark.parametrize(
    ("loss", "error"), [(lambda shares: shares, ValueError), (lambda shares: shares[:1], ValueError),
                        (lambda shares: None, TypeError), (lambda shares: "0", TypeError)],
)  # fmt: skip
def test_a_loss_that_is_no_scalar_is_named(loss: Any, error: type[Exception]) -> None:
    def uneven(routing: Any, context: Context) -> Any:
        return loss(routing.router_logits.softmax(-1).mean(0))

    with raises(error, "balance") as caught:
        Router(16, E, 2, balance=[uneven])(torch.randn(3, 16))
    assert "uneven" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("top_k", partial(TopK, 0)),
        ("score_function", partial(TopK, 2, "tanh")),
        ("topk_groups", partial(TopK, 2, "sqrt_softplus", num_groups=2, topk_groups=3)),
        ("group_score", partial(Grouped, 2, 4, group_score=0)),
        ("group_score", partial(TopK, 2, group_score="mean")),
        ("group_score", partial(Grouped, 2, 4, group_score="mean")),
        ("topk_groups", partial(Grouped, 2, 4, 5)),
        ("ranks", partial(RankK, ())),
        ("ranks", partial(RankK, (1, 1))),
        ("p", partial(TopP, -0.1)),
        ("p", partial(TopP, float("nan"))),
        ("tau", partial(routing.Temperature, TopK(2), 0.001)),
        ("top_k", partial(Lookup.hashed, 10, 4, 5)),
        ("top_k", partial(Lookup.hashed, 10, 4, 0)),
        ("routing", partial(SkipBelow.calibrate, TopK(1)(torch.zeros(3, E)))),
        ("routing: expected at least 1 token", partial(SkipBelow.calibrate, TopK(2)(torch.zeros(0, E)))),
        ("router_logits: expected at least 1 token", partial(Threshold.calibrate, torch.zeros(0, E), 2.0)),
        ("experts_per_token", partial(Threshold.calibrate, torch.zeros(3, E), math.nan)),
        ("threshold", partial(Threshold, math.nan)),
        ("entropy_above: expected a number, got nan", partial(Broadcast, TopK(2), math.nan)),
        ("noise_std", partial(routing.ImportanceLoad, noise_std=0.0)),
        ("noise_std", partial(routing.ImportanceLoad, noise_std=-1.0)),
        ("scale", partial(TopK, 2, scale=math.nan)),
        ("scale", partial(TopP, 0.5, scale=math.inf)),
        ("scale", partial(SampledTopK, 2, scale=math.nan)),
        ("weight", partial(Lookup, torch.zeros(3), math.nan)),
        ("max_experts", partial(TopP, 0.4, 0)),
        ("min_experts", partial(Threshold, 0.1, -1)),
        ("max_experts", partial(Threshold, 0.1, 3, 2)),
        ("score_function", partial(Dense, "tanh")),
        ("ratio", partial(SkipBelow, TopK(2), 1.5)),
        ("protect", partial(SkipBelow, TopK(2), 0.5, -1.0)),
        ("max_fraction", partial(Broadcast, TopK(2), 1.0, 2.0)),
        ("scope", partial(Broadcast, TopK(2), 1.0, scope="token")),
        ("capacity_factor", partial(ExpertChoice, 0.0)),
        ("tokens_per_expert", partial(ExpertChoice, tokens_per_expert=0)),
        ("max_experts_per_token", partial(ExpertChoice, max_experts_per_token=0)),
        ("evaluation", partial(ExpertChoice, evaluation=0)),
        ("evaluation", partial(ExpertChoice, evaluation=1, weights="softmax_over_tokens")),
        ("capacity_factor", partial(ExpertChoice, float("inf"))),
        ("scale", partial(ExpertChoice, scale=float("nan"))),
        ("weights", partial(ExpertChoice, weights="none")),
        ("ties", partial(ExpertChoice, ties="first")),
        ("scope", partial(ExpertChoice, scope="world")),
        ("eps", partial(BalancedAssignment, "small")),
        ("eps", partial(BalancedAssignment, 0.0)),
        ("max_iterations", partial(BalancedAssignment, max_iterations=0)),
        ("score_function", partial(BalancedAssignment, score_function="tanh")),
        ("p_sample", partial(SampledTopK, 2, 1.5)),
        ("noise", partial(NoisyTopK, 1, -1.0)),
        ("jitter", partial(SparseMixer, 2, -0.1)),
        ("tau", partial(GumbelSoftmax, 0.0)),
        ("samples", partial(GumbelSoftmax, samples=-1)),
        ("level", partial(GumbelSoftmax, level="world")),
        ("level", partial(Random, level="world")),
        ("evaluation", partial(Random, evaluation="none")),
        ("rate", partial(ExpertDropout, 1.5)),
        ("level", partial(ExpertDropout, 0.5, "world")),
        ("scope", partial(routing.SwitchLoss, scope="world")),
        ("accumulate", partial(routing.SwitchLoss, accumulate=True)),
        ("groups", partial(routing.DeviceBalance, 9, num_experts=8)),
        ("groups", partial(routing.DeviceBalance, 2)),
        ("top_k", partial(Router, 16, E)),
        ("top_k", partial(Router, 16, E, 2, select=TopK(2))),
        ("normalize", partial(Router, 16, E, normalize=True, select=TopK(2))),
        ("float32", partial(Router, 16, E, 2, float32=True, score=routing.Linear)),
        ("isolation", partial(Router, 16, E, 2, isolation="token")),
    ],
)
def test_bad_options_are_named(name: str, make: Any) -> None:
    with raises(ValueError, name):
        make()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("p", partial(TopP, "a")),
        ("top_k", partial(TopK, 2.0)),
        ("top_k", partial(TopK, "2")),
        ("num_groups", partial(TopK, 2, num_groups="4")),
        ("scale", partial(Dense, scale="a")),
        ("top_k", partial(Grouped, "2", 4)),
        ("num_groups", partial(Grouped, 2, "4")),
        ("topk_groups", partial(Grouped, 2, 4, 1.5)),
        ("ratio", partial(SkipBelow, TopK(2), "a")),
        ("protect", partial(SkipBelow, TopK(2), 0.5, "a")),
        ("entropy_above", partial(Broadcast, TopK(2), "a")),
        ("max_fraction", partial(Broadcast, TopK(2), 1.0, "a")),
        ("threshold", partial(Threshold, "a")),
        ("min_experts", partial(Threshold, 0.1, "1")),
        ("max_experts", partial(Threshold, 0.1, 1, 2.5)),
        ("top_k", partial(SampledTopK, "2")),
        ("p_sample", partial(SampledTopK, 2, "a")),
        ("top_k", partial(NoisyTopK, 2.5)),
        ("noise", partial(NoisyTopK, 2, "a")),
        ("top_k", partial(SparseMixer, "2")),
        ("jitter", partial(SparseMixer, 2, "a")),
        ("tau", partial(GumbelSoftmax, "a")),
        ("samples", partial(GumbelSoftmax, samples=1.5)),
        ("top_k", partial(Random, 1.5)),
        ("rate", partial(ExpertDropout, "a")),
        ("rate", partial(ClusterDropout, 2, "a", num_experts=4)),
        ("interval", partial(ClusterDropout, 2, interval=2.5, num_experts=4)),
        ("tau", partial(routing.Temperature, TopK(2), "a")),
        ("max_iterations", partial(BalancedAssignment, max_iterations=2.5)),
        ("eps", partial(BalancedAssignment, None)),
        ("table", partial(Lookup, [0, 1])),
        ("visible", partial(TokenIdMask, [[True, False]])),
        ("noise_std", partial(routing.ImportanceLoad, noise_std="a")),
        ("jitter", partial(routing.Linear, 16, E, jitter="a")),
        ("ranks", partial(RankK, torch.tensor([0, 1]))),
        ("ranks", partial(RankK, (0.5,))),
        ("ranks", partial(RankK, "01")),
        ("ranks", partial(RankK, 2)),
        ("capacity_factor", partial(ExpertChoice, "a")),
        ("tokens_per_expert", partial(ExpertChoice, tokens_per_expert=2.5)),
        ("max_experts_per_token", partial(ExpertChoice, max_experts_per_token=1.5)),
        ("evaluation", partial(ExpertChoice, evaluation="a")),
        ("cap_iterations", partial(ExpertChoice, cap_iterations=0.5)),
        ("fraction", partial(DepthChoice, "a")),
        ("free_experts", partial(CapacityByKind, 1.5)),
        ("tau", partial(CapacityByKind, 1, "a")),
    ],
)
def test_options_of_another_type_are_named(name: str, make: Any) -> None:
    with raises(TypeError, name):
        make()


def test_options_that_exceed_the_experts_are_named() -> None:
    logits = torch.randn(4, E)
    for name, select in {
        "top_k": TopK(E + 1), "num_groups": Grouped(1, 3), "min_experts": Threshold(0.1, E + 1),
    }.items():  # fmt: skip
        with raises(ValueError, name):
            select(logits)
    with raises(ValueError, "top_k"):
        Grouped(3, 4)(logits)
    with raises(ValueError, "top_k"):
        SparseMixer(E + 1)(logits)
    limit = Capacity(1.0, scope="sequence")
    for name, context in (
        ("sequence_length", Context()),
        ("sequence_length", Context(sequence_length=3)),
        ("sequence_ids", Context(sequence_ids=torch.zeros(3))),
    ):
        with raises(ValueError, name):
            limit(TopK(1)(logits), context)


def test_everything_exported_is_on_the_page() -> None:
    text = (Path(__file__).parents[1] / "docs/routing.md").read_text()
    internal = {"Score", "Select", "Limit", "Balance", "max_violation", "min_capacity", "load_balancing_loss", "z_loss"}
    missing = [name for name in routing.__all__ if name not in internal and name not in text]
    assert not missing


def a_score(x: Tensor, context: Context) -> Tensor:
    return x[:, :E]


def test_pairs_become_rows() -> None:
    """A token's experts in ascending order; those above the limit are removed, and so are pairs without a token."""
    token, expert = torch.tensor([2, 0, 2, -1, 2, 0]), torch.tensor([5, 1, 0, 3, 3, 0])
    weight = torch.arange(6.0).requires_grad_()
    ids, weights = routing.from_pairs(token, expert, weight, 4, E)
    assert ids.tolist() == [[0, 1, -1], [-1, -1, -1], [0, 3, 5], [-1, -1, -1]]
    assert weights.tolist() == [[5, 1, 0], [0, 0, 0], [2, 4, 0], [0, 0, 0]]
    ids, weights = routing.from_pairs(token, expert, weight, 4, E, max_experts_per_token=2)
    assert ids.tolist() == [[0, 1], [-1, -1], [0, 3], [-1, -1]]
    (grad,) = torch.autograd.grad(weights.sum(), weight)
    assert grad.tolist() == [0, 1, 1, 0, 1, 1]
    ids, _ = routing.from_pairs(token[:0], expert[:0], weight[:0], 2, E)
    assert ids.tolist() == [[-1], [-1]]


def test_modules_inside_of_dataclasses_belong_to_the_router() -> None:
    """Their buffers are saved and moved, their controllers called, and partials in fields are built."""
    visible = torch.ones(5, E).index_fill(1, torch.tensor([2]), 0.0)
    mask = partial(Masked, TopK(2), TokenIdMask(visible))
    select = Broadcast(partial(Masked, mask, partial(ClusterDropout, 2, 0.5, 1)), 99.0)
    router = Router(16, E, select=select)
    names = {name for name in router.state_dict() if name.startswith("select")}
    assert names == {
        "select_modules.0.mask.closed",
        "select_modules.0.mask.step",
        "select_modules.0.select.mask.visible",
    }
    x, token_ids = torch.randn(9, 16), torch.randint(5, (9,))
    ids = router(x, Context(token_ids=token_ids)).topk_ids
    closed = router.select.select.mask.closed.clone()
    assert not torch.isin(ids, closed.nonzero().flatten()).any()
    assert not (ids == 2).any()
    for _ in range(20):
        router.after_step()
    assert router.select.select.mask.step == 20
    twin = copy.deepcopy(router)
    assert twin.select.select is twin.select_modules[0]
    assert twin.select.select is not router.select.select


@pytest.mark.parametrize("whole", [False, True])
def test_parts_are_made_at_any_depth(whole: bool) -> None:
    inner = partial(Masked, TopK(2), partial(ClusterDropout, 2))
    nested: Any = partial(Broadcast, SkipBelow(inner, 0.1), 0.0) if whole else Broadcast(SkipBelow(inner, 0.1), 0.0)
    router = Router(16, E, select=nested)
    made = router.select.select.select
    assert isinstance(made, Masked)
    assert router(torch.randn(4, 16)).topk_ids.shape[0] == 4
    assert "select_modules.0.mask.closed" in router.state_dict()
    assert isinstance(inner, partial)


def test_functions_are_parts() -> None:
    moe = switchgear.MoE(16, 12, E, score=a_score, select=lambda z, context, bias=None: switchgear.route(z, 2))
    x = torch.randn(2, 5, 16)
    assert moe(x).shape == x.shape
    assert isinstance(a_score, routing.Score)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: uniform((3, 64), Context(), torch.device("cpu")),
        lambda: gumbel((3, 64), Context(), torch.device("cpu")),
        lambda: Random(3)(torch.zeros(4, 64, dtype=torch.float32))[:2],
        lambda: TokenIdMask.of_frequencies(torch.zeros(50), 64, frequent_from=1, rare_experts=3).visible,
        lambda: Lookup.hashed(50, 64, 3).table,
        lambda: Lookup(torch.zeros(4, 3))(torch.zeros(1, 64), Context(token_ids=torch.arange(1))).topk_weights,
        lambda: ClusterDropout(2, 0.5, num_experts=64).closed,
        lambda: routing.Linear(64, 16, orthogonal=0.1, dtype=torch.bfloat16).weight.detach(),
        lambda: per_expert({1: 1.3}, 1.0, 4, torch.device("cpu")),
        lambda: anchor_loss(torch.ones(2, 4, dtype=torch.float32) / 3, 1),
    ],
    ids=["uniform", "gumbel", "Random", "TokenIdMask", "hashed", "Lookup", "clusters", "orthogonal", "gain", "anchor"],
)
def test_the_default_dtype_changes_no_draw(draw: Any) -> None:
    """In bfloat16 eight bits would make ties, and weights of 1/3 would be rounded."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        with default_dtype(dtype):
            found.append(draw())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
