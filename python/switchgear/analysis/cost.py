# SPDX-License-Identifier: BSD-3-Clause
"""What a model costs: parameters, flops, bytes per decoded token, keys and values. Nothing is allocated."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.layers.virtual import VirtualExperts

_OTHERS = ("LinearAttention", "Lightning", "Delta", "Vision", "Cross")  # a state of constant size, or not the decoder's
_OUTSIDE = {"encoder", "cross_attention", "visual", "vision_tower", "audio_tower"}  # parts of names


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer that keeps keys and values.

    name: of the module.
    kept: numbers kept per token: keys and values, or the latent that both come from (DeepSeek's MLA).
    width: of the queries and of the weighted values, all heads, for a pair of tokens: 2·width flops.
    window: tokens that it sees at most; None for all.
    """

    name: str
    kept: int
    width: int
    window: int | None

    def seen(self, context: int) -> int:
        """Tokens that a token attends to, of `context`."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class Cost:
    """The cost of a model of L MoE layers. Numbers of parameters are counted, the rest follows from them.

    Attributes:
        parameters: all, tied ones once.
        embedding: those that are looked up, not multiplied: tables that are not also an output layer.
        experts: those of routed experts.
        active: those that a token uses: all but those of the experts that it does not choose. Where choices may be
            empty or virtual experts, the most that a token uses.
        moe_layers: (num_experts, top_k, parameters of all its routed experts) for each, and for JetMoE's attentions,
            which have experts, too. Virtual experts, which have no weights, do not count as experts.
        attention: the layers that keep keys and values; None if they are not known for this model.
    """

    parameters: int
    embedding: int
    experts: int
    active: int
    moe_layers: tuple[tuple[int, int, int], ...]
    attention: tuple[AttentionLayer, ...] | None

    def flops(self, context: int = 0) -> int:
        """Of a token's forward pass: 2 per parameter that it is multiplied with, and of attention to `context`
        tokens. A training step takes three times as many."""
        pairs = sum(2 * layer.width * layer.seen(context) for layer in self._attention()) if context else 0
        return 2 * (self.active - self.embedding) + pairs

    def weight_bytes(self, bits: float = 16, expert_bits: float | None = None) -> int:
        """All weights, those of routed experts with expert_bits each (as `bits` if None)."""
        expert_bits = bits if expert_bits is None else expert_bits
        return round(((self.parameters - self.experts) * bits + self.experts * expert_bits) / 8)

    def kv_bytes(self, context: int, bits: float = 16) -> int:
        """Keys and values of a sequence of `context` tokens; sliding windows keep no more than they see."""
        return round(sum(layer.kept * layer.seen(context) for layer in self._attention()) * bits / 8)

    def experts_read(self, batch: int = 1) -> float:
        """The expected fraction of the routed experts' parameters that a step of `batch` tokens reads, if tokens choose
        evenly and independently: 1 - (1 - K/E)^batch per layer."""
        read = sum(size * (1 - (1 - k / e) ** batch) for e, k, size in self.moe_layers)
        return read / max(self.experts, 1)

    def decode_bytes(
        self, context: int = 0, batch: int = 1, bits: float = 16, expert_bits: float | None = None, kv_bits: float = 16
    ) -> float:
        """Bytes read from memory per decoded token: the weights of a step of `batch` sequences, divided by them, and
        the keys and values of its own sequence. Divided by a bandwidth, the least time of a token."""
        expert_bits = bits if expert_bits is None else expert_bits
        dense = (self.parameters - self.experts - self.embedding) * bits
        weights = (dense + self.experts * self.experts_read(batch) * expert_bits) / 8
        return weights / batch + (self.kv_bytes(context, kv_bits) if context else 0)

    def _attention(self) -> tuple[AttentionLayer, ...]:
        if self.attention is None:
            raise ValueError("context: expected 0, since this model's attention is not known, got more")
        return self.attention

    def __str__(self) -> str:
        parts = [f"{_shorten(self.parameters)} parameters, {_shorten(self.active)} active"]
        parts += [f"{_shorten(self.experts)} in {len(self.moe_layers)} layers of routed experts"]
        if self.attention is not None:
            parts += [f"{self.kv_bytes(1) / 1024:.1f} KiB of keys and values per token"]
        return ", ".join([*parts, f"{_shorten(self.flops())} flops per token without attention"])


def cost(model: nn.Module | Any) -> Cost:
    """The cost of a model, or of the model that a config describes, which is built on the meta device.

        cost(AutoConfig.from_pretrained(path)).decode_bytes(context=4096, expert_bits=4.5)
        cost(json.load(open("config.json")))

    Args:
        model: an nn.Module on any device with plain weights (not stored, nor packed), ours or Hugging Face's; a Hugging
            Face config, or its dict. Vision and audio towers count too.

    Raises:
        ValueError: a dict without a known model_type, or a layer whose number of experts per token varies.
    """
    model = model if isinstance(model, nn.Module) else build_on_meta(model)
    blocks = list(moe_blocks(model).values())
    layers, routed = [], set()
    for block in blocks:
        real, num_experts = block.experts, block.num_experts
        if isinstance(real, VirtualExperts):  # only the others have weights
            num_experts, real = real.num_real, real.experts
        own = [p for p in _list_routed(block, real, num_experts) if id(p) not in routed]
        routed |= {id(parameter) for parameter in own}
        if block.top_k is None:
            raise ValueError(
                f"{block.name or 'model'}: expected a fixed number of experts per token, got one that varies"
            )
        layers.append((num_experts, min(block.top_k, num_experts), sum(parameter.numel() for parameter in own)))
    layers += _count_attention_experts(model)
    every = {id(parameter): parameter.numel() for parameter in model.parameters()}
    parameters, experts = sum(every.values()), sum(size for _, _, size in layers)
    active = parameters - experts + sum(round(size * k / e) for e, k, size in layers)
    attention = attention_layers(model)
    return Cost(parameters, _embedding(model), experts, active, tuple(layers), tuple(attention) or None)


def build_on_meta(config: Any) -> nn.Module:
    """The model of a Hugging Face config, or of its dict, without memory for its weights."""
    transformers = importlib.import_module("transformers")
    if isinstance(config, Mapping):
        fields = dict(config)
        kind = fields.pop("model_type", None)
        if kind not in transformers.CONFIG_MAPPING:
            raise ValueError(f"model_type: expected a type that transformers knows, got {kind}")
        config = transformers.AutoConfig.for_model(kind, **fields)
    for task in ("ForCausalLM", "ForImageTextToText", "ForSeq2SeqLM", "ForTokenClassification", ""):
        auto_class = getattr(transformers, f"AutoModel{task}")
        if type(config) in auto_class._model_mapping:
            with torch.device("meta"):
                built: nn.Module = auto_class.from_config(config)
            return built
    raise ValueError(f"model: expected a module or a Hugging Face config, got {type(config).__name__}")


def _list_routed(block: MoeBlock, experts: nn.Module, num_experts: int) -> Iterator[nn.Parameter]:
    """The parameters of which a token uses K of E: stacked ones, or those of a module per expert."""
    others = {id(p) for part in (block.gate, block.shared) if part is not None for p in part.parameters()}
    rows = experts.slices.num_experts if isinstance(experts, HeterogeneousExperts) else num_experts
    for name, parameter in experts.named_parameters():
        alone = any(part.removeprefix("expert_").isdigit() for part in name.split("."))
        stacked = parameter.dim() > 1 and parameter.shape[0] % rows == 0
        if id(parameter) not in others and (alone or stacked):
            yield parameter


def _count_attention_experts(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """moe_layers of JetMoE's attentions: experts of queries and outputs, behind a router of their own."""
    module: Any
    for module in model.modules():
        if type(module).__name__ == "JetMoeMoA":
            size = module.input_linear.weight.numel() + module.output_linear.weight.numel()
            yield module.num_experts, module.top_k, size


def _embedding(model: nn.Module) -> int:
    """Parameters of lookup tables that no other module multiplies with."""
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module._parameters.values()
    }
    return sum(size for key, size in tables.items() if key not in multiplied)


def _shorten(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention layers of a decoder, in order. Empty for a model whose attention has names not known here."""
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__.replace("KimiLinear", "Kimi")
        if not ("Attention" in kind or kind.endswith("MLA")) or any(part in kind for part in _OTHERS):
            continue
        if _OUTSIDE & set(name.split(".")):
            continue
        sizes = _find_sizes(module)
        if sizes is not None:
            window = _find_window(module)
            found.append(AttentionLayer(name, *sizes, window if isinstance(window, int) and window > 0 else None))
    return found


def _find_window(module: Any) -> Any:
    """As the cache of transformers takes it: from the kind of the layer, if the config lists kinds. A module may have a
    window that its layer does not use, and a config one that the module does not repeat."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else None
    sliding, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if kind is None:
        return getattr(module, "sliding_window", None) or sliding or chunk
    if kind in ("sliding_attention", "hybrid_sliding"):
        return getattr(module, "sliding_window", None) or sliding
    return chunk if kind == "chunked_attention" else None


def _find_sizes(module: Any) -> tuple[int, int] | None:
    """(kept, width), or None for a module that holds no projections of its own."""
    config = getattr(module, "config", None)
    heads = getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None)
    latent = _out(module, "kv_a_proj_with_mqa")
    if latent is not None and heads:
        rope, nope = (getattr(module, name, 0) for name in ("qk_rope_head_dim", "qk_nope_head_dim"))
        return latent, heads * (rope + nope + module.v_head_dim)
    head_dim = getattr(module, "head_dim", None)
    fused = _out(module, "Wqkv")
    if fused is not None and heads and head_dim:
        return fused - heads * head_dim, 2 * heads * head_dim
    query, key, value = (_out(module, name) for name in ("q_proj", "k_proj", "v_proj"))
    if query is not None and key is not None and heads and head_dim:
        value = key if value is None else value
        return key + value, 2 * heads * head_dim
    return None


def _out(module: Any, name: str) -> int | None:
    size = getattr(getattr(module, name, None), "out_features", None)
    return size if isinstance(size, int) else None
