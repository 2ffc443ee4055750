# SPDX-License-Identifier: BSD-3-Clause
"""Self-contrast (row 78): against the paper's formula on two separate passes in float64, in loops and in `generate`."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import MoE
from switchgear.generation import SelfContrast
from switchgear.routing import Capacity, RankK, TopK

V, H, E = 40, 32, 6
THIRD = RankK((2,), normalize=True)


def formula(strong: list[float], weak: list[float], beta: float, alpha: float) -> list[float]:
    """The paper's: a token is kept if its strong logit is at least the largest + log alpha."""
    best = max(strong)
    kept = [s > -math.inf and s >= best + (math.log(alpha) if alpha else -math.inf) for s in strong]
    scores = [(1 + beta) * s - beta * w for s, w in zip(strong, weak, strict=True)]
    return [score if keep else -math.inf for score, keep in zip(scores, kept, strict=True)]


@pytest.mark.parametrize(("beta", "alpha"), [(0.5, 0.1), (0.0, 0.1), (1.5, 0.0), (0.5, 1.0)])
def test_row78_scores_are_the_formula(beta: float, alpha: float) -> None:
    strong, weak = 3 * torch.randn(2, 4, V, dtype=torch.float64)
    strong[0, 3] = weak[0, 3] = -math.inf  # a token that the model excludes
    found = SelfContrast(beta=beta, alpha=alpha)(strong, weak)
    for row in range(4):
        assert found[row].tolist() == pytest.approx(formula(strong[row].tolist(), weak[row].tolist(), beta, alpha))
    if beta == 0:
        assert torch.equal(found.argmax(-1), strong.argmax(-1))
    if alpha == 1:
        assert found.isfinite().sum() == 4  # only the best


class Model(nn.Module):
    """A model of ours: causal mean, MoE, logits."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.first, self.second = MoE(H, 24, E, 2, normalize=True), MoE(H, 24, E, **(options or {"top_k": 3}))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in (self.first, self.second):
            x = x + layer(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])
        logits: Tensor = self.head(x)
        return logits


def test_row78_a_pass_over_our_layers_equals_two() -> None:
    model, ids = Model().double(), torch.randint(V, (3, 7))
    contrast = SelfContrast(weak=THIRD)
    strong = model(ids)
    with switchgear.override(model, select=THIRD):
        weak = model(ids)
    with contrast.applied(model):
        found = model(ids)
    torch.testing.assert_close(found, contrast(strong, weak))
    assert not torch.allclose(strong, weak)
    assert torch.equal(model(ids), strong)

    with SelfContrast(weak=THIRD, strong=TopK(1)).applied(model):
        found = model(ids)
    with switchgear.override(model, select=TopK(1)):
        torch.testing.assert_close(found, contrast(model(ids), weak))


def test_row78_identities() -> None:
    model, ids = Model(), torch.randint(V, (2, 5))
    with SelfContrast(beta=0, alpha=0).applied(model):
        torch.testing.assert_close(model(ids), model.double()(ids).float(), atol=1e-5, rtol=1e-4)
    model = model.float()
    with SelfContrast(weak=RankK((0, 1)), strong=TopK(2), alpha=0, beta=5).applied(model):  # both passes are the same
        found = model(ids)
    with switchgear.override(model, select=TopK(2)):
        torch.testing.assert_close(found, model(ids), atol=1e-5, rtol=1e-4)


def test_row78_inputs_of_any_name() -> None:
    class Named(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens)

    model, ids = Named().double(), torch.randint(V, (2, 5))
    with SelfContrast().applied(model):
        torch.testing.assert_close(model(tokens=ids), model(ids))
        with raises(ValueError, "model"):
            model(ids[0])


def test_row78_errors_change_nothing() -> None:
    with raises(TypeError, "model"), SelfContrast().applied("model"):  # type: ignore[arg-type]
        pass
    for options in ({"beta": -1.0}, {"beta": math.nan}, {"alpha": 2.0}):
        with raises(ValueError, next(iter(options))):
            SelfContrast(**options)
    for options in ({"weak": 3}, {"weak": None}, {"strong": "x"}):
        with raises(TypeError, next(iter(options))):
            SelfContrast(**options)
    with raises(ValueError, "model"), SelfContrast().applied(nn.Linear(2, 2)):
        pass
    model, ids = Model(), torch.randint(V, (2, 5))
    with SelfContrast().applied(model):
        wanted = model(ids)
        with raises(ValueError, "model"):
            SelfContrast().applied(model).__enter__()
        assert torch.equal(model(ids), wanted)
    model = Model(top_k=2, capacity=Capacity(1.0))
    with raises(ValueError), SelfContrast().applied(model):
        pass
    assert not model.first.gate.overrides


# ---- Hugging Face models ---------------------------------------------------------------------------------------------


def built(name: str = "Mixtral", experts: str = "eager", **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, hidden_size=H, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=None, initializer_range=0.4, **options,
    )  # fmt: skip
    config._experts_implementation = experts
    return getattr(transformers, f"{name}ForCausalLM")(config).double().eval()


@pytest.fixture
def mixtral() -> Any:
    return built(num_local_experts=E, num_experts_per_tok=2)


def test_row78_what_was_observed_before_sees_both_passes(mixtral: Any) -> None:
    """Their tokens without padding, by example."""
    ids = torch.randint(1, V, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with (
        switchgear.RoutingTrace(mixtral) as trace,
        switchgear.diagnostics.collect(mixtral) as kept,
        SelfContrast().applied(mixtral),
        torch.no_grad(),
    ):
        mixtral(input_ids=ids, attention_mask=mask)
    assert [layer.num_tokens for layer in trace.layers.values()] == [2 * (2 + 6)] * 2
    for choices in kept.values():
        assert torch.bincount(choices.examples).tolist() == [2, 6, 2, 6]


def weak_logits(model: Any, ids: Tensor) -> Tensor:
    """The weak pass on its own: the third expert with the weight 1, by a hook on each gate."""

    def third(gate: nn.Module, args: Any, output: Any) -> Any:
        logits = output[0]
        return logits, torch.ones_like(output[1][:, :1]), logits.argsort(-1, descending=True)[:, 2:3]

    hooks = [layer.mlp.gate.register_forward_hook(third) for layer in model.model.layers]
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits


def looped(model: Any, ids: Tensor, steps: int, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    """Greedy decoding by the formula: two whole passes without a cache for each token."""
    for _ in range(steps):
        with torch.no_grad():
            strong = model(ids).logits[:, -1]
        weak = weak_logits(model, ids)[:, -1]
        rows = [formula(s, w, beta, alpha) for s, w in zip(strong.tolist(), weak.tolist(), strict=True)]
        ids = torch.cat([ids, torch.tensor(rows).argmax(-1, keepdim=True)], 1)
    return ids


def test_row78_with_the_experts_on_our_kernels(mixtral: Any) -> None:
    import switchgear.integrations.transformers  # noqa: F401  registers the name

    model, ids = built(experts="switchgear", num_local_experts=E, num_experts_per_tok=2), torch.randint(1, V, (2, 5))
    with SelfContrast().applied(model):
        found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, looped(mixtral, ids, 4))


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_row78_generate_equals_the_loop(mixtral: Any, cache: str | None) -> None:
    ids = torch.randint(1, V, (2, 5))
    wanted = looped(mixtral, ids, 8, beta=1.0)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    with SelfContrast(beta=1.0).applied(mixtral):
        found = mixtral.generate(ids, max_new_tokens=8, do_sample=False, **options)
    assert torch.equal(found, wanted)
    plain = mixtral.generate(ids, max_new_tokens=8, do_sample=False)
    assert not torch.equal(plain, wanted)
    with SelfContrast(beta=0.0).applied(mixtral):
        assert torch.equal(mixtral.generate(ids, max_new_tokens=8, do_sample=False), plain)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen2_moe", "deepseek_v3", "llama4_text", "jetmoe", "deepseek_v4"])
def test_row78_a_pass_equals_two_on_other_families(model_type: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tiny_models import build, example_inputs

    model: Any = build(model_type)
    for module in model.modules():  # DeepSeek V4's table from token ids to experts is not initialised
        if hasattr(module, "tid2eid"):
            module.tid2eid.copy_(torch.rand(len(module.tid2eid), 8).argsort(-1)[:, : module.tid2eid.shape[1]])
    inputs, contrast = example_inputs(model), SelfContrast(weak=RankK((1,)), alpha=0)
    with torch.no_grad():
        strong = model(**inputs).logits
        with switchgear.override(model, select=RankK((1,))):
            weak = model(**inputs).logits
        with contrast.applied(model):
            found = model(**inputs).logits
    assert not torch.allclose(strong, weak)
    torch.testing.assert_close(found, contrast(strong, weak), atol=1e-4, rtol=1e-4)


def test_row78_generate_of_a_peft_model(mixtral: Any) -> None:
    """It calls the model inside."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids = torch.randint(1, V, (2, 5))
    wanted = looped(mixtral, ids, 4)
    wrapper = peft.get_peft_model(mixtral, peft.LoraConfig(target_modules=["q_proj"]))
    with SelfContrast().applied(wrapper):
        assert torch.equal(wrapper.generate(input_ids=ids, max_new_tokens=4, do_sample=False), wanted)
        with raises(ValueError, "model"):
            SelfContrast().applied(mixtral).__enter__()


def test_row78_a_part_of_the_model_is_refused(mixtral: Any) -> None:
    """Its tokens are not doubled, also after a call of the model that raised."""
    ids = torch.randint(1, V, (2, 5))
    message = "model"
    with SelfContrast().applied(mixtral):
        with raises(ValueError, message):
            mixtral.model(ids)
        with pytest.raises(IndexError):
            mixtral(torch.full((2, 5), V))
        with raises(ValueError, message):
            mixtral.model(ids)
    model = Model()
    with SelfContrast().applied(model), raises(ValueError, message):
        model.first(torch.randn(2, 4, H))


def test_row78_padding_sampling_and_beams(mixtral: Any) -> None:
    """Each row of a padded batch as alone; a beam's score is the sum of its tokens' log-probabilities."""
    short = torch.randint(1, V, (1, 3))
    ids = torch.cat([nn.functional.pad(short, (2, 0)), torch.randint(1, V, (1, 5))])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    contrast = SelfContrast(alpha=0)
    with contrast.applied(mixtral):
        both = mixtral.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert torch.equal(both[:1, 2:], mixtral.generate(short, max_new_tokens=4, do_sample=False))
        torch.manual_seed(1)
        sampled = mixtral.generate(short, max_new_tokens=4, do_sample=True, num_return_sequences=3)
        assert sampled.shape == (3, 7)
        beams = mixtral.generate(
            short, max_new_tokens=4, num_beams=3, do_sample=False, length_penalty=0.0, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found = beams.sequences
    with torch.no_grad():
        log_p = contrast(mixtral(found).logits, weak_logits(mixtral, found)).log_softmax(-1)
    score = sum(log_p[0, at - 1, found[0, at]] for at in range(3, 7))
    torch.testing.assert_close(beams.sequences_scores[0], score.to(beams.sequences_scores.dtype), atol=1e-4, rtol=1e-4)


def test_row78_a_plain_loop_with_a_cache(mixtral: Any) -> None:
    if "cache" not in inspect.signature(mixtral.forward).parameters:
        pytest.skip("this transformers has no argument cache")
    ids = torch.randint(1, V, (2, 5))
    wanted = looped(mixtral, ids, 4)
    with SelfContrast().applied(mixtral), torch.no_grad():
        past, step, found = None, ids, ids
        for _ in range(4):
            output = mixtral(step, cache=past, use_cache=True)
            past, step = output.cache, output.logits[:, -1:].argmax(-1)
            found = torch.cat([found, step], 1)
    assert torch.equal(found, wanted)
    assert "reorder_cache" not in vars(past)
    with raises(ValueError), SelfContrast().applied(mixtral):
        mixtral(ids, labels=ids)


def test_row78_hugging_face_errors(mixtral: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SwitchTransformersConfig(vocab_size=V, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    for wrapper in (model, torch.compile(model, backend="eager")):
        with raises(ValueError), SelfContrast().applied(wrapper):
            pass
