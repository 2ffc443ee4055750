# SPDX-License-Identifier: BSD-3-Clause
"""Experts disabled, forced, favoured and amplified temporarily, and selections replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import MoE, Routing
from switchgear.routing import (
    BalancedAssignment,
    Capacity,
    Dense,
    ExpertChoice,
    ExpertDropout,
    GumbelSoftmax,
    Lookup,
    LossFreeBias,
    Masked,
    NoisyTopK,
    Random,
    RankK,
    SampledTopK,
    SkipBelow,
    SparseMixer,
    Threshold,
    TopK,
    TopP,
)
from switchgear.routing.context import NOTHING_KNOWN

E, H = 8, 16

POLICIES: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 2},
    "sigmoid in groups": {
        "top_k": 3, "score_function": "sigmoid", "normalize": True, "selection_bias": True, "num_groups": 2,
        "topk_groups": 2, "group_score": "top2_sum",
    },
    "top_p": {"select": TopP(0.6)},
    "threshold": {"select": Threshold(0.1, min_experts=2)},
    "sqrt_softplus": {"select": TopK(2, "sqrt_softplus")},
    "capacity": {"top_k": 2, "capacity": Capacity(8.0, overflow="reroute")},
}  # fmt: skip
policies = pytest.mark.parametrize("policy", POLICIES)


def layer(**options: Any) -> MoE:
    return MoE(H, 12, E, **options)


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (40,)), H)


def routed(moe: MoE, tokens: Tensor) -> Routing:
    routing: Routing = moe.gate(tokens)
    return routing


def rows(routing: Routing) -> list[dict[int, float]]:
    return [
        {e: w for e, w in zip(ids, weights, strict=True) if e >= 0}
        for ids, weights in zip(routing.topk_ids.tolist(), routing.topk_weights.tolist(), strict=True)
    ]


@policies
def test_a_disabled_expert_never_appears(policy: str) -> None:
    moe, tokens = layer(**POLICIES[policy]), x()
    with moe.gate.intervene(disable=[0, 5]):
        routing = routed(moe, tokens)
    assert not {0, 5} & set(routing.topk_ids.flatten().tolist())
    assert (routing.topk_weights[routing.topk_ids < 0] == 0).all()
    assert {0, 5} & set(routed(moe, tokens).topk_ids.flatten().tolist())


@pytest.mark.parametrize("select", [Dense(), ExpertChoice(2.0), ExpertChoice(2.0, scope="sequence")])
def test_disabled_where_the_bias_decides_little(select: Any) -> None:
    moe = layer(select=select)
    with moe.gate.intervene(disable=[3]):
        assert 3 not in routed(moe, x(2, 20)).topk_ids.flatten().tolist()


@policies
def test_a_forced_expert_always_appears_with_its_own_score(policy: str) -> None:
    moe, tokens = layer(**POLICIES[policy]), x()
    with moe.gate.intervene(force=[2, 6]):
        forced = rows(routed(moe, tokens))
    assert all({2, 6} <= set(row) for row in forced)
    if policy == "softmax":
        scores = moe.gate.logits(tokens).softmax(-1)
        torch.testing.assert_close(torch.tensor([row[2] for row in forced]), scores[:, 2])


def test_fewer_experts_than_choices_leave_holes() -> None:
    moe, tokens = layer(top_k=3), x()
    with moe.gate.intervene(disable=range(2, E)):
        routing = routed(moe, tokens)
    assert all(set(row) == {0, 1} for row in rows(routing))


def test_bias_changes_the_choice_and_not_the_weights() -> None:
    moe, tokens = layer(top_k=2), x()
    scores = moe.gate.logits(tokens).softmax(-1)
    with moe.gate.intervene(bias={4: 0.5}):
        favoured = rows(routed(moe, tokens))
    assert sum(4 in row for row in favoured) > sum(4 in row for row in rows(routed(moe, tokens)))
    for token, row in enumerate(favoured):
        for expert, weight in row.items():
            torch.testing.assert_close(torch.tensor(weight), scores[token, expert])
    with moe.gate.intervene(bias=[0.0] * E):
        assert rows(routed(moe, tokens)) == rows(routed(moe, tokens))


@policies
def test_gain_scales_a_contribution_linearly(policy: str) -> None:
    moe, tokens = layer(**POLICIES[policy]), x()
    outputs = {}
    for gain in (0.0, 1.0, 2.0, 3.0):
        with moe.gate.intervene(gain={1: gain}):
            outputs[gain] = moe(tokens)
    torch.testing.assert_close(outputs[1.0], moe(tokens))
    one = outputs[1.0] - outputs[0.0]
    torch.testing.assert_close(outputs[2.0] - outputs[0.0], 2 * one, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[3.0] - outputs[0.0], 3 * one, atol=1e-5, rtol=1e-4)
    assert one.abs().max() > 1e-3


LIMITS = {
    "drop": Capacity(1.0, "score"),
    "reroute": Capacity(1.0, "score", "reroute"),
    "reroute, renormalize": Capacity(1.0, "order", "reroute", renormalize=True),
    "overselect": Capacity(1.0, "score", "overselect"),
    "overselect, renormalize": Capacity(1.0, "score", "overselect", expand=2.0, renormalize=True),
}
limits = pytest.mark.parametrize("limit", LIMITS)


@limits
@pytest.mark.parametrize("select", [TopK(2), TopP(0.6)], ids=["top_k", "top_p"])
def test_a_capacity_sends_nothing_to_a_disabled_expert(limit: str, select: Any) -> None:
    """Nor does a token lose a place to one: the choice is that of a router without the expert."""
    moe, tokens = layer(select=select, capacity=LIMITS[limit]), x(64)
    with moe.gate.intervene(disable=[5]), moe.gate.intervene(disable=[0]):
        routing = routed(moe, tokens)
    assert not {0, 5} & set(routing.topk_ids.flatten().tolist())
    assert (routing.topk_weights[routing.topk_ids < 0] == 0).all()
    scores = moe.gate.logits(tokens).softmax(-1).index_fill(1, torch.tensor([0, 5]), 0)
    bias = torch.zeros(E).index_fill(0, torch.tensor([0, 5]), -torch.inf)
    chosen = select(moe.gate.logits(tokens), NOTHING_KNOWN, bias)
    gone = (chosen.topk_ids == 0) | (chosen.topk_ids == 5)
    chosen = chosen._replace(
        topk_ids=chosen.topk_ids.masked_fill(gone, -1), topk_weights=chosen.topk_weights.masked_fill(gone, 0)
    )
    wanted = LIMITS[limit](chosen._replace(scores=scores), NOTHING_KNOWN)
    assert rows(routing) == rows(wanted)
    assert routing.num_dropped == wanted.num_dropped


@limits
def test_a_gain_comes_after_a_capacity(limit: str) -> None:
    moe, tokens = layer(top_k=2, capacity=LIMITS[limit]), x(64)
    plain = routed(moe, tokens)
    gains = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0])
    with moe.gate.intervene(gain=gains), moe.gate.intervene(gain={2: 0.5}):
        routing = routed(moe, tokens)
    assert torch.equal(routing.topk_ids, plain.topk_ids)
    gains[2] = 1.0
    wanted = plain.topk_weights * gains[plain.topk_ids.clamp(min=0).long()]
    torch.testing.assert_close(routing.topk_weights, wanted)


def test_blocks_nest_and_restore() -> None:
    moe, tokens = layer(top_k=2), x()
    before = moe(tokens)
    with moe.gate.intervene(disable=[0]):
        with moe.gate.intervene(disable=[1]):
            assert not {0, 1} & set(routed(moe, tokens).topk_ids.flatten().tolist())
        assert 1 in routed(moe, tokens).topk_ids
        assert 0 not in routed(moe, tokens).topk_ids
    assert torch.equal(moe(tokens), before)
    with raises(RuntimeError), moe.gate.intervene(disable=[0]):
        raise RuntimeError("inside")
    assert torch.equal(moe(tokens), before)
    assert moe.gate.overrides == []


def test_gradients_flow_under_an_intervention() -> None:
    moe = layer(top_k=2)
    with moe.gate.intervene(disable=[0], force=[1], gain={1: 2.0}):
        moe(x()).square().sum().backward()
    assert moe.gate.weight.grad.isfinite().all()
    assert not moe.experts.gate_up_proj.grad[0].any()
    assert moe.experts.gate_up_proj.grad[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disable": [8]}, "disable"),
        ({"force": [-1]}, "force"),
        ({"gain": {9: 1.0}}, "gain"),
        ({"bias": [1.0, 2.0]}, "bias"),
        ({"disable": [1], "force": [1]}, "force"),
        ({"force": [1, 2, 3]}, "force"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    moe = layer(top_k=2)
    with raises(ValueError, message), moe.gate.intervene(**options):
        pass
    with raises(ValueError, message), switchgear.override(moe, **options):
        pass
    assert moe.gate.overrides == []


@pytest.mark.parametrize("name", ["disable", "force"])
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (torch.tensor([1]), "a list of numbers of experts, got Tensor"),
        (torch.arange(8), "a list of numbers of experts, got Tensor"),
        (3, "a list of numbers of experts, got int"),
        ("3", "a list of numbers of experts, got str"),
        ([1.0], "numbers of experts, got float"),
        (["1"], "numbers of experts, got str"),
    ],
)
def test_experts_are_numbers(name: str, given: Any, got: str) -> None:
    moe = layer(top_k=2)
    with raises(TypeError, name), switchgear.override(moe, **{name: given}):
        pass
    assert moe.gate.overrides == []
    with (
        raises(TypeError, "gain"),
        moe.gate.intervene(gain={"1": 2.0}),
    ):
        pass


# ---- override --------------------------------------------------------------------------------------------------------


def test_another_selection_for_all_layers_or_some() -> None:
    model, tokens = nn.Sequential(layer(top_k=2), layer(top_k=2)), x()
    plain = model(tokens)
    with switchgear.override(model, select=RankK((0, 1))) as names:
        torch.testing.assert_close(model(tokens), plain)
    assert names == ["0.gate", "1.gate"]
    with switchgear.override(model, select=RankK((2,)), layers=["1.gate"]) as names:
        assert routed(model[0], tokens).topk_ids.shape[1] == 2
        third = routed(model[1], tokens).topk_ids
    assert names == ["1.gate"]
    assert torch.equal(third, switchgear.route(model[1].gate.logits(tokens), 3).topk_ids[:, 2:])
    assert torch.equal(model(tokens), plain)
    with switchgear.override(model, select=BalancedAssignment(balanced_in_evaluation=True), disable=[0]):
        assert 0 not in routed(model[0], tokens).topk_ids


def test_override_errors() -> None:
    with raises(ValueError, "model"), switchgear.override(nn.Linear(2, 2), disable=[0]):
        pass
    with raises(ValueError, "layers"):
        switchgear.override(layer(top_k=2), disable=[0], layers=["router"]).__enter__()
    with raises(ValueError, "layers"):
        switchgear.override(layer(top_k=2), disable=[0], layers="router").__enter__()
    with raises(TypeError, "layers"):
        switchgear.override(layer(top_k=2), disable=[0], layers=3).__enter__()  # type: ignore[arg-type]
    with raises(TypeError, "model"):
        switchgear.override("model", disable=[0]).__enter__()  # type: ignore[arg-type]
    model = nn.Sequential(layer(top_k=2))
    for name in ("0.gate", "0"):  # a router, or its block, as in a RoutingTrace
        with switchgear.override(model, disable=[0], layers=name) as names:
            assert names == ["0.gate"]


# ---- Hugging Face models ---------------------------------------------------------------------------------------------


@pytest.fixture
def olmoe() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import switchgear.integrations.transformers  # noqa: F401  registers the name

    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_experts=E, num_experts_per_tok=2,
    )  # fmt: skip
    config._experts_implementation = "switchgear"
    return transformers.OlmoeForCausalLM(config).eval()


def test_experts_of_a_hugging_face_model_are_disabled_and_amplified(olmoe: Any) -> None:
    ids = torch.randint(50, (1, 12))
    with torch.no_grad():
        plain = olmoe(ids).logits
        with switchgear.override(olmoe, disable=range(E)) as names, switchgear.RoutingTrace(olmoe) as trace:
            olmoe(ids)
        assert names == [name for name, module in olmoe.named_modules() if name.endswith("experts")]
        with switchgear.override(olmoe, gain=[1.0] * E):
            assert torch.equal(olmoe(ids).logits, plain)
        with switchgear.override(olmoe, gain=[0.0] * E):
            none = olmoe(ids).logits
        with switchgear.override(olmoe, disable=range(E)):
            torch.testing.assert_close(olmoe(ids).logits, none)
        assert torch.equal(olmoe(ids).logits, plain)
    assert all(int(layer.tokens_per_expert.sum()) == 0 for layer in trace.layers.values())
    with raises(ValueError, "disable"), switchgear.override(olmoe, disable=[E]):
        pass


DRAWN = [
    SparseMixer(2),
    SparseMixer(2, jitter=2.0),
    GumbelSoftmax(hard=True),
    GumbelSoftmax(hard=True, samples=2),
    SampledTopK(2, 1.0),
    SampledTopK(2, 0.5, "sigmoid"),
    NoisyTopK(2),
    Random(2),
    Random(1, "batch"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("select", DRAWN, ids=str)
def test_draws_heed_force_and_disable(select: Any, training: bool) -> None:
    """A forced expert serves every token; others take the place of a disabled one."""
    moe, tokens = layer(select=select).train(training), x()
    top_k = routed(moe, tokens).topk_ids.shape[1]
    with moe.gate.intervene(force=[5]):
        forced = routed(moe, tokens)
    assert (forced.topk_ids == 5).any(1).all()
    with moe.gate.intervene(disable=[5]):
        without = rows(routed(moe, tokens))
    assert all(len(row) == top_k and 5 not in row for row in without)
    if forced.topk_weights.requires_grad:
        forced.topk_weights.sum().backward()
        assert moe.gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("change", [{"force": [1]}, {"bias": {1: 1.0}}])
@pytest.mark.parametrize(
    "select", [Lookup(torch.zeros(4)), Dense(), GumbelSoftmax(), Masked(Dense(), ExpertDropout(0.5))]
)
def test_a_selection_that_no_bias_moves_takes_no_force_and_no_bias(select: Any, change: dict[str, Any]) -> None:
    moe = layer(top_k=2)
    message = next(iter(change))
    with raises(ValueError, message), switchgear.override(moe, select=select, **change):
        pass
    assert not moe.gate.overrides
    with raises(ValueError, message), layer(select=select).gate.intervene(**change):
        pass
    with raises(ValueError, "selection_bias"):
        layer(select=select, selection_bias=True)
    with raises(ValueError, "balance"):
        layer(select=select, balance=[LossFreeBias()])


@pytest.mark.parametrize(
    "select", [TopK(2), SkipBelow(TopK(2), 0.1), TopP(0.5, 2), GumbelSoftmax(hard=True), RankK((0, 1, 3))]
)
def test_no_more_experts_are_forced_than_a_selection_takes(select: Any) -> None:
    with (
        raises(ValueError, "force"),
        layer(select=select).gate.intervene(force=[1, 2, 3]),
    ):
        pass
    with (
        raises(ValueError, "force"),
        switchgear.override(layer(top_k=4), select=select, force=[1, 2, 3]),
    ):
        pass
