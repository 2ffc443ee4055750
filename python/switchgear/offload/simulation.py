# SPDX-License-Identifier: BSD-3-Clause
"""The hits and misses of a cache of experts on a recorded run.

An expert's weights are one record, loaded when it is needed and absent. A step's experts of a layer run together:

- those that are resident are hits, whatever the order of the others;
- all of them stay until the layer has run, if the cache has so many slots;
- if it has fewer, they run in waves: first the resident ones, then the others through one slot more. Afterwards the
  cache keeps those that the policy would evict last.

Misses then depend on the policy alone, and Belady's are the fewest of any policy that loads on demand: a miss is saved
for each interval between two uses of an expert in which it stays, the experts that stay at a moment are bounded, and
dropping the interval that ends last keeps the most intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

from switchgear.offload.accesses import Accesses
from switchgear.offload.policies import POLICIES, Policy, check_policy
from switchgear.offload.residency import Residency

RecordBytes = int | Sequence[Sequence[int]]


@dataclass(frozen=True)
class LayerHits:
    """Uses of experts of one layer that a cache would have served (hits) and read (misses)."""

    name: str
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Of the uses of experts; 0 if there are none."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass(frozen=True)
class Simulation:
    """What a cache of `slots` experts does in a run.

    Attributes:
        policy: its name.
        shared: one cache for all layers, or one of slots / L for each.
        slots: of all layers.
        bytes: loaded: record_bytes for each miss; None without record_bytes.
        tokens_per_second: None without a bandwidth.
        layers: hits and misses of each.
    """

    policy: str
    shared: bool
    slots: int
    hits: int
    misses: int
    bytes: int | None
    tokens_per_second: float | None
    layers: tuple[LayerHits, ...]

    @property
    def hit_rate(self) -> float:
        """Of the uses of experts; 0 if there are none."""
        return self.hits / max(self.hits + self.misses, 1)


def simulate(
    accesses: Accesses,
    policy: Policy,
    *,
    slots: int | None = None,
    bytes: int | None = None,
    shared: bool = False,
    record_bytes: RecordBytes | None = None,
    bandwidth: float | None = None,
    compute_seconds: float = 0.0,
) -> Simulation:
    """Replays a run through an empty cache.

    Args:
        slots: experts per layer that the cache holds; if shared, L times as many for all layers together.
        bytes: of the whole cache, instead of slots; record_bytes says what an expert takes.
        shared: one cache for all layers instead of one for each.
        record_bytes: of an expert, or of each expert of each layer, such as [r.sizes for r in store.layers.values()]. A
            slot has room for the largest one of its cache.
        bandwidth: bytes per second at which experts are loaded.
        compute_seconds: of a step whose experts are resident. Loads add to it: nothing overlaps.
    """
    if not isinstance(accesses, Accesses):
        raise TypeError(f"accesses: expected Accesses, got {type(accesses).__name__}; Accesses.of makes them")
    check_policy(policy)
    for name, count in (("slots", slots), ("bytes", bytes)):
        if count is not None and not isinstance(count, int):
            raise TypeError(f"{name}: expected an integer, got {count!r}")
    if bandwidth is not None and not (bandwidth > 0 and isfinite(bandwidth)):
        raise ValueError(f"bandwidth: expected more than 0, got {bandwidth}")
    if not (compute_seconds >= 0 and isfinite(compute_seconds)):
        raise ValueError(f"compute_seconds: expected at least 0, got {compute_seconds}")
    if bandwidth is not None and record_bytes is None:
        raise ValueError("record_bytes: expected a number with a bandwidth, got None")
    sizes = None if record_bytes is None else _sizes(accesses, record_bytes)
    room = None if sizes is None else [max(own, default=0) for own in sizes]
    capacities = _capacities(len(accesses.layers), slots, bytes, shared, room)
    hits, misses, nbytes = _replay(accesses, policy, capacities, sizes)
    loaded = None if sizes is None else nbytes
    rate = None
    if bandwidth is not None and loaded is not None:
        seconds = loaded / bandwidth + compute_seconds * len(accesses.steps)
        rate = accesses.num_tokens / seconds if seconds else (inf if accesses.num_tokens else 0.0)
    layers = tuple(LayerHits(*layer) for layer in zip(accesses.layers, hits, misses, strict=True))
    return Simulation(policy.name, shared, sum(capacities), sum(hits), sum(misses), loaded, rate, layers)


def simulate_all(
    accesses: Accesses,
    policies: Sequence[Policy] = POLICIES,
    *,
    slots: int | None = None,
    bytes: int | None = None,
    shared: bool = False,
    record_bytes: RecordBytes | None = None,
    bandwidth: float | None = None,
    compute_seconds: float = 0.0,
) -> dict[str, Simulation]:
    """`simulate` for each policy, by its name. Add StaticFrequency.of(another run) to POLICIES to see a hot list."""
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise ValueError(f"policies: expected different names, got {', '.join(names)}")
    return {
        policy.name: simulate(
            accesses, policy, slots=slots, bytes=bytes, shared=shared, record_bytes=record_bytes, bandwidth=bandwidth,
            compute_seconds=compute_seconds,
        )
        for policy in policies
    }  # fmt: skip


def _sizes(accesses: Accesses, record_bytes: RecordBytes) -> Sequence[Sequence[int]]:
    """Of each expert of each layer."""
    if isinstance(record_bytes, int):
        record_bytes = [[record_bytes] * count for count in accesses.num_experts]
    elif not isinstance(record_bytes, Sequence) or isinstance(record_bytes, str):
        raise TypeError(f"record_bytes: expected an integer, or those of each layer, got {record_bytes!r}")
    got = [len(own) if isinstance(own, Sequence) else own for own in record_bytes]
    if len(got) != len(accesses.num_experts) or any(
        not isinstance(own, Sequence) or len(own) < count
        for own, count in zip(record_bytes, accesses.num_experts, strict=True)
    ):
        raise ValueError(f"record_bytes: expected {list(accesses.num_experts)} numbers by layer, got {got}")
    for size in (size for own in record_bytes for size in own):
        if not isinstance(size, int):
            raise TypeError(f"record_bytes: expected integers, got {size!r}")
        if size <= 0:
            raise ValueError(f"record_bytes: expected more than 0, got {size}")
    return record_bytes


def _capacities(
    num_layers: int, slots: int | None, size: int | None, shared: bool, room: Sequence[int] | None
) -> list[int]:
    """Slots of each cache: one for all layers, or one per layer. room: bytes of a slot of each layer."""
    if (slots is None) == (size is None):
        raise ValueError(f"slots: expected slots or bytes, got {'neither' if slots is None else 'both'}")
    if slots is not None:
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        each = slots * num_layers if shared else slots
    else:
        assert size is not None
        if room is None:
            raise ValueError("record_bytes: expected a number with bytes, got None")
        least = max(room, default=1) if shared else sum(room)
        each = size // max(least, 1)
        if each < 1:
            raise ValueError(f"bytes: expected at least {least}, a slot for {'one' if shared else 'each'}, got {size}")
    return [each] * min(num_layers, 1) if shared else [each] * num_layers


def _replay(
    accesses: Accesses, policy: Policy, capacities: Sequence[int], sizes: Sequence[Sequence[int]] | None
) -> tuple[list[int], list[int], int]:
    """Hits and misses by layer, and bytes of all misses."""
    num_layers = len(accesses.layers)
    width = max(accesses.num_experts, default=0)
    caches = [Residency(policy, capacity, num_layers, width) for capacity in capacities]
    future = _next_uses(accesses) if policy.looks_ahead else None
    hits, misses = [0] * num_layers, [0] * num_layers
    moment = nbytes = 0
    for step in accesses.steps:
        for layer, experts in enumerate(step):
            following = None if future is None else future[moment]
            turn = caches[layer % len(caches)].run(layer, experts, moment, following)
            hits[layer] += len(turn.hits)
            misses[layer] += len(turn.misses)
            if sizes is not None:
                nbytes += sum(sizes[layer][key - layer * width] for key in turn.misses)
            moment += 1
    return hits, misses, nbytes


def _next_uses(accesses: Accesses) -> list[list[float]]:
    """By moment, for each of its experts: the moment of its next use, inf for none."""
    num_layers = len(accesses.layers)
    following: list[dict[int, float]] = [{} for _ in range(num_layers)]
    result: list[list[float]] = []
    moment = len(accesses.steps) * num_layers
    for step in reversed(accesses.steps):
        for layer in reversed(range(num_layers)):
            moment -= 1
            known = following[layer]
            result.append([known.get(expert, inf) for expert in step[layer]])
            known.update(dict.fromkeys(step[layer], float(moment)))
    result.reverse()
    return result
