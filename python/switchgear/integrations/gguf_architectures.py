# SPDX-License-Identifier: BSD-3-Clause
"""The models that GGUF files hold: ARCHITECTURES is the table of what is known. A row has the keys of the config, the
fixed values of it, and the tensors whose names or rows differ from those of _MODULES."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.integrations.gguf_file import GgufFile, Value
from switchgear.weights.form import Layout, layout_of
from switchgear.weights.module import stored_of

ARCHITECTURE = "general.architecture"
LAYERS = "model.layers."


class Split(NamedTuple):
    """A matrix of the model that files have as several tensors. Functions take the model's config."""

    names: tuple[str, ...]  # of the tensors, as in _MODULES
    split: Callable[[Tensor, Any], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], Any], Tensor]


class Architecture(NamedTuple):
    """A model in both worlds. Keys have the prefix "<name in llama.cpp>." in files."""

    model_type: str  # of transformers
    keys: Mapping[str, str]  # key -> field of the config; all are needed
    optional: Mapping[str, str] = {}  # those that a file may lack
    fixed: Mapping[str, Any] = {}  # fields of the config that no key has, or whose key is absent
    rope: Mapping[str, Any] = {}  # the same for yarn's
    constants: Mapping[str, tuple[Any, ...]] = {}  # key -> its value, and others it may have in files; None: no key
    tensors: Mapping[str, str] = {}  # fields that tell whether a layer has a tensor
    modules: Mapping[str, str] = {}  # modules of a layer whose tensors have other names than in _MODULES
    splits: Mapping[str, Split] = {}  # by name in _MODULES
    experts: Layout | None = None  # of experts that `store` does not know
    has_interleaved_rope: bool = False  # rows of q and k are in another order in files
    has_factors: bool = False  # a tensor has the factors of llama3's scaling of positions
    read: Callable[[GgufFile, str, dict[str, Any]], None] | None = None  # sets fields of keys that are no fields
    write: Callable[[Any, GgufFile | None], dict[str, Any]] | None = None  # those keys of a config; the other is `like`


# ---- latent attention and partial rotation ---------------------------------------------------------------------------


def _split_latent(weight: Tensor, config: Any) -> Sequence[Tensor]:
    """kv_b_proj [heads·(k+v),C] as k_b [heads,C,k] and v_b [heads,v,C]."""
    heads = weight.view(config.num_attention_heads, -1, weight.shape[-1])
    return heads[:, : config.qk_nope_head_dim].mT, heads[:, config.qk_nope_head_dim :]


def _join_latent(parts: Sequence[Tensor], config: Any) -> Tensor:
    return torch.cat((parts[0].mT, parts[1]), 1).flatten(0, 1)


def _read_latent(file: GgufFile, prefix: str, fields: dict[str, Any]) -> None:
    kind = "_mla" if f"{prefix}attention.key_length_mla" in file.metadata else ""  # older files have whole heads
    key, rotated = f"{prefix}attention.key_length{kind}", fields["qk_rope_head_dim"]
    if (length := read_key(file, key, int)) <= rotated:
        raise build_error(file, f"key {key!r}", f"more than {prefix}rope.dimension_count, {rotated}", length)
    fields["qk_nope_head_dim"] = length - rotated
    fields["v_head_dim"] = read_key(file, f"{prefix}attention.value_length{kind}", int)
    fields["num_key_value_heads"] = fields["num_attention_heads"]
    key, rope = f"{prefix}rope.scaling.yarn_log_multiplier", fields["rope_parameters"]
    if rope["rope_type"] == "yarn" and key in file.metadata:
        rope["mscale"] = rope["mscale_all_dim"] = round(10 * read_key(file, key, float), 6)


def _write_latent(config: Any, like: GgufFile | None) -> dict[str, Any]:
    heads = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    keys: dict[str, Any] = {"rope.dimension_count": config.qk_rope_head_dim}
    if like is not None and f"{like.get(ARCHITECTURE)}.attention.key_length_mla" not in like.metadata:
        keys |= {"attention.head_count_kv": config.num_attention_heads}
        keys |= zip(("attention.key_length", "attention.value_length"), heads, strict=True)
    else:
        width = config.kv_lora_rank
        keys |= {"attention.head_count_kv": 1, "attention.value_length": width}
        keys |= {"attention.key_length": width + config.qk_rope_head_dim}
        keys |= zip(("attention.key_length_mla", "attention.value_length_mla"), heads, strict=True)
    rope = config.rope_parameters
    if (scale := rope.get("mscale_all_dim", 0)) != rope.get("mscale", scale):
        raise ValueError(
            f"model.config.rope_parameters: expected mscale {scale}, as mscale_all_dim, got {rope['mscale']}"
        )
    return keys | ({"rope.scaling.yarn_log_multiplier": 0.1 * scale} if scale else {})


def _read_rotation(file: GgufFile, prefix: str, fields: dict[str, Any]) -> None:
    key = f"{prefix}rope.dimension_count"
    if (rotated := read_key(file, key, int)) > fields["head_dim"]:
        raise build_error(file, f"key {key!r}", f"at most {prefix}attention.key_length, {fields['head_dim']}", rotated)
    fields["rope_parameters"]["partial_rotary_factor"] = rotated / fields["head_dim"]


def _write_rotation(config: Any, like: GgufFile | None) -> dict[str, Any]:
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return {"rope.dimension_count": round(config.head_dim * factor)}


def _read_glm(file: GgufFile, prefix: str, fields: dict[str, Any]) -> None:
    key = f"{prefix}nextn_predict_layers"
    extra = read_key(file, key, int, 0) if key in file.metadata else 0
    fields["num_hidden_layers"] -= extra  # layers that predict further tokens follow the model's own
    if fields["num_hidden_layers"] < 1:
        raise build_error(file, f"key {key!r}", f"fewer than {prefix}block_count", extra)
    _read_rotation(file, prefix, fields)


def _write_glm(config: Any, like: GgufFile | None) -> dict[str, Any]:
    return _write_rotation(config, like) | {"nextn_predict_layers": 0}


def _read_llama4(file: GgufFile, prefix: str, fields: dict[str, Any]) -> None:
    fields["use_qk_norm"] = fields["num_local_experts"] != _WITHOUT_NORM  # llama.cpp tells by it
    if FACTORS not in file.tensors:
        return
    factors, rope = file.tensors[FACTORS].data.float(), fields["rope_parameters"]
    for high in (1.0, 4.0):  # of Llama 4, and of Llama 3
        known = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": high}
        scaled = {**rope, "rope_type": "llama3", **known, "original_max_position_embeddings": 8192}
        wanted = find_factors(scaled, fields["head_dim"])
        if wanted.shape == factors.shape and torch.allclose(wanted, factors, rtol=1e-5):
            rope |= scaled
            return
    raise build_error(file, f"tensor {FACTORS!r}", "factors of llama3's scaling of 8192 positions", "others")


def find_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """What llama3's scaling divides each frequency by, [head_dim / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** exponents)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns >= low).double()
    return torch.reciprocal((1 - smooth) / factor + smooth).float()


def _write_llama4(config: Any, like: GgufFile | None) -> dict[str, Any]:
    layers = range(1, config.num_hidden_layers + 1)
    for field, values in {
        "use_qk_norm": config.num_local_experts != _WITHOUT_NORM,
        "no_rope_layers": [int(layer % 4 > 0) for layer in layers],
        "layer_types": ["chunked_attention" if layer % 4 else "full_attention" for layer in layers],
        "moe_layers": [layer - 1 for layer in layers if layer % config.interleave_moe_layer_step == 0],
    }.items():
        if (got := getattr(config, field)) != values:
            raise ValueError(f"model.config.{field}: expected {values}, got {got}")
    return {}


def _write_gpt_oss(config: Any, like: GgufFile | None) -> dict[str, Any]:
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(config.num_hidden_layers)]
    if config.layer_types != kinds:
        raise ValueError(f"model.config.layer_types: expected {', '.join(kinds)}, got {', '.join(config.layer_types)}")
    return {}


# ---- the table -------------------------------------------------------------------------------------------------------

_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
}
_ONE_WIDTH = _KEYS | {"feed_forward_length": "intermediate_size"}
_LOCAL = {**_ONE_WIDTH, "expert_count": "num_local_experts"}
_OWN_WIDTH = _KEYS | {"expert_feed_forward_length": "moe_intermediate_size"}
_GROUPED = {
    **_OWN_WIDTH,
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "feed_forward_length": "intermediate_size",
}
_SCALED = {
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor",
}
_NORMED = _SCALED | {
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_UNSCALED = {"first_k_dense_replace": 0, "routed_scaling_factor": 1.0}
_UNNORMED = _UNSCALED | {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}
_LATENT = {key: field for key, field in _GROUPED.items() if key != "attention.head_count_kv"} | {
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
}
LATENT_HEADS = {"attn_kv_b": Split(("attn_k_b", "attn_v_b"), _split_latent, _join_latent)}
_SOFTMAX, _SIGMOID = 1, 2  # of expert_gating_func
_WITHOUT_NORM = 128  # experts of the Llama 4 that does not norm q and k
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}

ARCHITECTURES = {
    "olmoe": Architecture("olmoe", _ONE_WIDTH, {"attention.clamp_kqv": "clip_qkv"}, {"norm_topk_prob": False}),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _OWN_WIDTH | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {"feed_forward_length": "intermediate_size"},
        _ALL_SPARSE | {"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _OWN_WIDTH,
        {"feed_forward_length": "intermediate_size", "attention.key_length": "head_dim"},
        _ALL_SPARSE | {"norm_topk_prob": True},
    ),
    "llama": Architecture("mixtral", _LOCAL, {"rope.dimension_count": "head_dim"}, has_interleaved_rope=True),
    "gpt-oss": Architecture(
        "gpt_oss",
        _KEYS
        | {
            "expert_count": "num_local_experts",
            "expert_feed_forward_length": "intermediate_size",
            "attention.key_length": "head_dim",
            "attention.sliding_window": "sliding_window",
        },
        fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True},
        rope={"truncate": False},
        modules={"post_attention_layernorm": "post_attention_norm"},
        write=_write_gpt_oss,
    ),
    "deepseek2": Architecture(
        "deepseek_v3",
        _LATENT,
        _NORMED | {"attention.q_lora_rank": "q_lora_rank"},
        _UNNORMED | {"q_lora_rank": None, "rope_interleave": True, "attention_bias": False},
        constants={"expert_gating_func": (_SIGMOID,)},
        splits=LATENT_HEADS,
        read=_read_latent,
        write=_write_latent,
    ),
    "deepseek2:softmax": Architecture(
        "deepseek_v2",
        _LATENT,
        _SCALED | {"attention.q_lora_rank": "q_lora_rank"},
        _UNSCALED | {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": False, "mlp_bias": False},
        constants={
            "expert_gating_func": (_SOFTMAX, None),
            "expert_weights_norm": (None, False),
            "expert_group_count": (None, 1),
        },
        splits=LATENT_HEADS,
        read=_read_latent,
        write=_write_latent,
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        _GROUPED | {"attention.key_length": "head_dim"},
        _NORMED,
        _UNNORMED,
        constants={"expert_gating_func": (_SIGMOID, None)},
        tensors={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
        modules={"post_attention_layernorm": "post_attention_norm"},
        read=_read_glm,
        write=_write_glm,
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        _LOCAL | {"expert_feed_forward_length": "intermediate_size", "attention.key_length": "head_dim"},
        constants={"expert_gating_func": (_SIGMOID,)},
        read=_read_rotation,
        write=_write_rotation,
    ),
    "llama4": Architecture(
        "llama4_text",
        _LOCAL
        | {
            "feed_forward_length": "intermediate_size_mlp",
            "expert_feed_forward_length": "intermediate_size",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
            "attention.key_length": "head_dim",
        },
        fixed={
            "attention_chunk_size": 8192,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "attn_temperature_tuning": True,
            "attention_bias": False,
        },
        experts=Layout(("gate_up_proj", "down_proj"), transposed=True, split_gates=True),
        has_factors=True,
        read=_read_llama4,
        write=_write_llama4,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        _LOCAL,
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        has_interleaved_rope=True,
    ),
}
"""By the name in llama.cpp, and what else tells models of one name apart."""

_FLOAT_FIELDS = (
    "rms_norm_eps", "clip_qkv", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
    "routed_scaling_factor",
)  # fmt: skip
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    # of a layer
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.experts": "exps",
    "mlp.experts": "exps",
    "block_sparse_moe.experts": "exps",
}
OWN = {  # parameters and buffers whose tensors are not named as their module
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.e_score_correction_bias": "exp_probs_b.bias",
}
FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD, VECTOR = "token_embd.weight", "output.weight", "ffn_gate_inp_shexp.weight"
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def name_module(path: str, known: Architecture) -> str | None:
    """The name of a module's tensors, without .weight; of experts with "exps" at the end. None if it is unknown."""
    return find_name(path, {**_MODULES, **known.modules})


def name_parameter(path: str, own: str, known: Architecture) -> str | None:
    """The name of a parameter's tensor. None if it is unknown."""
    if (name := find_name(f"{path}.{own}", OWN)) is not None:
        return name
    return None if (name := name_module(path, known)) is None else f"{name}.{own}"


def find_name(path: str, names: Mapping[str, str]) -> str | None:
    if not path.startswith(LAYERS):
        return names.get(path)
    number, _, rest = path.removeprefix(LAYERS).partition(".")
    return None if (stem := names.get(rest)) is None else f"blk.{number}.{stem}"


def find_layout(module: nn.Module, known: Architecture) -> Layout | None:
    """The layout of experts; None if they do not run on switchgear."""
    return layout_of(module) or known.experts if (stored := stored_of(module)) is None else stored.layout


def name_experts(name: str, own: str = "weight") -> tuple[str, str, str]:
    """Gates, ups and the second projection."""
    gate, up, down = (f"{name.removesuffix('exps')}ffn_{part}_exps.{own}" for part in ("gate", "up", "down"))
    return gate, up, down


def reorder_heads(name: str, rows: Tensor, config: Any, is_back: bool) -> Tensor:
    """Rows of q or k [N,...], each head's two halves interleaved; is_back: the inverse. Others as they are."""
    if (field := _HEADS.get(name.split(".")[-2])) is None:
        return rows
    heads = getattr(config, field)
    split = (heads, -1, 2) if is_back else (heads, 2, len(rows) // heads // 2)
    return rows.reshape(*split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def take_part(rows: Tensor, parts: int, is_apart: bool, index: int) -> Tensor:
    """The rows of one of the parts of [E,N,…]; see `_split` of gguf.py."""
    return rows.chunk(parts, 1)[index] if is_apart else rows[:, index::parts]


# ---- configs out of files --------------------------------------------------------------------------------------------


def find_architecture(file: GgufFile, name: str) -> Architecture:
    found = [known for each, known in ARCHITECTURES.items() if each.partition(":")[0] == name]
    if not found:
        names = dict.fromkeys(each.partition(":")[0] for each in ARCHITECTURES)
        raise build_error(file, f"key {ARCHITECTURE!r}", f"one of {', '.join(names)}", repr(name))
    others = []
    for known in found:
        wrong = [key for key, values in known.constants.items() if file.get(f"{name}.{key}") not in values]
        if not wrong:
            return known
        others.append((known.constants[wrong[0]], wrong[0]))
    values, key = others[-1]
    raise build_error(file, f"key {name + '.' + key!r}", f"one of {values}", file.get(f"{name}.{key}"))


def choose_architecture(model: Any) -> tuple[str, Architecture]:
    """The name in llama.cpp, and the row, of a model. Raises ValueError for other models."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for name, known in ARCHITECTURES.items():
        if known.model_type == kind:
            return name.partition(":")[0], known
    types = ", ".join(each.model_type for each in ARCHITECTURES.values())
    raise ValueError(f"model: expected a model of {types}, got {kind or type(model)}")


def build_error(file: GgufFile, what: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{file.path}: {what}: expected {expected}, got {got}")


def read_key(file: GgufFile, key: str, kind: type, least: int = 1) -> Any:
    value = file.get(key)
    is_number = kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, kind))
    if not is_number and type(value) is not kind:
        text = {int: "an integer", float: "a number", bool: "a bool", str: "a string"}[kind]
        raise build_error(file, f"key {key!r}", text, "none" if value is None else file.metadata[key].type)
    if kind is int and value < least:
        raise build_error(file, f"key {key!r}", f"a number from {least} on", value)
    return value


def _kind_of(field: str) -> type:
    """What a field's key holds."""
    return float if field in _FLOAT_FIELDS else bool if field == "norm_topk_prob" else int


def read_config(file: GgufFile, name: str, known: Architecture) -> dict[str, Any]:
    prefix = f"{name}."
    present = {key: field for key, field in known.optional.items() if prefix + key in file.metadata}
    config: dict[str, Any] = dict(known.fixed)
    for key, field in {**known.keys, **present}.items():
        config[field] = read_key(file, prefix + key, _kind_of(field), int(field != "first_k_dense_replace"))
    if (layers := config["num_hidden_layers"]) != (found := _count_layers(file)):
        raise build_error(file, f"key {prefix + 'block_count'!r}", f"{found}, the layers that have tensors", layers)
    for key, field in _TOKENS.items():
        config[field] = file.get(f"tokenizer.ggml.{key}")
    config |= {field: f"blk.0.{tensor}" in file.tensors for field, tensor in known.tensors.items()}
    config["rope_parameters"] = _read_rope(file, prefix, known)
    if known.read is not None:
        known.read(file, prefix, config)
    return config


def _count_layers(file: GgufFile) -> int:
    return len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})


def _read_rope(file: GgufFile, prefix: str, known: Architecture) -> dict[str, Any]:
    key = f"{prefix}rope.freq_base"
    rope = {"rope_type": "default", "rope_theta": float(read_key(file, key, float) if key in file.metadata else 1e4)}
    key = f"{prefix}rope.scaling.type"
    kind = read_key(file, key, str) if key in file.metadata else "none"
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise build_error(file, f"key {key!r}", "none, linear or yarn", repr(kind))
    rope |= {"rope_type": kind, "factor": float(read_key(file, f"{prefix}rope.scaling.factor", float))}
    if kind == "yarn":
        length = read_key(file, f"{prefix}rope.scaling.original_context_length", int)
        rope |= {**known.rope, "original_max_position_embeddings": length}
    return rope


# ---- configs into files ----------------------------------------------------------------------------------------------


def write_config(config: Any, name: str, known: Architecture, source: GgufFile | None) -> dict[str, Value]:
    carried = {**known.keys, **known.optional}
    for field, value in known.fixed.items():
        if field not in carried.values() and (got := getattr(config, field, value)) != value:
            raise ValueError(f"model.config.{field}: expected {value}, got {got}")
    metadata = {ARCHITECTURE: Value("string", name)} if source is None else dict(source.metadata)
    for key, field in carried.items():
        if (value := getattr(config, field, None)) is not None:
            _set(metadata, f"{name}.{key}", _value_of(_kind_of(field)(value)), source is None or key in known.keys)
    others = {key: values[0] for key, values in known.constants.items() if values[0] is not None}
    for key, value in {**others, **({} if known.write is None else known.write(config, source))}.items():
        _set(metadata, f"{name}.{key}", _value_of(value), source is None)
    rope = config.rope_parameters
    _set(metadata, f"{name}.rope.freq_base", Value("float32", rope["rope_theta"]), source is None)
    if source is None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            metadata.setdefault(f"{name}.{key}", Value("uint32", head_dim))
        _set(metadata, f"{name}.vocab_size", Value("uint32", config.vocab_size))
        _set(metadata, "tokenizer.ggml.model", Value("string", "none"))
        if (kind := rope.get("rope_type", "default")) != "default":
            if kind not in ("linear", "yarn") and not (kind == "llama3" and known.has_factors):
                raise ValueError(f"model.config.rope_parameters: expected default, linear or yarn, got {kind!r}")
            if kind != "llama3":  # a tensor has it
                _set(metadata, f"{name}.rope.scaling.type", Value("string", kind))
                _set(metadata, f"{name}.rope.scaling.factor", Value("float32", rope["factor"]))
            if kind == "yarn":
                length = Value("uint32", rope["original_max_position_embeddings"])
                _set(metadata, f"{name}.rope.scaling.original_context_length", length)
        for key, field in _TOKENS.items():
            if isinstance(token := getattr(config, field, None), int):
                _set(metadata, f"tokenizer.ggml.{key}", Value("uint32", token))
    return metadata


def _value_of(value: Any) -> Value:
    kinds = {float: "float32", bool: "bool", int: "uint32"}
    return Value(kinds[type(value)], value)


def _set(metadata: dict[str, Value], key: str, value: Value, is_added: bool = True) -> None:
    """Sets a value. One that is there keeps its type, and its bits if it is equal in float32."""
    if (old := metadata.get(key)) is None:
        if is_added:
            metadata[key] = value
    elif not isinstance(old.value, (int, float)) or struct.pack("<f", old.value) != struct.pack("<f", value.value):
        metadata[key] = value if not isinstance(old.value, (int, float)) else Value(old.type, value.value)
