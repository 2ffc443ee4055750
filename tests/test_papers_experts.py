# SPDX-License-Identifier: BSD-3-Clause
"""Papers that change or single out experts of a trained layer: Lifelong-MoE (row 60), SEUF (row 72)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import adapters, diagnostics, finetune
from switchgear.routing import ExpertChoice, Gaussian, LossFreeBias, SwitchLoss, anchor_loss, output_regularization
from switchgear.routing.balance import router_probabilities


def make_moe(**options: Any) -> switchgear.MoE:
    torch.manual_seed(0)
    return switchgear.MoE(16, 8, 4, 2, **options)


def data(seed: int, rows: int = 64) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


# ---- row 60: Lifelong-MoE --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["copy", "random"])
@pytest.mark.parametrize(
    "options", [{}, {"router_bias": True, "bias": True, "transposed": True}, {"selection_bias": True, "gated": False}]
)
def test_row60_old_experts_and_gates_keep_every_bit(init: str, options: dict[str, Any]) -> None:
    moe = make_moe(**options)
    old = copy.deepcopy(moe.state_dict())
    trained = moe.expand(3, init=init)
    assert moe.experts.num_experts == moe.gate.num_experts == 7
    assert all(len(parameter) == 3 for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step in range(10):
        optimizer.zero_grad()
        moe(data(step)).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in trained)
    new = moe.state_dict()
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        assert torch.equal(new[name][:4], tensor), name
    for name in ("experts.down_proj", "gate.weight"):
        sources = old[name][:3] if init == "copy" else new[name][:3]
        assert (new[name][4:] != sources).any()


@pytest.mark.parametrize("init", ["copy", "random"])
def test_row60_outputs_stay_while_new_gates_are_closed(init: str) -> None:
    """With logits of -inf the layer computes the old bits. So it does with an override, if weights are normalised over
    the chosen experts: else the softmax counts those that are disabled."""
    for options in ({}, {"score_function": "sigmoid", "normalize": True}):
        moe = make_moe(router_bias=True, **options)
        x = data(1)
        wanted = moe(x)
        moe.expand(2, init=init)
        with torch.no_grad():
            moe.gate.bias_selected.fill_(-torch.inf)
        assert torch.equal(moe(x), wanted)
        if not options:
            continue
        moe.gate.bias_selected.data.zero_()
        with switchgear.override(moe, disable=[4, 5]):
            assert torch.equal(moe(x), wanted)


def test_row60_copies_of_experts() -> None:
    moe = make_moe()
    moe.expand(2, sources=[3, 0])
    for tensor in (moe.experts.gate_up_proj, moe.experts.down_proj, moe.gate.weight):
        assert torch.equal(tensor[4:], tensor[[3, 0]])
    finetune.unfreeze(moe)
    whole = moe.expand(1, freeze_old=False)
    assert all(parameter.requires_grad and len(parameter) == 7 for parameter in whole)
    moe(data(0)).sum().backward()
    assert moe.experts.down_proj.grad.shape[0] == 7
    fresh = make_moe()
    fresh.expand(2, init="random")
    for tensor in (fresh.experts.gate_up_proj, fresh.experts.down_proj, fresh.gate.weight):
        assert not torch.isin(tensor[4:], tensor[:4]).all()


def test_row60_output_regularization() -> None:
    old, new = torch.randn(5, 7, 11), torch.randn(5, 7, 11, requires_grad=True)
    assert output_regularization(old, old) == 0
    p, q = (2 * old).softmax(-1).double(), (2 * new).softmax(-1).double()
    wanted = 0.25 * (p * (p / q).log()).sum(-1)
    loss = output_regularization(old, new, temperature=0.5)
    torch.testing.assert_close(loss.double(), wanted.mean())
    mask = torch.arange(7).expand(5, 7) < 3
    torch.testing.assert_close(output_regularization(old, new, mask, temperature=0.5).double(), wanted[:, :3].mean())
    loss.backward()
    assert new.grad.any()
    with raises(ValueError):
        output_regularization(old, new, temperature=0.0)


def test_row60_two_tasks() -> None:
    """The toy forgetting curve: new experts learn a second task, and the first one keeps its loss if their gates are
    closed for it; training everything forgets it."""

    def loss(moe: nn.Module, task: int, seed: int) -> Tensor:
        x = data(seed) + 2 * task
        y: Tensor = moe(x)
        return (y - x.roll(1 + task, -1)).square().mean()

    def train(moe: nn.Module, parameters: Any, task: int) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(60):
            optimizer.zero_grad()
            loss(moe, task, step).backward()
            optimizer.step()

    moe = make_moe(normalize=True)
    train(moe, moe.parameters(), 0)
    first = loss(moe, 0, 99).detach()
    whole = copy.deepcopy(moe)
    train(whole, whole.parameters(), 1)
    before = loss(moe, 1, 99).detach()
    train(moe, moe.expand(4), 1)
    assert loss(moe, 1, 99) < before
    with switchgear.override(moe, disable=[4, 5, 6, 7]):
        assert torch.equal(loss(moe, 0, 99), first)
    assert loss(whole, 0, 99) > first


def test_row60_an_expert_of_another_model() -> None:
    moe, x = make_moe(bias=True, router_bias=True), data(2)
    other = make_moe(bias=True)
    ffn = {name: parameter.detach()[2] for name, parameter in other.experts.named_parameters()}
    logits = moe.gate(x).router_logits
    assert moe.add_expert(ffn, torch.ones(16), gate_bias=-1.0) == 4
    assert torch.equal(moe.gate(x).router_logits[:, :4], logits)
    torch.testing.assert_close(moe.gate(x).router_logits[:, 4], x.sum(-1) - 1)
    ids, ones = torch.full((64, 1), 4), torch.ones(64, 1)
    assert torch.equal(moe.experts(x, ids, ones), other.experts(x, ids - 2, ones))
    for spoiled, message in (({}, "expert"), ({**ffn, "down_proj": torch.zeros(3)}, "down_proj")):
        with raises(ValueError, message):
            moe.add_expert(spoiled, torch.ones(16))
    with raises(ValueError, "gate_weight"):
        moe.add_expert(ffn, torch.ones(15))
    for wrong, message in (([1], "expert"), ({**ffn, "down_proj": 1.0}, "down_proj")):
        with raises(TypeError, message):
            moe.add_expert(wrong, torch.ones(16))
    with raises(ValueError, "gate_bias"):
        make_moe(bias=True).add_expert(ffn, torch.ones(16), gate_bias=-100.0)
    assert moe.experts.num_experts == 5


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"num_new": 0}, "num_new"),
        ({}, {"num_new": 1, "init": "zero"}, "init"),
        ({}, {"num_new": 1, "sources": [4]}, "sources"),
        ({}, {"num_new": 1, "sources": [0, 1]}, "sources"),
        ({}, {"num_new": 1, "init": "random", "sources": [0]}, "sources"),
        ({"num_groups": 2}, {"num_new": 1}, "num_new"),
        ({"null_experts": 1}, {"num_new": 1}, "VirtualExperts"),
        ({"widths": [1, 1, 2, 4]}, {"num_new": 1}, "experts"),
        ({"score": Gaussian}, {"num_new": 1}, "gate"),
    ],
)
def test_row60_nothing_grows_on_failure(options: Any, arguments: Any, message: str) -> None:
    moe = make_moe(**options)
    before = [(name, id(p), p.shape) for name, p in moe.named_parameters()]
    with raises(ValueError, message):
        moe.expand(**arguments)
    assert [(name, id(p), p.shape) for name, p in moe.named_parameters()] == before


def test_row60_experts_with_adapters_do_not_grow() -> None:
    moe = make_moe()
    adapters.add_lora(moe, 2)
    with raises(ValueError, "experts"):
        moe.expand(1)


def test_row60_nothing_grows_within_a_step_that_a_loss_counts() -> None:
    moe = make_moe(balance=[SwitchLoss(scope="global", accumulate=True)])
    moe(data(0))
    with raises(ValueError, "gate"):
        moe.expand(1)
    assert moe.gate.num_experts == len(moe.gate.weight) == 4
    switchgear.after_step(moe)
    moe.expand(1)
    moe(data(0))
    assert moe.gate.balance[0].has_counts


def test_row60_controllers_and_other_selections() -> None:
    moe = make_moe(balance=[LossFreeBias()])
    moe.expand(2, freeze_old=False)
    moe(data(0))
    switchgear.after_step(moe)
    assert moe.gate.e_score_correction_bias.shape == moe.gate.tokens_per_expert.shape == (6,)
    moe(data(0))
    counts = moe.gate.tokens_per_expert.tolist()
    moe.expand(1, freeze_old=False)
    assert moe.gate.tokens_per_expert.tolist() == [*counts, 0]
    torch.manual_seed(0)
    choice = switchgear.MoE(16, 8, 4, select=ExpertChoice(2.0))
    choice.expand(2)
    choice(data(0)).sum().backward()
    assert choice.gate.weight_selected.grad.any()


# ---- row 72: SEUF ----------------------------------------------------------------------------------------------------


def test_row72_a_planted_expert_is_found() -> None:
    moe = make_moe(normalize=True)
    with torch.no_grad():
        moe.gate.weight[2] = 1.0
    with switchgear.RoutingTrace(moe) as trace:
        moe(data(0).abs())
        moe(data(1).abs())
    scores = diagnostics.affinity(trace)["gate"]
    assert int(scores.argmax()) == 2
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0, dtype=torch.float64))
    wanted = [moe.gate(data(seed).abs()) for seed in (0, 1)]
    mean = sum(torch.where(r.topk_ids == 2, r.topk_weights, 0.0).sum() for r in wanted) / 128
    torch.testing.assert_close(scores[2].float(), mean)


def test_row72_affinity_is_a_mean_over_texts_of_means_over_tokens() -> None:
    moe, texts = make_moe().double(), [data(seed)[None, :length].double() for seed, length in enumerate((3, 3, 40))]
    with diagnostics.collect(moe) as choices:
        for text in texts:
            moe(text)
    wanted = torch.zeros(4, dtype=torch.float64)
    for text in texts:
        routing = moe.gate(text)
        for ids, weights in zip(routing.topk_ids.tolist(), routing.topk_weights, strict=True):
            for e, weight in zip(ids, weights, strict=True):
                wanted[e] += weight.detach() / text.shape[1] / len(texts)
    torch.testing.assert_close(diagnostics.affinity(choices)["gate"], wanted)
    empty = diagnostics.LayerChoices(torch.zeros(0, 2), torch.zeros(0, 2), 4, examples=torch.zeros(0).long())
    assert not diagnostics.affinity({"gate": empty})["gate"].any()


def test_row72_anchor_is_zero_at_one_hot() -> None:
    g = nn.functional.one_hot(torch.full((5,), 1), 4).float()
    assert anchor_loss(g, 1) == 0
    assert anchor_loss(g, 0) == 2
    uniform = torch.full((3, 4), 0.25)
    torch.testing.assert_close(anchor_loss(uniform, 3), torch.tensor(0.75**2 + 3 * 0.25**2))
    with raises(ValueError):
        anchor_loss(uniform, 4)


def test_row72_only_one_expert_and_the_router_change() -> None:
    """Unlearning the output of an expert: the router moves tokens away from it, unless the anchor holds them."""
    stays = {}
    for weight in (0.0, 10.0):
        model = nn.Sequential(make_moe(normalize=True, router_bias=True))
        x = data(3)
        with switchgear.RoutingTrace(model) as trace:
            model(x)
        expert = int(diagnostics.affinity(trace)["0.gate"].argmax())
        with torch.no_grad():
            model[0].experts.down_proj[expert] *= 30
        before = copy.deepcopy(model.state_dict())
        trained = finetune.freeze_except(model, {"0": [expert]}, also=["0.gate"])
        chosen = (model[0].gate(x).topk_ids == expert).any(-1)
        optimizer = torch.optim.AdamW(trained, lr=2e-2)
        for _ in range(60):
            optimizer.zero_grad()
            probabilities = router_probabilities(model[0].gate(x))
            loss = model(x).square().mean() + weight * anchor_loss(probabilities, expert)
            loss.backward()
            optimizer.step()
        others = [e for e in range(4) if e != expert]
        for name, tensor in model.state_dict().items():
            if name.startswith("0.experts"):
                assert torch.equal(tensor[others], before[name][others])
                assert not torch.equal(tensor[expert], before[name][expert])
        stays[weight] = float((model[0].gate(x).topk_ids == expert).any(-1)[chosen].float().mean())
    assert stays[10.0] > stays[0.0]
