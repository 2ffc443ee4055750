# SPDX-License-Identifier: BSD-3-Clause
"""A cache of keys and values for models of transformers whose tokens are written in place.

transformers' DynamicCache copies all keys and values of a layer for each new token. A GrowingLayer has space for more
tokens than it holds, and doubles it if it is full, so a token is copied once or twice in all.

    model.generate(**inputs, past_key_values=GrowingCache(model.config))

It works with greedy decoding, sampling, beams, assisted decoding, batches and sliding windows, of which it keeps all
tokens. Layers that are no attention, such as those of Mamba, are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from switchgear.checks import Count, checked

__all__ = ["GrowingCache", "GrowingLayer", "adopt_layer", "begins"]

_STEP = 128  # positions: capacities are multiples


class GrowingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The keys [B,J,L,D] and values [B,J,L,V] of one layer, views of memory for more positions.

    Args:
        capacity: positions to allocate space for at first.
        is_sliding: whether the layer's attention has a window. All tokens are kept nevertheless.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, capacity: int = 0, is_sliding: bool = False) -> None:
        self.capacity, self.is_sliding = capacity, is_sliding
        self.length = 0
        self.memory: tuple[Tensor, Tensor] | None = None  # [B,J,C,D] and [B,J,C,V]
        self.expanded: GrowingLayer | None = None  # see `expand`
        self.call: Any = None  # a LayerCall; False if the layer has none

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.memory is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return None if self.memory is None else self.memory[0][:, :, : self.length]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self.memory is None else self.memory[1][:, :, : self.length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        capacity = max(self.capacity, key_states.shape[2], 1)
        self._allocate(key_states[:, :, :0], value_states[:, :, :0], capacity)

    def _allocate(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Moves keys and values of the tokens that stay into memory for `capacity` positions or some more."""
        capacity = -(-capacity // _STEP) * _STEP
        memory = tuple(t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in (keys, values))
        for new, old in zip(memory, (keys, values), strict=True):
            new[:, :, : old.shape[2]] = old
        self.memory, self.length = (memory[0], memory[1]), keys.shape[2]

    def extend(self, like: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """The parts [B,J,count,D] and [B,J,count,V] of memory for `count` more tokens, which the caller writes. like:
        tensors [B,J,·,D] and [B,J,·,V]; they define memory if there is none yet."""
        if self.memory is None:
            self.lazy_initialization(*like)
        begin = self.length
        keys, values = self.lengthen(count)
        return keys[:, :, begin : self.length], values[:, :, begin : self.length]

    def lengthen(self, count: int) -> tuple[Tensor, Tensor]:
        """Makes room in memory, which there is, for `count` more tokens, which the caller writes. Returns memory."""
        keys, values = self.memory  # type: ignore[misc]
        begin, end = self.length, self.length + count
        if end > keys.shape[2]:
            self._allocate(keys[:, :, :begin], values[:, :, :begin], max(end, 2 * keys.shape[2]))
        self.length = end
        return self.memory  # type: ignore[return-value]

    def expand(self, compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The memory of what `compute` makes of keys and values of tokens, which is kept for later calls."""
        if self.expanded is None:
            self.expanded = GrowingLayer(self.capacity)
        begin = self.expanded.length
        if begin < self.length:
            self.expanded.update(*compute(self.keys[:, :, begin:], self.values[:, :, begin:]))  # type: ignore[index]
        return self.expanded.memory  # type: ignore[return-value]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens, and returns the keys and values of all."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            if self.memory is None:
                self.lazy_initialization(key_states, value_states)
            old: Any = (self.keys, self.values)  # the graph needs them as they are
            keys, values = (torch.cat((a, b), 2) for a, b in zip(old, (key_states, value_states), strict=True))
            self.memory, self.length = (keys, values), keys.shape[2]
            return keys, values
        for part, new in zip(
            self.extend((key_states, value_states), key_states.shape[2]), (key_states, value_states), strict=True
        ):
            part.copy_(new)
        return self.keys, self.values  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._shorten(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens; a positive number is how many stay."""
        kept = self.length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self._shorten(max(kept, 0))

    def _shorten(self, length: int) -> None:
        self.length = min(length, self.length)
        if self.expanded is not None:
            self.expanded._shorten(length)

    def _select(self, select: Any) -> None:
        if self.memory is not None:
            keys, values = select(self.keys), select(self.values)
            self._allocate(keys, values, self.memory[0].shape[2])
        if self.expanded is not None:
            self.expanded._select(select)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda t: t[indices])

    def offload(self) -> None:
        raise NotImplementedError("a GrowingLayer stays where its first tokens were")

    prefetch = offload


class GrowingCache(Cache):
    """A cache of GrowingLayers.

    Args:
        config: of the model. Without it, all layers are attention.
        capacity: tokens to allocate space for at first; it grows by doubling.
    """

    @checked
    def __init__(self, config: Any = None, capacity: Count = 0) -> None:
        if config is None:
            super().__init__(layer_class_to_replicate=partial(GrowingLayer, capacity))  # type: ignore[arg-type]
            return
        layers = [_replace(layer, capacity) or layer for layer in DynamicCache(config=config).layers]
        super().__init__(layers=layers)


def _replace(layer: Any, capacity: int = 0) -> GrowingLayer | None:
    """A GrowingLayer with the tokens of one of transformers'; None if it has more than those."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return None
    is_sliding = type(layer) is DynamicSlidingWindowLayer
    new = GrowingLayer(capacity, is_sliding)
    if layer.is_initialized and layer.get_seq_length():
        if is_sliding:  # tokens before the window are gone
            return None
        new.update(layer.keys, layer.values)
    return new


def adopt_layer(cache: Any, index: int) -> GrowingLayer | None:
    """The GrowingLayer of a cache; a layer of a DynamicCache is replaced by one. None if another kind has to stay."""
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        return None
    found: GrowingLayer | None
    if index < len(layers) and type(found := layers[index]) is GrowingLayer:
        return found
    if type(cache) not in (DynamicCache, GrowingCache):
        return None
    while len(layers) <= index:
        if cache.layer_class_to_replicate is None:
            return None
        layers.append(cache.layer_class_to_replicate())
    if type(found := layers[index]) is not GrowingLayer and (found := _replace(layers[index])) is not None:
        layers[index] = found
    return found


def begins(cache: Any, index: int) -> bool:
    """Whether a cache of tokens has none of a layer yet."""
    is_known = type(cache) in (DynamicCache, GrowingCache) and not getattr(cache, "offloading", False)
    return is_known and cache.get_seq_length(index) == 0
