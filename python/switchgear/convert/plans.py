# SPDX-License-Identifier: BSD-3-Clause
"""Plans: each tensor of a converted model, with its shape and how to make it. The same plan fills a model in memory and
writes a checkpoint shard by shard, so that both have the same bits."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from switchgear.convert.families import PARTS, Family, Sizes, dense_key

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
        self.tensors = tensors

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def read(self, key: str) -> Tensor:
        return self.tensors[key].detach()


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


def derive_seed(seed: int, index: int) -> int:
    """The seed of one of several layers: seed + index, which goes on at the lowest one after the largest."""
    return (int(seed) + index + 2**63) % 2**64 - 2**63


def copy_item(source: Source, key: str) -> Item:
    return Item(key, source.shape(key), source.dtype(key), lambda: source.read(key))


def copy_with_noise(source: Source, dense: str, key: str, width: int, noise: float, seed: int) -> Item:
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


def copy_neurons(
    source: Source, dense: str, key: str, width: int, scale: float, find_neurons: Callable[[], Tensor]
) -> Item:
    """Neurons of a matrix, with neurons of zeros up to `width`; a down projection is multiplied by `scale`."""
    shape, dtype, is_down = source.shape(dense), source.dtype(dense), dense.endswith("down_proj.weight")
    hidden = shape[0 if is_down else 1]

    def make() -> Tensor:
        index, weight = find_neurons(), source.read(dense)
        rows = (weight.T if is_down else weight)[index.to(weight.device)]
        made = rows.new_zeros(width, hidden)
        made[: len(index)] = rows * scale if is_down else rows
        return made.T if is_down else made

    return Item(key, (hidden, width) if is_down else (width, hidden), dtype, make)


def list_items(
    source: Source, family: Family, size: Sizes, make_item: Callable[[int, int | None, str, str], Item], *,
    router_init: float, seed: int, router: Mapping[int, Tensor] | None = None,
    keep: Callable[[str], Item] | None = None,
) -> tuple[Item, ...]:  # fmt: skip
    """The tensors of a model whose dense networks in `source` become experts: the others, copied or as `keep` makes
    them; then of each layer the router (its rows of `router`, or random ones), and make_item(layer, expert, part, key)
    for each matrix. The expert None is the shared one, which has no neurons where the family, but not the size, has
    one."""
    replaced = {dense_key(layer, part) for layer in size.layers for part in PARTS}
    if missing := sorted(replaced - set(source.keys())):
        raise ValueError(f"model: expected {missing[0]} among its tensors, got none")
    kept = (key for key in source.keys() if key not in replaced)  # noqa: SIM118  (not a mapping)
    items = [copy_item(source, key) if keep is None else keep(key) for key in kept]
    for layer in size.layers:
        gate = dense_key(layer, "gate_proj")
        dtype, hidden = source.dtype(gate), source.shape(gate)[1]
        rows = None if router is None else router[layer].to(dtype)
        items.append(_make_router(family.router(layer), (size.num_experts, hidden), dtype, rows, router_init, seed))
        for expert in range(size.num_experts):
            items += [make_item(layer, expert, part, family.expert(layer, expert, part)) for part in PARTS]
        if family.has_shared:
            for part in PARTS:
                key, shape = family.shared(layer, part), (hidden, 0) if part == "down_proj" else (0, hidden)
                is_filled = size.shared_width > 0
                items.append(make_item(layer, None, part, key) if is_filled else _fill_zeros(key, shape, dtype))
            items.append(_fill_zeros(family.shared_gate(layer), (1, hidden), dtype))
    return tuple(items)


def _make_router(
    key: str, shape: tuple[int, int], dtype: torch.dtype, rows: Tensor | None, std: float, seed: int
) -> Item:
    return Item(key, shape, dtype, lambda: (draw_noise(seed, key, shape) * std).to(dtype) if rows is None else rows)


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
