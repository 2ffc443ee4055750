# SPDX-License-Identifier: BSD-3-Clause
"""ProgressivePruner: survivors shrink to one, dropped experts get nothing, the exported FFN is the layer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small_models import clone, our_model
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import routing
from switchgear.compress import ProgressivePruner
from switchgear.compress.progressive import find_wire_device
from switchgear.trace import observe


def train(model: nn.Module, pruner: ProgressivePruner, steps: int) -> list[dict[str, list[int]]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step)) + 0.5
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step()
        history.append(pruner.survivors)
    return history


@pytest.mark.parametrize("criterion", ["alpha", "hit_rate"])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"top_k": 1}])
def test_row46_survivors_shrink_to_one(criterion: str, options: dict[str, Any]) -> None:
    """Monotonically, by half of the training; then one expert stays."""
    model = our_model(**options).train()
    with ProgressivePruner(model, 20, criterion=criterion, windows=5) as pruner:
        history = train(model, pruner, 20)
    for name in ("layers.0", "layers.1"):
        for before, after in itertools.pairwise(history):
            assert set(after[name]) <= set(before[name])
        assert len(history[0][name]) == 8
        assert 1 < len(history[5][name]) < 8
        assert len(history[9][name]) == len(history[19][name]) == 1


def test_row46_scores_are_those_of_a_loop() -> None:
    """Window 1 of 2 with beta 1: experts below half the mean share of the normalised weights are dropped."""
    for criterion in ("alpha", "hit_rate"):
        model = our_model().train()
        x = torch.randn(50, 16) + 1
        with ProgressivePruner(model, 4, criterion=criterion, windows=2, beta=1.0) as pruner:
            routing = model.layers[0].gate(x)
            scores = [0.0] * 8
            for t in range(50):
                weights = routing.topk_weights[t].tolist()
                for e, g in zip(routing.topk_ids[t].tolist(), weights, strict=True):
                    scores[e] += g / sum(weights) if criterion == "alpha" else 1
            pruner.step()
            mean = sum(scores) / 8
            assert pruner.survivors["layers.0"] == [e for e in range(8) if scores[e] >= 0.5 * mean]


def test_row46_each_window_counts_anew() -> None:
    """What an expert did in window 1 does not save it at the end of window 2."""
    model = our_model(top_k=1).train()
    gate = model.layers[0].gate
    with ProgressivePruner(model, 6, windows=3, beta=1.0) as pruner:
        for favourite, tokens in ((0, 1000), (1, 10)):
            with torch.no_grad():
                gate.weight.zero_()
                gate.weight[favourite] = 1
            gate(torch.ones(tokens, 16))
            if favourite == 0:
                with torch.no_grad():
                    gate.weight[0], gate.weight[1] = 0, 1
                gate(torch.ones(900, 16))
            pruner.step()
        assert pruner.survivors["layers.0"] == [1]


def test_row46_dropped_experts_get_no_traffic_and_no_gradient() -> None:
    model = our_model(normalize=True).train()
    with ProgressivePruner(model, 8, windows=2) as pruner:
        train(model, pruner, 2)
        alive = pruner.survivors
        assert 1 < len(alive["layers.0"]) < 8
        seen: list[tuple[str, set[int]]] = []
        with observe(model, lambda name, one: seen.append((name, set(one.topk_ids.flatten().tolist()) - {-1}))):
            model.zero_grad()
            model(torch.randn(200, 16)).sum().backward()
        for name, experts in seen:
            assert experts <= set(alive[name])
        for name, layer in zip(alive, model.layers, strict=True):
            gone = [e for e in range(8) if e not in alive[name]]
            assert not layer.experts.down_proj.grad[gone].any()
            assert layer.experts.down_proj.grad[alive[name]].any()
        pruner.step()
        train(model, pruner, 1)
        seen.clear()
        with observe(model, lambda name, one: seen.append((name, set(one.topk_ids.flatten().tolist()) - {-1}))):
            model(torch.randn(20, 16))
        assert dict(seen) == {name: set(experts) for name, experts in pruner.survivors.items()}
        assert all(len(experts) == 1 for _, experts in seen)
    assert not model.layers[0].gate.overrides


@pytest.mark.parametrize("options", [
    {}, {"normalize": True, "score_function": "sigmoid", "selection_bias": True}, {"bias": True, "activation": "gelu"},
    {"gated": False, "activation": "relu"}, {"interleaved": True, "transposed": True},
])  # fmt: skip
def test_row46_the_exported_ffn_is_the_layer(options: dict[str, Any]) -> None:
    model = our_model(**options).train()
    with ProgressivePruner(model, 4, windows=1) as pruner:
        with raises(ValueError):
            pruner.export()
        train(model, pruner, 2)
        model.eval()
        x = torch.randn(30, 16)
        for name, dense in pruner.export().items():
            layer = model.layers[int(name[-1])]
            torch.testing.assert_close(dense(x), layer(x), rtol=1e-5, atol=1e-6)
            assert not isinstance(dense, switchgear.MoE)


def test_the_eager_variant_drops_at_once() -> None:
    model = our_model().train()
    with ProgressivePruner(model, 10, windows=1) as pruner:
        history = train(model, pruner, 5)
    assert [len(one["layers.0"]) for one in history] == [8, 8, 8, 8, 1]


def test_row46_processes_add_their_proficiency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process's counts decide; they travel on the device that the group's backend takes."""
    asked: list[Any] = []

    def all_reduce(scores: Tensor, group: Any) -> None:
        asked.append((scores.device.type, group))
        scores[5] += 1000  # the other process sent all of its tokens to expert 5

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "gloo")
    model = our_model().train()
    with ProgressivePruner(model, 4, windows=1, group="all") as pruner:
        train(model, pruner, 2)
    assert pruner.survivors == {"layers.0": [5], "layers.1": [5]}
    assert asked == [("cpu", "all")] * 2
    router = our_model().layers[0].gate
    assert find_wire_device(router, "all").type == "cpu"
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    assert find_wire_device(router.to("meta"), "all").type == "meta"


def test_nothing_is_dropped_before_its_time_and_all_is_undone() -> None:
    model = our_model()
    x, plain = torch.randn(9, 16), clone(model)
    with ProgressivePruner(model, 40) as pruner:
        assert torch.equal(model(x), plain(x))
        model.train()(x)
        assert pruner.step() == {}
        pruner.step()
        assert not torch.equal(model.eval()(x), plain(x))
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"windows": 11}, "windows"),
        ({"force_at": 0.0}, "force_at"),
        ({"beta": -1.0}, "beta"),
        ({"criterion": "loss"}, "criterion"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with raises(ValueError, message):
        ProgressivePruner(our_model(), **{"total_steps": 20, **arguments})


def test_refused_models() -> None:
    with raises(ValueError, "model"):
        ProgressivePruner(nn.Linear(2, 2), 20)
    with raises(ValueError):
        ProgressivePruner(our_model(score_function="sigmoid"), 20)
    with raises(ValueError):
        ProgressivePruner(our_model(null_experts=2), 20)
    with raises(ValueError):
        ProgressivePruner(our_model(scale_input=True), 20)


@pytest.mark.parametrize("options", [
    {"scale": 2.5}, {"normalize": False, "score_function": "sigmoid"}, {"normalize": True},
])  # fmt: skip
def test_a_layer_that_is_no_network_is_not_exported(options: dict[str, Any]) -> None:
    """The weight of the expert left is 1 only in the last case."""
    model = our_model(top_k=None, select=routing.TopK(2, **options)).train()
    with ProgressivePruner(model, 4, windows=1) as pruner:
        train(model, pruner, 2)
        model.eval()
        if options == {"normalize": True}:
            x = torch.randn(30, 16)
            torch.testing.assert_close(pruner.export()["layers.0"](x), model.layers[0](x))
        else:
            with raises(ValueError):
                pruner.export()
    with raises(ValueError):
        pruner.export()
