# SPDX-License-Identifier: BSD-3-Clause
"""Models of transformers whose experts a store has: loaded without them, and saved with them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.convert.directory import ConversionError, divide_into_shards, write_index, write_shard
from switchgear.convert.plans import Item
from switchgear.files import AnyPath, is_gguf
from switchgear.offload.attachment import find_targets, read_all
from switchgear.offload.projections import InStore, OffloadedProjections
from switchgear.offload.store import Store
from switchgear.offload.store_records import StoreError
from switchgear.weights.form import Layout
from switchgear.weights.module import in_layout, stored_of
from switchgear.weights.weight import Weight

# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_model(
    checkpoint: AnyPath,
    store: Store | AnyPath,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Loads a causal language model of transformers on switchgear, in eval mode, except the experts that `store` has:
    they stay on the meta device until `offload` attaches a cache, so that they are never in memory as a whole.

        store = offload.write_store("olmoe/", "olmoe-experts/", "int4")
        model = offload.load_model("olmoe/", store)
        cache = offload.offload(model, store, bytes=8 << 30)

    Args:
        checkpoint: the folder that the store was written from, or a copy: config.json and safetensors files; or the
            GGUF file, whose other weights stay mapped.
        store: an open store, or its path.
        dtype: of the model; by default that of the store's weights.
        device: of what is loaded. The experts will run there. Of a GGUF file the CPU, which alone has kernels for it.

    Raises:
        ValueError: the checkpoint cannot be loaded, or its experts are not those of the store.
        StoreError: the store cannot be opened.
    """
    from switchgear.integrations.gguf import load_without_experts
    from switchgear.integrations.published import fill, planned

    opened = store if isinstance(store, Store) else Store.open(store)
    dtypes = {kind.dtype for records in opened.layers.values() for kind in records.kinds}
    if dtype is None and len(dtypes) == 1:
        dtype = next(iter(dtypes))
    if is_gguf(checkpoint):
        if torch.device(device).type != "cpu":
            raise ValueError(f"device: expected cpu for a GGUF file, got {device}")
        model, _ = load_without_experts(checkpoint, dtype or torch.float32)
        find_targets(model, opened)
        return model
    plan = planned(Path(checkpoint), dtype)
    _check(plan, opened)
    held = {f"{name}.{projection}" for name, layout, _ in plan.experts() for projection in layout.names}
    return fill(plan, torch.device(device), held)


def _check(plan: Any, store: Store) -> None:
    names = [name for name, _, _ in plan.experts()]
    if names != list(store.layers):
        wrong = next((name for name in (*names, *store.layers) if (name in names) != (name in store.layers)), "order")
        raise ValueError(f"store: expected the experts of {plan.files.path}, {store.path} differs in {wrong}")
    for name, _, sizes in plan.experts():
        records = store.layers[name]
        first, second = records.kinds
        got = (records.num_experts, first.rows, first.cols, second.rows, second.cols)
        if got != sizes:
            raise ValueError(f"store: expected experts of sizes {list(sizes)} in {name}, {store.path} has {list(got)}")


# ---- Saving ----------------------------------------------------------------------------------------------------------


_SUFFIX, _TIMEOUT = ".partial", 600.0


def save_pretrained(model: Any, path: AnyPath, *, max_shard_size: int = 5 * 10**9) -> None:
    """Writes the whole model for `from_pretrained`: config, what is in memory, and the experts from their store, as the
    plain weights that it represents. One layer is in memory at a time. The folder appears when it is complete.

        cache = offload.offload(model, store, bytes=8 << 30)
        …                                              # train what is not offloaded
        offload.save_pretrained(model, "changed/")

    Keys are those of the model in memory; `switchgear convert` writes a layout with keys of each expert.

    Args:
        model: of transformers, with experts that are offloaded, even if the cache is closed.
        path: a folder that does not exist.
        max_shard_size: bytes of a file; a larger tensor has one of its own.

    Raises:
        ValueError: the model is not offloaded, or `path` exists. StoreError: the store cannot be read, or a file
            written; there is no folder then.
    """
    target = Path(path)
    if not hasattr(model, "config") or not hasattr(model.config, "save_pretrained"):
        raise ValueError(f"model: expected one of transformers, got {type(model).__name__}")
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, int) or max_shard_size < 1:
        raise ValueError(f"max_shard_size: expected a number of bytes, got {max_shard_size!r}")
    if os.path.lexists(target):
        raise ValueError(f"path: expected a folder that does not exist, got {target}")
    layers = _find_offloaded(model)
    unfinished = target.with_name(target.name + _SUFFIX)
    if unfinished.exists():
        raise ValueError(f"path: expected no {unfinished}, which an earlier call may have left; remove it")
    try:
        unfinished.mkdir(parents=True)
        model.config.save_pretrained(unfinished)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(unfinished)
        with ExitStack() as stack:
            items = list(_items(model, layers, _Experts(stack)))
            shards = divide_into_shards(items, max_shard_size)
            for name, own in shards.items():
                write_shard(unfinished / name, own, lambda *_: None)
        write_index(unfinished, shards)
        unfinished.rename(target)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, ConversionError):
            raise error.__cause__ if isinstance(error.__cause__, StoreError) else StoreError(str(error)) from error
        raise


def _find_offloaded(model: nn.Module) -> dict[str, OffloadedProjections]:
    found = {}
    for name, module in model.named_modules():
        stored = stored_of(module)
        if isinstance(stored, OffloadedProjections) and not stored.is_in_memory:
            found[name] = stored
    if not found:
        raise ValueError("model: expected experts that are offloaded, got none; call model.save_pretrained")
    return found


def _items(model: nn.Module, layers: Mapping[str, OffloadedProjections], experts: _Experts) -> Iterator[Item]:
    """The entries of the state dict; tensors that share memory once, as from_pretrained ties them again. Stored linear
    layers are decoded."""
    seen: set[tuple[int, torch.Size]] = set()
    state = model.state_dict()
    for name, module in model.named_modules():
        if (stored := stored_of(module)) is not None and stored.is_in_memory and stored.form.suffixes:
            for own, weight in zip(stored.layout.names, stored.weights(module), strict=True):
                key = f"{name}.{own}"
                for suffix in stored.form.suffixes:
                    del state[f"{key}{suffix}"]
                shape = stored.layout.view_back(torch.empty(weight.shape, device="meta")).shape
                yield Item(key, tuple(shape), weight.dtype, partial(_decode, weight, stored.layout))
    for key, tensor in state.items():
        if isinstance(tensor, InStore):
            name, _, projection = key.rpartition(".")
            make = partial(experts.plain, name, layers[name], projection)
        else:
            place = tensor.data_ptr(), tensor.shape
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
            make = partial(torch.Tensor.detach, tensor)
        yield Item(key, tuple(tensor.shape), tensor.dtype, make)


def _decode(weight: Weight, layout: Layout) -> Tensor:
    return in_layout(weight.plain(), layout)


class _Experts:
    """Reads weights from stores, and keeps those of the last layer: both of its projections are read at once."""

    def __init__(self, stack: ExitStack) -> None:
        """stack: closes the readers."""
        self._stack = stack
        self._stores: dict[str, tuple[Store, Any]] = {}
        self._last: tuple[str, tuple[Weight, Weight]] | None = None

    def plain(self, name: str, stored: OffloadedProjections, projection: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # freed before others are read
            self._last = name, self._read(name, stored)
        return in_layout(self._last[1][stored.layout.names.index(projection)].plain(), stored.layout)

    def _read(self, name: str, stored: OffloadedProjections) -> tuple[Weight, Weight]:
        path = stored.form.path
        if path not in self._stores:
            opened = Store.open(path)
            self._stores[path] = opened, opened.open_reader()
            self._stack.callback(self._stores[path][1].close)
        store, reader = self._stores[path]
        records = store.layers.get(name)
        if records is None or records != stored.records:
            raise StoreError(f"{path}: expected the experts of {name} that were offloaded, got others")
        return read_all(reader, records, store.reads(records), _TIMEOUT)
