# SPDX-License-Identifier: BSD-3-Clause
"""NextGate and Follows against loops written from the papers; recall."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from replayed import random_steps
from stacks import residual

from errors import raises
from switchgear import diagnostics, offload
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.offload import Accesses, Follows, FromPreGate, NextGate

E = 6


class Scripted:
    """Predicts what it is told."""

    def __init__(self, answers: dict[int, list[tuple[int, int]]]) -> None:
        self.answers = answers

    def predict(self, layer: int, hidden_states: Any, topk_ids: Any) -> list[tuple[int, int]]:
        return self.answers.get(layer, [])

    def observe(self, layer: int, topk_ids: Any) -> None: ...


@pytest.mark.parametrize("options", [{}, {"selection_bias": True, "score_function": "sigmoid"}])
def test_row41_the_next_gate_applied_early(options: dict[str, Any]) -> None:
    model = residual(**options).eval()
    for block in model:
        if options:
            block.gate.e_score_correction_bias.normal_()
    x = torch.randn(5, 16)
    nothing = torch.zeros(5, 2, dtype=torch.int32)
    for layer, ahead, experts in ((0, 1, 1), (0, 1, 2), (0, 2, 2), (1, 1, 1)):
        gate = model[layer + ahead].gate
        logits = x @ gate.weight.T
        scores = (logits.sigmoid() if options else logits.softmax(-1)).detach()
        worth: Counter[int] = Counter()
        for row in scores:
            chosen = (row + gate.e_score_correction_bias if options else row).topk(2).indices.tolist()
            best = sorted(chosen, key=lambda e: -row[e])[:experts]
            worth.update({e: float(row[e]) for e in best})
        wanted = [(layer + ahead, e) for e, _ in sorted(worth.items(), key=lambda item: -item[1])]
        assert NextGate(model, ahead, experts).predict(layer, x, nothing) == wanted
    assert NextGate(model).predict(2, x, nothing) == []
    assert NextGate(model, 2).predict(1, x, nothing) == []


def test_row41_the_next_gate_of_a_hugging_face_model() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=E, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    for block in moe_blocks(model).values():
        torch.nn.init.normal_(block.gate_weight())
    predictor = NextGate(model, top_k=2)
    x = torch.randn(1, 16)
    for layer in range(2):
        weight = list(moe_blocks(model).values())[layer + 1].gate_weight()
        wanted = (x @ weight.T)[0].topk(2).indices.tolist()
        assert predictor.predict(layer, x, torch.zeros(1, 2)) == [(layer + 1, e) for e in wanted]
    with offload.watch(model, predictor) as found, torch.no_grad():
        for token in range(12):
            model(input_ids=torch.tensor([[token]]))
    assert [layer.used for layer in found.layers] == [24, 24, 24]
    assert [layer.predicted for layer in found.layers] == [0, 24, 24]


def test_row41_recall_is_reported_by_layer() -> None:
    """Hidden states change little from layer to layer, so that the next gate beats the share of a random guess."""
    model = residual().eval()
    with torch.no_grad(), offload.watch(model, NextGate(model)) as found:
        for x in torch.randn(40, 16):
            model(x[None])
    first, *others = found.layers
    assert (first.used, first.predicted, first.recall, first.precision) == (80, 0, 0.0, 0.0)
    for layer in others:
        assert layer.used == layer.predicted == 80
        assert layer.recall > 0.8 > 2 * 2 / E


@torch.no_grad()
def test_row41_virtual_experts_are_neither_predicted_nor_used() -> None:
    """They have no weights to read: the cache refuses predictions of them."""
    model = residual(null_experts=4).eval()
    with diagnostics.collect(model) as choices, offload.watch(model, NextGate(model)) as found:
        for x in torch.randn(20, 16):
            model(x[None])
    used = [int((layer.topk_ids < E).sum()) for layer in choices.values()]
    assert [layer.used for layer in found.layers] == used
    assert max(used) < 2 * 20
    predicted = NextGate(model).predict(0, torch.randn(20, 16), torch.zeros(20, 2))
    assert sorted(expert for _, expert in predicted) == list(range(E))
    with offload.watch(model, Follows.of(choices)) as found:  # it saw virtual experts, too
        model(torch.randn(20, 16))
    assert 0 < found.layers[1].predicted <= E


def test_recall_counts_what_a_loop_counts() -> None:
    run = Accesses.of([[{0, 1}, {2}], [{1}, {2, 3}]], num_experts=4)
    found = offload.recall(Scripted({0: [(1, 2), (1, 0), (1, 2)], 1: [(0, 1)]}), run)
    # layer 0: nothing, then 1 of {1}; layer 1: {2, 0} of {2}, and of {2, 3}
    assert [(layer.used, layer.predicted, layer.right) for layer in found] == [(3, 1, 1), (3, 4, 2)]
    assert [layer.recall for layer in found] == [1 / 3, 2 / 3]
    assert [layer.precision for layer in found] == [1.0, 0.5]


def test_recall_of_tensors_and_none() -> None:
    found = offload.Recall(["0", "1"])
    found.predicted([(torch.tensor(1), torch.tensor(3)), (1, 3), (1, -1), (0, 0)])  # type: ignore[list-item]
    for layer in range(2):
        found.used(layer, torch.tensor([[3, -1]]))
    assert [(layer.used, layer.predicted, layer.right) for layer in found.layers] == [(1, 1, 0), (1, 1, 1)]


def singles(seed: int, num_layers: int = 3, length: int = 60) -> Any:
    """A step has one expert per layer, which depends on the layer before."""
    rng = random.Random(seed)
    steps: list[list[set[int]]] = []
    last = 0
    for _ in range(length):
        step = []
        for layer in range(num_layers):
            last = (last * 2 + layer) % E if rng.random() < 0.6 else rng.randrange(E)
            step.append({last})
        steps.append(step)
    return steps


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("observed_first", [False, True])
def test_row42_argmax_of_the_empirical_conditional(order: int, num_layers: int, observed_first: bool) -> None:
    for seed in range(4):
        steps = singles(seed, num_layers)
        chain = [next(iter(experts)) for step in steps for experts in step]  # by moment
        predictor = Follows.of(Accesses.of(steps, num_experts=E), order=order, top_k=1)
        for moment, expert in enumerate(chain):
            layer = moment % num_layers
            ids = torch.tensor([[expert]])
            if observed_first:
                predictor.observe(layer, ids)
            predicted = predictor.predict(layer, torch.empty(1, 0), ids)
            if not observed_first:
                predictor.observe(layer, ids)
            if moment + 1 < order:
                continue
            context = chain[moment + 1 - order : moment + 1]
            counts = Counter(
                chain[m]
                for m in range(order, len(chain))
                if m % num_layers == (moment + 1) % num_layers and chain[m - order : m] == context
            )
            ahead = (layer + 1) % num_layers
            if counts:
                assert predicted == [(ahead, max(range(E), key=lambda e: (counts[e], -e)))]


def test_row42_sets_of_experts_average_and_unseen_ones_fall_back() -> None:
    steps = [[{0, 1}, {0}], [{1, 2}, {1, 2}], [{0}, {0, 2}]]
    follows = Follows.of(Accesses.of(steps, num_experts=4), top_k=4)
    # P(j | 0): 0 in 2 of 2, 2 in 1 of 2. P(j | 1): 0, 1, 2 each in 1 of 2. Mean: 0.75, 0.25, 0.5.
    assert follows.predict(0, torch.empty(1, 0), torch.tensor([[0, 1]])) == [(1, 0), (1, 2), (1, 1)]
    assert follows.predict(0, torch.empty(1, 0), torch.tensor([[0, -1]])) == [(1, 0), (1, 2)]
    # 3 was never there: frequencies 2/3, 1/3, 2/3; nor was a token without experts.
    for ids in ([[3]], [[-1, -1]]):
        assert follows.predict(0, torch.empty(1, 0), torch.tensor(ids)) == [(1, 0), (1, 2), (1, 1)]
    # Of the last layer: the next step's first.
    assert follows.predict(1, torch.empty(1, 0), torch.tensor([[0]])) == [(0, 1), (0, 2)]
    # As many as there are choices; two tokens add up.
    table = Follows.of(Accesses.of(steps, num_experts=4))
    assert table.predict(0, torch.empty(2, 0), torch.tensor([[0], [2]])) == [(1, 0), (1, 1)]


def test_row42_smoothing_is_the_stated_formula() -> None:
    steps = random_steps(3, 2, E, 50)
    run = Accesses.of(steps, num_experts=E)
    table = Follows.of(run, smoothing=1.5).tables[1][1]
    for i in range(E):
        with_i = [step for step in steps if i in step[0]]
        for j in range(E):
            frequency = sum(j in step[1] for step in steps) / len(steps)
            wanted = (sum(j in step[1] for step in with_i) + 1.5 * frequency) / (len(with_i) + 1.5)
            assert float(table[i, j]) == pytest.approx(wanted, rel=1e-5)


def test_row42_other_tokens_than_before_fall_back_to_order_1() -> None:
    run = Accesses.of(singles(0), num_experts=E)
    first, second = (Follows.of(run, order=order, top_k=2) for order in (1, 2))
    ids = torch.tensor([[1], [2]])
    second.observe(0, torch.tensor([[1]]))
    assert second.predict(1, torch.empty(2, 0), ids) == first.predict(1, torch.empty(2, 0), ids)


def test_bad_input() -> None:
    model = residual().eval()
    run = Accesses.of(singles(0), num_experts=E)
    for words, call in [
        ("layers_ahead", lambda: NextGate(model, 0)),
        ("top_k", lambda: NextGate(model, top_k=0)),
        ("model", lambda: NextGate(torch.nn.Linear(2, 2))),
        ("model", lambda: FromPreGate(model)),
        ("order", lambda: Follows.of(run, order=3)),
        ("smoothing", lambda: Follows.of(run, smoothing=-1)),
    ]:
        with raises(ValueError, words):
            call()
