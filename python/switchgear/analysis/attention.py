# SPDX-License-Identifier: BSD-3-Clause
"""What a model's attention keeps per token and multiplies per pair of tokens, read from its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_OTHERS = ("LinearAttention", "Lightning", "Delta", "Vision", "Cross")  # a state of constant size, or not the decoder's


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


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention layers of a decoder, in order. Empty for a model whose attention has names not known here."""
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__.replace("KimiLinear", "Kimi")
        if not ("Attention" in kind or kind.endswith("MLA")) or any(part in kind for part in _OTHERS):
            continue
        if _is_outside(name):
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


def _is_outside(name: str) -> bool:
    parts = name.split(".")
    return any(part in parts for part in ("encoder", "cross_attention", "visual", "vision_tower", "audio_tower"))


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
