# SPDX-License-Identifier: BSD-3-Clause
# ruff: noqa: C408, SIM905  (keywords and one long string read best in these tables)
"""Tiny configs of every MoE type of the installed transformers.

About four layers of width 64 with eight experts and top_k 2. Types name their sizes differently, so `SIZES` lists every
name in use and a config gets those that it has. `OVERRIDES` holds what else a type needs.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Every type with routed experts, by the innermost model_type that an auto class accepts.
MODEL_TYPES = """
afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
diffusion_gemma dots1 dots3_note_text ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4_text glm4_moe
glm4_moe_lite glm4v_moe_text glm5_next_text glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid
granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 hy_v4_vl_text inkling2_loop_text inkling2_text inkling_text jamba jetmoe
kimi_k25 kimi_linear kolibri1 laguna lara_mini lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash minimax
minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral muse_spark nemotron_h nllb-moe olmoe openai_privacy_filter
phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe_talker_text qwen3_omni_moe_thinker qwen3_vl_moe
qwen4_exp_text solar_open step3p7 switch_transformers unlimited_ocr vitpose_backbone zaya
""".split()

SIZES: dict[str, Any] = {
    # width and depth
    **dict.fromkeys(("hidden_size", "d_model", "out_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    "projection_dim": 32,
    "hidden_size_per_layer_input": 0,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    "shared_intermediate_size": 32,
    **dict.fromkeys(("num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "moe_layer_interval"), 1),
    "decoder_sparse_step": 1,
    "enable_moe_block": True,
    "num_nextn_predict_layers": 0,
    # attention
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "d_kv"), 16),
    "qk_head_dim": 32,
    "q_lora_rank": 32,
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank"), 16),
    "o_groups": 2,
    "sliding_window": 64,
    "index_n_heads": 4,
    **dict.fromkeys(("index_head_dim", "index_topk"), 16),
    # state space and linear attention
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    # vision
    "patch_size": 8,
    "image_size": 32,
    # tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# None in these means that the type does not use the feature; a number would turn it on.
OPTIONAL = {
    "n_group", "topk_group", "q_lora_rank", "sliding_window", "num_key_value_heads", "first_k_dense_replace",
    "shared_intermediate_size", "shared_expert_intermediate_size",
}  # fmt: skip

ALTERNATING = ["linear_attention", "full_attention"] * 2
ONE_DENSE = ["dense", "sparse", "sparse", "sparse"]


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}


OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": dict(
        layer_types=ALTERNATING, mlp_layer_types=ONE_DENSE, linear_head_dim=16, linear_num_heads=4,
    ),
    "dbrx": dict(
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    ),
    "deepseek_ocr2_text": dict(mlp_layer_types=ONE_DENSE, num_key_value_heads=4, n_group=1, topk_group=1),
    "diffusion_gemma_text": dict(
        num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"],
        num_experts=8, top_k_experts=2, moe_intermediate_size=32,
    ),
    "dots3_note_text": dict(layer_types=["indexed_attention", "sliding_attention"] * 2, mlp_layer_types=ONE_DENSE),
    "ernie4_5_vl_moe_text": dict(moe_intermediate_size=[32, 32], rope_parameters=_mrope(2, 2, 4)),
    "gemma4_text": dict(
        num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"],
        num_experts=8, top_k_experts=2, moe_intermediate_size=32,
    ),
    "glm4v_moe_text": dict(rope_parameters=_mrope(2, 3, 3, partial_rotary_factor=1.0)),
    "glm5_next_text": dict(
        layer_types=["linear_attention", "indexed_attention"] * 2, indexer_types=["full"] * 4,
        mlp_layer_types=ONE_DENSE,
        linear_head_dim=16, linear_num_heads=4, qk_rope_head_dim=0, head_dim=0, qk_head_dim=16, index_kpool=4,
    ),
    "granitemoehybrid": dict(layer_types=ALTERNATING),
    "hy_v4_vl_text": dict(
        rope_parameters=_mrope(2, 3, 3), layer_types=["indexed_attention"] * 4, indexer_types=["full"] * 4,
        mlp_layer_types=ONE_DENSE,
    ),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
    ),
    "jetmoe": dict(kv_channels=16, num_key_value_heads=2, activation_function="silu"),
    "kimi_linear": dict(
        layer_types=ALTERNATING, mlp_layer_types=ONE_DENSE, linear_head_dim=16, linear_num_heads=4,
    ),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "longcat_flash": dict(num_layers=2, ffn_hidden_size=48, zero_expert_num=2, head_dim=16, qk_head_dim=32),
    "mistral4": dict(head_dim=32, qk_head_dim=32),
    "qwen2_moe": dict(mlp_only_layers=[]),
    "qwen4_exp_text": dict(
        layer_types=["linear_attention"] * 3 + ["indexed_attention"], hc_lowrank=16,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=4,
    ),
    "step3p5": dict(
        sliding_window=64, share_expert_dim=32, mlp_layer_types=ONE_DENSE, swiglu_limits=[None, None, None, 0.5],
    ),
    "vitpose_backbone": dict(image_size=[32, 24], patch_size=[8, 8], part_features=16),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=32),
}  # fmt: skip


def tiny_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A config of the class with all its sizes made small, including those of sub-configs."""
    default = config_class()
    sizes = {name: size for name, size in SIZES.items() if _takes(default, name)}
    if "kv_lora_rank" in vars(default):  # latent attention: as many key heads as query heads; head_dim follows
        if "num_key_value_heads" in sizes:
            sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
        sizes.pop("head_dim", None)
        sizes.pop("qk_head_dim", None)
    sizes |= OVERRIDES.get(config_class.model_type, {})
    for name in config_class.sub_configs:
        sub_config = getattr(default, name, None)
        if sub_config is not None and name not in sizes:
            sizes[name] = tiny_config(type(sub_config)).to_dict()
    return config_class(**sizes)


def _takes(default: PretrainedConfig, name: str) -> bool:
    try:
        value = getattr(default, name)
    except (AttributeError, RuntimeError):  # absent, or one value per layer, which OVERRIDES sets if required
        return False
    return not isinstance(value, (list, tuple, dict)) and not (value is None and name in OPTIONAL)
