# SPDX-License-Identifier: BSD-3-Clause
"""Costs and scaling laws (rows 62 and 63): parameters by hand, constants recovered from data of a law."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from errors import raises
from switchgear import MoE, presets
from switchgear.analysis import MoEScalingLaw, PowerLaw, UpcyclingLaw, attention_layers, cost, moe_parameters
from switchgear.routing import Masked, SkipBelow, Temperature, TopK, TopP

LAW = MoEScalingLaw(A=120.0, a=0.31, B=0.9, b=0.45, C=410.0, c=0.28, F=1.6, d=0.0015, e_start=1.2, e_max=80.0)


def meshed(*columns: list[float]) -> list[torch.Tensor]:
    """All combinations, a column each."""
    tensors = [torch.tensor(column, dtype=torch.float64) for column in columns]
    return [values.flatten() for values in torch.meshgrid(*tensors, indexing="ij")]


# ---- 62: cost --------------------------------------------------------------------------------------------------------


def test_row62_cost_of_our_layers_by_hand() -> None:
    """Two MoE layers between an embedding and a head that is tied to it."""
    model = nn.Sequential(nn.Embedding(50, 16), MoE(16, 24, 8, 2), MoE(16, 12, 4, 1, num_shared_experts=1))
    experts = (8 * 3 * 24 * 16, 4 * 3 * 12 * 16)
    routers, shared = (8 + 4) * 16, 3 * 12 * 16
    found = cost(model)
    assert found.parameters == sum(p.numel() for p in model.parameters()) == 800 + sum(experts) + routers + shared
    assert (found.embedding, found.experts) == (800, sum(experts))
    assert found.active == 800 + routers + shared + experts[0] // 4 + experts[1] // 4
    assert found.moe_layers == ((8, 2, experts[0]), (4, 1, experts[1]))
    assert found.flops() == 2 * (found.active - 800)
    assert found.weight_bytes(16, 4) == 2 * (found.parameters - found.experts) + found.experts // 2
    read = experts[0] * (1 - (6 / 8) ** 3) + experts[1] * (1 - (3 / 4) ** 3)
    assert found.experts_read(3) == pytest.approx(read / sum(experts))
    assert found.decode_bytes(batch=3) == pytest.approx(2 * (routers + shared + read) / 3)
    assert found.decode_bytes() == pytest.approx(2 * (found.active - 800))
    with raises(ValueError, "context"):
        found.kv_bytes(1)


def test_row62_virtual_experts_have_no_weights() -> None:
    """Their constants are no experts either, though as many as experts have the same first size."""
    plain, size = cost(MoE(16, 8, 8, 2)), 8 * 3 * 8 * 16
    found = cost(MoE(16, 8, 8, 2, null_experts=2, constant_experts=8, mix_constants=True))
    assert found.moe_layers == plain.moe_layers == ((8, 2, size),)
    assert found.active == plain.active + (2 + 8) * 16 + 8 * 16 + 8 * 2 * 16  # router, constants, mixing
    assert cost(MoE(16, 8, 2, 3, null_experts=4)).moe_layers == ((2, 2, size // 4),)


def test_row62_experts_of_different_widths() -> None:
    """Three slices of width 4, for two experts."""
    size = 3 * 3 * 4 * 16
    assert cost(MoE(16, 6, 2, 1, widths=[1, 2])).moe_layers == ((2, 1, size),)


def test_row62_selections_of_a_fixed_number() -> None:
    wanted = cost(MoE(16, 8, 8, 2)).active
    for select in (TopK(2), partial(Temperature, partial(Masked, TopK(2), lambda logits, context: None))):
        assert cost(MoE(16, 8, 8, select=select)).active == pytest.approx(wanted, abs=1)  # log_tau
    assert cost(MoE(16, 8, 8, **presets.llama4())).moe_layers[0][:2] == (8, 1)
    for varying in (TopP(0.4), SkipBelow(TopK(2), 0.5)):
        with raises(ValueError, "model"):
            cost(MoE(16, 8, 8, select=varying))


def test_row62_published_sizes() -> None:
    """Of transformers' default configs, which are those of the published models. Billions: the models' cards."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for name, total, active, kept in (
        ("Mixtral", 46.7, 12.9, 32 * 2 * 8 * 128),
        ("DeepseekV3", 671.0, 37.6, 61 * (512 + 64)),
    ):
        found = cost(getattr(transformers, f"{name}Config")())
        assert found.parameters == pytest.approx(total * 1e9, rel=2e-3)
        assert found.active == pytest.approx(active * 1e9, rel=1e-2)
        assert found.kv_bytes(1) == 2 * kept
        assert found.kv_bytes(4096, bits=8) == 4096 * kept


@pytest.mark.parametrize("form", ["config", "dict", "module"])
def test_row62_a_config_as_by_hand(form: str) -> None:
    """OLMoE's parameters by formula."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    h, i, e, k, layers, heads, kv, vocabulary = 64, 32, 8, 2, 3, 4, 2, 100
    config = transformers.OlmoeConfig(
        vocab_size=vocabulary, hidden_size=h, intermediate_size=i, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, num_experts=e, num_experts_per_tok=k,
    )  # fmt: skip
    given: Any = {"config": lambda: config, "dict": config.to_dict,
                  "module": lambda: transformers.OlmoeForCausalLM(config)}[form]()  # fmt: skip
    found = cost(given)
    wide = kv * h // heads
    attention = 2 * h * h + 2 * h * wide + h + wide  # q, o, k, v and the norms of q and k
    dense = layers * (attention + 2 * h + e * h) + h + 2 * vocabulary * h
    experts = layers * e * 3 * h * i
    assert found.parameters == dense + experts
    assert found.active == dense + experts * k // e
    assert found.embedding == vocabulary * h
    assert found.kv_bytes(10) == 10 * layers * 2 * wide * 2
    assert found.flops(100) - found.flops() == layers * 2 * 2 * h * 100
    assert found.decode_bytes(10) == 2 * (found.active - found.embedding) + found.kv_bytes(10)
    assert "active" in str(found)


@pytest.mark.parametrize(
    "model_type", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "jetmoe", "dbrx", "llama4_text", "gemma4_text"]
)
def test_row62_counts_and_caches_of_tiny_models(model_type: str) -> None:
    """Parameters on meta are those of the built model; the cache that a forward fills is as predicted."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tiny_models import build, example_inputs

    model: Any = build(model_type)
    found = cost(model.config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found == cost(model)
    assert 0 < found.experts < found.parameters
    assert all(size % e == 0 for e, _, size in found.moe_layers)
    if found.attention is None:
        assert model_type == "jetmoe"
        return
    with torch.no_grad():
        output = model(**example_inputs(model), use_cache=True)
    cache = output.cache if hasattr(output, "cache") else output.past_key_values  # as older releases call it
    kept = sum(
        tensor.shape[1] * tensor.shape[3]
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None and tensor.dim() == 4
    )
    assert found.kv_bytes(1) == 2 * kept


def test_row62_experts_of_attention_are_counted_by_what_runs() -> None:
    """The products of JetMoE, whose attention has experts, too; vectors are in `active`, and are no products."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from torch.utils.flop_counter import FlopCounterMode

    from tiny_models import build, example_inputs

    model: Any = build("jetmoe").eval()
    found, inputs = cost(model), example_inputs(model)
    tokens = inputs["input_ids"].numel()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert tokens * (found.flops() - 2 * vectors) == products
    assert found.experts == sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 3)


def test_row62_keys_and_values_of_different_widths() -> None:
    class OwnAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.head_dim = 4, 8
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 6)

    (found,) = attention_layers(nn.Sequential(OwnAttention()))
    assert (found.kept, found.width, found.window) == (16 + 6, 2 * 4 * 8, None)


def test_row62_a_sliding_window_bounds_the_cache() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    found = cost(transformers.GptOssConfig())
    windows = [layer.window for layer in found.attention or ()]
    assert windows.count(128) == windows.count(None) == 18
    assert found.kv_bytes(10_000) == 2 * 18 * 2 * 8 * 64 * (10_000 + 128)


def test_row62_cost_grows_with_the_experts_in_memory_but_not_in_flops() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rows = [cost(transformers.MixtralConfig(num_hidden_layers=2, num_local_experts=e)) for e in (4, 8, 16)]
    routers = 2 * 4096
    assert rows[1].flops() - rows[0].flops() == 2 * 4 * routers
    step = rows[1].parameters - rows[0].parameters
    assert rows[2].parameters - rows[1].parameters == 2 * step
    assert rows[0].decode_bytes(batch=1) == pytest.approx(rows[2].decode_bytes(batch=1), rel=1e-3)
    assert rows[0].decode_bytes(batch=64) < rows[1].decode_bytes(batch=64) < rows[2].decode_bytes(batch=64)


def test_row62_errors() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with raises(ValueError, "model_type"):
        cost({"model_type": "nothing"})
    with raises(ValueError, "model"):
        cost(3)


# ---- 62: the law -----------------------------------------------------------------------------------------------------


def test_row62_the_law_is_its_formula() -> None:
    for n, e, d in ((1e8, 1, 1e10), (3e9, 16, 2e11)):
        saturated = 1 / (1 / (e - 1 + 1 / (1 / LAW.e_start - 1 / LAW.e_max)) + 1 / LAW.e_max)
        log_loss = math.log(LAW.A / n**LAW.a + LAW.B / saturated**LAW.b + LAW.C / d**LAW.c + LAW.F)
        log_loss += LAW.d * math.log(n) * math.log(saturated)
        assert float(LAW.loss(n, e, d)) == pytest.approx(math.exp(log_loss), rel=1e-12)
    assert float(LAW.effective_experts(1)) == pytest.approx(LAW.e_start)
    assert float(LAW.effective_experts(1e12)) == pytest.approx(LAW.e_max)


def test_row62_a_fit_recovers_the_constants() -> None:
    n, e, d = meshed([1e7, 5e7, 3e8, 2e9], [1, 2, 4, 8, 32, 128, 512], [1e9, 7e9, 5e10, 3e11])
    for given in ({"e_start": LAW.e_start, "e_max": LAW.e_max}, {}):
        found = MoEScalingLaw.fit(n, e, d, LAW.loss(n, e, d), **given)
        torch.testing.assert_close(found.loss(n, e, d), LAW.loss(n, e, d), rtol=1e-5, atol=0)
        if given:
            assert vars(found) == pytest.approx(vars(LAW), rel=1e-2)
            assert (found.e_start, found.e_max) == (LAW.e_start, LAW.e_max)
    with raises(ValueError, "losses"):
        MoEScalingLaw.fit([1e8], [4], [1e9], [2.0])
    with raises(ValueError, "losses"):
        MoEScalingLaw.fit(n, e, d, -LAW.loss(n, e, d))
    for wrong in (0.0, -1, math.inf, True, "1"):
        error = ValueError if type(wrong) in (int, float) else TypeError
        for name in ("e_start", "e_max"):
            with raises(error, name):
                MoEScalingLaw.fit(n, e, d, LAW.loss(n, e, d), **{name: wrong})
    with raises(ValueError, "e_start"):
        MoEScalingLaw.fit(n, e, d, LAW.loss(n, e, d), e_start=3.0, e_max=2.0)


def test_laws_name_numbers_that_are_not_above_zero() -> None:
    scratch = PowerLaw(9.0, 0.4, 1.5)
    for name, call in (
        ("size", lambda: LAW.loss([1e8, -1.0], 4, 1e9)),
        ("experts", lambda: LAW.loss(1e8, 0, 1e9)),
        ("tokens", lambda: LAW.loss(1e8, 4, math.nan)),
        ("experts", lambda: LAW.effective_experts(-1)),
        ("experts", lambda: LAW.optimum(1e20, [4, 0])),
        ("tokens", lambda: scratch.loss(-2.0)),
        ("dense_tokens", lambda: UPCYCLED.loss(-1.0, 2.0)),
        ("tokens", lambda: UPCYCLED.loss(1.0, 0.0)),
        ("dense_tokens", lambda: UPCYCLED.crossover(0.0, scratch)),
        ("most", lambda: UPCYCLED.crossover(4.0, scratch, most=0)),
        ("most", lambda: UPCYCLED.crossover(4.0, scratch, most=1)),
    ):
        with raises(ValueError, name):
            call()


def test_row62_the_optimum_within_a_budget_by_brute_force() -> None:
    flops = 1e21
    for budget in (math.inf, 3e9, 5e8):
        found = LAW.optimum(flops, (1, 4, 8, 16), budget=budget)
        best = (math.inf, 0.0, 0)
        for e in (1, 4, 8, 16):
            sizes = torch.logspace(6, 12, 4001, dtype=torch.float64)
            sizes = sizes[moe_parameters(sizes, e) <= budget]  # type: ignore[arg-type, operator]
            losses = LAW.loss(sizes, e, flops / (6 * sizes))
            best = min(best, (float(losses.min()), float(sizes[losses.argmin()]), e))
        assert found.loss <= best[0] + 1e-9
        assert found.experts == best[2]
        assert found.size == pytest.approx(best[1], rel=2e-2)
        assert found.cost <= budget
        assert found.tokens == pytest.approx(flops / (6 * found.size))
    free, tight = LAW.optimum(flops), LAW.optimum(flops, budget=5e8)
    assert tight.cost == pytest.approx(5e8, rel=1e-5)  # all of the budget
    assert tight.size < free.size  # over-trained: smaller, on more tokens
    assert tight.tokens > free.tokens
    assert moe_parameters(3.0, 4) == 6.0
    with raises(ValueError):
        LAW.optimum(flops, budget=1.0)
    for wrong in (math.nan, math.inf, 0.0, -1e20):
        with raises(ValueError, "train_flops"):
            LAW.optimum(wrong)
    with raises(ValueError, "experts"):
        LAW.optimum(flops, ())


# ---- 63: upcycling ---------------------------------------------------------------------------------------------------

UPCYCLED = UpcyclingLaw(A=8.0, a1=0.12, a2=0.3, a3=0.02, E=1.5)


def test_row63_a_fit_recovers_the_constants() -> None:
    d1, d2 = meshed([1, 4, 16, 64], [2, 8, 40, 200])
    losses = UPCYCLED.loss(d1, d2)
    for a, b, loss in zip(d1.tolist(), d2.tolist(), losses.tolist(), strict=True):
        assert loss == pytest.approx(8.0 * a**-0.12 * b ** (-0.3 + 0.02 * math.log(a)) + 1.5, rel=1e-12)
    assert vars(UpcyclingLaw.fit(d1, d2, losses)) == pytest.approx(vars(UPCYCLED), rel=1e-4)
    noise = 1 + 1e-3 * torch.randn(16, dtype=torch.float64)
    assert float((UpcyclingLaw.fit(d1, d2, losses * noise).loss(d1, d2) / losses - 1).abs().max()) < 4e-3
    scratch = PowerLaw(9.0, 0.4, 1.5)
    assert vars(PowerLaw.fit(d2, scratch.loss(d2))) == pytest.approx(vars(scratch), rel=1e-4)


def test_row63_crossover_with_training_from_scratch() -> None:
    """With the same constant, A·D1^-a1·D2^-(a2 - a3 log D1) = B·D2^-b has a closed form."""
    scratch = PowerLaw(9.0, 0.4, 1.5)
    crossings = []
    for d1 in (4.0, 64.0):
        power = UPCYCLED.a2 - UPCYCLED.a3 * math.log(d1)
        closed = (scratch.A / (UPCYCLED.A * d1**-UPCYCLED.a1)) ** (1 / (scratch.a - power))
        found = UPCYCLED.crossover(d1, scratch)
        assert found == pytest.approx(closed, rel=1e-6)
        assert UPCYCLED.loss(d1, 0.9 * closed) < scratch.loss(0.9 * closed)
        assert UPCYCLED.loss(d1, 1.1 * closed) > scratch.loss(1.1 * closed)
        crossings.append(closed / d1)
    assert crossings[1] < crossings[0]  # relative to the sunk tokens, upcycling pays for less and less
    assert UPCYCLED.crossover(4.0, PowerLaw(9.0, 0.01, 1.5)) is None
    best = PowerLaw(1e-3, 0.4, 1.0)  # never behind
    assert UPCYCLED.crossover(4.0, best, most=1e3) == pytest.approx(4e-3)
