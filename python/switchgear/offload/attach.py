# SPDX-License-Identifier: BSD-3-Clause
"""offload: runs a model whose experts are in a store and not in memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from switchgear.checks import Range, Seconds, Size, checked
from switchgear.files import AnyPath
from switchgear.layers.virtual import VirtualExperts
from switchgear.offload.attachment import Attachment, Read, Target, choose_device, end_read, find_targets, read_all
from switchgear.offload.cache import Cache, CachedLayer
from switchgear.offload.device import find_device
from switchgear.offload.policies import LRU, Policy
from switchgear.offload.pool import Pool, Staging, arena
from switchgear.offload.predictors import Predictor
from switchgear.offload.projections import OffloadedForm
from switchgear.offload.residency import CachePlan, LayerStatistics, Residency, Statistics, group_layers, plan_caches
from switchgear.offload.store import Store
from switchgear.offload.store_records import StoreError
from switchgear.weights.module import Tie, check_before_load, freeze_stored
from switchgear.weights.store import commit_all
from switchgear.weights.weight import OffloadedWeight, Weight


@checked
def offload(
    model: nn.Module,
    store: Store | AnyPath,
    *,
    slots: Size | None = None,
    bytes: int | None = None,
    policy: Policy | None = None,
    shared: bool = False,
    prefetch: Predictor | None = None,
    prefetch_slots: Size = 16,
    device: torch.device | str | None = None,
    staging_slots: Annotated[int, Range(2, 2**31 - 1)] = 8,
    threads: Size = 4,
    verify: bool = True,
    timeout: Seconds = 60.0,
) -> Offloaded:
    """Runs a model with its experts on disk: those in use are in a cache, in place of the parameters, which are freed.

        store = offload.write_store(model, "experts/", "int4")
        with offload.offload(model, store, bytes=8 << 30) as cache:
            model.generate(…)
            print(cache)  # hits, misses, bytes and waits, by layer

    Results have the bits of the model whose experts are in memory in the store's form; in float64, the last bits may
    differ. A step that needs more experts than there are slots runs in waves. If all experts fit, they are loaded at
    once, and calls cost nothing more.

    On a GPU, records are read into pinned memory and copied from there on a stream of their own, while kernels run.

    Gradients reach x, topk_weights, biases and adapters; backward reads the experts once more. Not supported:
    expert parallelism, and experts of Hugging Face models that do not run on the fused kernel; on a GPU, the forms
    "compact" and "panels", which have no kernels there, and gradients through plain experts.

    Args:
        model: has Experts, or experts of transformers that run on the fused kernel (`accelerate`), also on meta
            (`load_model`).
        store: of this model (`write_store`), or its path.
        slots: experts of each layer in memory. Beside them, the cache has some rows for the experts of large steps.
        bytes: of memory, for all of that, instead of slots.
        policy: which expert makes room; LRU() by default. `simulate` tells which one suits.
        shared: one cache for all layers whose records have one size, instead of one for each.
        prefetch: predicts experts, which are read while others compute, into prefetch_slots more rows of memory.
        device: where the experts run, that of x: "cpu" or a CUDA device. By default that of the experts' parameters, or
            of the other ones if those are on meta.
        staging_slots: records of pinned host memory, at least 2, through which they get to a GPU.
        threads: how many read.
        verify: compares each record with its checksum.
        timeout: seconds for a read, after which a call raises StoreError.

    Raises:
        ValueError: the store is of another model, or an argument is wrong. TypeError: one has another type.
            StoreError: a file cannot be read. The model is unchanged.
    """
    policy = LRU() if policy is None else policy
    if policy.looks_ahead:
        raise ValueError(
            f"policy: expected one that does not look ahead, got {policy.name}, which only simulate can run"
        )
    store = store if isinstance(store, Store) else Store.open(store)
    targets = find_targets(model, store)
    place = choose_device(model, targets, device)
    lanes = find_device(place)
    records = [target.records for target in targets]
    groups = group_layers([r.record_bytes for r in records], [r.num_experts for r in records])
    plans = plan_caches(groups, slots, bytes, shared, prefetch_slots if prefetch is not None else 0)
    reader = store.open_reader(threads)
    try:
        most = max(target.records.num_experts for target in targets)
        cache = Cache(reader, most, prefetch, timeout, lanes, _count_routed(model, targets))
        weakref.finalize(cache, _end, reader).atexit = False
        files = [store.reads(target.records, verify) for target in targets]
        weights: Sequence[tuple[Any, Any]]
        if all(plan.fits for plan in plans):
            pairs = zip(targets, files, strict=True)
            weights = [read_all(reader, target.records, file, timeout, place) for target, file in pairs]
        else:
            weights = _cached(cache, targets, files, plans, policy, staging_slots)
        attached = Offloaded(cache, _attach(store.path, targets, weights, files), plans, str(store.path))
        attached._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    except BaseException:
        reader.close()
        raise
    check_before_load(model)
    return attached


def _count_routed(model: nn.Module, targets: Sequence[Target]) -> list[int]:
    """How many experts the router of each target chooses from: virtual ones have no record."""
    virtual = [part for part in model.modules() if isinstance(part, VirtualExperts)]
    around = {inner: part.num_experts for part in virtual for inner in part.experts.modules()}  # wrapped or not
    return [around.get(target.module, target.records.num_experts) for target in targets]


def _end(reader: Any) -> None:
    """Of a cache that was not closed: no read outlives the memory that it fills."""
    with suppress(OSError):  # a forked child's
        reader.close()


class Offloaded:
    """A model whose experts are offloaded. Its str is a table of the statistics.

    Attributes:
        is_inert: whether all experts are in memory. Then nothing is counted.
        slots: experts that the cache holds, of all layers. nbytes: its memory, with the other rows.
    """

    def __init__(self, cache: Cache, attachments: Sequence[Attachment], plans: Sequence[CachePlan], path: str) -> None:
        self._cache, self._attachments, self._path = cache, list(attachments), path
        self._trained: list[nn.Parameter] = []  # the model's other ones, which show whether it is frozen meanwhile
        self.is_inert = not cache.layers
        self.slots = sum(sum(plan.capacities) for plan in plans)
        self.nbytes = sum(plan.nbytes for plan in plans)

    @property
    def statistics(self) -> Statistics:
        """The counts so far."""
        return Statistics(tuple(LayerStatistics(**vars(layer.counts)) for layer in self._cache.layers))

    @property
    def busy_seconds(self) -> float:
        """In which at least one thread was reading."""
        return float(self._cache.reader.statistics()[2])

    def __str__(self) -> str:
        if self.is_inert:
            return f"all experts of {self._path} are in memory"
        return str(self.statistics)

    def __enter__(self) -> Offloaded:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except StoreError:
            with suppress(StoreError):  # the error of the block is the one to see
                self.close(restore=False)

    @torch.inference_mode(False)  # the parameters may be trained
    def close(self, restore: bool | None = None) -> None:
        """Ends the cache and frees its memory. A second call does nothing.

        restore: whether the parameters return, read from the store: the original bits if its form is lossless, else
            what it represents. By default they do if the model had them (not on meta). Without them, a call of the
            experts raises an error. They are new objects: an optimizer that was made before trains others. They are
            frozen if they were before, or if all other parameters that were trained have been frozen meanwhile, as by
            model.requires_grad_(False) and by PEFT.

        Raises:
            StoreError: the store cannot be read, or the process is a fork of the cache's; the model stays offloaded.
        """
        if not self._cache.is_closed:
            self._cache.refuse_fork("cache")
        with self._cache.lock:
            if self._cache.is_closed:
                return
            loaded: list[tuple[Weight, Weight] | None] = []
            for attachment in self._attachments:
                wanted = attachment.had_weights if restore is None else restore
                reads = (self._cache.reader, attachment.target.records, attachment.reads, self._cache.timeout)
                loaded.append(read_all(*reads) if wanted else None)
            self._cache.is_closed = True
            if self._cache.device is not None:
                self._cache.device.synchronize()  # before its memory is freed
            ties: dict[Tie, nn.Parameter] = {}
            is_frozen = bool(self._trained) and not any(parameter.requires_grad for parameter in self._trained)
            for attachment, weights in zip(self._attachments, loaded, strict=True):
                if is_frozen:
                    freeze_stored(attachment.target.module)
                attachment.end(weights, ties)
            self._attachments.clear()
            self._trained.clear()
            self._cache.reader.close()


# ---- all modules -----------------------------------------------------------------------------------------------------


def _attach(
    path: Path, targets: Sequence[Target], weights: Sequence[tuple[Any, Any]], files: Sequence[Sequence[Read]]
) -> list[Attachment]:
    """Changes all modules or none."""
    ties: dict[int, Tie] = {}
    form = OffloadedForm(str(path.absolute()))
    attachments = [
        Attachment.of(target, form, own, file, ties) for target, own, file in zip(targets, weights, files, strict=True)
    ]
    commit_all(attachments)
    for attachment in attachments:
        attachment.forget()
    return attachments


@torch.inference_mode(False)
def _cached(
    cache: Cache,
    targets: Sequence[Target],
    files: Sequence[Sequence[Read]],
    plans: Sequence[CachePlan],
    policy: Policy,
    staging_slots: int,
) -> list[tuple[OffloadedWeight, OffloadedWeight]]:
    of_layer: dict[int, tuple[Pool, Residency]] = {}
    for plan in plans:
        pool = _pool(cache, plan, staging_slots)
        first = plan.group.layers[0]
        _warm(pool, files[first][0], targets[first].name, cache.timeout)
        shared = Residency(policy, plan.capacities[0], len(targets), cache.width)
        for place, layer in enumerate(plan.group.layers):
            own = shared
            if len(plan.capacities) == len(plan.group.layers):
                own = Residency(policy, plan.capacities[place], len(targets), cache.width)
            of_layer[layer] = pool, own
    weights = []
    for index, target in enumerate(targets):
        pool, residency = of_layer[index]
        slots = torch.zeros(target.records.num_experts, dtype=torch.int32, device="cpu")
        on_device = slots if cache.device is None else slots.to(pool.arena.device, copy=True)
        first_weight, second_weight = target.records.weights(pool.arena, on_device)
        placed: tuple[Weight, Weight] = (first_weight, second_weight)
        tables: list[tuple[Tensor, Tensor]] = []
        if cache.device is not None:
            placed, tables = _on_host(placed)
            tables.append((on_device.data, slots))  # autograd must not count our copies as changes
        placing = target.records.placing(placed)
        source = CachedLayer(cache, target.name, pool, residency, files[index], slots, placing, tables)
        weights.append((OffloadedWeight(first_weight, source), OffloadedWeight(second_weight, source)))
    return weights


def _pool(cache: Cache, plan: CachePlan, staging_slots: int) -> Pool:
    size = plan.rows, plan.group.record_bytes
    if cache.device is None:
        return Pool(cache.reader, arena(*size), plan.guess_rows)
    rows = cache.device.rows(*size)
    return Pool(Staging(cache.reader, cache.device, rows, staging_slots), rows, plan.guess_rows)


def _on_host(weights: tuple[Weight, Weight]) -> tuple[tuple[Weight, Weight], list[tuple[Tensor, Tensor]]]:
    """The same weights with host copies of what says where planes are, and pairs of these tables and the copies."""
    tables = []
    copies = []
    for weight in weights:
        if weight.records is not None:
            tables.append((weight.records.data, weight.records.to("cpu", copy=True)))
            weight = weight.with_tensors({"records": tables[-1][1]})
        copies.append(weight)
    return (copies[0], copies[1]), tables


def _warm(pool: Pool, read: Read, name: str, timeout: float) -> None:
    """Reads one record into the row to which all slots point at first: a store that cannot be read is an error now."""
    reader = pool.reader
    ticket = reader.submit(read, pool.address)
    try:
        reader.wait(ticket, timeout)
    except OSError as error:
        end_read(reader, ticket)
        raise StoreError(f"{name}, expert 0: {error}") from error
