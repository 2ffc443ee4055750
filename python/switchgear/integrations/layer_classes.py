# SPDX-License-Identifier: BSD-3-Clause
"""What a decoder layer of transformers consists of, and the forms that such a layer may have.

A layer is described by its parts, whatever its class. Its form, as how heads turn, is the one whose results are those
of the class's own forward (layer_trials.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from switchgear.integrations.forwards import PartClass


class Rotation(NamedTuple):
    """How rotary embeddings turn a head: which elements are pairs, and where cos and sin have the angle of a pair.

    Pairs are elements i and i + R, or 2·i and 2·i + 1; "split" also puts the first elements of all pairs before the
    second ones. cos has an angle once, or twice: in two halves, or side by side.
    """

    pairs: Literal["none", "halves", "interleaved", "split"]
    angles: Literal["once", "halves", "side by side"] = "halves"

    def select(self, angles: Tensor) -> Tensor:
        """The angle of each pair, of cos or sin."""
        if self.angles == "halves":
            return angles[..., : angles.shape[-1] // 2]
        return angles if self.angles == "once" else angles[..., ::2]

    def count(self, cos: Tensor) -> int:
        """The number of pairs."""
        return cos.shape[-1] if self.angles == "once" else cos.shape[-1] // 2


ROTATIONS = (
    Rotation("halves"),
    Rotation("halves", "once"),
    Rotation("interleaved"),
    Rotation("interleaved", "side by side"),
    Rotation("interleaved", "once"),
    Rotation("split"),
    Rotation("none"),
)


class LayerClass(NamedTuple):
    """A decoder layer and its parts: norm, attention, residual, norm, blocks, residual."""

    layer: PartClass
    attention: PartClass
    norm: PartClass
    blocks: tuple[str, ...]  # the parts after the second norm, whose outputs are added
    head_norms: tuple[str, ...]  # those of queries and keys, or none
    is_latent: bool  # keys and values are expanded from a vector per token, which the cache has
    is_centred: bool  # the norm is torch's LayerNorm; else it divides by the root mean square
    rotation: Rotation = ROTATIONS[0]
    turns_first: bool = False  # heads turn before they are normalised

    @property
    def is_plain(self) -> bool:
        """Whether the layer has the usual order: norms of the root mean square, heads normalised, then turned."""
        return self.rotation.pairs == "halves" and not (self.is_latent or self.is_centred or self.turns_first)

    def list_forms(self) -> Iterator[LayerClass]:
        """The forms that a layer with these parts may have."""
        for turns_first in (False, True)[: 1 + bool(self.head_norms)]:
            for rotation in ROTATIONS:
                yield self._replace(rotation=rotation, turns_first=turns_first)


_NORMS = "input_layernorm", "post_attention_layernorm"
_PLAIN = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LATENT = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
_QUERIES = {"q_proj"}, {"q_a_proj", "q_a_layernorm", "q_b_proj"}


def find_layer_class(layer: nn.Module) -> LayerClass | None:
    """The parts of a decoder layer; None if it has others than those above, or is no class of transformers."""
    parts = _list_parts(layer)
    attention, norm = parts.pop("self_attn", None), parts.get(_NORMS[0])
    if attention is None or norm is None or _NORMS[1] not in parts:
        return None
    blocks = tuple(name for name in parts if name not in _NORMS)
    of_layer, of_attention, of_norm = (find_class(part) for part in (layer, attention, norm))
    is_centred = isinstance(norm, nn.LayerNorm)
    if of_layer is None or of_attention is None or of_norm is None or len(blocks) not in (1, 2):
        return None
    if not is_centred and not hasattr(norm, "variance_epsilon"):
        return None
    names = _list_parts(attention)
    head_norms: tuple[str, ...] = ()
    is_latent = any(names.keys() == _LATENT | queries for queries in _QUERIES)
    if not is_latent:
        head_norms = tuple(name for name in names if name not in _PLAIN)
        if not names.keys() >= _PLAIN or len(head_norms) not in (0, 2):
            return None
        if any(find_class(names[name]) != of_norm for name in head_norms):
            return None
    return LayerClass(of_layer, of_attention, of_norm, blocks, head_norms, is_latent, is_centred)


def _list_parts(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in module._modules.items() if part is not None}


def find_class(module: nn.Module) -> PartClass | None:
    """The class of transformers or torch whose forward a module has."""
    for cls in type(module).__mro__:
        if cls is nn.LayerNorm or cls.__module__.startswith("transformers.models."):
            found = PartClass(cls.__module__, cls.__name__)
            return found if found.matches(type(module)) else None
    return None
