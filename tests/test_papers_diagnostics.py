# SPDX-License-Identifier: BSD-3-Clause
"""The diagnostics of rows 37 and 73 to 77, each against a plain loop in float64 from its formula."""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errors import raises
from switchgear import MoE, RoutingTrace, diagnostics, route
from switchgear.diagnostics import LayerChoices
from switchgear.routing import Cosine

E, H, WIDTH, T = 6, 10, 5, 40


def choices(seed: int, num_tokens: int = T, top_k: int = 2, **fields: Any) -> LayerChoices:
    logits = torch.randn(num_tokens, E, generator=torch.Generator().manual_seed(seed))
    routing = route(logits, top_k)
    return LayerChoices(routing.topk_ids, routing.topk_weights, E, logits, **fields)


def rows_of(layer: LayerChoices) -> list[list[tuple[int, float]]]:
    """The choices of each token as (expert, weight), without empty ones."""
    pairs = zip(layer.topk_ids.tolist(), layer.topk_weights.tolist(), strict=True)
    return [[(e, w) for e, w in zip(ids, weights, strict=True) if e >= 0] for ids, weights in pairs]


# ---- 73: A Closer Look into Mixture-of-Experts -----------------------------------------------------------------------


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_row73_similarity_of_matrices_and_of_mean_neurons() -> None:
    weights = torch.randn(E, WIDTH, H, dtype=torch.float64)
    for how, vectors in (("matrices", weights.flatten(1)), ("neurons", weights.mean(1))):
        found = diagnostics.expert_similarity(weights, how)
        wanted = [[cosine(a.tolist(), b.tolist()) for b in vectors] for a in vectors]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_row73_identical_experts_are_similar_and_permuted_neurons_after_reordering() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    gate_up, down = torch.randn(1, 2 * WIDTH, H), torch.randn(1, H, WIDTH)
    same = diagnostics.neurons(gate_up.expand(3, -1, -1), down.expand(3, -1, -1))
    for how in ("matrices", "neurons", "reordered"):
        torch.testing.assert_close(diagnostics.expert_similarity(same, how), torch.ones(3, 3, dtype=torch.float64))

    order = torch.tensor([3, 0, 4, 1, 2])
    moved_gate_up = torch.cat([gate_up, torch.cat([half[:, order] for half in gate_up.split(WIDTH, 1)], 1)])
    moved = diagnostics.neurons(moved_gate_up, torch.cat([down, down[:, :, order]]))
    assert diagnostics.expert_similarity(moved)[0, 1] < 0.9
    for how in ("neurons", "reordered"):
        assert diagnostics.expert_similarity(moved, how)[0, 1] == pytest.approx(1)
    assert torch.equal(order[diagnostics.neuron_order(moved[0], moved[1])], torch.arange(WIDTH))


def test_row73_neurons_in_other_layouts() -> None:
    gate_up, down = torch.randn(3, 2 * WIDTH, H), torch.randn(3, H, WIDTH)
    wanted = diagnostics.neurons(gate_up, down)
    assert torch.equal(wanted[1, 2], torch.cat([gate_up[1, 2], gate_up[1, WIDTH + 2], down[1, :, 2]]))
    turned = diagnostics.neurons(gate_up.transpose(1, 2), down.transpose(1, 2), transposed=True)
    assert torch.equal(turned, wanted)
    alternating = torch.stack(gate_up.split(WIDTH, 1), 2).flatten(1, 2)
    assert torch.equal(diagnostics.neurons(alternating, down, interleaved=True), wanted)
    with raises(ValueError, "gate_up_proj"):
        diagnostics.neurons(gate_up[:, 1:], down)


def test_row73_reordering_finds_the_best_assignment() -> None:
    """Against all permutations of four neurons."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    from itertools import permutations

    a, b = torch.randn(2, 4, 3, dtype=torch.float64)
    cosines = [[cosine(x.tolist(), y.tolist()) for y in b] for x in a]
    best = max(permutations(range(4)), key=lambda order: sum(cosines[i][order[i]] for i in range(4)))
    assert diagnostics.neuron_order(a, b).tolist() == list(best)


def test_row73_similarity_of_outputs() -> None:
    moe = MoE(H, WIDTH, E, 2).double()
    x = torch.randn(7, H, dtype=torch.float64)
    outputs = diagnostics.expert_outputs(moe.experts, x)
    for expert in range(E):  # each expert alone, in plain torch
        gate, up = (x @ moe.experts.gate_up_proj[expert].T).split(WIDTH, 1)
        torch.testing.assert_close(outputs[expert], nn.functional.silu(gate) * up @ moe.experts.down_proj[expert].T)
    found = diagnostics.output_similarity(outputs)
    for i in range(E):
        for j in range(E):
            mean = sum(cosine(outputs[i, t].tolist(), outputs[j, t].tolist()) for t in range(7)) / 7
            assert float(found[i, j]) == pytest.approx(mean)
    assert found.diagonal().tolist() == pytest.approx([1] * E)


def test_row73_cka_ignores_rotations_and_sees_independence() -> None:
    first, other = torch.randn(2, 400, H, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(H, H, dtype=torch.float64)).Q
    found = diagnostics.output_similarity(torch.stack([first, 3 * first @ rotation + 1, other]), "cka")
    assert float(found[0, 1]) == pytest.approx(1)
    assert float(found[0, 2]) < 0.2
    centre = torch.eye(400, dtype=torch.float64) - 1 / 400
    k, m = (centre @ (y @ y.T) @ centre for y in (first, other))  # HSIC of linear kernels
    wanted = (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()
    torch.testing.assert_close(found[0, 2], wanted)


def test_row73_rank_of_norms_by_score() -> None:
    outputs, scores = torch.randn(E, T, H), torch.rand(T, E)
    found = diagnostics.norm_vs_score_rank(outputs, scores)
    wanted = torch.zeros(E, E, dtype=torch.int64)
    for t in range(T):
        norms = [float(outputs[e, t].norm()) for e in range(E)]
        by_score = sorted(range(E), key=lambda e: -float(scores[t, e]))
        by_norm = sorted(range(E), key=lambda e: -norms[e])
        for i, expert in enumerate(by_score):
            wanted[i, by_norm.index(expert)] += 1
    assert torch.equal(found, wanted)
    assert (found.sum(0) == T).all()
    assert (found.sum(1) == T).all()
    sizes = outputs.norm(dim=-1).T
    assert torch.equal(diagnostics.norm_vs_score_rank(outputs, sizes), T * torch.eye(E, dtype=torch.int64))


def test_row73_gate_embeddings_and_weights_correlate() -> None:
    weights = torch.randn(E, WIDTH, H, dtype=torch.float64)
    assert diagnostics.gate_embedding_correlation(3 * weights.mean(1), weights) == pytest.approx(1)
    gate = torch.randn(E, H, dtype=torch.float64)
    means = weights.mean(1)
    pairs = [(i, j) for i in range(E) for j in range(i)]
    a = [cosine(gate[i].tolist(), gate[j].tolist()) for i, j in pairs]
    b = [cosine(means[i].tolist(), means[j].tolist()) for i, j in pairs]
    ca, cb = ([x - sum(side) / len(side) for x in side] for side in (a, b))
    r = sum(x * y for x, y in zip(ca, cb, strict=True)) / math.sqrt(sum(x * x for x in ca) * sum(y * y for y in cb))
    assert diagnostics.gate_embedding_correlation(gate, weights) == pytest.approx(r * r)


def test_row73_principal_components() -> None:
    plane = torch.randn(E, 2, dtype=torch.float64) @ torch.randn(2, 30, dtype=torch.float64) + 5
    found, variance = diagnostics.principal_components(plane)
    assert float(variance.sum()) == pytest.approx(1)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(plane, plane))


# ---- 74: Expert contributions on quizzes -----------------------------------------------------------------------------


def test_row74_usage_and_entropy_of_known_choices() -> None:
    ids = torch.tensor([[0, 1], [0, 3], [0, -1]])
    trace = {"gate": LayerChoices(ids, torch.ones(3, 2), 5, torch.zeros(3, 5))}
    found = diagnostics.usage(trace)["gate"]
    assert found.tokens.tolist() == [3, 1, 0, 1, 0]
    assert found.share.tolist() == [0.6, 0.2, 0, 0.2, 0]
    assert found.unused == (2, 4)
    assert diagnostics.gate_entropy(trace)["gate"] == pytest.approx(math.log(5))
    assert math.isnan(diagnostics.gate_entropy({"gate": LayerChoices(ids, torch.ones(3, 2), 5)})["gate"])


def test_row74_of_a_trace_as_of_the_choices() -> None:
    moe = MoE(H, WIDTH, E, 2)
    x = torch.randn(T, H)
    x[3] = math.nan
    with RoutingTrace(moe) as trace:
        routing = moe.gate(x)
    kept = {"gate": LayerChoices(routing.topk_ids, routing.topk_weights, E, routing.router_logits)}
    assert torch.equal(diagnostics.usage(trace)["gate"].tokens, diagnostics.usage(kept)["gate"].tokens)
    assert diagnostics.gate_entropy(trace)["gate"] == pytest.approx(diagnostics.gate_entropy(kept)["gate"])
    torch.testing.assert_close(diagnostics.affinity(trace)["gate"], diagnostics.affinity(kept)["gate"])


def test_what_a_trace_does_not_record_is_named() -> None:
    moe = MoE(H, WIDTH, E, 2)
    with RoutingTrace(moe, record=("counts",)) as trace:
        moe(torch.randn(T, H))
    with raises(ValueError, "trace"):
        diagnostics.gate_entropy(trace)
    for function in (diagnostics.affinity, lambda trace: diagnostics.ftri(trace, trace)):
        with raises(ValueError, "trace"):
            function(trace)


def test_row74_outcome_by_expert() -> None:
    examples = torch.arange(T) // 4
    layer, correct = choices(1, examples=examples), torch.rand(T // 4) > 0.5
    found = diagnostics.outcome_by_expert({"gate": layer}, correct)["gate"]
    used = [{e for t in range(4 * n, 4 * n + 4) for e, _ in rows_of(layer)[t]} for n in range(T // 4)]
    for expert in range(E):
        inside = [float(correct[n]) for n in range(T // 4) if expert in used[n]]
        outside = [float(correct[n]) for n in range(T // 4) if expert not in used[n]]
        assert int(found.active[expert]) == len(inside)
        for value, side in ((found.with_expert[expert], inside), (found.without_expert[expert], outside)):
            assert float(value) == pytest.approx(sum(side) / len(side)) if side else math.isnan(value)
    assert torch.equal(found.difference.isnan(), (found.active == 0) | (found.active == T // 4))
    with raises(ValueError, "correct"):
        diagnostics.outcome_by_expert({"gate": layer}, correct[:9])
    with raises(ValueError, "examples"):
        diagnostics.outcome_by_expert({"gate": choices(1)}, correct)


# ---- 75: MoEE --------------------------------------------------------------------------------------------------------


@pytest.fixture
def olmoe() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_experts=E, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(config).eval()


def test_row75_embedding_is_the_routing_of_the_last_token(olmoe: Any) -> None:
    """Each text alone, its gates' softmax read by hooks; then padded on either side in one batch."""
    texts = [torch.randint(1, 50, (n,)) for n in (5, 8, 3)]
    logits: list[Tensor] = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda *a: logits.append(a[2][0])) for layer in olmoe.model.layers]
    routing, hidden = [], []
    for text in texts:
        logits.clear()
        with torch.no_grad():
            states = olmoe(text[None], output_hidden_states=True).hidden_states[-1]
        routing.append(torch.cat([rows.reshape(-1, E)[-1].softmax(-1) for rows in logits]))
        hidden.append(states[0, -1])
    for hook in hooks:
        hook.remove()
    for side in ("right", "left"):
        ids, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
        for row, text in enumerate(texts):
            at = slice(0, len(text)) if side == "right" else slice(8 - len(text), 8)
            ids[row, at], mask[row, at] = text, 1
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        found = diagnostics.routing_embedding(olmoe, inputs)
        assert found.routing.shape == (3, 3 * E)  # the sum over layers of E
        torch.testing.assert_close(found.routing, torch.stack(routing), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.hidden, torch.stack(hidden), atol=1e-5, rtol=1e-4)
        assert torch.equal(found.routing, diagnostics.routing_embedding(olmoe, inputs).routing)


def test_row75_similarity_is_the_weighted_sum(olmoe: Any) -> None:
    a, b = (diagnostics.routing_embedding(olmoe, {"input_ids": torch.randint(50, (n, 6))}) for n in (3, 2))
    for alpha in (1.0, 0.5):
        found = a.similarity(b, alpha)
        for i in range(3):
            for j in range(2):
                hs = cosine(a.hidden[i].tolist(), b.hidden[j].tolist())
                rw = cosine(a.routing[i].tolist(), b.routing[j].tolist())
                assert float(found[i, j]) == pytest.approx(hs + alpha * rw, abs=1e-5)
    torch.testing.assert_close(a.concatenated @ b.concatenated.T, a.similarity(b))


def test_row75_plain_ids_have_the_hidden_state(olmoe: Any) -> None:
    ids = torch.randint(1, 50, (3, 6))
    found, wanted = (diagnostics.routing_embedding(olmoe, inputs) for inputs in (ids, {"input_ids": ids}))
    assert torch.equal(found.routing, wanted.routing)
    assert torch.equal(found.hidden, wanted.hidden)


def test_row75_z_scores_over_the_batch_are_those_of_the_code(olmoe: Any) -> None:
    found = diagnostics.routing_embedding(olmoe, torch.randint(1, 50, (5, 6)))
    scores = found.standardize()
    for name in ("routing", "hidden"):
        for feature, got in zip(getattr(found, name).T.tolist(), getattr(scores, name).T.tolist(), strict=True):
            mean, deviation = statistics.mean(feature), statistics.stdev(feature)
            assert got == pytest.approx([(v - mean) / (deviation + 1e-8) for v in feature], abs=1e-3)
    assert diagnostics.RoutingEmbedding(found.routing, None).standardize().hidden is None
    with raises(ValueError, "routing"):
        diagnostics.RoutingEmbedding(found.routing[:1], None).standardize()


def test_row75_prompt_is_that_of_the_code() -> None:
    assert diagnostics.prompt_eol("a cat") == 'This sentence : "a cat." means in one word:"'
    assert diagnostics.prompt_eol('a "big_cat"') == 'This sentence : "a \'big cat\'" means in one word:"'
    assert diagnostics.prompt_eol("a cat?") == 'This sentence : "a cat?" means in one word:"'
    assert diagnostics.prompt_eol("") == 'This sentence : "" means in one word:"'


def test_row75_similarities_rank_texts_as_their_topics_do(olmoe: Any) -> None:
    """Spearman's correlation with "same topic", for texts whose words come from one of three ranges."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    topics = torch.arange(12) % 3
    ids = 16 * topics[:, None] + torch.randint(1, 4, (12, 10))
    found = diagnostics.routing_embedding(olmoe, {"input_ids": ids}, token="mean")
    pairs = torch.ones(12, 12).tril(-1).bool()
    same = (topics[:, None] == topics)[pairs].double()
    for similarity in (found.similarity(found), diagnostics.RoutingEmbedding(found.routing, None).similarity(found)):
        assert stats.spearmanr(similarity[pairs].numpy(), same.numpy()).statistic > 0.6


def test_row75_of_our_own_layers_and_under_generate(olmoe: Any) -> None:
    model = nn.Sequential(MoE(H, WIDTH, E, 2), MoE(H, WIDTH, 4, 1))
    x = torch.randn(2, 7, H)
    found = diagnostics.routing_embedding(model, x)
    logits = model[0].gate.logits(x[:, -1]), model[1].gate.logits(model[0](x)[:, -1])
    torch.testing.assert_close(found.routing, torch.cat([rows.softmax(-1) for rows in logits], -1))
    torch.testing.assert_close(found.hidden, model(x)[:, -1])
    with raises(ValueError, "token"):
        diagnostics.routing_embedding(model, x, "first")
    with raises(ValueError, "inputs"):
        diagnostics.routing_embedding(model, {"use_cache": False})
    ids = torch.randint(1, 50, (2, 4))
    found = diagnostics.routing_embedding(olmoe, {"use_cache": False, "input_ids": ids})
    assert torch.equal(found.routing, diagnostics.routing_embedding(olmoe, {"input_ids": ids}).routing)
    with diagnostics.collect(olmoe) as kept:
        olmoe.generate(torch.randint(1, 50, (2, 4)), max_new_tokens=3, do_sample=False)
    assert [layer.num_tokens for layer in kept.values()] == [2 * 4 + 2 * 2] * 3
    assert all(layer.router_logits.shape == (12, E) for layer in kept.values())


def test_collect_leaves_padding_out_and_numbers_the_examples(olmoe: Any) -> None:
    ids, mask = torch.randint(1, 50, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with diagnostics.collect(olmoe) as kept, RoutingTrace(olmoe) as trace:
        olmoe(ids, attention_mask=mask)
        olmoe(ids[:1], attention_mask=mask[:1])
    assert list(kept) == list(trace.layers)
    for layer in kept.values():
        assert layer.examples.tolist() == [0] * 3 + [1] * 5 + [2] * 3
        assert layer.topk_ids.shape == (11, 2)
    assert set(diagnostics.activation_by_example(kept)) == set(kept)


def test_collect_counts_decoded_tokens_to_their_examples(olmoe: Any) -> None:
    prompts = torch.randint(1, 50, (2, 4))
    with diagnostics.collect(olmoe) as kept:
        for _ in range(2):
            olmoe.generate(prompts, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for layer in kept.values():
        assert layer.examples.tolist() == ([0] * 4 + [1] * 4 + [0, 1] * 2) + ([2] * 4 + [3] * 4 + [2, 3] * 2)


def test_collect_begins_a_batch_after_a_prefix(olmoe: Any) -> None:
    """Which is in the cache of every call."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model, prompts = peft.get_peft_model(olmoe, options).eval(), torch.randint(1, 50, (2, 4))
    with diagnostics.collect(model) as kept:
        for _ in range(2):
            model(input_ids=prompts, attention_mask=torch.ones_like(prompts))
    for layer in kept.values():
        assert layer.examples.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


# ---- 76: Mixture of tunable experts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["weight", "count"])
def test_row76_resonance_is_the_difference_of_means(by: str) -> None:
    sides = [choices(seed, examples=torch.arange(T) // (T // n)) for seed, n in ((1, 4), (2, 5))]
    wanted = []
    for layer, n in zip(sides, (4, 5), strict=True):
        sums = [[0.0] * E for _ in range(n)]
        for t, row in enumerate(rows_of(layer)):
            for expert, weight in row:
                sums[t * n // T][expert] += weight if by == "weight" else 1
        wanted.append([sum(prompt[e] for prompt in sums) / n for e in range(E)])
    found = diagnostics.ftri({"gate": sides[0]}, {"gate": sides[1]}, by=by)
    difference = [a - b for a, b in zip(*wanted, strict=True)]
    assert found.by_layer["gate"].tolist() == pytest.approx(difference)
    best = max(range(E), key=lambda e: difference[e])
    assert found.ranked(1)[0][:2] == ("gate", best)
    assert found.top(1) == {"gate": [best]}
    assert (-found).top(1) == {"gate": [min(range(E), key=lambda e: difference[e])]}


def planted(model: nn.Sequential, expert: int) -> tuple[Tensor, Tensor]:
    """Prompts [N,S,H] of two kinds; those of the first choose `expert` of the first layer."""
    neutral = torch.randn(4, 8, H)
    with torch.no_grad():
        model[0].gate.weight[expert] = 3 * nn.functional.normalize(torch.ones(H), dim=0)
    neutral = neutral - neutral.mean(-1, keepdim=True) - 0.5
    return neutral + 2, neutral


def test_row76_the_found_experts_are_disabled_end_to_end() -> None:
    model = nn.Sequential(MoE(H, WIDTH, E, 2), MoE(H, WIDTH, E, 2))
    shown, neutral = planted(model, 4)
    traces = []
    for prompts in (shown, neutral):
        with RoutingTrace(model) as trace:
            for prompt in prompts:
                model(prompt)
        traces.append(trace)
    experts = diagnostics.ftri(*traces).top(1)
    assert experts == {"0.gate": [4]}
    plain = model(shown)
    with diagnostics.steered(model, experts, disable=True):
        assert 4 not in model[0].gate(shown).topk_ids
        assert not torch.allclose(model(shown), plain)
    with diagnostics.steered(model, experts, force=True):
        assert (model[0].gate(neutral).topk_ids == 4).any(-1).all()
    with diagnostics.steered(model, experts, gain=2.0):
        assert not torch.allclose(model(shown), plain)
    assert torch.equal(model(shown), plain)
    with raises(ValueError, "disable"), diagnostics.steered(model, experts):
        pass
    with raises(ValueError), diagnostics.steered(model, {"2.gate": [1]}, disable=True):
        pass
    assert torch.equal(model(shown), plain)


def test_row76_on_a_hugging_face_model(olmoe: Any) -> None:
    traces = []
    for low in (1, 26):
        with RoutingTrace(olmoe) as trace:
            for _ in range(3):
                olmoe(torch.randint(low, low + 24, (1, 9)))
        traces.append(trace)
    experts = diagnostics.ftri(*traces).top(4)
    assert sum(map(len, experts.values())) == 4
    ids = torch.randint(1, 25, (1, 9))
    plain = olmoe(ids).logits
    with diagnostics.steered(olmoe, experts, disable=True), diagnostics.collect(olmoe) as kept:
        assert not torch.allclose(olmoe(ids).logits, plain)
    for name, disabled in experts.items():
        assert not set(disabled) & set(kept[name].topk_ids.flatten().tolist())
    assert torch.equal(olmoe(ids).logits, plain)


# ---- 77: Core experts in retrieval-augmented models ------------------------------------------------------------------


def test_row77_contrastive_activation_is_the_difference_of_frequencies() -> None:
    sides = [choices(seed, num_tokens=n) for seed, n in ((1, 40), (2, 30))]
    found = diagnostics.contrastive_activation({"gate": sides[0]}, {"gate": sides[1]}).by_layer["gate"]
    for expert in range(E):
        share = [sum(expert in dict(row) for row in rows_of(side)) / side.num_tokens for side in sides]
        assert float(found[expert]) == pytest.approx(share[0] - share[1])
    with raises(ValueError, "negative"):
        diagnostics.contrastive_activation({"gate": sides[0]}, {"other": sides[1]})


def test_row77_a_planted_core_expert_is_found_boosted_and_predicts() -> None:
    model = nn.Sequential(MoE(H, WIDTH, E, 2), MoE(H, WIDTH, E, 2))
    shown, neutral = planted(model, 3)
    with RoutingTrace(model) as positive:
        model(shown)
    with RoutingTrace(model) as negative:
        model(neutral)
    core = diagnostics.contrastive_activation(positive, negative).top(1)
    assert core == {"0.gate": [3]}

    def used(x: Tensor) -> int:
        return int((model[0].gate(x).topk_ids == 3).sum())

    before = used(neutral)
    with diagnostics.steered(model, core, bias=1.0):
        assert used(neutral) > before

    routing = model[0].gate(torch.cat([shown, neutral]))
    layer = LayerChoices(routing.topk_ids, routing.topk_weights, E, examples=torch.arange(64) // 8)
    scores = diagnostics.core_activation({"0.gate": layer}, core)
    for n in range(8):
        hits = [e for row in rows_of(layer)[8 * n : 8 * n + 8] for e, _ in row]
        assert float(scores[n]) == pytest.approx(hits.count(3) / len(hits))
    assert diagnostics.auc(scores, torch.arange(8) < 4) == 1


def test_row77_boosted_on_a_hugging_face_model(olmoe: Any) -> None:
    ids = torch.randint(1, 50, (3, 9))
    with RoutingTrace(olmoe) as trace:
        olmoe(ids)
    layers = list(trace.layers)
    core = {name: [2] for name in layers[:2]}

    def used() -> list[int]:
        with diagnostics.collect(olmoe) as kept:
            olmoe(ids)
        return [int((kept[name].topk_ids == 2).sum()) for name in core]

    before = used()
    with diagnostics.steered(olmoe, core, bias=2.0):
        assert used() == [27, 27]  # a bias above all differences of a softmax
    assert used() == before
    assert max(before) < 27


def test_row77_auc_is_the_fraction_of_ordered_pairs() -> None:
    scores, labels = torch.randint(5, (30,)).double(), torch.arange(30) % 3 == 0
    pairs = [(float(p), float(n)) for p in scores[labels] for n in scores[~labels]]
    wanted = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
    assert diagnostics.auc(scores, labels) == pytest.approx(wanted)
    assert math.isnan(diagnostics.auc(scores, labels & False))
    with raises(ValueError, "labels"):
        diagnostics.auc(scores, labels[1:])


def test_layers_are_collected_by_their_names_in_a_trace() -> None:
    model, x = nn.Sequential(MoE(H, 16, E, 2), MoE(H, 16, E, 2)), torch.randn(5, H)
    for name in ("1.gate", "1"):
        with diagnostics.collect(model, layers=name) as kept:
            model(x)
        assert list(kept) == ["1.gate"]
    with (
        raises(ValueError, "layers"),
        diagnostics.collect(model, layers="2"),
    ):
        pass


def test_row77_core_experts_are_checked() -> None:
    layer = LayerChoices(torch.tensor([[0, 1]]), torch.ones(1, 2), 3, examples=torch.zeros(1, dtype=torch.int64))
    with raises(ValueError, "core"):
        diagnostics.core_activation({"a": layer}, {"b": [1]})
    for expert in (-1, 3):
        with raises(ValueError, "core"):
            diagnostics.core_activation({"a": layer}, {"a": [expert]})
    assert diagnostics.core_activation({"a": layer}, {"a": [1, 1]}).tolist() == [0.5]  # named twice, counted once


# ---- 37: margin and change, which LibMoE defines otherwise, and its routers ------------------------------------------


def test_row37_margin_saturation_and_change() -> None:
    early, late = choices(1, top_k=3), choices(2, top_k=3)
    p = late.router_logits.double().softmax(-1)
    for k in (1, 3):
        wanted = [sorted(row, reverse=True)[k - 1] - sorted(row, reverse=True)[k] for row in p.tolist()]
        assert diagnostics.router_margin(late.router_logits, k).tolist() == pytest.approx(wanted)
    sets = [[{e for e, _ in row} for row in rows_of(layer)] for layer in (early, late)]
    shared = sum(len(a & b) for a, b in zip(*sets, strict=True))
    assert diagnostics.router_saturation(early.topk_ids, late.topk_ids, E) == pytest.approx(shared / (3 * T))
    changed = sum(a != b for a, b in zip(*sets, strict=True))
    assert diagnostics.routing_change(early.topk_ids, late.topk_ids, E) == pytest.approx(changed / T)
    flipped = late.topk_ids.flip(1)
    assert diagnostics.router_saturation(flipped, late.topk_ids, E) == 1
    assert diagnostics.routing_change(flipped, late.topk_ids, E) == 0
    with raises(ValueError, "top_k"):
        diagnostics.router_margin(late.router_logits, E)
    for function in (diagnostics.router_saturation, diagnostics.routing_change):
        with raises(ValueError):
            function(early.topk_ids, late.topk_ids[1:], E)
        assert function(early.topk_ids[:0], late.topk_ids[:0], E) == 0


class Hyper(nn.Module):
    """HyperRouter (arXiv:2312.07035): the router's weight comes from a fixed network and a learned embedding."""

    def __init__(self, hidden_size: int, num_experts: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(4, dtype=dtype))
        self.register_buffer("fixed", torch.randn(num_experts * hidden_size, 4, dtype=dtype))

    def forward(self, x: Tensor, context: Any) -> Tensor:
        return x @ (self.fixed @ self.embedding).relu().view(-1, x.shape[-1]).T


ROUTERS: dict[str, dict[str, Any]] = {
    "smoe": {"top_k": 2},
    "sigma_moe": {"top_k": 2, "score_function": "sigmoid"},
    "xmoe": {"top_k": 2, "score": Cosine},
    "perturbed cosine": {"top_k": 2, "score": functools.partial(Cosine, perturb=0.1)},
    "hyper router": {"top_k": 2, "score": Hyper},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_row37_a_router_swap_changes_nothing_else(router: str) -> None:
    """LibMoE's five routers on a common layer: the same experts, run as a plain loop over the router's choice runs
    them, and gradients to both."""
    torch.manual_seed(0)
    common = MoE(H, WIDTH, E, 2).double().experts.state_dict()
    layer = MoE(H, WIDTH, E, **ROUTERS[router]).double()
    layer.experts.load_state_dict(common)
    x = torch.randn(9, H, dtype=torch.float64)
    routing, y = layer.gate(x), layer(x)
    for token in range(9):
        wanted = torch.zeros(H, dtype=torch.float64)
        for expert, weight in zip(routing.topk_ids[token].tolist(), routing.topk_weights[token], strict=True):
            gate, up = (x[token] @ common["gate_up_proj"][expert].T).split(WIDTH)
            wanted = wanted + weight.double() * (nn.functional.silu(gate) * up @ common["down_proj"][expert].T)
        torch.testing.assert_close(y[token], wanted, atol=1e-6, rtol=1e-5)
    y.square().sum().backward()
    trained = dict(layer.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained.values())
    assert {name for name in trained if name.startswith("experts.")} == {f"experts.{name}" for name in common}


# ---- coactivation and cacheability -----------------------------------------------------------------------------------


def test_coactivation_counts_pairs() -> None:
    layer = choices(1, top_k=3)
    sets = [{e for e, _ in row} for row in rows_of(layer)]
    wanted = [[sum(i in s and j in s for s in sets) for j in range(E)] for i in range(E)]
    found = diagnostics.coactivation(layer.topk_ids, E)
    assert found.tolist() == wanted
    given = diagnostics.coactivation(layer.topk_ids, E, conditional=True)
    assert float(given[0, 1]) == pytest.approx(wanted[0][1] / wanted[0][0])
    few = torch.tensor([[0, 1], [0, -1], [0, 3]])  # expert 2 is in no token, and 3 is none of three
    assert diagnostics.coactivation(few, 3).tolist() == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert diagnostics.coactivation(few, 3, conditional=True)[1:].tolist() == [[1, 1, 0], [0, 0, 0]]


def test_cacheability_against_its_definition() -> None:
    """SRP by trying every threshold on lists; SCH by counting."""
    ids, m, slots, length = choices(3, num_tokens=60).topk_ids, 5, 3, 20
    windows = [range(s * length + t, s * length + t + m) for s in range(3) for t in range(length - m + 1)]
    sets = [set(row) - {-1} for row in ids.tolist()]
    counts = [[sum(e in sets[t] for t in window) for e in range(E)] for window in windows]
    total = sum(map(sum, counts))
    best = 0.0
    for threshold in range(1, m + 1):
        picked = [n for row in counts for n in row if n >= threshold]
        best = max(best, 2 * sum(picked) / (m * len(picked) + total))
    hits = sum(sum(sorted(row, reverse=True)[:slots]) for row in counts)
    found = diagnostics.cacheability(ids, E, segment=m, slots=slots, sequence_length=length)
    assert found.srp == pytest.approx(best)
    assert found.sch == pytest.approx(hits / total)
    assert found.experts_per_segment == pytest.approx(sum(n > 0 for row in counts for n in row) / len(windows))


def test_cacheability_of_extremes() -> None:
    same = torch.tensor([[1, 4]]).expand(30, 2)
    found = diagnostics.cacheability(same, E, segment=8)
    assert (found.srp, found.sch, found.experts_per_segment, found.slots) == (1, 1, 2, 4)
    spread = (torch.arange(30) % E)[:, None]
    found = diagnostics.cacheability(spread, E, segment=E, slots=1)
    assert found.sch == pytest.approx(1 / E)
    assert found.srp == pytest.approx(2 / (E + 1))
    alone = diagnostics.cacheability(spread, E, segment=1, slots=1, sequence_length=1)
    assert (alone.srp, alone.sch, alone.experts_per_segment) == (1, 1, 1)
    for options, message in (
        ({"segment": 31}, "segment"),
        ({"segment": 0}, "segment"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"slots": 7}, "slots"),
        ({"sequence_length": 7}, "sequence_length"),
    ):
        with raises(ValueError, message):
            diagnostics.cacheability(spread, E, **options)
