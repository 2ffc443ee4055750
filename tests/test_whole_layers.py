# SPDX-License-Identifier: BSD-3-Clause
"""Decoder layers as a whole: the results of their modules, the modules where these are needed, and the same bits
everywhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import OlmoeConfig, OlmoeForCausalLM, StaticCache

import switchgear
from switchgear import ops
from switchgear.integrations import decoding
from switchgear.integrations.cache import GrowingCache, GrowingLayer
from switchgear.integrations.transformers import accelerate, undo_accelerate
from tiny_configs import MODEL_TYPES, OVERRIDES, tiny_config
from tiny_models import build, example_inputs

TYPES = ("olmoe", "qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "glm4_moe", "phimoe", "deepseek_v3")
ALIKE = (  # layers of these forms, and of some others
    "aria", "deepseek_v2", "dots1", "ernie4_5_moe", "exaone_moe", "granitemoeshared", "hunyuan_v1_moe", "minimax_m2",
    "qwen2_moe", "qwen3_vl_moe", "solar_open",
)  # fmt: skip
IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
WINDOW = 6


def make(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = build(model_type).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = WINDOW
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = WINDOW
    return model.to(dtype)


@pytest.fixture(params=TYPES)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that ran as a whole."""
    seen: list[Any] = []
    real = decoding._run_layer

    def spied(layer: Any, *args: Any, **kwargs: Any) -> Any:
        y = real(layer, *args, **kwargs)
        if y is not None:
            seen.append(layer)
        return y

    monkeypatch.setattr(decoding, "_run_layer", spied)
    return seen


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if decoding.find_layer_class(module) is not None]


def accelerated(model: Any, calls: list[Any]) -> list[Any]:
    replaced = accelerate(model, whole_layers=True)
    names = {r.name for r in replaced if r.path == "whole layer"}
    assert names >= {name for name, module in model.named_modules() if module in layers_of(model)}
    calls.clear()
    return replaced


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Of the tokens after each."""
    return logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


# ---- results ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_results_are_those_of_the_modules(model: Any, calls: list[Any]) -> None:
    want = model(IDS).logits
    replaced = accelerated(model, calls)
    got = model(IDS).logits
    assert calls == layers_of(model)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    undo_accelerate(replaced)
    assert torch.equal(model(IDS).logits, want)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "vitpose_backbone"])
def test_models_compute_what_they_did(model_type: str) -> None:
    """Whatever a class adds to the layer or the block that another one is recognised by."""
    model = build(model_type).eval()
    inputs = example_inputs(model)
    results = []
    with torch.no_grad():
        for is_whole in (False, True):
            if is_whole:
                accelerate(model, whole_layers=True)
            torch.manual_seed(0)
            output = model(**inputs)
            results.append(output if isinstance(output, torch.Tensor) else output[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3 * float(results[0].abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["greedy", "padded", "beams", "assisted"])
def test_generate(model: Any, calls: list[Any], mode: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = IDS if mode in ("padded", "beams") else IDS[:1]
    if mode == "padded":
        options["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(5), 0) | torch.tensor([[0], [1]])
    options |= {"beams": {"num_beams": 3}, "assisted": {"prompt_lookup_num_tokens": 2}}.get(mode, {})
    want = model.generate(ids, **options)
    accelerated(model, calls)
    assert torch.equal(model.generate(ids, **options), want)
    assert len(calls) >= len(layers_of(model))
    calls.clear()
    cache = GrowingCache(model.config.get_text_config())
    assert torch.equal(model.generate(ids, **options, past_key_values=cache), want)
    assert len(calls) >= len(layers_of(model))
    assert all(type(layer) is GrowingLayer for layer in cache.layers)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", TYPES + ALIKE)
def test_a_token_has_the_same_bits_everywhere(
    model_type: str, dtype: torch.dtype, threads: None, calls: list[Any]
) -> None:
    """Logits in a generation, in prompts cut anywhere, in a batch with padding at either side, and with gradients."""
    model = make(model_type, dtype)
    accelerate(model, whole_layers=True)
    ids, pad = IDS[:1], 7
    count = ids.shape[1]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            for cuts in ([1] * count, [5, 1, count - 6], [count - 1, 1]):
                cache, parts = GrowingCache(model.config.get_text_config()), []
                for part in ids.split(cuts, 1):
                    parts.append(model(part, past_key_values=cache).logits)
                assert torch.equal(torch.cat(parts, 1), whole), (num_threads, cuts)
            for left in (pad, 0):
                padded = torch.cat((IDS[1:, :left], ids, IDS[1:, : pad - left]), 1)
                mask = torch.zeros_like(padded)
                mask[:, left : left + count] = 1
                batch = (
                    torch.cat((padded, IDS[1:].repeat(1, 2)[:, : count + pad])),
                    torch.cat((mask, torch.ones_like(mask))),
                )
                positions = (batch[1].cumsum(-1) - 1).clamp(min=0)
                logits = model(batch[0], attention_mask=batch[1], position_ids=positions).logits
                assert torch.equal(logits[:1, left : left + count], whole), (num_threads, left)
    for use_cache in (False, True)[: 1 if "deepseek" in model_type else 2]:  # latent attention trains without a cache
        calls.clear()
        trained = model(ids, use_cache=use_cache)
        assert calls == layers_of(model)
        assert trained.logits.requires_grad
        assert torch.equal(trained.logits, whole)
    if use_cache:
        kept = GrowingCache(model.config.get_text_config())
        with torch.no_grad():
            model(ids, past_key_values=kept)
        for layer, wanted in zip(trained.past_key_values.layers, kept.layers, strict=True):
            assert torch.equal(layer.keys, wanted.keys[:, :, -layer.keys.shape[2] :])
            assert torch.equal(layer.values, wanted.values[:, :, -layer.keys.shape[2] :])


@torch.no_grad()
def test_weights_may_have_transposed_storage(calls: list[Any]) -> None:
    model = make("olmoe")
    accelerated(model, calls)
    want = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for layer in layers_of(model):
        for name in ("q_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.weight = nn.Parameter(linear.weight.mT.contiguous().mT)
    calls.clear()
    got = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert calls
    assert all(map(torch.equal, got.logits, want.logits))


@pytest.mark.parametrize("model_type", TYPES)
def test_generation_has_the_log_probs_of_a_trainer(model_type: str) -> None:
    model = make(model_type, torch.bfloat16)
    accelerate(model, whole_layers=True)
    mask = torch.ones_like(IDS).index_fill(1, torch.arange(4), 0) | torch.tensor([[0], [1]])
    torch.manual_seed(0)
    out = model.generate(
        IDS, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=True, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    rollout = (
        torch.stack(out.logits, 1).float().log_softmax(-1).gather(2, out.sequences[:, IDS.shape[1] :, None])[..., 0]
    )
    full = torch.cat((mask, torch.ones(2, 9, dtype=mask.dtype)), 1)
    positions = (full.cumsum(-1) - 1).clamp(min=0)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            logits = model(out.sequences, attention_mask=full, position_ids=positions, use_cache=False).logits
        assert float((log_probs(logits.detach(), out.sequences)[:, -9:] - rollout).abs().max()) == 0.0


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3"])
def test_stored_linears(model_type: str, calls: list[Any]) -> None:
    model = make(model_type)
    switchgear.accelerate(model)
    switchgear.store(model, "fp8", linears="fp8")
    want = model(IDS).logits
    replaced = accelerated(model, calls)
    whole = model(IDS, use_cache=False).logits
    assert calls == layers_of(model)
    torch.testing.assert_close(whole, want, rtol=1e-3, atol=1e-4)
    cache = GrowingCache()
    parts = [model(part, past_key_values=cache).logits for part in IDS.split((5, 1, 11), 1)]
    assert torch.equal(torch.cat(parts, 1), whole)
    undo_accelerate(replaced)


@torch.no_grad()
@pytest.mark.parametrize("form", ["compact", "panels"])
def test_lossless_forms_have_the_bits_of_plain_layers_in_as_few_calls(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(OlmoeConfig)
    config.update({"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 384, "head_dim": 128})
    config.num_hidden_layers = 2
    model: Any = OlmoeForCausalLM(config).bfloat16().eval()
    accelerate(model, whole_layers=True)
    repeated: list[Any] = []
    real = ops.decoder_layers_on_host
    monkeypatch.setattr(ops, "decoder_layers_on_host", lambda *args: (repeated.append(len(args[3])), real(*args))[1])

    def decode() -> tuple[Tensor, list[Any]]:
        repeated.clear()
        cache = GrowingCache(config)
        logits = [model(part, past_key_values=cache).logits for part in IDS.split((9, 1, 1, 1, 1, 1, 3), 1)]
        return torch.cat(logits, 1), list(repeated)

    want, wanted_calls = decode()
    switchgear.store(model, form, linears=form)
    got, got_calls = decode()
    assert torch.equal(got, want)
    assert got_calls == wanted_calls
    assert 2 in got_calls


def test_gradients_are_those_of_the_modules(model: Any, calls: list[Any]) -> None:
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(IDS, use_cache=False).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    accelerated(model, calls)
    got = gradients()
    assert calls == layers_of(model)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-2, atol=1e-3 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3"])
def test_gradient_checkpointing_changes_no_bit(model_type: str, use_reentrant: bool, calls: list[Any]) -> None:
    model = make(model_type)
    accelerate(model, whole_layers=True)
    model.train()
    results = []
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls.clear()
        model.zero_grad()
        logits = model(IDS, use_cache=False).logits
        assert calls == layers_of(model)
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))


@torch.no_grad()
@pytest.mark.parametrize("form", ["", "int8", "fp8"])
@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe", "mixtral", "gpt_oss"])
def test_layers_repeat_one_call_until_they_change(model_type: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = OVERRIDES.get(model_type, {}) | {"num_hidden_layers": 4}
    monkeypatch.setitem(OVERRIDES, model_type, sizes)  # type: ignore[arg-type]
    model = make(model_type, torch.bfloat16)
    switchgear.accelerate(model)
    if form:
        switchgear.store(model, form, linears=form)
    accelerate(model, whole_layers=True)
    repeated: list[Any] = []
    real = ops.decoder_layers_on_host
    monkeypatch.setattr(ops, "decoder_layers_on_host", lambda *args: (repeated.append(len(args[3])), real(*args))[1])

    def decode(before: Any = lambda token: None) -> Tensor:
        cache, logits = GrowingCache(model.config.get_text_config()), []
        repeated.clear()
        for token in range(WINDOW + 2):
            before(token)
            logits.append(model(IDS[:, token : token + 1], past_key_values=cache).logits)
            copy.deepcopy(cache)
        return torch.cat(logits, 1)

    layers = layers_of(model)
    can_repeat = bool(form) or model_type != "gpt_oss"  # whose plain experts are transposed
    got = decode()
    assert sum(repeated) == WINDOW * len(layers) * can_repeat
    alone = model_type == "gpt_oss"  # the first layer, after which the second's mask is not known
    assert max(repeated, default=0) == (len(layers) - alone) * can_repeat
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_repeat_call", lambda *_: None)
        assert torch.equal(got, decode())
    norm = layers[0].post_attention_layernorm
    seen: list[Any] = []

    def change(token: int) -> None:
        if token == 3:
            norm.weight = nn.Parameter(2 * norm.weight)
        if token == 4:
            handles.append(layers[0].self_attn.o_proj.register_forward_hook(lambda *args: seen.append(args)))

    handles: list[Any] = []
    got = decode(change)
    assert len(seen) == WINDOW - 2
    handles[0].remove()
    norm.weight = nn.Parameter(norm.weight / 2)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_repeat_call", lambda *_: None)
        assert torch.equal(got, decode(change))
    handles[1].remove()


@pytest.mark.parametrize("change", ["hook", "fewer", "by hand"])
def test_what_is_computed_ahead_is_taken_only_where_it_holds(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("olmoe")
    accelerate(model, whole_layers=True)
    layers = layers_of(model)

    def call_layers(token: int, cache: Any) -> Tensor:
        x = model.model.embed_tokens(IDS[:, token : token + 1])
        positions = torch.full((1, 1), token)
        angles = model.model.rotary_emb(x, positions)
        for layer in layers:
            x = layer(x, position_embeddings=angles, position_ids=positions, cache=cache)
            x.mul_(2)
        return x

    @torch.no_grad()
    def decode() -> list[Tensor]:
        cache, results = GrowingCache(model.config), []
        model.config.num_hidden_layers = len(layers)
        handle = None
        for token in range(8):
            if token == 3 and change == "hook":
                handle = layers[1].register_forward_hook(lambda layer, args, y: y.mul_(2))
            if token == 5 and handle is not None:
                handle.remove()
            if change == "fewer":
                model.config.num_hidden_layers = len(layers) - (token in (3, 4))
            if token > 3 and change == "by hand":
                results.append(call_layers(token, cache))
            else:
                results.append(model(IDS[:, token : token + 1], cache=cache).logits)
            results.append(torch.tensor([layer.get_seq_length() for layer in cache.layers]))
        return results

    got = decode()
    monkeypatch.setattr(decoding, "_repeat_call", lambda *_: None)
    assert all(map(torch.equal, got, decode()))


# ---- where the modules run -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hooks_and_replaced_forwards_take_the_modules(model: Any, calls: list[Any]) -> None:
    accelerated(model, calls)
    first, *others = layers_of(model)
    parts = [first.self_attn, first.self_attn.o_proj, first.input_layernorm, first.post_attention_layernorm]
    parts.append(next(iter(first.self_attn.children())))
    for part in parts:
        seen: list[Any] = []
        handle = part.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        model(IDS)
        handle.remove()
        assert len(seen) == 1
        assert calls == others
        calls.clear()
    block = first._modules[decoding.find_layer_class(first).blocks[0]]
    for part in (block, next(iter(block.children()))):  # the layer runs, and calls its block
        seen = []
        handle = part.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        model(IDS)
        handle.remove()
        assert len(seen) == 1
    calls.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model(IDS)
    handle.remove()
    first.self_attn.forward = first.self_attn.forward
    model(IDS)
    assert calls == others


@torch.no_grad()
def test_recorded_outputs_are_complete(model: Any, calls: list[Any]) -> None:
    want = model(IDS, output_hidden_states=True)
    accelerated(model, calls)
    got = model(IDS, output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert calls == layers_of(model)
    if getattr(want, "router_logits", None) is not None or "glm" not in type(model).__name__.lower():
        logits = model(IDS, output_router_logits=True).router_logits
        assert len(logits) == sum(name.endswith(".experts") for name, _ in model.named_modules())
    model.set_attn_implementation("eager")
    attentions = model(IDS, output_attentions=True).attentions
    assert len(attentions) == len(layers_of(model))


@torch.no_grad()
def test_other_caches_and_masks_take_the_modules(model: Any, calls: list[Any]) -> None:
    replaced = accelerated(model, calls)
    config = model.config.get_text_config()
    want = model(IDS).logits
    calls.clear()
    got = model(IDS, past_key_values=StaticCache(config, max_cache_len=32)).logits
    assert not calls
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    ragged = torch.ones_like(IDS)
    ragged[0, 4:6] = 0
    model(IDS, attention_mask=ragged)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert not calls
    packed = torch.arange(IDS.shape[1])[None].repeat(2, 1) % 8
    got = model(IDS, position_ids=packed, use_cache=False).logits
    undo_accelerate(replaced)
    torch.testing.assert_close(got, model(IDS, position_ids=packed, use_cache=False).logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_mixing_with_the_modules(model: Any, calls: list[Any]) -> None:
    """A cache that one of them has begun is continued by the other."""
    accelerated(model, calls)
    want = model(IDS).logits
    layer = layers_of(model)[0]
    for hooked in (0, 1):
        cache = GrowingCache(model.config.get_text_config())
        parts = []
        for index, part in enumerate(IDS.split((6, 11), 1)):
            handle = layer.self_attn.register_forward_hook(lambda *_: None) if index == hooked else None
            parts.append(model(part, past_key_values=cache).logits)
            if handle is not None:
                handle.remove()
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-3, atol=1e-4)


def test_a_layer_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("olmoe")
    layers_of(model)[0].self_attn.scaling = 0.01
    with torch.no_grad():
        want = model(IDS).logits
        accelerate(model, whole_layers=True)
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-3, atol=1e-4)
    model = make("olmoe")
    model.config.clip_qkv = 30.0  # more than random inputs reach
    with pytest.warns(UserWarning, match="left alone"):
        replaced = accelerate(model, whole_layers=True)
    assert all(r.path != "whole layer" for r in replaced)
    model = make("qwen3_moe")
    monkeypatch.setattr(decoding, "rms_norm", lambda x, *args, **kwargs: (2 * x, x) if "residual" in kwargs else x)
    with pytest.warns(UserWarning, match="left alone"):
        replaced = accelerate(model, whole_layers=True)
    assert all(r.path != "whole layer" for r in replaced)
