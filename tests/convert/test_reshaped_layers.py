# SPDX-License-Identifier: BSD-3-Clause
"""MoE to dense, distillation of layers, and mixtures of attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from errors import raises
from switchgear import convert
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.layers.shared import SharedExperts
from switchgear.routing import ImportanceLoad, LossFreeBias, TopK

H, WIDTH, E = 24, 32, 4


# ---- row 50 ----------------------------------------------------------------------------------------------------------


def expert_weights(moe: switchgear.MoE) -> list[tuple[Tensor, Tensor, Tensor]]:
    gate, up = moe.experts.gate_up_proj.detach().double().chunk(2, 1)
    return list(zip(gate, up, moe.experts.down_proj.detach().double(), strict=True))


def test_row50_mean_of_identical_experts_is_that_expert() -> None:
    mlp, x = SharedExperts(H, WIDTH), torch.randn(9, H)
    moe = convert.upcycle(mlp, E, 2)
    dense = convert.to_dense(moe, "mean")
    plain = SharedExperts(H, WIDTH)
    plain.load_state_dict(dense.state_dict())  # loads into a plain network
    assert plain(x).sub(mlp(x)).abs().max() < 1e-5


def test_row50_sum_and_weighted_mean() -> None:
    moe = switchgear.MoE(H, WIDTH, E, 2)
    weights = expert_weights(moe)
    for dense, shares in (
        (convert.to_dense(moe, "sum"), [1.0] * E),
        (convert.to_dense(moe, "mean", weights=[1, 2, 3, 4]), [0.1, 0.2, 0.3, 0.4]),
        (convert.to_dense(moe, "mean", weights=torch.tensor([1, 2, 3, 4])), [0.1, 0.2, 0.3, 0.4]),  # as of a trace
    ):
        for index, linear in enumerate((dense.gate_proj, dense.up_proj, dense.down_proj)):
            expected = sum(share * expert[index] for share, expert in zip(shares, weights, strict=True))
            assert linear.weight.sub(expected).abs().max() < 1e-6


def test_row50_topk_keeps_the_width_and_the_strongest_neurons() -> None:
    moe = switchgear.MoE(H, WIDTH, E, 2)
    dense, x = convert.to_dense(moe, "topk"), torch.randn(9, H)
    assert dense.up_proj.weight.shape == (WIDTH, H)
    expected = torch.zeros(9, H, dtype=torch.float64)
    for gate, up, down in expert_weights(moe):
        strength = [float(gate[n].norm() * up[n].norm() * down[:, n].norm()) for n in range(WIDTH)]
        for n in sorted(range(WIDTH), key=lambda n: -strength[n])[: WIDTH // E]:
            expected += (F.silu(x.double() @ gate[n]) * (x.double() @ up[n]))[:, None] * down[:, n]
    assert dense(x).sub(expected).abs().max() < 1e-5


def test_row50_svd_of_full_rank_is_the_sum_and_low_rank_is_the_best_one() -> None:
    moe = switchgear.MoE(H, WIDTH, E, 2)
    full, total = convert.to_dense(moe, "svd", rank=H), convert.to_dense(moe, "sum")
    for one, other in zip(full.parameters(), total.parameters(), strict=True):
        assert one.sub(other).abs().max() < 1e-5
    low = convert.to_dense(moe, "svd", rank=3)
    expected = 0
    for gate, _, _ in expert_weights(moe):
        u, s, v = torch.linalg.svd(gate)
        expected = expected + u[:, :3] @ s[:3].diag() @ v[:3]
    assert low.gate_proj.weight.sub(expected).abs().max() < 1e-5


@pytest.mark.parametrize("options", [
    {"transposed": True}, {"interleaved": True}, {"bias": True}, {"gated": False}, {"activation": "gelu"},
    {"interleaved": True, "bias": True, "transposed": True},
])  # fmt: skip
def test_row50_layouts(options: dict[str, Any]) -> None:
    moe, x = switchgear.MoE(H, WIDTH, 1, 1, normalize=True, num_shared_experts=1, **options), torch.randn(9, H)
    for method in ("mean", "topk", "svd"):
        dense = convert.to_dense(moe, method)  # one expert and the shared one, side by side
        assert dense(x).sub(moe(x)).abs().max() < 1e-5


def test_row50_refused() -> None:
    moe = switchgear.MoE(H, WIDTH, E, 2)
    for name, options in (("method", {"method": "max"}), ("rank", {"rank": 3}), ("rank", {"method": "svd", "rank": 0}),
                          ("weights", {"weights": [1.0]})):  # fmt: skip
        with raises(ValueError, name):
            convert.to_dense(moe, **options)
    with raises(ValueError):
        convert.to_dense(switchgear.MoE(H, WIDTH, E, 2, num_shared_experts=1, shared_gate=True))
    ragged = switchgear.MoE(H, WIDTH, 2, 2, widths=[1, 3])
    assert isinstance(ragged.experts, HeterogeneousExperts)
    with raises(ValueError):
        convert.to_dense(ragged)
    assert convert.to_dense(ragged, "topk").up_proj.weight.shape == (16 + 24, H)
    switchgear.store(moe, "int8")
    with raises(ValueError):
        convert.to_dense(moe)


def test_row50_shared_experts_of_another_kind() -> None:
    moe, x = switchgear.MoE(H, WIDTH, E, E, normalize=True, num_shared_experts=1), torch.randn(9, H)
    for other in ({"activation": "gelu"}, {"gated": False}):
        wrong = copy.deepcopy(moe)
        wrong.shared_experts = SharedExperts(H, WIDTH, **other)
        with raises(ValueError, "moe"):
            convert.to_dense(wrong)
    moe.shared_experts = SharedExperts(H, WIDTH, bias=True)  # beside experts without
    gate, up, down = (torch.stack(part).mean(0) for part in zip(*expert_weights(moe), strict=True))
    routed = F.linear(F.silu(x.double() @ gate.T) * (x.double() @ up.T), down)
    expected = routed + moe.shared_experts(x)
    assert convert.to_dense(moe)(x).sub(expected).abs().max() < 1e-5


# ---- row 57 ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = SharedExperts(H, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_row57_distilled_layers_come_closer_than_a_split() -> None:
    model = nn.Sequential(Block(), Block())
    for block in model:  # weights that matter
        block.mlp.down_proj.weight.data *= 4
    x = torch.randn(600, H)
    dense = [copy.deepcopy(block.mlp) for block in model]
    result = convert.distill_layers(model, 4, [x[:300], x[300:]], 2, tokens=500, steps=120, batch_size=128, lr=3e-3)
    assert [layer.name for layer in result.layers] == ["0.mlp", "1.mlp"]
    assert all(layer.num_tokens == 500 for layer in result.layers)
    fresh = torch.randn(400, H)
    for layer, block, mlp in zip(result.layers, model, dense, strict=True):
        assert layer.after < 0.7 * layer.before
        found = convert.layers.compute_error(block.mlp, fresh, mlp(fresh).detach())
        for seed in range(3):
            split = convert.split_dense(mlp, 4, 2, weights="softmax", seed=seed)
            assert found < convert.layers.compute_error(split, fresh, mlp(fresh).detach())


def test_layers_are_distilled_without_dropout() -> None:
    """From inputs and outputs in eval(), and also where no gradients are recorded; modes stay."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Dropout(0.9), Block(), Block()), torch.randn(64, H)
    model[2].eval()
    results = []
    for training in (True, False):
        fresh = copy.deepcopy(model)
        fresh[0].train(training)
        with torch.set_grad_enabled(training):
            results.append(convert.distill_layers(fresh, 4, [x], 2, steps=3, batch_size=16))
        assert [block.training for block in fresh] == [training, True, False]
        assert [fresh[1].mlp.training, fresh[2].mlp.training] == [True, False]
    assert results[0].layers == results[1].layers


def test_layers_are_distilled_without_padding() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.block(x)

    model, x, mask = Masked(), torch.randn(2, 5, H), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    results = [convert.distill_layers(copy.deepcopy(model), 4, [batch], 2, steps=3, batch_size=4)
               for batch in ({"x": x, "attention_mask": mask}, x[mask.bool()])]  # fmt: skip
    assert results[0].layers == results[1].layers
    assert results[0].layers[0].num_tokens == 7


def test_layers_are_distilled_with_balance() -> None:
    """Losses train the router, and controllers act after each step."""
    torch.manual_seed(0)
    mlp, x = SharedExperts(H, 64), torch.randn(64, H) + 1
    skewed = []
    for balance in ([], [ImportanceLoad(10.0)]):
        options = {"steps": 20, "batch_size": 16, "lr": 1e-2, "router_init": 0.3, "balance": balance}
        moe = convert.distill_layers(copy.deepcopy(mlp), 4, [x], 2, **options).model
        skewed.append(moe.gate(x).router_logits.detach().softmax(-1).mean(0).var())
    assert skewed[1] < 0.5 * skewed[0]
    moe = convert.distill_layers(mlp, 4, [x], 2, steps=3, batch_size=16, balance=[LossFreeBias(1e-2)]).model
    assert moe.gate.e_score_correction_bias.any()
    assert not moe.gate.tokens_per_expert.any()


def test_layers_are_distilled_with_importance_by_layer() -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(64, H)
    scores = convert.layer_importance(model, [x], lambda y: y.square().mean())
    split = convert.split_dense(copy.deepcopy(model), 4, 2, method="gradient", importance=scores, weights="softmax")
    convert.distill_layers(model, 4, [x], 2, steps=0, method="gradient", importance=scores)
    assert torch.equal(model[1].mlp.experts.down_proj, split.model[1].mlp.experts.down_proj)
    assert torch.equal(model[1].mlp.gate.weight, split.model[1].mlp.gate.weight)  # not that of the first layer


def test_row57_threshold_meets_the_average_number_of_experts() -> None:
    mlp, x = SharedExperts(H, 64), torch.randn(2000, H)
    result = convert.distill_layers(mlp, 8, [x], 2, steps=5, router_init=0.5)
    moe = result.model
    for wanted in (1.3, 2.0, 3.7):
        moe_copy = copy.deepcopy(moe)
        convert.use_threshold(moe_copy, x, wanted)
        used = float((moe_copy.gate(x).topk_ids >= 0).float().sum(1).mean())
        assert abs(used / wanted - 1) < 0.01
    with raises(ValueError):
        convert.use_threshold(moe_copy, x, 2.0)


def test_measuring_a_layer_in_training_counts_no_tokens() -> None:
    moe = convert.split_dense(SharedExperts(H, 64), 8, 2, weights="softmax", balance=[LossFreeBias(1e-2)])
    x = torch.randn(9, H)
    convert.layers.compute_error(moe, x, x)
    convert.use_threshold(moe, x, 1.5)
    assert moe.training
    assert not moe.gate.tokens_per_expert.any()


def test_row57_nothing_is_replaced_on_failure() -> None:
    model = nn.Sequential(Block(), Block())
    for batches, options in (([], {}), ([torch.randn(9, H)], {"num_experts": 7})):
        with raises(ValueError):
            convert.distill_layers(model, **{"num_experts": 4, "batches": batches, **options})  # type: ignore[arg-type]
    assert all(isinstance(block.mlp, SharedExperts) for block in model)
    assert not any(block.mlp._forward_pre_hooks for block in model)


# ---- rows 55 and 58: attention ---------------------------------------------------------------------------------------


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model_type = options.pop("model_type", "llama")
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=4, max_position_embeddings=64, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(ids, **options).logits
        return y


IDS = torch.arange(3, 21).view(2, 9)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"model_type": "qwen3"}, {"model_type": "qwen2"}])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_row55_all_head_groups_are_the_attention(options: dict[str, Any], groups: int) -> None:
    model = llama(**options)
    expected, padded = logits(model, IDS), logits(model, IDS, attention_mask=MASK)
    for layer in model.model.layers:
        layer.self_attn = convert.attention_to_moe(layer.self_attn, groups, router_init=1.0)
    assert logits(model, IDS).sub(expected).abs().max() < 1e-5
    assert logits(model, IDS, attention_mask=MASK).sub(padded)[MASK.bool()].abs().max() < 1e-5
    step = model.generate(IDS, max_new_tokens=4, do_sample=False)  # with a cache
    whole = logits(model, step[:, :-1])
    assert torch.equal(step[:, 9:], whole[:, 8:].argmax(-1))


@pytest.mark.parametrize("without", ["q_proj", "k_proj", "v_proj"])
def test_row55_projections_with_and_without_bias(without: str) -> None:
    model = llama(attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.get_submodule(without).register_parameter("bias", None)
    expected = logits(model, IDS)
    for layer in model.model.layers:
        layer.self_attn = convert.attention_to_moe(layer.self_attn, 2, router_init=1.0)
    assert logits(model, IDS).sub(expected).abs().max() < 1e-5


def head_groups(attention: Any, moe: Any, x: Tensor, keys: str) -> Tensor:
    """The loop of LLaMA-MoE v2 in float64, without rotations: a token attends in each group that it chose, to the
    tokens before it that chose the group, too; or to all of them. Weights are those of the layer's router."""
    batch, length, experts = x.shape[0], x.shape[1], moe.num_experts
    routing = moe.gate(x)
    ids, weights = routing.topk_ids.view(batch, length, -1), routing.topk_weights.double().view(batch, length, -1)
    q, k, v = (
        linear(x).double().view(batch, length, -1, 4)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    output, y = attention.o_proj.weight.double(), torch.zeros(batch, length, 32, dtype=torch.float64)
    for b in range(batch):
        for e in range(experts):
            seen = [t for t in range(length) if keys == "all" or e in ids[b, t]]
            for t in range(length):
                if e in ids[b, t]:
                    weight, before = weights[b, t, ids[b, t] == e].sum(), [s for s in seen if s <= t]
                    for head in range(8 * e // experts, 8 * (e + 1) // experts):  # two heads have the keys of one
                        scores = (k[b, before, head // 2] @ q[b, t, head] / 2).softmax(0)
                        y[b, t] += weight * output[:, 4 * head : 4 * head + 4] @ (scores @ v[b, before, head // 2])
    return y


SOFTMAX = TopK(2, "softmax", normalize=True, scale=3.0)  # as in the paper's code


@pytest.mark.parametrize(("groups", "options"), [
    (4, {}), (2, {}), (8, {}), (4, {"select": SOFTMAX}), (4, {"keys": "all"}), (8, {"keys": "all", "select": SOFTMAX}),
], ids=str)  # fmt: skip
def test_row55_chosen_head_groups(groups: int, options: dict[str, Any]) -> None:
    """With all keys, it is the sum of the chosen groups of the layer alone."""
    attention, x = llama().model.layers[0].self_attn, torch.randn(2, 7, 32)
    moe = convert.attention_to_moe(attention, groups, min(2, groups - 1), router_init=1.0, **options)
    if not options:
        assert (moe.gate(x).topk_weights == groups / min(2, groups - 1)).all()
    y = moe(x)[0]
    assert y.sub(head_groups(attention, moe, x, moe.keys)).abs().max() < 1e-5
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_row55_tokens_that_did_not_choose_a_group_have_no_share_of_it(dtype: torch.dtype) -> None:
    """The gradient of a token's output is exactly 0 for those that chose another group."""
    attention, x = llama().model.layers[0].self_attn.to(dtype), torch.randn(1, 9, 32, dtype=dtype, requires_grad=True)
    moe = convert.attention_to_moe(attention, 4, 1, router_init=1.0)
    group = moe.gate(x).topk_ids.flatten()
    for token in range(9):
        (grad,) = torch.autograd.grad(moe(x)[0][0, token].sum(), x)
        shares = (group == group[token]) & (torch.arange(9) <= token)
        assert torch.equal(grad[0].any(1), shares)


@pytest.mark.parametrize("cache", [None, "static"])
def test_row55_a_cache_keeps_which_groups_were_chosen(cache: str | None) -> None:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn = convert.attention_to_moe(layer.self_attn, 4, 2, router_init=1.0)
    whole = logits(model, IDS)
    assert logits(model, IDS, attention_mask=MASK).isfinite().all()
    padded = logits(model, torch.cat((IDS[:1, :2] * 0, IDS[:1, 2:]), 1), attention_mask=MASK[:1])
    assert padded.sub(logits(model, IDS, attention_mask=MASK)[:1])[:, 2:].abs().max() < 1e-5
    output, rows = model(IDS[:, :4], use_cache=True), []
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    for token in IDS[:, 4:].T:
        output = model(token[:, None], **{name: output[name]})
        rows.append(output.logits[:, 0])
    assert torch.stack(rows, 1).sub(whole[:, 4:]).abs().max() < 1e-5
    step = model.generate(IDS, max_new_tokens=4, do_sample=False, cache_implementation=cache)
    assert torch.equal(step[:, 9:], logits(model, step[:, :-1])[:, 8:].argmax(-1))
    beams = model.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=3)
    assert torch.equal(beams, model.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=3, use_cache=False))


def cache_of(model: Any, is_static: bool) -> Any:
    from transformers.cache_utils import DynamicCache, StaticCache

    return StaticCache(model.config, max_cache_len=20) if is_static else DynamicCache(config=model.config)


@pytest.mark.parametrize("keys", ["all", "chosen"])
@pytest.mark.parametrize("steps", [[7], [3, 4], [6, 1], [1] * 7], ids=str)
@pytest.mark.parametrize("is_static", [False, True])
def test_row55_without_a_mask_tokens_see_those_before_them(keys: str, steps: list[int], is_static: bool) -> None:
    model, x = llama(), torch.randn(1, 7, 32)
    moe = convert.attention_to_moe(model.model.layers[0].self_attn, 4, 2, keys=keys, router_init=1.0)
    cache = cache_of(model, is_static)
    y = torch.cat([moe(part, cache=cache)[0] for part in torch.split(x, steps, 1)], 1)
    assert y.sub(moe(x)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("is_static", [False, True])
def test_row55_a_cache_with_a_window_shows_no_later_token(is_static: bool) -> None:
    model = llama(model_type="mistral", sliding_window=4)
    moe = convert.attention_to_moe(llama().model.layers[0].self_attn, 4, 2, router_init=1.0)
    x, rows = torch.randn(1, 12, 32), []
    for last in (0.0, 5.0):
        cache = cache_of(model, is_static)
        x[:, -1] += last
        moe(x[:, :8], cache=cache)
        rows.append(moe(x[:, 8:], cache=cache)[0])
    assert torch.equal(rows[0][:, :3], rows[1][:, :3])
    assert not torch.equal(rows[0][:, 3], rows[1][:, 3])


def test_row55_what_hides_a_key_is_finite_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast rounds keys that rotations left in float32."""
    seen, attend = [], F.scaled_dot_product_attention

    def remember(q: Tensor, k: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.append(k)
        return attend(q, k, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", remember)
    moe = convert.MixtureOfAttention(32, 4, 1, 1, head_dim=256, keys="chosen", select=TopK(1))
    moe(torch.randn(1, 7, 32))
    assert seen[0].half().isfinite().all()


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("options", [{"attention_bias": True}, {"model_type": "qwen3"}])
def test_row58_identical_attention_experts_are_the_attention(options: dict[str, Any], shared_kv: bool) -> None:
    model = llama(**options)
    expected = logits(model, IDS)
    for layer in model.model.layers:
        attention = layer.self_attn
        layer.self_attn = convert.attention_from_experts([attention] * 3, shared_kv=shared_kv, router_init=1.0)
    assert logits(model, IDS).sub(expected).abs().max() < 1e-5
    output = model(IDS, use_cache=True)
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    keys = cache.layers[0].keys
    assert keys.shape[1] == (4 if shared_kv else 12) == model.model.layers[0].self_attn.cached_heads


def test_row58_soft_mixture_and_parallel_block() -> None:
    """y = x + MoE(LN x) + Σ_e softmax(gate)_e · attention_e(LN x), with every expert computed apart."""
    attentions = [llama(attention_bias=True).model.layers[i].self_attn for i in (0, 1)]
    for attention in attentions:
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.3)
    mixture = convert.attention_from_experts(attentions, router_init=1.0)
    singles = [convert.attention_from_experts([attention]) for attention in attentions]
    block = convert.ParallelBlock(nn.LayerNorm(32), switchgear.MoE(32, 16, 4, 2), mixture)
    x = torch.randn(2, 7, 32)
    rows = block.norm(x)
    scores = (rows.double() @ mixture.gate.weight.double().T).softmax(-1)
    expected = x + block.moe(rows) + sum(scores[..., e, None].float() * singles[e](rows)[0] for e in range(2))
    assert block(x).sub(expected).abs().max() < 1e-5
    block(x).sum().backward()
    assert mixture.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("make", [convert.attention_to_moe, convert.attention_from_experts])
@pytest.mark.parametrize("options", [
    {"model_type": "cohere"},  # interleaved rotations
    {"model_type": "helium"},
    {"model_type": "ernie4_5"},
    {"model_type": "smollm3", "no_rope_layers": [0, 0]},
    {"model_type": "olmo", "clip_qkv": 8.0},
    {"model_type": "hunyuan_v1_dense"},  # norms after the rotation
    {"model_type": "bitnet"},  # a norm before the last projection
    {"model_type": "gemma2", "layer_types": ["full_attention"] * 2},  # soft-capping
    {"model_type": "diffllama"},
    {"model_type": "nemotron"},  # rotates a part of each head
], ids=lambda options: options["model_type"])  # fmt: skip
def test_attention_that_the_mixture_cannot_express_is_refused(options: dict[str, Any], make: Any) -> None:
    attention = llama(pad_token_id=0, **options).model.layers[0].self_attn.train()
    with raises(ValueError):
        make(attention, 2) if make is convert.attention_to_moe else make([attention])
    assert attention.training


@pytest.mark.parametrize("options", [
    {}, {"dtype": torch.bfloat16}, {"attn_implementation": "sdpa"}, {"model_type": "gemma"}, {"model_type": "arcee"},
    {"model_type": "granite", "attention_multiplier": 0.7}, {"model_type": "starcoder2", "sliding_window": None},
    {"model_type": "seed_oss"},
], ids=str)  # fmt: skip
def test_attention_that_the_mixture_expresses_is_accepted(options: dict[str, Any]) -> None:
    attention = llama(pad_token_id=0, **options).model.layers[0].self_attn
    mixture = convert.attention_to_moe(attention, 4)
    assert not mixture.training
    assert all(parameter.dtype is attention.q_proj.weight.dtype for parameter in mixture.parameters())


def test_attention_keeps_its_dropout() -> None:
    """A single token attends to itself: in training a head gives none of its value, or twice."""
    attention = llama(attention_dropout=0.5).model.layers[0].self_attn
    mixture = convert.attention_to_moe(attention, 4, router_init=1.0).train()
    x = torch.randn(1, 1, 32)
    value = attention.v_proj(x).view(4, 4).double().repeat_interleave(2, 0)
    heads = torch.einsum("nd,hnd->nh", value, attention.o_proj.weight.double().view(32, 8, 4))
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 2.0], dtype=torch.float64)] * 8) @ heads
    for _ in range(4):
        assert (choices - mixture(x)[0].double().view(32)).abs().amax(1).min() < 1e-5
    assert mixture.eval()(x)[0].double().sub(heads.sum(0)).abs().max() < 1e-5


def test_residual_dropout_is_kept() -> None:
    attention = llama(model_type="seed_oss", attention_dropout=0.0, residual_dropout=0.5).model.layers[0].self_attn
    mixture, x = convert.attention_to_moe(attention, 2, router_init=1.0), torch.randn(1, 1, 32)
    whole, kept = mixture(x)[0], mixture.train()(x)[0]
    assert ((kept == 0) | (kept.sub(2 * whole).abs() < 1e-5)).all()
    assert (kept == 0).any()


def test_attention_bad_input() -> None:
    attention = llama().model.layers[0].self_attn
    for name, groups, top_k in (("num_experts", 3, None), ("num_experts", 0, None), ("top_k", 2, 3)):
        with raises(ValueError, name):
            convert.attention_to_moe(attention, groups, top_k)
    with raises(ValueError, "num_experts"):
        convert.attention_to_moe(attention, 16)
    with raises(ValueError, "keys"):
        convert.attention_to_moe(attention, 2, keys="some")
    with raises(ValueError, "keys"):
        convert.MixtureOfAttention(32, 2, 4, shared_kv=True, keys="chosen")
    with raises(ValueError):
        convert.attention_to_moe(nn.Linear(3, 3), 1)
    with raises(ValueError):
        convert.attention_from_experts([attention, llama(attention_bias=True).model.layers[0].self_attn])
