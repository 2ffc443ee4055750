# SPDX-License-Identifier: BSD-3-Clause
"""Pre-gates: the model against a loop, its training, and the timeline of its prefetch."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from stacks import normalized, residual
from torch import Tensor

from errors import raises
from switchgear import MoE, offload, routing
from switchgear.offload import Accesses, FromPreGate

E, K, H = 6, 2, 16


def loop(model: Any, x: Tensor) -> Tensor:
    """Block n computes with the experts that the router of block n chose from the input of block n - 1."""
    inputs = []
    for n, block in enumerate(model):
        inputs.append(normalized(x))
        scores = (inputs[max(n - 1, 0)] @ block.gate.weight.T).softmax(-1)
        rows = []
        for token in range(len(x)):
            best = scores[token].topk(K)
            y = torch.zeros(H, dtype=x.dtype)
            for weight, e in zip(best.values, best.indices.tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[e] @ inputs[n][token]).chunk(2)
                y = y + weight * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
            rows.append(y)
        x = x + torch.stack(rows)
    return x


def test_row40_each_block_chooses_for_the_next() -> None:
    """Outputs and gradients, of the shifted gates too; parameters keep their names; it can be undone."""
    model = residual(dtype=torch.float64)
    before = copy.deepcopy(model)
    assert routing.pregate(model) == ["1", "2"]
    assert list(model.state_dict()) == list(before.state_dict())
    x = torch.randn(7, H, dtype=torch.float64, requires_grad=True)
    y, wanted = model(x), loop(model, x)
    torch.testing.assert_close(y, wanted)
    assert not torch.allclose(y, before(x))
    inputs = [x, *model.parameters()]
    for got, expected in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(wanted.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
        assert bool(expected.any())
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    routing.pregate(model, enabled=False)
    torch.testing.assert_close(model(x), before(x))


def test_row40_it_trains() -> None:
    model = residual(balance=[routing.SwitchLoss(1e-2)])
    routing.pregate(model)
    x = torch.randn(64, H)
    target = torch.tanh(x @ torch.randn(H, H) / 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (model(x.view(4, 16, H)).view(64, H) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(block.gate.weight.grad is not None for block in model)
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("options", [{}, {"selection_bias": True, "score_function": "sigmoid", "normalize": True}])
def test_row40_the_choice_of_the_next_block_is_known(options: dict[str, Any]) -> None:
    model = residual(4, **options).eval()
    routing.pregate(model)
    with torch.no_grad(), offload.watch(model, FromPreGate(model)) as found:
        for x in torch.randn(20, 3, H):
            model(x)
    assert found.layers[0].predicted == 0
    assert all(layer.right == layer.used == layer.predicted for layer in found.layers[1:])


def decoded(model: torch.nn.Module, x: Tensor) -> Accesses:
    with torch.no_grad(), routing.record(model) as record:
        model(x)
    return Accesses.of(record)


@pytest.mark.parametrize("copy_seconds", [0.25, 1.0])
def test_row40_no_layer_waits_if_copies_take_no_longer_than_the_layer(copy_seconds: float) -> None:
    """A layer's K records take at most its compute time; only the first layer of a step, whose gate is its own, waits.
    Memory holds two layers' experts."""
    model = residual(4)
    routing.pregate(model)
    run = decoded(model, torch.randn(2, 15, H))
    found = offload.timeline(run, offload.pregated(run), copy_seconds=copy_seconds, compute_seconds=K * copy_seconds)
    assert all(wait == 0 for step in found.waits for wait in step[1:])
    assert all(step[0] == pytest.approx(K * copy_seconds) for step in found.waits)
    assert found.peak <= 2 * K
    assert (found.copied, found.wasted) == (run.num_uses, 0)
    # On demand every layer waits, in half the memory.
    alone = offload.timeline(run, copy_seconds=copy_seconds, compute_seconds=K * copy_seconds)
    assert all(wait == pytest.approx(K * copy_seconds) for step in alone.waits for wait in step)
    assert alone.peak == K
    assert found.seconds == pytest.approx(K * copy_seconds * 30 * 5)
    assert alone.seconds == pytest.approx(K * copy_seconds * 30 * 8)


def test_row40_slower_copies_expose_the_difference() -> None:
    run = Accesses.of([[{0, 1}, {2, 3}, {4, 5}]])
    found = offload.timeline(run, offload.pregated(run), copy_seconds=1.0, compute_seconds=1.5)
    assert found.waits == ((2.0, 0.5, 0.5),)  # 2 s of copies behind 1.5 s of computation, but for the first layer
    lanes = [(i.begin, i.end) for i in found.intervals if i.expert is not None]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(lanes))


def test_row40_wrong_guesses_and_missed_ones() -> None:
    """By hand. Layer 0 needs {0}: copied 0–1. Its guesses for layer 1 are 5 (wrong, 1–2), 1 (right, 2–3), 6 (wrong, has
    not begun at 2.5, dropped). Layer 0 computes 1–2.5. Layer 1 needs {1, 2}: 1 arrives at 3, 2 at 4: it waits 1.5.
    Then 3 is copied, 4–5, while layer 1 computes, 4–5.5, with 5, 1, 2 in memory."""
    run = Accesses.of([[{0}, {1, 2}, {3}]])
    found = offload.timeline(run, [[(), (5, 1, 6), (3,)]], copy_seconds=1.0, compute_seconds=1.5)
    assert found.waits == ((1.0, 1.5, 0.0),)
    assert (found.copied, found.wasted, found.seconds, found.exposed) == (5, 1, 7.0, 2.5)
    assert [(i.expert, i.begin) for i in found.intervals if i.expert is not None] == [
        (0, 0.0), (5, 1.0), (1, 2.0), (2, 3.0), (3, 4.0),
    ]  # fmt: skip
    assert found.peak == 4
    with raises(ValueError, "guesses"):
        offload.timeline(run, [[()]], copy_seconds=1, compute_seconds=1)
    with raises(ValueError, "copy_seconds"):
        offload.timeline(run, copy_seconds=-1, compute_seconds=1)


def test_row40_two_layers_of_experts_suffice() -> None:
    """Each layer computes while all experts but those that the timeline holds then are NaN: the same bits."""
    model = residual(4).eval()
    routing.pregate(model)
    x = torch.randn(6, H)
    predictor = FromPreGate(model)
    guess: dict[int, set[int]] = {}
    weights = [{n: p.detach().clone() for n, p in block.experts.named_parameters()} for block in model]
    with torch.no_grad():
        wanted = torch.cat([model(row[None]) for row in x])

        def before(layer: int) -> Any:
            def hook(experts: Any, args: Any) -> None:
                resident = guess.pop(layer) if layer else set(args[1].flatten().tolist())
                for name, parameter in experts.named_parameters():
                    parameter.fill_(torch.nan)
                    for e in resident:
                        parameter[e] = weights[layer][name][e]
                for at, expert in predictor.predict(layer, args[0], args[1]):
                    guess.setdefault(at, set()).add(expert)
                assert len(resident) + sum(map(len, guess.values())) <= 2 * K

            return hook

        for layer, block in enumerate(model):
            block.experts.register_forward_pre_hook(before(layer))
        found = torch.cat([model(row[None]) for row in x])
    assert torch.equal(found, wanted)


def test_row40_a_block_of_its_own_is_refused() -> None:
    model = residual()
    x = torch.randn(3, H)
    with raises(ValueError):
        routing.pregate(torch.nn.Sequential(MoE(H, 8, E, K)))
    with raises(ValueError):
        routing.pregate(torch.nn.ModuleList([MoE(H, 8, E, K), MoE(8, 8, E, K)]))
    routing.pregate(model)
    with raises(ValueError):
        model[1](x)
    model[0](x)
    with raises(ValueError, "hidden_states"):
        model[1](x[:2])
    assert model(x).isfinite().all()  # usable afterwards
