# SPDX-License-Identifier: BSD-3-Clause
"""Whole Hugging Face models: the results are models of unmodified families, and load from their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import raises

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import switchgear  # noqa: E402
from switchgear import convert  # noqa: E402

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(3, 27).view(2, 12)


def dense(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def reloaded(model: Any, path: Path) -> Any:
    model.save_pretrained(path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded.eval()


WINDOW = {"use_sliding_window": True, "sliding_window": 5}
ROPE = {"rope_type": "default", "rope_theta": 7e3}
LONG = {"rope_type": "llama3", "rope_theta": 7e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {}, {}, "mixtral"),
    ("llama", {"tie_word_embeddings": True, "rope_parameters": ROPE}, {}, "mixtral"),
    ("llama", {"rope_parameters": LONG}, {}, "mixtral"),
    ("llama", {"rope_parameters": LONG}, {"layers": [1]}, "qwen2_moe"),
    ("llama", {"head_dim": 16}, {"layers": [0, -1]}, "qwen2_moe"),
    ("mistral", {"sliding_window": 5}, {}, "mixtral"),
    ("mistral", {"sliding_window": 5}, {"layers": [1]}, "qwen2_moe"),
    ("qwen2", {}, {}, "qwen2_moe"),
    ("qwen2", {**WINDOW, "max_window_layers": 1}, {"layers": [1, 2]}, "qwen2_moe"),
    ("qwen3", {"head_dim": 8}, {}, "qwen3_moe"),
    ("qwen3", {"head_dim": 16, "attention_bias": True}, {"layers": [2]}, "qwen3_moe"),
    ("qwen3", {"head_dim": 8, **WINDOW, "max_window_layers": 0}, {}, "qwen3_moe"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "config", "options", "family"), CASES)
def test_row53_upcycled_model_has_the_logits_of_the_dense_one(
    model_type: str, config: dict[str, Any], options: dict[str, Any], family: str, tmp_path: Path
) -> None:
    model = dense(model_type, **config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    done = convert.upcycle(model, 4, 2, router_init=1.0, **options)
    assert done.model.config.model_type == family
    assert len(done.layers) == len(options.get("layers", range(3)))
    assert logits(done.model).sub(expected).abs().max() < 1e-5
    assert logits(reloaded(done.model, tmp_path)).sub(expected).abs().max() < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


SPLITS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"method": "random"}, "mixtral"),
    ("llama", {"method": "cluster", "layers": [1]}, "qwen2_moe"),
    ("llama", {"method": "contiguous", "shared": 0.5}, "qwen2_moe"),
    ("qwen2", {"method": "gradient", "importance": {i: torch.rand(48) for i in range(3)}, "shared": 2}, "qwen2_moe"),
    ("qwen3", {"method": "contiguous"}, "qwen3_moe"),
]


@pytest.mark.parametrize(("model_type", "options", "family"), SPLITS)
def test_row54_split_model_with_all_experts_has_the_logits_of_the_dense_one(
    model_type: str, options: dict[str, Any], family: str, tmp_path: Path
) -> None:
    model = dense(model_type)
    expected = logits(model)
    done = convert.split_dense(model, 4, router_init=0.0, **options)
    assert done.model.config.model_type == family
    assert done.notes
    assert logits(reloaded(done.model, tmp_path)).sub(expected).abs().max() < 1e-5
    split_again = convert.split_dense(model, 4, 2, router_init=1.0, **options)
    assert logits(split_again.model).sub(expected).abs().max() > 1e-4  # half of the experts


def test_row44_domain_masks_in_a_model_are_padded(tmp_path: Path) -> None:
    model = dense("llama")
    importance = {layer: torch.rand(2, 48) for layer in range(3)}
    done = convert.split_dense(model, 2, method="domain_masks", importance=importance)
    domain = 1
    for layer, block in enumerate(model.model.layers):
        mask = torch.zeros(48).index_fill_(0, importance[layer][domain].topk(24).indices, 1)
        block.mlp.down_proj.weight.data *= mask
        gate = done.model.model.layers[layer].mlp.gate
        gate.weight.data.zero_()
        # every hidden state goes to the domain's expert: a bias, since zero logits would go to expert 0
        gate.register_forward_hook(lambda *args: forced(args[2], domain))
    assert logits(done.model).sub(logits(model)).abs().max() < 1e-5
    assert any("padded" in note for note in done.notes)


def forced(output: Any, expert: int) -> Any:
    scores, weights, ids = output
    return scores, torch.ones_like(weights), torch.full_like(ids, expert)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {"mlp_bias": True}, {}, "mlp_bias"),
    ("llama", {"attention_bias": True}, {}, "family"),
    ("llama", {}, {"layers": [0], "family": "mixtral"}, "family"),
    ("llama", {}, {"family": "qwen3_moe"}, "family"),
    ("qwen2", {}, {"family": "mixtral"}, "family"),
    ("qwen3", {"head_dim": 8}, {"family": "mixtral"}, "family"),
    ("qwen3", {"head_dim": 8, **WINDOW, "max_window_layers": 1}, {}, "family"),
    ("llama", {}, {"family": "gpt"}, "family"),
    ("llama", {}, {"layers": [3]}, "layers"),
    ("llama", {}, {"normalize": False}, "normalize"),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, {}, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "config", "options", "reason"), REFUSED)
def test_what_a_family_cannot_express_is_refused(
    model_type: str, config: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    with raises(ValueError, reason):
        convert.upcycle(dense(model_type, **config), 4, 2, **options)
    if reason == "family" and model_type == "qwen3":
        with raises(ValueError):
            convert.split_dense(dense(model_type, **config), 4, shared=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row53_in_two_bytes(dtype: torch.dtype) -> None:
    """An element of the sum of experts rounds twice more: to within 2 · 2^-8 of it for bfloat16."""
    model = dense("llama").to(dtype)
    done = convert.upcycle(model, 4, 2)
    assert done.model.dtype is dtype
    expected = logits(model).float()
    assert logits(done.model).float().sub(expected).abs().max() < 0.05 * expected.abs().max()


def test_a_model_of_several_dtypes_is_refused() -> None:
    model = dense("llama")
    model.model.embed_tokens.bfloat16()
    with raises(ValueError):
        convert.upcycle(model, 2, 1)


@pytest.mark.parametrize("model_type", ["gemma", "phi3"])
def test_row53_other_families_in_place(model_type: str) -> None:
    """Layers of ours take the place of modules that no MoE family has."""
    model = dense(model_type, head_dim=8)
    expected = logits(model)
    done = convert.upcycle(model, 4, 2, family="switchgear")
    assert done.model is model
    assert len(done.layers) == 3
    assert logits(model).sub(expected).abs().max() < 1e-5
    other = dense(model_type, head_dim=8)
    convert.split_dense(other, 4, family="switchgear", layers=[1])
    assert logits(other).sub(expected).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["deepseek_v3", "olmoe", "qwen3_moe", "gpt_oss", "qwen2_moe", "granitemoe"])
def test_row50_blocks_of_other_types(model_type: str) -> None:
    """One dense network of identical experts and the shared ones, or a reason."""
    import tiny_models
    from switchgear.integrations import moe_blocks

    block = next(iter(moe_blocks.moe_blocks(tiny_models.build(model_type)).values()))
    if model_type in ("gpt_oss", "qwen2_moe"):
        with raises(ValueError, "moe"):
            convert.to_dense(block.block)
        return
    for parameter in block.experts.parameters():
        parameter.data[1:] = parameter.data[:1].clone()
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected = block.experts(x, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
        if block.shared is not None:
            expected = expected + block.shared(x)
        assert convert.to_dense(block.block)(x).sub(expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_a_module_of_transformers_and_shared_experts_stay() -> None:
    model = dense("llama")
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 5, 32)
    assert convert.upcycle(mlp, 4, 2)(x).sub(mlp(x)).abs().max() < 1e-5
    expected = logits(model)
    done = convert.upcycle(model, 4, 2, layers=[0], family="qwen2_moe").model
    again = convert.upcycle(done, 3, 1, family="switchgear")  # layer 0 has experts, and a shared one, already
    assert [layer.name for layer in again.layers] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert logits(done).sub(expected).abs().max() < 1e-5


def test_qwen3_moe_without_head_dim(tmp_path: Path) -> None:
    """Its default is hidden_size // heads, and that of a dense Qwen3 is 128."""
    model = dense("qwen3_moe", moe_intermediate_size=48, num_experts=1, num_experts_per_tok=1, norm_topk_prob=True)
    done = convert.to_dense(model).model
    assert done.config.head_dim == 8
    assert logits(done).sub(logits(model)).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "moe")
    convert.run({"operation": "dense"}, tmp_path / "moe", tmp_path / "dense")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(done))


def test_qwen3_without_head_dim(tmp_path: Path) -> None:
    """Its default is 128, and that of Qwen3-MoE is hidden_size // heads."""
    model = dense("qwen3", head_dim=128)
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    del config["head_dim"]
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    convert.run({"operation": "upcycle", "num_experts": 2, "top_k": 1}, tmp_path / "dense", tmp_path / "moe")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert logits(loaded).sub(logits(model)).abs().max() < 1e-5


def test_experts_of_an_odd_width_are_padded() -> None:
    """transformers' grouped_mm reads rows of multiples of 16 bytes."""
    models = [dense("llama", intermediate_size=45) for _ in range(2)]
    for done in (convert.upcycle(models[0], 4, 2), convert.from_dense_experts(models, top_k=2)):
        assert done.model.config.intermediate_size == 48
        assert done.notes == ("experts are padded with zeros to 48 neurons",)
        assert logits(done.model).sub(logits(models[0])).abs().max() < 1e-5


def test_noise_of_double_precision() -> None:
    model = dense("llama").double()
    experts = convert.upcycle(model, 2, 1, noise=1e-12).model.model.layers[0].mlp.experts
    difference = experts.down_proj - model.model.layers[0].mlp.down_proj.weight
    assert 0.9e-12 < float(difference.detach().std()) < 1.1e-12


def test_row50_models_with_dense_layers_and_refused_ones() -> None:
    options = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "mlp_only_layers": [1]}
    model = dense("qwen3_moe", moe_intermediate_size=48, **options)
    done = convert.to_dense(model, "topk")
    assert [layer.name for layer in done.layers] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    kept = done.model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(kept, model.model.layers[1].mlp.up_proj.weight)
    with raises(ValueError):
        convert.to_dense(dense("qwen3_moe", moe_intermediate_size=24, **options))
    with raises(ValueError):
        convert.to_dense(dense("qwen2_moe", moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2))
    with raises(ValueError):
        convert.to_dense(dense("llama"))


@pytest.mark.parametrize("form", ["int8", "fp8", "panels"])
def test_stored_experts_are_restored_first(form: str) -> None:
    """Unless the state dict has their plain weights."""
    model = dense("mixtral", num_local_experts=4, hidden_size=64, intermediate_size=64)
    wanted = convert.to_dense(model).model.state_dict()
    switchgear.accelerate(model)
    switchgear.store(model, form)
    if form == "panels":
        done = convert.to_dense(model).model.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in done.items())
        return
    with raises(ValueError, "model.model.layers.0.mlp.experts"):
        convert.to_dense(model)
