# SPDX-License-Identifier: BSD-3-Clause
"""Merging models of one architecture: average, TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) of task vectors."""

from __future__ import annotations

import copy
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from switchgear.checks import Finite, FiniteTensor, NotEmpty, Range, Seed, checked
from switchgear.convert.plans import Item, Source, StateDict
from switchgear.weights.module import check_state_dict

S = TypeVar("S")
_PART = 2**20  # elements that are merged at a time


Merge = Literal["average", "ties", "dare", "base"]
Density = Annotated[float, Range(0, 1, "low")]


@checked
@dataclass(frozen=True)
class Merging:
    """How tensors of the same name become one; see merge_models."""

    method: Merge = "average"
    weights: Sequence[Finite] | None = None
    density: Density = 0.2
    scale: Finite = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.weights is not None and not sum(self.weights) > 0:
            raise ValueError(f"weights: expected numbers with a positive sum, got {list(self.weights)}")

    def __call__(self, key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Merges tensors of the same name into a contiguous one. Each is trimmed, or dropped from, by itself.
        ValueError for NaN and infinities."""
        first = tensors[0] if base is None else base
        if not first.is_floating_point() or self.method == "base":
            return first
        if (index := next((i for i, tensor in enumerate(tensors) if not _is_finite(tensor)), None)) is not None:
            if all(torch.equal(tensor, first) for tensor in tensors):
                return first  # a mask with -inf; NaN equals nothing
            raise _not_finite(f"models[{index}]", key)
        if self.method != "average" and not _is_finite(first):  # the base
            raise _not_finite("base", key)
        return self._merged(key, [tensor.flatten() for tensor in tensors], first.flatten()).view(first.shape)

    def _merged(self, key: str, tensors: list[Tensor], base: Tensor) -> Tensor:
        """Merges flat tensors a part at a time: little memory is needed beside them and the result, but for "ties" the
        magnitudes of one task vector. The base of "average" gives only the dtype."""
        wide = torch.float64 if base.dtype is torch.float64 else torch.float32
        shares = self.weights or (1.0,) * len(tensors)
        weights = [share / sum(shares) for share in shares]
        cuts = [_find_cut(tensor, base, wide, self.density) for tensor in tensors] if self.method == "ties" else []
        seeds = [zlib.crc32(f"{self.seed} {index} {key}".encode()) for index in range(len(tensors))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        result = torch.empty_like(base)
        for start in range(0, len(base), _PART):
            part = slice(start, start + _PART)
            if self.method == "average":
                result[part] = _weighted_sum(weights, [tensor[part].to(wide) for tensor in tensors])
                continue
            origin = base[part].to(wide)
            deltas = [tensor[part].to(wide) - origin for tensor in tensors]
            if self.method == "dare":
                dropped = [self._dropped(delta, random) for delta, random in zip(deltas, generators, strict=True)]
                merged = _weighted_sum(weights, dropped)
            else:
                merged = _merge_ties(
                    [_trim(delta, *cut, start) for delta, cut in zip(deltas, cuts, strict=True)], shares
                )
            result[part] = origin + self.scale * merged
        return result

    def _dropped(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        """Each element is kept with probability `density`, and divided by it."""
        kept = torch.rand(delta.shape, generator=generator, dtype=torch.float32).to(delta.device) < self.density
        return torch.where(kept, delta / self.density, torch.zeros_like(delta))


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for weight, tensor in zip(weights, tensors, strict=True):
        total += weight * tensor
    return total


def _merge_ties(trimmed: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Elect the sign of the weighted sum, and average what agrees with it: Σ w δ / Σ w, or Σ w δ where these weights
    cancel."""
    elected = torch.where(_weighted_sum(shares, trimmed) >= 0, 1.0, -1.0)
    merged, total = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
    for share, delta in zip(shares, trimmed, strict=True):
        weighted = share * delta
        agrees = (weighted.sign() == elected).to(delta.dtype)
        merged += weighted * agrees
        total += share * agrees
    return merged / torch.where(total == 0, 1.0, total)


def _find_cut(tensor: Tensor, base: Tensor, wide: torch.dtype, density: float) -> tuple[int, int]:
    """(low, end): the density · n elements of largest |tensor - base|, at least one, ties to the lowest index, are
    the ones of magnitude above `low`, and before index `end` the ones equal to it.

    The bits of a magnitude are an integer in the same order, so both are found by halving: no sorted copy of a large
    tensor, and no indices.
    """
    count = max(int(density * len(base)), min(len(base), 1))
    if count >= len(base):
        return -1, 0
    magnitudes = torch.empty(len(base), dtype=wide, device=base.device)
    for start in range(0, len(base), _PART):
        part = slice(start, start + _PART)
        magnitudes[part] = (tensor[part].to(wide) - base[part].to(wide)).abs()
    bits = _view_bits(magnitudes)
    low, high = 0, int(bits.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int((bits >= middle).sum()) >= count else (low, middle - 1)
    if low == 0:  # what is 0 need not be kept
        return 0, 0
    ties = count - int((bits > low).sum())
    return low, bisect_left(range(len(bits)), ties, key=lambda end: int((bits[:end] == low).sum()))


def _trim(delta: Tensor, low: int, end: int, start: int) -> Tensor:
    """delta, whose first index is `start`, with zeros for what a `_cut` drops."""
    bits = _view_bits(delta.abs())
    kept = bits > low
    before = max(end - start, 0)
    kept[:before] |= bits[:before] == low
    return torch.where(kept, delta, torch.zeros_like(delta))


def _view_bits(magnitudes: Tensor) -> Tensor:
    return magnitudes.view(torch.int64 if magnitudes.dtype is torch.float64 else torch.int32)


def _is_finite(tensor: Tensor) -> bool:
    """The extremes show NaN and infinities without a mask as large as the tensor."""
    return tensor.is_meta or not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _not_finite(name: str, key: str) -> ValueError:
    return ValueError(f"{name}: expected finite numbers, got NaN or infinities in {key}")


@checked
def merge_models(
    models: Annotated[Sequence[nn.Module | Mapping[str, Tensor]], NotEmpty],
    method: Merge = "average",
    *,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    weights: Sequence[Finite] | FiniteTensor | None = None,
    density: Density = 0.2,
    scale: Finite = 1.0,
    seed: Seed = 0,
) -> Any:
    """One model from several of the same architecture.

    "average": Σ w θ. "ties": of each task vector θ - base the `density` largest elements of every tensor stay; the sign
    of their weighted sum is elected, and those that agree are averaged. "dare": each element of a task vector is
    dropped with probability 1 - density, and the rest divided by density; then the weighted sum. The result of both
    is base + scale · that. "base": the base's tensors, as mergekit-moe does outside of experts.

    Args:
        models: modules, or state dicts.
        base: the model they were trained from; ties and dare need it.
        weights: one per model, divided by their sum; equal by default.
        density: the share of a task vector that stays; 0.2 in TIES, 0.1 and less in DARE.
        scale: λ.
        seed: of the dropping.

    Returns a copy of the first module with the merged tensors, or a state dict. Integer tensors come from the base,
    or from the first model. Tensors that the first model ties are merged once.

    Raises:
        TypeError, ValueError: an option out of range, models whose tensors differ in name or shape, or where the first
            model ties them, NaN or infinities, float8 tensors, stored experts, or adapters.
    """
    shares = None if weights is None else [float(share) for share in weights]
    states = [StateDict(read_state(f"models[{index}]", model)) for index, model in enumerate(models)]
    origin = None if base is None else StateDict(read_state("base", base))
    make = prepare_merge(states, origin, Merging(method, shares, density, scale, seed))
    first = states[0].tensors
    tied = _find_tied(first)
    for name, state in _name_sources(states, origin):
        for key, twin in tied.items():
            one, other = state.read(key), state.read(twin)
            if _locate(one) != _locate(other) and not torch.equal(one, other):
                raise ValueError(f"{name}: expected {key} equal to {twin}, which the first model ties, got another")
    merged = {key: make(key).make() for key in first if key not in tied}
    merged = {key: merged[tied.get(key, key)] for key in first}
    if isinstance(models[0], Mapping):
        return merged
    made = copy.deepcopy(models[0])
    made.load_state_dict(merged)
    return made


def prepare_merge(sources: Sequence[Source], base: Source | None, merging: Merging) -> Callable[[str], Item]:
    """Makes the item of a key of all models. Raises ValueError if their tensors differ in name or shape, and for
    options that do not fit them; TypeError for float8, whose scales are other tensors: sums of both are no sums of
    weights."""
    if merging.weights is not None and len(merging.weights) != len(sources):
        raise ValueError(f"weights: expected {len(sources)}, one per model, got {len(merging.weights)}")
    if merging.method != "average" and base is None:
        raise ValueError(f"base: expected the model from which all were trained for {merging.method}, got None")
    wanted = {key: sources[0].shape(key) for key in sources[0].keys()}  # noqa: SIM118  (not a mapping)
    for name, source in _name_sources(sources, base):
        if different := sorted(set(source.keys()) ^ set(wanted)):
            raise ValueError(f"{name}: expected the tensors of the first model, got a difference in {different[0]}")
        for key, shape in wanted.items():
            if (found := source.shape(key)) != shape:
                raise ValueError(f"{name}: expected {key} of shape {list(shape)}, got {list(found)}")
            if (dtype := source.dtype(key)).is_floating_point and dtype.itemsize == 1:
                raise TypeError(f"{name}: expected plain weights, got {key} in {dtype}")

    def item(key: str) -> Item:
        like = sources[0] if base is None else base

        def make() -> Tensor:
            return merging(key, [source.read(key) for source in sources], None if base is None else base.read(key))

        return Item(key, like.shape(key), like.dtype(key), make)

    return item


def _name_sources(sources: Sequence[S], base: S | None) -> Iterator[tuple[str, S]]:
    yield from ((f"models[{index}]", source) for index, source in enumerate(sources))
    if base is not None:
        yield "base", base


def read_state(name: str, model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict. Raises ValueError for a model that computes with other tensors."""
    if isinstance(model, Mapping):
        return model
    check_state_dict(name, model)
    return model.state_dict()


def _find_tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that have an earlier name too, with that."""
    seen: dict[Any, str] = {}
    names = {key: seen.setdefault(_locate(v), key) for key, v in state.items() if v.numel() and not v.is_meta}
    return {key: first for key, first in names.items() if key != first}


def _locate(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
