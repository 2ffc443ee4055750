# SPDX-License-Identifier: BSD-3-Clause
"""Plans: each tensor of a converted model, with its shape and how to make it. The same plan fills a model in memory and
writes a checkpoint shard by shard, so that both have the same bits."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from switchgear.convert.checks import derive_seed
from switchgear.convert.families import PARTS, Family, Sizes, dense_key
from switchgear.convert.partitions import Method, Partition, partition
from switchgear.integrations.blocks import FeedForward

T = TypeVar("T")


class Source(Protocol):
    """The tensors of a model by their names in its checkpoint."""

    def keys(self) -> Iterable[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> torch.dtype: ...
    def read(self, key: str) -> Tensor: ...


class StateDict:
    """A Source of tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach()


@dataclass(frozen=True)
class Item:
    """A tensor of the result."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class ConversionPlan:
    """A whole conversion: the new config, the tensors, and what is done to each layer with experts."""

    config: dict[str, Any]
    items: tuple[Item, ...]
    layers: tuple[tuple[str, str, int, str], ...] = ()
    notes: tuple[str, ...] = ()


def draw_noise(seed: int, key: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that depend on the seed and the tensor's name alone, so that a sharded conversion draws
    the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))  # 32 bits count
    return torch.randn(tuple(shape), generator=generator)


def draw_router(family: Family, layer: int, rows: int, hidden: int, std: float, seed: int, dtype: torch.dtype) -> Item:
    key = family.router(layer)
    return Item(key, (rows, hidden), dtype, lambda: (draw_noise(seed, key, (rows, hidden)) * std).to(dtype))


def copy_item(source: Source, key: str) -> Item:
    return Item(key, source.shape(key), source.dtype(key), lambda: source.read(key))


def list_kept_keys(source: Source, layers: Sequence[int]) -> list[str]:
    """The keys that stay as they are."""
    replaced = {dense_key(layer, part) for layer in layers for part in PARTS}
    if missing := sorted(replaced - set(source.keys())):
        raise ValueError(f"model: expected {missing[0]} among its tensors, got none")
    return [key for key in source.keys() if key not in replaced]  # noqa: SIM118  (not a mapping)


def copy_networks(
    source: Source, family: Family, size: Sizes, *, router_init: float, noise: float, seed: int
) -> list[Item]:
    """Each expert is a copy of the dense network, plus noise."""
    items = [copy_item(source, key) for key in list_kept_keys(source, size.layers)]
    for layer in size.layers:
        dtype, hidden = source.dtype(dense_key(layer, "gate_proj")), source.shape(dense_key(layer, "gate_proj"))[1]
        items.append(draw_router(family, layer, size.num_experts, hidden, router_init, seed, dtype))
        for expert in range(size.num_experts):
            for part in PARTS:
                key = family.expert(layer, expert, part)
                items.append(_copy_with_noise(source, dense_key(layer, part), key, size.width, noise, seed))
        items += leave_out_shared(family, layer, hidden, dtype)
    return items


def _copy_with_noise(source: Source, dense: str, key: str, width: int, noise: float, seed: int) -> Item:
    """A matrix plus noise, with neurons of zeros up to `width`."""
    shape, dtype, dim = source.shape(dense), source.dtype(dense), int(dense.endswith("down_proj.weight"))
    more = width - shape[dim]

    def make() -> Tensor:
        weight = source.read(dense)
        if noise:
            wide = weight.to(torch.promote_types(dtype, torch.float32))
            weight = (wide + noise * draw_noise(seed, key, shape).to(wide)).to(dtype)
        return F.pad(weight, (0, more) if dim else (0, 0, 0, more)) if more else weight

    return Item(key, (shape[0], width) if dim else (width, shape[1]), dtype, make)


def leave_out_shared(family: Family, layer: int, hidden: int, dtype: torch.dtype) -> list[Item]:
    """A shared expert without neurons, where the family's layers have one."""
    if not family.has_shared:
        return []
    shapes = {part: (hidden, 0) if part == "down_proj" else (0, hidden) for part in PARTS}
    items = [_fill_zeros(family.shared(layer, part), shape, dtype) for part, shape in shapes.items()]
    return [*items, _fill_zeros(family.shared_gate(layer), (1, hidden), dtype)]


def _fill_zeros(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Item:
    return Item(key, shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


class LayerCache(Generic[T]):
    """Computes a layer's value when it is first needed, and keeps it until another layer's is: the items of a plan go
    layer by layer, so one value is in memory."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._kept: dict[int, T] = {}

    def __call__(self, layer: int) -> T:
        if layer not in self._kept:
            self._kept.clear()  # one value at a time
            self._kept[layer] = self._make(layer)
        return self._kept[layer]


# ---- splits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """How each layer of a model is split; see split_dense."""

    num_experts: int
    method: Method = "random"
    shared: int | float = 0
    importance: Mapping[int, Tensor] | None = None
    keep: float = 0.5
    seed: int = 0

    def widths(self, source: Source, layer: int) -> tuple[int, int]:
        """The widths of an expert and of the shared one. Domain masks need their importance, the others sizes alone."""
        parts = self.partition(source, layer, shapes_only=True)
        return max(parts.widths), len(parts.shared)

    def partition(self, source: Source, layer: int, shapes_only: bool = False) -> Partition:
        gate = dense_key(layer, "gate_proj")
        importance = None if self.importance is None else self.importance.get(layer)
        if self.importance is not None and importance is None:
            raise ValueError(f"importance: expected one of layer {layer}, got none")
        method = "contiguous" if shapes_only and self.method == "cluster" else self.method
        weight = source.read(gate) if method == "cluster" else torch.empty(source.shape(gate), device="meta")
        dense = FeedForward(weight, weight, weight.T)
        return partition(
            dense, self.num_experts, method, shared=self.shared, importance=importance, keep=self.keep,
            seed=derive_seed(self.seed, layer),
        )  # fmt: skip


def split_networks(
    source: Source, family: Family, size: Sizes, how: Split, *, scale: float, router_init: float
) -> list[Item]:
    """Each expert has its neurons, padded with zeros to the common width; down projections are multiplied by `scale`,
    since the family's weights sum to 1. The shared expert's are doubled, since its gate starts at sigmoid(0) = 1/2."""
    items = [copy_item(source, key) for key in list_kept_keys(source, size.layers)]
    parts = LayerCache(partial(how.partition, source))
    for layer in size.layers:
        dtype, hidden = source.dtype(dense_key(layer, "gate_proj")), source.shape(dense_key(layer, "gate_proj"))[1]
        items.append(draw_router(family, layer, size.num_experts, hidden, router_init, how.seed, dtype))
        for expert in range(size.num_experts):
            for part in PARTS:
                key = family.expert(layer, expert, part)
                items.append(_copy_neurons(source, layer, part, key, size.width, scale, parts, expert))
        if size.shared_width:
            for part in PARTS:
                key = family.shared(layer, part)
                items.append(_copy_neurons(source, layer, part, key, size.shared_width, 2.0, parts, None))
            items.append(_fill_zeros(family.shared_gate(layer), (1, hidden), dtype))
        else:
            items += leave_out_shared(family, layer, hidden, dtype)
    return items


def _copy_neurons(
    source: Source,
    layer: int,
    part: str,
    key: str,
    width: int,
    scale: float,
    parts: LayerCache[Partition],
    expert: int | None,
) -> Item:
    dense = dense_key(layer, part)
    is_down, dtype = part == "down_proj", source.dtype(dense_key(layer, part))
    hidden = source.shape(dense)[0 if is_down else 1]

    def make() -> Tensor:
        index = parts(layer).shared if expert is None else parts(layer).experts[expert]
        weight = source.read(dense)
        rows = (weight.T if is_down else weight)[index.to(weight.device)]
        made = rows.new_zeros(width, hidden)
        made[: len(index)] = rows * scale if is_down else rows
        return made.T if is_down else made

    return Item(key, (hidden, width) if is_down else (width, hidden), dtype, make)


# ---- experts of several dense models ---------------------------------------------------------------------------------


def collect_networks(
    base: Source, experts: Sequence[Source], family: Family, size: Sizes, *, router: Mapping[int, Tensor] | None,
    router_init: float, seed: int, merge: Callable[[str], Item], noise: float = 0.0,
) -> list[Item]:  # fmt: skip
    """Expert e of each layer is the feed-forward network of model e; other tensors are merge(key)."""
    items = [merge(key) for key in list_kept_keys(base, size.layers)]
    for layer in size.layers:
        gate = dense_key(layer, "gate_proj")
        dtype, hidden = base.dtype(gate), base.shape(gate)[1]
        if router is None:
            items.append(draw_router(family, layer, size.num_experts, hidden, router_init, seed, dtype))
        else:
            rows = router[layer].to(dtype)
            items.append(Item(family.router(layer), tuple(rows.shape), dtype, lambda rows=rows: rows))  # type: ignore[misc]
        for expert, source in enumerate(experts):
            for part in PARTS:
                key = family.expert(layer, expert, part)
                items.append(_copy_with_noise(source, dense_key(layer, part), key, size.width, noise, seed))
        items += leave_out_shared(family, layer, hidden, dtype)
    return items
