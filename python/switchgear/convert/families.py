# SPDX-License-Identifier: BSD-3-Clause
"""Families of Hugging Face models: which MoE family expresses a dense one exactly, its config and its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from switchgear.convert.modules import choose_layers

PARTS = ("gate_proj", "up_proj", "down_proj")
DENSE = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # prefix of class names


@dataclass(frozen=True)
class Family:
    """A family of MoE models, as its checkpoints are published.

    block: the module of experts in a layer. names: of the projections gate, up, down of an expert. prefix: of classes.
    """

    model_type: str
    prefix: str
    block: str
    names: tuple[str, str, str]
    num_experts: str  # the config's name
    width: str
    has_shared: bool = False
    chooses_layers: bool = False

    def expert(self, layer: int, expert: int, part: str) -> str:
        return f"{self._block(layer)}experts.{expert}.{self.names[PARTS.index(part)]}.weight"

    def router(self, layer: int) -> str:
        return f"{self._block(layer)}gate.weight"

    def shared(self, layer: int, part: str) -> str:
        return f"{self._block(layer)}shared_expert.{part}.weight"

    def shared_gate(self, layer: int) -> str:
        return f"{self._block(layer)}shared_expert_gate.weight"

    def _block(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}."


FAMILIES = {
    family.model_type: family
    for family in (
        Family("mixtral", "Mixtral", "block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", "intermediate_size"),
        Family("qwen2_moe", "Qwen2Moe", "mlp", PARTS, "num_experts", "moe_intermediate_size", True, True),
        Family("qwen3_moe", "Qwen3Moe", "mlp", PARTS, "num_experts", "moe_intermediate_size", False, True),
    )
}


@dataclass(frozen=True)
class Sizes:
    """The experts of a converted model. width: of an expert. shared_width: 0 for none. layers: with experts."""

    num_experts: int
    top_k: int
    width: int
    layers: tuple[int, ...]
    shared_width: int = 0

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: expected 1 to {self.num_experts} (num_experts), got {self.top_k}")


def dense_key(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.{part}.weight"


def read_model_type(config: Mapping[str, Any]) -> str:
    """The model type. Raises ValueError for a quantized model, whose tensors are codes and scales."""
    if config.get("quantization_config"):
        raise ValueError("model: expected plain weights, got a quantization_config in its config")
    return str(config.get("model_type"))


def read_dense_type(config: Mapping[str, Any]) -> str:
    """The model type of a dense config that can be converted."""
    model_type = read_model_type(config)
    if model_type not in DENSE:
        raise ValueError(
            f"model: expected a dense model of type {', '.join(DENSE)}, got {model_type}; family='switchgear' replaces "
            "the layers of any model in place"
        )
    if config.get("mlp_bias"):
        raise ValueError("model: expected mlp_bias false, since no MoE family has biases in its experts, got true")
    return model_type


def choose_family(config: Mapping[str, Any], size: Sizes, wanted: str | None = None) -> Family:
    """The family that expresses the result exactly. Raises ValueError with the reason if there is none."""
    model_type, every = read_dense_type(config), len(size.layers) == config["num_hidden_layers"]
    if wanted is None:
        plain = "mixtral" if every and not size.shared_width else "qwen2_moe"
        wanted = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}.get(model_type, plain)
    if not isinstance(wanted, str) or wanted not in FAMILIES:
        raise ValueError(f"family: expected {', '.join(FAMILIES)}, got {wanted}")
    family = FAMILIES[wanted]

    reasons = {
        "it has no shared expert": size.shared_width and not family.has_shared,
        "all of its layers have experts": not every and not family.chooses_layers,
        "only qwen3 and qwen3_moe normalise queries and keys": (model_type == "qwen3") != (wanted == "qwen3_moe"),
        "its attention has no biases": model_type == "qwen2" and wanted == "mixtral",
        "its attention has no bias of the output projection": config.get("attention_bias") and wanted != "qwen3_moe",
        "its layers share one kind of attention":
            wanted in ("mixtral", "qwen3_moe") and len(set(config.get("layer_types") or ())) > 1,
    }  # fmt: skip
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ValueError(f"family: {wanted} cannot express this {model_type} model: {reason}")
    return family


def make_moe_config(config: Mapping[str, Any], family: Family, size: Sizes) -> dict[str, Any]:
    """The config.json of the result. `config` is the dense model's, with all of its fields."""
    source = str(config["model_type"])
    made = {key: value for key, value in config.items() if key not in ("mlp_bias", "pretraining_tp", "auto_map")}
    made["model_type"] = family.model_type
    made["architectures"] = [
        name.replace(DENSE[source], family.prefix, 1) for name in config.get("architectures") or []
    ] or [f"{family.prefix}ForCausalLM"]
    made[family.num_experts] = size.num_experts
    made["num_experts_per_tok"] = size.top_k
    made[family.width] = size.width
    made["output_router_logits"] = False
    if family.model_type != "mixtral":
        every = set(range(int(config["num_hidden_layers"])))
        made |= {
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": sorted(every - set(size.layers)),
        }  # fmt: skip
    if family.model_type == "qwen2_moe":
        made["shared_expert_intermediate_size"] = size.shared_width
        made["qkv_bias"] = source == "qwen2"
        if source in ("llama", "mistral"):
            window = config.get("sliding_window") if source == "mistral" else None
            made |= {"use_sliding_window": window is not None, "sliding_window": window}
            kind = "full_attention" if window is None else "sliding_attention"
            made["layer_types"] = [kind] * int(config["num_hidden_layers"])
    if family.model_type == "mixtral":
        made.pop("attention_bias", None)
    if family.model_type == "qwen3_moe":
        made["use_sliding_window"] = "sliding_attention" in set(config.get("layer_types") or ())
        made.pop("layer_types", None)
    return made


def layers_of(config: Mapping[str, Any], layers: str | Sequence[int]) -> tuple[int, ...]:
    return tuple(choose_layers(layers, int(config["num_hidden_layers"])))


def read_num_experts(config: Mapping[str, Any], family: Family) -> int:
    """Published configs of Qwen3-MoE say num_experts, transformers' newer ones num_local_experts; other types have
    names of their own."""
    for name in (family.num_experts, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ValueError(f"model: expected {family.num_experts} in its config, got none")


def make_dense_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The config of the dense family of an MoE one, and its layers with experts."""
    model_type = read_model_type(config)
    if model_type not in FAMILIES:
        raise ValueError(f"model: expected an MoE model of type {', '.join(FAMILIES)}, got {model_type}")
    family, count = FAMILIES[model_type], int(config["num_hidden_layers"])
    sparse = [layer for layer in range(count) if layer not in set(config.get("mlp_only_layers") or ())]
    sparse = [layer for layer in sparse if (layer + 1) % int(config.get("decoder_sparse_step") or 1) == 0]
    if len(sparse) < count and config[family.width] != config["intermediate_size"]:
        raise ValueError(
            f"model: expected experts as wide as its dense layers ({config['intermediate_size']}), since a dense "
            f"family has one width, got {config[family.width]}"
        )
    if family.has_shared:
        raise ValueError(
            f"model: expected no shared experts with gates, which no dense network contains, got {model_type}"
        )
    target = {"mixtral": "mistral", "qwen3_moe": "qwen3"}[model_type]
    dropped = {family.num_experts, "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
               "moe_intermediate_size", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
               "num_experts", "num_local_experts"}  # fmt: skip
    made = {key: value for key, value in config.items() if key not in dropped}
    names = config.get("architectures") or [f"{family.prefix}ForCausalLM"]
    made |= {
        "model_type": target, "intermediate_size": config[family.width],
        "architectures": [name.replace(family.prefix, DENSE[target], 1) for name in names],
    }  # fmt: skip
    if target == "qwen3":
        if made.get("head_dim") is None:  # Qwen3-MoE's default; Qwen3's is 128
            made["head_dim"] = int(config["hidden_size"]) // int(config["num_attention_heads"])
        made["max_window_layers"] = 0 if config.get("use_sliding_window") else count
    return made, sparse
