# SPDX-License-Identifier: BSD-3-Clause
"""Newer structures against float64 loops of their papers' formulas, and the options that they brought."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from errors import raises
from loops import E, H, I, assert_agrees, best, expert, layer_of, linear, mixture
from switchgear import presets
from switchgear.layers import VirtualExperts
from switchgear.routing import (
    AdaptiveSparsity,
    Capacity,
    CapacityByKind,
    Context,
    DepthChoice,
    GatingResidual,
    Linear,
    Lookup,
    Masked,
    Router,
    TopK,
)

# ---- ReMoE -----------------------------------------------------------------------------------------------------------


def test_remoe_is_a_loop_of_relus(backend: str) -> None:
    layer = layer_of(presets.remoe(top_k=2, initial=0.125))

    def loop(layer: Any, x: Tensor) -> Any:
        z = linear(layer, x)
        ids = [[e for e in range(E) if row[e] > 0] for row in z]
        y = mixture(layer.experts, x, ids, [[z[t, e] for e in choice] for t, choice in enumerate(ids)])
        f = [E / (2 * len(x)) * sum(e in choice for choice in ids) for e in range(E)]
        return y, 0.125 * sum(f[e] * z[t, e] for t, choice in enumerate(ids) for e in choice) / len(x)

    x = torch.randn(20, H)
    with torch.no_grad():
        layer.gate.weight[3] = -layer.gate.weight[2]  # a token without positive logits becomes likelier
    assert_agrees(layer, loop, x)


def test_remoe_shows_a_token_that_is_not_a_number(backend: str) -> None:
    """Without an expert it would be 0, as if nothing had happened. Other tokens have the bits that they had."""
    layer, x = layer_of(presets.remoe(top_k=2)), torch.randn(6, H)
    spoiled = x.clone()
    spoiled[1, 0] = torch.nan
    found, wanted = layer(spoiled), layer(x)
    assert found[1].isnan().any()
    others = [0, 2, 3, 4, 5]
    assert torch.equal(found[others], wanted[others])


def test_remoe_coefficient_grows_while_too_many_experts_are_active() -> None:
    loss = AdaptiveSparsity(2, E, initial=1e-3)
    few = switchgear.Routing(torch.tensor([[0], [1]], dtype=torch.int32), torch.ones(2, 1), torch.ones(2, E), E)
    many = few._replace(topk_ids=torch.arange(3, dtype=torch.int32).expand(2, 3))
    exact = few._replace(topk_ids=torch.arange(2, dtype=torch.int32).expand(2, 2))
    for routing, factor in ((many, 1.2), (few, 1 / 1.2), (exact, 1.0)):
        before = float(loss.value)
        loss(routing, Context())
        loss.after_step(torch.zeros(E), nn.Module())
        assert float(loss.value) == pytest.approx(before * factor)


@pytest.mark.parametrize("top_k", [1, 3])
def test_remoe_coefficient_comes_back_from_a_long_way(top_k: int) -> None:
    loss = AdaptiveSparsity(2, E, initial=1e-3)
    ids = torch.arange(top_k, dtype=torch.int32).expand(2, top_k)
    routing = switchgear.Routing(ids, torch.ones(2, top_k), torch.ones(2, E), E)
    for _ in range(700):
        loss(routing, Context())
        loss.after_step(torch.zeros(E), nn.Module())
    assert float(loss.value) == pytest.approx(1e-3 * (1e-6 if top_k == 1 else 1e10))
    assert loss(routing, Context()).isfinite()


def test_remoe_reaches_its_sparsity() -> None:
    layer, x = layer_of(presets.remoe(top_k=2, initial=1e-3), return_routing=True), torch.randn(64, H) + 1
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    assert (layer(x)[1].topk_ids >= 0).sum() / 64 > 3
    for _ in range(150):
        y, routing = layer(x)
        ((y - x).square().mean() + switchgear.balance_loss(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
        switchgear.after_step(layer)
    assert (routing.topk_ids >= 0).sum() / 64 < 2.75


# ---- Mixture-of-Depths -----------------------------------------------------------------------------------------------


def test_mixture_of_depths_is_a_loop_over_sequences(backend: str) -> None:
    layer = presets.build(H, I, 1, **presets.mixture_of_depths(fraction=0.25, balance=0.1))

    def loop(layer: Any, x: Tensor) -> Any:
        y, loss = torch.zeros_like(x), 0
        for b, tokens in enumerate(x):
            r = tokens @ layer.gate.weight[0]
            taken = best(r, 3)
            for t in taken:
                y = y.index_put((torch.tensor(b), torch.tensor(t)), r[t] * expert(layer.experts, 0, tokens[t]))
            loss = loss + sum((F.softplus(-r[t]) if t in taken else F.softplus(r[t])) for t in range(12))
        return y, 0.1 * loss / 24

    assert_agrees(layer, loop, torch.randn(2, 12, H))


def test_mixture_of_depths_is_causal_in_evaluation() -> None:
    layer = presets.build(H, I, 1, **presets.mixture_of_depths()).eval()
    x = torch.randn(2, 12, H)
    torch.testing.assert_close(layer(x)[:, :5], layer(x[:, :5]))
    r = x @ layer.gate.weight[0]
    assert torch.equal(layer(x).any(-1), r > 0)
    with raises(ValueError):
        DepthChoice(0.0)


# ---- Llama 4 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_llama4_scales_the_input(backend: str, top_k: int) -> None:
    layer = layer_of(presets.llama4(top_k=top_k))

    def loop(layer: Any, x: Tensor) -> Tensor:
        z, shared, rows = linear(layer, x), layer.shared_experts, []
        for t, row in enumerate(x):
            y = (F.silu(shared.gate_proj.weight @ row) * (shared.up_proj.weight @ row)) @ shared.down_proj.weight.T
            rows.append(y + sum(expert(layer.experts, e, z[t, e].sigmoid() * row) for e in best(z[t], top_k)))
        return torch.stack(rows)

    assert_agrees(layer, loop, torch.randn(15, H))


# ---- DeepSeek-V4 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary_size", [None, 30])
def test_deepseek_v4_weighs_what_a_table_or_a_bias_chose(backend: str, vocabulary_size: int | None) -> None:
    layer = layer_of(presets.deepseek_v4(vocabulary_size=vocabulary_size, top_k=3, limit=0.5))
    token_ids = torch.arange(15) * 7 % 30
    if vocabulary_size is None:
        layer.gate.e_score_correction_bias.copy_(torch.linspace(-1, 1, E))

    def loop(layer: Any, x: Tensor) -> Tensor:
        z, shared = linear(layer, x), layer.shared_experts
        scores = z.exp().log1p().sqrt()
        if vocabulary_size is None:
            ids = [best(row + layer.gate.e_score_correction_bias, 3) for row in scores.detach()]
        else:
            ids = [layer.gate.select.table[v].tolist() for v in token_ids]
        rows = []
        for t, row in enumerate(x):
            total = sum(scores[t, e] for e in ids[t])
            y = clamped(shared.gate_proj.weight @ row, shared.up_proj.weight @ row) @ shared.down_proj.weight.T
            for e in ids[t]:
                gate, up = (layer.experts.gate_up_proj[e] @ row).chunk(2)
                y = y + 1.5 * scores[t, e] / total * (layer.experts.down_proj[e] @ clamped(gate, up))
            rows.append(y)
        return torch.stack(rows)

    def clamped(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)

    assert_agrees(layer, loop, torch.randn(15, H), token_ids=token_ids)


def test_a_table_with_scores_is_checked_and_masked() -> None:
    table = torch.tensor([[0, 1], [2, -1]])
    for name, options in (
        ("weight", {"weight": 0.5, "score_function": "sigmoid"}),
        ("score_function", {"normalize": True}),
        ("score_function", {"score_function": "relu"}),
    ):
        with raises(ValueError, name):
            Lookup(table, **options)
    select = Masked(Lookup(table, score_function="sigmoid", normalize=True), lambda z, context: torch.arange(4) != 0)
    routing = select(torch.zeros(2, 4), Context(token_ids=torch.tensor([0, 1])))
    assert routing.topk_ids.tolist() == [[-1, 1], [2, -1]]
    assert routing.topk_weights[1].tolist() == [1, 0]


# ---- MoE++ -----------------------------------------------------------------------------------------------------------


def moe_plus_plus_layer() -> Any:
    layer = layer_of(presets.moe_plus_plus(balance=0.1))
    for parameter in (layer.experts.constants, layer.experts.mixing, layer.gate.score.residual):
        nn.init.normal_(parameter)
    return layer


def test_moe_plus_plus_is_a_loop_over_three_kinds_of_free_experts(backend: str) -> None:
    layer, before = moe_plus_plus_layer(), torch.randn(20, E + 4)

    def loop(layer: Any, x: Tensor) -> Any:
        virtual = layer.experts
        z = x @ layer.gate.score.weight.T + before.double() @ layer.gate.score.residual.T
        p, rows, ids = z.softmax(-1), [], [best(row, 2) for row in z]
        for t, row in enumerate(x):
            y = 0 * row
            for e in ids[t]:
                if e < E:
                    out = expert(virtual.experts, e, row)
                elif e == E:
                    out = 0 * row
                elif e == E + 1:
                    out = row
                else:
                    a = (virtual.mixing[e - E - 2] @ row).softmax(0)
                    out = a[0] * row + a[1] * virtual.constants[e - E - 2]
                y = y + p[t, e] * out
            rows.append(y)
        load = [sum(e in choice for choice in ids) / len(x) for e in range(E + 4)]
        eta = [1.0] * E + [0.75] * 4
        loss = (E + 4) * sum(eta[e] * load[e] * p[:, e].mean() for e in range(E + 4))
        return torch.stack(rows), 0.1 * loss

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, fields={"previous_logits": before.to(x.dtype)})[0]

    assert_agrees(Bound(), lambda bound, x: loop(bound.layer, x), torch.randn(20, H))


@pytest.mark.parametrize("drop", ["order", "score"])
def test_moe_plus_plus_limits_real_and_free_experts(backend: str, drop: str) -> None:
    """⌈γ·τ·K·T / (τ·N + F)⌉ choices of a real expert are kept, and ⌈γ·K·T / (τ·N + F)⌉ of a free one."""
    limit = presets.moe_plus_plus(capacity_factor=1.15)["capacity"]
    limit = CapacityByKind(limit.free_experts, limit.tau, Capacity(limit.limit.factor, drop))
    routing = TopK(2)(torch.randn(50, E + 4) + torch.randn(E + 4))
    kept = limit(routing, Context(training=True))
    base = 1.15 * 2 * 50 / (0.75 * E + 4)
    for e in range(E + 4):
        places = math.ceil(base if e >= E else 0.75 * base)
        choices = [(t, k) for t in range(50) for k in range(2) if routing.topk_ids[t, k] == e]
        if drop == "score":
            choices.sort(key=lambda at: -float(routing.topk_weights[at]))
        for place, at in enumerate(choices):
            assert kept.topk_ids[at] == (e if place < places else -1)
            assert kept.topk_weights[at] == (routing.topk_weights[at] if place < places else 0)
    assert kept.num_dropped == (kept.topk_ids < 0).sum() > 0
    whole = replace(limit, limit=replace(limit.limit, renormalize=True))(routing, Context(training=True))
    assert torch.equal(whole.topk_ids, kept.topk_ids)
    wanted = routing.topk_weights.sum(1) * (kept.topk_ids >= 0).any(1)
    torch.testing.assert_close(whole.topk_weights.sum(1), wanted)
    with raises(ValueError, "free_experts"):
        CapacityByKind(E + 5)(routing, Context())
    with raises(ValueError):
        CapacityByKind(1, 0.0)
    with raises(ValueError):
        CapacityByKind(1, limit=Capacity(overflow="reroute"))
    layer, x = layer_of(presets.moe_plus_plus(capacity_factor=0.5)), torch.randn(40, H)
    assert layer(x)[1].num_dropped > 0


def test_moe_plus_plus_passes_logits_from_layer_to_layer() -> None:
    layers, x, z = [moe_plus_plus_layer() for _ in range(2)], torch.randn(5, H), None
    for layer in layers:
        _, routing = layer(x, fields={"previous_logits": z})
        wanted = x @ layer.gate.score.weight.T + (0 if z is None else z @ layer.gate.score.residual.T)
        torch.testing.assert_close(routing.router_logits, wanted)
        z = routing.router_logits
    with raises(ValueError, "previous_logits"):
        layers[0](x, fields={"previous_logits": z[:3]})
    with raises(TypeError, "fields"):
        layers[0](x, fields=[z])


def test_renormalize_false_keeps_the_weights_of_the_router() -> None:
    options = {"null_experts": 2, "copy_experts": 1, "top_k": 3}
    plain = switchgear.MoE(H, I, 4, **options, renormalize=False)
    divided = switchgear.MoE(H, I, 4, **options)
    divided.load_state_dict(plain.state_dict())
    x = torch.randn(30, H)
    weights, ids = (x @ plain.gate.weight.T).softmax(-1).topk(3)
    used = (weights * ((ids < 4) | (ids >= 6))).sum(-1, keepdim=True)
    torch.testing.assert_close(plain(x), divided(x) * used)
    assert isinstance(plain.experts, VirtualExperts)
    with raises(ValueError, "mix_constants"):
        switchgear.MoE(H, I, 4, 2, mix_constants=True)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_fields_of_ones_own_reach_every_part() -> None:
    seen = []

    def select(logits: Tensor, context: Context, bias: Tensor | None = None) -> Any:
        seen.append(context.require("depth", "select"))
        return TopK(2)(logits, context, bias)

    moe = switchgear.MoE(H, I, E, select=select)
    moe(torch.randn(3, H), fields={"depth": 7})
    assert seen == [7]
    with raises(ValueError, "depth"):
        moe(torch.randn(3, H))


JITTERY = partial(Linear, jitter=0.01, float32=True)


def test_row1_switch_takes_another_jitter() -> None:
    """The docstring's example of overriding what a preset sets."""
    x = torch.randn(30, H)
    layer = layer_of({**presets.switch(), "jitter": 0.0}, return_routing=True)
    torch.testing.assert_close(layer(x)[1].router_logits, x @ layer.gate.score.weight.T)
    noisy = layer_of(presets.switch(jitter=0.3), return_routing=True)
    ratio = (noisy(torch.eye(H))[1].router_logits / noisy.gate.score.weight.T).detach()
    assert 0.7 <= float(ratio.min()) < 0.9 < 1.1 < float(ratio.max()) <= 1.3


@pytest.mark.parametrize(
    "options",
    [presets.switch(), {"top_k": 1, "jitter": 0.01, "float32": True}, {"top_k": 1, "score": JITTERY}],
    ids=["switch", "router", "score"],
)
def test_row1_jitter_of_a_float32_router_is_even_in_bfloat16(options: dict[str, Any]) -> None:
    """x and noise are float32 then, as in Hugging Face's Switch router: numbers of bfloat16 lie closer below 1."""
    router, x = Router(1, 4, **options, dtype=torch.bfloat16), torch.ones(1 << 14, 1, dtype=torch.bfloat16)
    nn.init.ones_(router.weight if router.score is None else router.score.weight)
    noise = router(x).router_logits[:, 0].detach().double()
    assert abs(float(noise.mean()) - 1) < 6 * 0.01 / math.sqrt(3 * len(x))  # six standard deviations of the mean
    assert 0.99 <= float(noise.min()) < 0.9901 < 1.0099 < float(noise.max()) <= 1.01


def test_a_preset_of_several_layers_says_what_to_call() -> None:
    for name in ("stratified", "multi_head", "merged", "monet"):
        with raises(TypeError):
            switchgear.MoE(H, I, E, **getattr(presets, name)())


def test_gating_residual_without_a_layer_before_is_linear() -> None:
    router, x = Router(H, E, 2, score=GatingResidual), torch.randn(4, H)
    logits = router(x).router_logits
    torch.testing.assert_close(logits, x @ router.score.weight.T)
    assert not router.score.residual.any()
    logits.sum().backward()  # a parameter without gradient would stop DistributedDataParallel
    assert torch.equal(router.score.residual.grad, torch.zeros(E, E))


def test_gating_residual_leaves_experts_out_that_a_mask_closed() -> None:
    score, x, before = GatingResidual(H, E), torch.randn(4, H), torch.randn(4, E)
    nn.init.normal_(score.residual)
    allowed = torch.arange(E) % 2 == 0
    masked = Masked(TopK(2), lambda logits, context: allowed)(before).router_logits
    logits = score(x, Context(fields={"previous_logits": masked}))
    torch.testing.assert_close(logits, x @ score.weight.T + (before * allowed) @ score.residual.T)
    (grad,) = torch.autograd.grad(logits.sum(), score.residual)
    torch.testing.assert_close(grad, (before * allowed).sum(0).expand(E, E))
