# SPDX-License-Identifier: BSD-3-Clause
"""Experts from models that were trained apart, and merging of models, each against the papers' formulas in float64."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from errors import raises
from made_tensors import MadeTensors
from switchgear import adapters, convert
from switchgear.layers.shared import SharedExperts
from switchgear.routing import AdaptiveSparsity, LossFreeBias, SwitchLoss

H, WIDTH = 24, 32


# ---- row 61: merging -------------------------------------------------------------------------------------------------


def ties(deltas: list[list[float]], keep: int, weights: list[float]) -> list[float]:
    """TIES-Merging, section 3, element by element; a negative weight turns the sign of its model, as in mergekit."""
    trimmed = []
    for delta in deltas:
        order = sorted(range(len(delta)), key=lambda i: -abs(delta[i]))[:keep]
        trimmed.append([value if i in order else 0.0 for i, value in enumerate(delta)])
    merged = []
    for values in zip(*trimmed, strict=True):
        sign = 1 if sum(w * v for w, v in zip(weights, values, strict=True)) >= 0 else -1
        agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if w * v * sign > 0]
        total = sum(w for w, _ in agreeing)
        merged.append(sum(w * v for w, v in agreeing) / (total or 1))
    return merged


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 2.0], [2.0, -1.4, 0.9], [1.0, -1.0, 1.0]])
def test_row61_ties_trims_elects_and_averages_what_agrees(weights: list[float] | None) -> None:
    base = torch.randn(200, dtype=torch.float64)
    deltas = torch.randn(3, 200, dtype=torch.float64)
    models = [{"w": base + delta} for delta in deltas]
    found = convert.merge_models(models, "ties", base={"w": base}, density=0.3, weights=weights, scale=0.7)
    expected = ties([(m["w"] - base).tolist() for m in models], 60, weights or [1.0] * 3)
    assert found["w"].sub(base + 0.7 * torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12
    assert float(found["w"].sub(base).eq(0).double().mean()) > 0  # some element was trimmed from all
    opposite = [{"w": torch.tensor([sign])} for sign in (1.0, -1.0)]
    assert convert.merge_models(opposite, "ties", base={"w": torch.zeros(1)})["w"] == 1  # the sign of 0 is that of +


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row61_ties_keeps_the_largest_and_the_first_of_equal_ones(dtype: torch.dtype) -> None:
    base = torch.zeros(9, dtype=dtype)
    model = {"w": torch.tensor([1, -3, 2, -2, 2, 0, 5, -2, 1e-30], dtype=dtype)}
    for density, kept in (
        (0.05, [6]),
        (0.3, [1, 6]),
        (0.45, [1, 2, 3, 6]),
        (0.9, [0, 1, 2, 3, 4, 6, 7, 8]),
        (1, range(9)),
    ):
        found = convert.merge_models([model], "ties", base={"w": base}, density=density)["w"]
        expected = torch.zeros(9, dtype=dtype)
        expected[list(kept)] = model["w"][list(kept)]
        assert torch.equal(found, expected)


def test_row61_dare_drops_rescales_and_keeps_the_mean() -> None:
    base, delta = torch.randn(40_000, dtype=torch.float64), torch.randn(40_000, dtype=torch.float64)
    model = {"w": base + delta}
    found = convert.merge_models([model], "dare", base={"w": base}, density=0.1, seed=3)["w"] - base
    kept = found != 0
    assert abs(float(kept.double().mean()) - 0.1) < 4 * (0.1 * 0.9 / 40_000) ** 0.5  # four deviations
    assert found[kept].sub(delta[kept] / 0.1).abs().max() < 1e-9
    # E[DARE] is the task vector: the mean over draws is off by √((1/p - 1) / n) of an element, here n = 200
    draws = [
        convert.merge_models([model], "dare", base={"w": base}, density=0.5, seed=s)["w"] - base for s in range(200)
    ]
    error = (torch.stack(draws).mean(0) - delta) / delta.abs()
    assert abs(float(error.square().mean().sqrt()) / (1 / 200) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_row61_merging_in_parts_has_the_same_bits_and_no_copies(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(40, 50)
    models = [{"w": base + torch.randint(-3, 4, (40, 50)) / 4} for _ in range(3)]  # many are equal, or 0
    options = {"base": {"w": base}, "weights": [1.0, 2.0, 1.5], "scale": 0.7, "seed": 3}
    densities = (0.01, 0.3, 0.8, 0.95, 1.0)
    expected = [convert.merge_models(models, method, density=density, **options)["w"] for density in densities]
    monkeypatch.setattr("switchgear.convert.average._PART", 77)
    for density, whole in zip(densities, expected, strict=True):
        with MadeTensors() as made:
            found = convert.merge_models(models, method, density=density, **options)["w"]
        assert torch.equal(found, whole)
        large = sum(size >= base.nbytes for size in made.num_bytes)
        assert large <= {"ties": 4}.get(method, 1)  # the result, and magnitudes of one task vector at a time


def test_row61_average_of_modules_with_weights() -> None:
    models = [nn.Linear(4, 3).double() for _ in range(3)]
    made = convert.merge_models(models, weights=[2, 1, 1])
    assert isinstance(made, nn.Linear)
    expected = (2 * models[0].weight + models[1].weight + models[2].weight) / 4
    assert made.weight.sub(expected).abs().max() < 1e-12
    assert made is not models[0]


def test_row61_bad_input_is_named() -> None:
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    for name, options in (("base", {"method": "ties"}), ("density", {"density": 0.0}), ("weights", {"weights": [1.0]}),
                          ("method", {"method": "slerp"}), ("weights", {"weights": [1.0, -1.0]})):  # fmt: skip
        with raises(ValueError, name):
            convert.merge_models(models, **options)  # type: ignore[arg-type]
    with raises(ValueError, "models"):
        convert.merge_models([nn.Linear(4, 3), nn.Linear(5, 3)])
    with raises(ValueError, "base"):
        convert.merge_models(models, "ties", base={})
    with raises(ValueError):
        convert.merge_models([nn.Linear(4, 3), nn.Linear(4, 3, bias=False)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_not_merged(value: float, dtype: torch.dtype) -> None:
    good = {"v": torch.zeros(3, dtype=dtype), "w": torch.randn(5, 4).to(dtype), "none": torch.zeros(0, dtype=dtype)}
    bad = {**good, "w": good["w"].index_fill(0, torch.tensor(3), value)}
    for method in ("average", "ties", "dare"):
        with raises(ValueError, "models"):
            convert.merge_models([good, bad], method, base=good)
        if method != "average":
            with raises(ValueError, "base"):
                convert.merge_models([good, good], method, base=bad)
    assert torch.equal(convert.merge_models([good, bad], "base", base=good)["w"], good["w"])


def test_equal_masks_of_infinities_are_merged() -> None:
    model = {"mask": torch.full((3, 3), -torch.inf).triu(1), "w": torch.randn(2)}
    merged = convert.merge_models([model, {**model, "w": torch.randn(2)}], "ties", base=model)
    assert torch.equal(merged["mask"], model["mask"])


def test_models_that_compute_with_other_tensors_are_not_merged() -> None:
    models = [nn.Sequential(switchgear.MoE(8, 8, 4, 2)) for _ in range(2)]
    switchgear.store(models[1], "int8")
    with raises(ValueError):
        convert.merge_models(models)
    adapted = nn.Sequential(switchgear.MoE(8, 8, 4, 2))
    adapters.add_lora(adapted, 2)
    with raises(ValueError):
        convert.merge_models(models[:1], "ties", base=adapted)


class Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        if tie:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_tied_tensors_are_merged_once(method: str) -> None:
    base, *models = (Tied() for _ in range(3))
    options: dict[str, Any] = {"method": method, "base": base, "density": 0.5}
    made = convert.merge_models(models, **options)
    assert made.head.weight is made.embedding.weight
    once = [{"embedding.weight": model.embedding.weight} for model in (base, *models)]
    expected = convert.merge_models(once[1:], **{**options, "base": once[0]})["embedding.weight"]
    copies = {name: tensor.clone() for name, tensor in models[1].state_dict().items()}  # equal, as a file has them
    merged = [dict(made.state_dict()), convert.merge_models([m.state_dict() for m in models], **options),
              convert.merge_models([models[0], copies], **options).state_dict()]  # fmt: skip
    for state in merged:
        assert torch.equal(state["embedding.weight"], expected)
        assert torch.equal(state["head.weight"], expected)


def test_models_that_do_not_tie_what_the_first_ties_are_not_merged() -> None:
    tied, untied = Tied(), Tied(tie=False)
    for name, models, base in (("models[1]", [tied, untied], tied), ("base", [tied, tied], untied)):
        with raises(ValueError, name):
            convert.merge_models(models, "ties", base=base)
    made = convert.merge_models([untied, tied])
    assert torch.equal(made.head.weight, (untied.head.weight + tied.head.weight) / 2)
    assert torch.equal(made.embedding.weight, (untied.embedding.weight + tied.embedding.weight) / 2)


class Markov(nn.Module):
    """A language model whose next token depends on the last one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        table = torch.randn(12, 12, generator=torch.Generator().manual_seed(seed)) * 3
        self.table = nn.Parameter(table.log_softmax(-1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def sample(self, count: int, length: int) -> Tensor:
        ids = torch.randint(12, (count, 1))
        for _ in range(length - 1):
            ids = torch.cat((ids, torch.multinomial(self.table[ids[:, -1]].exp(), 1)), 1)
        return ids


def test_row61_perplexity_picks_the_model_that_wrote_the_text() -> None:
    models = [Markov(seed) for seed in range(3)]
    texts = [model.sample(5, 40) for model in models]
    perplexities = convert.sequence_perplexities(models, torch.cat(texts))
    assert perplexities.argmin(1).tolist() == [0] * 5 + [1] * 5 + [2] * 5
    ids = texts[0][0]
    log_probabilities = [float(models[1].table[a, b].detach()) for a, b in itertools.pairwise(ids)]
    assert abs(float(perplexities[0, 1]) / torch.tensor(-sum(log_probabilities) / 39).exp().item() - 1) < 1e-5
    moe = switchgear.MoE(H, WIDTH, 3, 1, score=convert.SequenceLogits)
    x = torch.randn(15, 40, H)
    moe(x, fields={"sequence_logits": -perplexities})
    routing = moe.gate(x, switchgear.Context(fields={"sequence_logits": -perplexities}))
    assert routing.topk_ids.view(15, 40).eq(perplexities.argmin(1)[:, None]).all()


class Averaging(Markov):
    """The mean of the known tokens so far predicts, each with its position; dropout in training."""

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        rows = self.table[ids] * (1 + position_ids[..., None]) * attention_mask[..., None]
        return F.dropout(rows.cumsum(1) / attention_mask.cumsum(1).clamp(min=1)[..., None], training=self.training)


@pytest.mark.parametrize("make", [Markov, Averaging])
def test_perplexity_of_padded_sequences_is_that_of_their_tokens(make: type[Markov]) -> None:
    model, ids = make(0), torch.randint(12, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 5:] = False
    alone = [convert.sequence_perplexities([model], ids[i : i + 1, :n], mask[i : i + 1, :n])
             for i, n in ((0, 5), (1, 9))]  # fmt: skip
    assert model.training
    assert convert.sequence_perplexities([model], ids, mask).allclose(torch.cat(alone))  # padded at the end
    ids[0], mask[0] = ids[0].roll(4), mask[0].roll(4)
    if make is Averaging:
        assert convert.sequence_perplexities([model], ids, mask).allclose(torch.cat(alone))
    else:
        with raises(ValueError, "mask"):
            convert.sequence_perplexities([model], ids, mask)
    with raises(ValueError, "mask"):
        convert.sequence_perplexities([model], ids, mask[:, 1:])


def test_row61_experts_of_another_size() -> None:
    narrow = convert.Projected(SharedExperts(16, 20), H, 16)
    moe = switchgear.MoE(H, WIDTH, 2, 2, normalize=True)
    moe.experts = convert.ModuleExperts([SharedExperts(H, WIDTH), narrow], H)
    x = torch.randn(3, 5, H)
    routing = moe.gate(x)
    y = moe(x).view(15, H)
    for token, row in enumerate(x.view(15, H)):
        pairs = zip(routing.topk_ids[token].tolist(), routing.topk_weights[token], strict=True)
        expected = sum(weight * moe.experts.members[expert](row[None])[0] for expert, weight in pairs)
        assert y[token].sub(expected).abs().max() < 1e-5
    moe(x).sum().backward()
    assert narrow.in_proj[0].weight.grad is not None


# ---- rows 58 and 59: experts of models -------------------------------------------------------------------------------


def test_row59_seed_is_shared_and_domains_route() -> None:
    """Nexus: y = seed(x) + Σ s_i FFN_i(x), s = softmax(x · P(d))."""
    seed, mlps, embeddings = SharedExperts(H, 40), [SharedExperts(H, WIDTH) for _ in range(3)], torch.randn(3, 7)
    moe = convert.from_dense_experts(mlps, 1, shared=seed, embeddings=embeddings)
    x = torch.randn(9, H)
    score = moe.gate.score
    y = moe(x)
    for token, row in enumerate(x.double()):
        d = embeddings.double()
        hidden = F.silu(d @ score.gate.weight.double().T) * (d @ score.up.weight.double().T)
        scores = ((hidden @ score.down.weight.double().T) @ row).softmax(0)
        best = int(scores.argmax())
        expected = seed(x[token]) + scores[best].float() * mlps[best](x[token])
        assert y[token].sub(expected).abs().max() < 1e-5


def test_row59_a_new_expert_leaves_the_logits_of_others() -> None:
    mlps, embeddings = [SharedExperts(H, WIDTH) for _ in range(2)], torch.randn(2, 7)
    moe = convert.from_dense_experts(mlps, 1, embeddings=embeddings)
    x = torch.randn(9, H)
    before = moe.gate(x).router_logits
    new, embedding = SharedExperts(H, WIDTH), torch.randn(7)
    assert convert.add_domain_expert(moe, new, embedding) == 2
    after = moe.gate(x).router_logits
    assert torch.equal(after[:, :2], before)
    assert torch.equal(moe.gate.score.expert_embeddings()[:2], moe.gate.score.expert_embeddings()[:2])
    routing = moe.gate(x)
    y = moe(x)
    for token in range(9):
        mlp = [*mlps, new][int(routing.topk_ids[token, 0])]
        assert y[token].sub(routing.topk_weights[token, 0] * mlp(x[token])).abs().max() < 1e-5
    with raises(ValueError):
        convert.add_domain_expert(moe, new, torch.randn(6))
    with raises(ValueError):
        convert.add_domain_expert(moe, SharedExperts(H, 31), embedding)
    with raises(ValueError, "mlp"):
        convert.add_domain_expert(moe, SharedExperts(H, WIDTH, activation="gelu"), embedding)
    with raises(ValueError):
        convert.add_domain_expert(convert.upcycle(new, 2, 1), new, embedding)
    assert moe.experts.num_experts == moe.gate.num_experts == 3


def test_a_new_expert_is_counted_and_biased_as_the_others() -> None:
    mlps, x = [SharedExperts(H, WIDTH) for _ in range(4)], torch.randn(9, H)
    moe = convert.from_dense_experts(mlps[:3], 1, embeddings=torch.randn(3, 7), balance=[LossFreeBias(1e-2)])
    moe(x)
    before, bias = moe.gate.tokens_per_expert.clone(), moe.gate.e_score_correction_bias.fill_(0.5)
    convert.add_domain_expert(moe, mlps[3], torch.randn(7))
    assert moe.gate.tokens_per_expert.tolist() == [*before.tolist(), 0]
    assert moe.gate.e_score_correction_bias.tolist() == [*bias.tolist(), 0]
    routing = moe.gate(x)
    assert moe.gate.tokens_per_expert.sum() == 18
    y = moe(x)
    for token in range(9):
        expected = routing.topk_weights[token, 0] * mlps[int(routing.topk_ids[token, 0])](x[token])
        assert y[token].sub(expected).abs().max() < 1e-5
    switchgear.after_step(moe)
    assert moe.gate.tokens_per_expert.tolist() == [0] * 4


@pytest.mark.parametrize(("options", "message"), [
    ({"balance": [SwitchLoss(1e-2, scope="global", accumulate=True)]}, "moe"),
    ({"balance": [AdaptiveSparsity(1.0, 4)]}, "moe"),
    ({"num_groups": 2}, "moe"),
])  # fmt: skip
def test_a_router_that_does_not_grow_is_refused(options: dict[str, Any], message: str) -> None:
    mlp = SharedExperts(H, WIDTH)
    moe = convert.from_dense_experts([mlp] * 4, 1, embeddings=torch.randn(4, 7), **options)
    moe(torch.randn(9, H))
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    with raises(ValueError, message):
        convert.add_domain_expert(moe, mlp, torch.randn(7))
    assert all(torch.equal(tensor, before[name]) for name, tensor in moe.state_dict().items())
    assert moe.experts.num_experts == moe.gate.num_experts == 4


@pytest.mark.parametrize("layout", [{"interleaved": True}, {"interleaved": True, "transposed": True}])
def test_collected_and_added_experts_of_any_layout(layout: dict[str, bool]) -> None:
    mlp, embeddings = SharedExperts(H, WIDTH, bias=True).double(), torch.randn(2, 7, dtype=torch.float64)
    moe = convert.from_dense_experts([mlp, mlp], 1, embeddings=embeddings, normalize=True, **layout)
    convert.add_domain_expert(moe, mlp, torch.randn(7, dtype=torch.float64))
    x = torch.randn(9, H, dtype=torch.float64)
    y = moe.experts(x, torch.arange(9)[:, None] % 3, torch.ones_like(x[:, :1]))
    assert y.sub(mlp(x)).abs().max() < 1e-12


def test_row59_one_model_is_the_seed_plus_one_expert() -> None:
    seed, mlp, x = SharedExperts(H, WIDTH), SharedExperts(H, WIDTH), torch.randn(9, H)
    moe = convert.from_dense_experts([mlp], 1, shared=seed, embeddings=torch.randn(1, 7))
    assert moe(x).sub(seed(x) + mlp(x)).abs().max() < 1e-5


def test_row58_networks_and_a_router_on_meta_become_a_layer_on_meta() -> None:
    mlps, router = [SharedExperts(H, WIDTH, device="meta")] * 2, torch.empty(2, H, device="meta")
    assert all(p.is_meta for p in convert.from_dense_experts(mlps, 1, router=router).parameters())


def test_row58_feed_forward_modules_become_experts() -> None:
    mlps, x = [SharedExperts(H, WIDTH) for _ in range(3)], torch.randn(9, H)
    router = torch.randn(3, H)
    moe = convert.from_dense_experts(mlps, 2, router=router)
    y = moe(x)
    for token, row in enumerate(x):
        best = (router.double() @ row.double()).topk(2)
        weights = best.values.softmax(0)
        expected = sum(w.float() * mlps[e](row) for w, e in zip(weights, best.indices.tolist(), strict=True))
        assert y[token].sub(expected).abs().max() < 1e-5
    with raises(ValueError):
        convert.from_dense_experts([SharedExperts(H, 8), SharedExperts(H, 9)], 1)
    with raises(ValueError, "top_k"):
        convert.from_dense_experts(mlps, 4)


class TestModels:
    """Whole models of transformers."""

    @pytest.fixture
    def models(self) -> list[Any]:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config).eval()
        models = [copy.deepcopy(base) for _ in range(3)]
        for model in models:
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        return [base, *models]

    def test_row58_experts_of_models_others_merged(self, models: list[Any], tmp_path: Path) -> None:
        import transformers

        base, *models = models
        done = convert.from_dense_experts(models, 2, merge="ties", base=base, density=0.5)
        done.model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.model_type == "mixtral"
        for layer, block in enumerate(loaded.model.layers):
            for expert, model in enumerate(models):
                mlp = model.model.layers[layer].mlp
                gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
                assert torch.equal(block.mlp.experts.gate_up_proj[expert], gate_up)
                assert torch.equal(block.mlp.experts.down_proj[expert], mlp.down_proj.weight)
        name = "model.layers.1.self_attn.q_proj.weight"
        origin = base.get_parameter(name).double().flatten()
        deltas = [(model.get_parameter(name).flatten().float() - origin.float()).tolist() for model in models]
        expected = torch.tensor(ties(deltas, len(origin) // 2, [1.0] * 3), dtype=torch.float64)
        assert loaded.get_parameter(name).double().flatten().sub(origin + expected).abs().max() < 1e-6

    def test_row58_router_from_hidden_states(self, models: list[Any]) -> None:
        _, *models = models
        prompts = [torch.randint(3, 96, (2, 5)) for _ in models]
        done = convert.from_dense_experts(models, 1, router="hidden", prompts=prompts)
        for layer in range(2):
            for expert, ids in enumerate(prompts):
                seen: list[Tensor] = []
                mlp = models[0].model.layers[layer].mlp
                handle = mlp.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
                models[0](ids)
                handle.remove()
                mean = seen[0].detach().double().reshape(-1, 32).mean(0)
                row = done.model.model.layers[layer].mlp.gate.weight[expert].double()
                assert row.sub(mean / mean.norm()).abs().max() < 1e-5
        dropping = copy.deepcopy(models[0]).train()
        for layer in dropping.model.layers:
            layer.self_attn.attention_dropout = 0.5
        other = convert.from_dense_experts([dropping, *models[1:]], 1, router="hidden", prompts=prompts)
        assert dropping.training
        for ours, theirs in zip(other.model.model.layers, done.model.model.layers, strict=True):
            assert torch.equal(ours.mlp.gate.weight, theirs.mlp.gate.weight)
        with raises(ValueError):
            convert.from_dense_experts(models, 1, router="hidden", prompts=prompts[:2])
        with raises(ValueError, "router"):
            convert.from_dense_experts(models, 1, router=torch.full((3, 32), torch.nan))

    def test_row58_identical_models_are_the_dense_model(self, models: list[Any]) -> None:
        base = models[0]
        ids = torch.randint(3, 96, (2, 9))
        done = convert.from_dense_experts([base, base, base], 2, router_init=1.0)
        with torch.no_grad():
            assert done.model(ids).logits.sub(base(ids).logits).abs().max() < 1e-5

    @pytest.mark.parametrize("attention", ["experts", "shared_kv"])
    def test_row58_attention_experts_in_a_model(self, models: list[Any], attention: str) -> None:
        base, ids = models[0], torch.randint(3, 96, (2, 9))
        done = convert.from_dense_experts([base, base, base], 2, attention=attention)
        with torch.no_grad():
            assert done.model(ids).logits.sub(base(ids).logits).abs().max() < 1e-5
            done = convert.from_dense_experts(models[1:], 2, attention=attention)
            assert done.model(ids).logits.sub(base(ids).logits).abs().max() > 1e-3
        assert isinstance(done.model.model.layers[1].self_attn, convert.MixtureOfAttention)
        assert any("only switchgear" in note for note in done.notes)

    def test_row58_base_as_in_mergekit(self, models: list[Any]) -> None:
        base, *models = models
        made = convert.from_dense_experts(models, 2, merge="base", base=base).model
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(made.get_parameter(name), base.get_parameter(name))

    @pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
    @pytest.mark.parametrize("method", ["mean", "sum", "topk", "svd"])
    def test_row50_whole_models(self, model_type: str, method: str, tmp_path: Path) -> None:
        import transformers

        config = transformers.AutoConfig.for_model(
            model_type, vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_local_experts=4,
            num_experts_per_tok=2, max_position_embeddings=64, head_dim=8,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        if method == "mean":
            for layer in model.model.layers:
                for parameter in layer.mlp.experts.parameters():
                    torch.nn.init.normal_(parameter, std=0.2)
                    parameter.data[1:] = parameter.data[:1].clone()
                layer.mlp.gate.norm_topk_prob = True
        done = convert.to_dense(model, method)
        done.model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.config.model_type == {"mixtral": "mistral", "qwen3_moe": "qwen3"}[model_type]
        ids = torch.randint(3, 96, (2, 9))
        with torch.no_grad():
            if method == "mean":  # identical experts
                assert loaded(ids).logits.sub(model(ids).logits).abs().max() < 1e-5
            block, mlp = model.model.layers[1].mlp, loaded.model.layers[1].mlp
            layer = convert.to_dense(block, method)
            assert torch.equal(mlp.gate_proj.weight, layer.gate_proj.weight)
            assert torch.equal(mlp.down_proj.weight, layer.down_proj.weight)
