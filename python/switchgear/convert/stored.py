# SPDX-License-Identifier: BSD-3-Clause
"""A checkpoint into a packed one, one projection at a time, for models that do not fit in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.convert.directory import (
    CONVERSION,
    Progress,
    count_bytes,
    list_beside_weights,
    write_index,
    write_shard,
)
from switchgear.convert.plans import Item
from switchgear.files import AnyPath, Unfinished
from switchgear.weights.exact import Plain
from switchgear.weights.form import Form, Layout, layout_of, linear_layout_of
from switchgear.weights.module import Kind, Projection, StoredProjections, Tie, in_layout, packed_keys
from switchgear.weights.store import PLAIN_LINEARS, LinearLayers, form_named
from switchgear.weights.weight import Weight


@dataclass(frozen=True)
class StoredCheckpoint:
    """The result of `store_checkpoint`."""

    path: Path
    experts: int  # modules of experts that are stored
    linears: int  # linear layers that are stored
    nbytes: int  # of all tensors

    def __str__(self) -> str:
        kinds = f"{self.experts} modules of experts, {self.linears} linear layers stored"
        return f"{self.path}: {kinds}, {self.nbytes / 1e6:,.1f} MB"


def store_checkpoint(
    source: AnyPath,
    target: AnyPath,
    form: str | Form | None,
    *,
    linears: str | Form | None = None,
    skip: Sequence[str] = PLAIN_LINEARS,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 10**9,
    progress: Progress | None = None,
    **options: Any,
) -> StoredCheckpoint:
    """Writes the packed checkpoint that `save_pretrained` would write of the model after `switchgear.store(model, form,
    linears=linears, skip=skip, **options)`. One projection and one file of the result are in memory at a time. The
    folder appears when it is complete.

    Args:
        source: a folder with config.json and safetensors files of a causal language model of transformers, plain or as
            `load_published` reads them.
        target: a folder that does not exist.
        form: of the experts; None: as published.
        linears, skip: of the linear layers, as in `store`; None: plain, or as published.
        dtype: of plain weights; None: that of the config.
        max_shard_size: bytes of a file; a larger projection has one of its own.
        progress: is called as progress(tensors done, all tensors, name).
        options: those of `form`.

    Raises:
        ValueError: `target` exists, the source cannot be read as a model, or a weight cannot be stored in its form.
        ConversionError: no room, or a file cannot be written. There is no target then.
    """
    from switchgear.integrations import packed  # imports transformers
    from switchgear.integrations.checkpoint_files import Reader
    from switchgear.integrations.published import planned

    source, target = Path(source), Path(target)
    if target.exists():
        raise ValueError(f"target: expected a folder that does not exist, got {target}")
    own = None if form is None else form_named(form, options)
    others = None if linears is None else form_named(linears, {})
    plan = planned(source, dtype, needs_experts=False, linears=True)
    wanted = _choose(plan.model, own, others, skip, plan.forms)
    if not any(module.form for module in wanted) and not plan.forms:
        raise ValueError("form: expected one for experts or linears, got None for both, and none of the checkpoint's")
    places = {f"{w.path}.{name}": (w, index) for w in wanted for index, name in enumerate(w.layout.names)}
    kinds: dict[str, Kind] = {}

    def make() -> Iterator[tuple[str, Tensor]]:
        reader = Reader(plan.files.headers)
        for done, (key, read) in enumerate(plan.reads.items(), 1):
            found = read(reader, torch.device("cpu"))
            if progress is not None:
                progress(done, len(plan.reads), key)
            if key not in places:
                yield key, found  # type: ignore[misc]
                continue
            module, index = places[key]
            made = _encode(key, found, module, index, plan.forms.get(key))
            if isinstance(made, Tensor):
                yield key, made
                continue
            kinds[key] = Kind.of(made)
            for field, name in packed_keys(key, kinds[key]):
                yield name, getattr(made, field)

    with Unfinished.opened(CONVERSION, target, None, resume=False) as unfinished:
        folder = unfinished.folder
        shards = _write_shards(folder, make(), max_shard_size)
        stored = dict(_describe(wanted, kinds, plan.forms))
        config = plan.model.config
        config.quantization_config = packed.config_of(stored.items())
        config.architectures = config.architectures or [type(plan.model).__name__]
        config.save_pretrained(folder)
        write_index(folder, shards)
        for name in list_beside_weights(source):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        unfinished.commit()
    num_linears = sum(one.layout.stored_class is not None for one in stored.values())
    nbytes = sum(count_bytes(item) for items in shards.values() for item in items)
    return StoredCheckpoint(target, len(stored) - num_linears, num_linears, nbytes)


class _Wanted(NamedTuple):
    """A module to store. form: None: as published."""

    path: str
    layout: Layout
    form: Form | None


def _choose(
    model: nn.Module, form: Form | None, linears: Form | None, skip: Sequence[str], published: Mapping[str, Form]
) -> list[_Wanted]:
    """The modules to store, and those that are published packed. Raises ValueError if a form has no modules."""
    experts = [
        _Wanted(path, layout, form)
        for path, module in model.named_modules()
        if (layout := layout_of(module)) is not None
    ]
    if form is not None and not experts:
        raise ValueError(f"form: expected None for {type(model).__name__}, which has no experts with a stored layout")
    layers = LinearLayers(tuple(skip))
    found = list(layers.find(model)) if linears is not None else []
    if linears is not None and not found:
        raise ValueError(f"linears: expected None for {type(model).__name__}; {layers.hint(model)}")
    for path, _ in found:
        if linears is not None and (obstacle := layers.obstacle(model, path, linears)) is not None:
            raise ValueError(f"{path}: expected a layer that can be stored as {linears}; {obstacle}")
    forms = {path: linears for path, _ in found}
    return experts + [
        _Wanted(path, layout, forms.get(path))
        for path, module in model.named_modules()
        if (layout := linear_layout_of(module)) is not None and (path in forms or f"{path}.weight" in published)
    ]


def _encode(key: str, found: Tensor | Weight, wanted: _Wanted, index: int, published: Form | None) -> Tensor | Weight:
    """A projection in the wanted form; the parameter if it is plain."""
    layout, form = wanted.layout, wanted.form
    if form is None or form == published:
        return found
    weight = layout.view(found) if isinstance(found, Tensor) else found.plain()
    if isinstance(form, Plain):
        return in_layout(weight, layout)
    made = form.encode(key, weight, layout.parts(index))
    if isinstance(made, str):
        raise ValueError(f"source: expected weights that can be stored as {form}; {made}")
    return made


def _describe(
    wanted: Sequence[_Wanted], kinds: Mapping[str, Kind], published: Mapping[str, Form]
) -> Iterator[tuple[str, StoredProjections]]:
    for path, layout, form in wanted:
        keys = [f"{path}.{name}" for name in layout.names]
        if keys[0] in kinds:
            projections = tuple(Projection(kinds[key], True, Tie()) for key in keys)
            yield path, StoredProjections(form or published[keys[0]], layout, projections)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], most: int) -> dict[str, list[Item]]:
    """Writes tensors into files as they come. Returns what each file has."""
    shards: list[list[Item]] = []
    waiting: list[Item] = []

    def write() -> None:
        write_shard(folder / str(len(shards)), waiting, lambda *_: None)
        shards.append([replace(item, make=_get_written) for item in waiting])
        waiting.clear()

    for key, tensor in tensors:
        if waiting and sum(map(count_bytes, waiting)) + tensor.nbytes > most:
            write()
        waiting.append(Item(key, tuple(tensor.shape), tensor.dtype, partial(Tensor.detach, tensor)))
    write()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(names) > 1 else ["model.safetensors"]
    for index, name in enumerate(names):
        (folder / str(index)).rename(folder / name)
    return dict(zip(names, shards, strict=True))


def _get_written() -> Tensor:
    raise AssertionError("a tensor that was written is not kept")
