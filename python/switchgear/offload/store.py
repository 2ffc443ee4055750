# SPDX-License-Identifier: BSD-3-Clause
"""A store: the experts of a model in a folder, one record each, to be read when they are needed (docs/offload.md).

write_store writes one from a model or a checkpoint, Store.open opens it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from switchgear import _C
from switchgear.files import AnyPath, Kind, Unfinished, bytes_of, is_gguf, replacing, write_whole
from switchgear.offload import store_index, store_sources
from switchgear.offload.store_records import PAGE, Records, StoreError, StoreFull, fill, lay_out_records
from switchgear.weights.form import Form
from switchgear.weights.store import form_named
from switchgear.weights.weight import Weight

Progress = Callable[[int, int, str], None]
STORE = Kind("store", "path", "layers", "form, dtype or model", StoreError, StoreFull)
_TIMEOUT = 600.0  # seconds for one record, in `verify`


@dataclass(frozen=True)
class Store:
    """A store that was checked: its index, and the sizes of its files.

    Attributes:
        path: the folder.
        form: in which experts are stored.
        config_hash: equal for models whose experts have the same names, numbers and sizes.
        layers: the records of each experts module, by its name in model.named_modules().
    """

    path: Path
    form: str
    config_hash: str
    layers: Mapping[str, Records] = field(repr=False)

    def __str__(self) -> str:
        records = self.layers.values()
        experts, count = sum(one.num_experts for one in records), len(records)
        largest = max(one.record_bytes for one in records)
        form = self.form if self.form == store_sources.AS_PUBLISHED else f"as {self.form}"
        return (
            f"{self.path}: {experts} experts of {count} layer{'s' * (count != 1)} {form}, "
            f"{self.nbytes / 1e6:,.1f} MB, at most {largest / 1e6:,.2f} MB each"
        )

    @staticmethod
    def open(path: AnyPath) -> Store:
        """Opens a store. Raises StoreError, which names the file, if one is missing, truncated or does not fit the
        others. Records are checked when they are read."""
        folder = Path(path)
        index = store_index.read(folder)
        return Store(folder, index.form, index.config_hash, index.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(records.nbytes for records in self.layers.values())

    def open_reader(self, threads: int = 4, direct: bool = True) -> _C.Reader:
        """A reader of the files, in the order of `layers`. Raises StoreError."""
        files = [os.fsencode(self.path / records.file) for records in self.layers.values()]
        try:
            return _C.Reader(files, threads, direct)
        except _C.ReadError as error:
            raise StoreError(str(error)) from error

    def reads(self, records: Records, is_checked: bool = True) -> list[tuple[int, int, int, int | None]]:
        """For each expert of a layer: file, offset, bytes and checksum for `submit` of the reader."""
        file = list(self.layers).index(records.name)
        checksums = records.checksums if is_checked else (None,) * records.num_experts
        return [(file, *read) for read in zip(records.offsets, records.sizes, checksums, strict=True)]

    def verify(self, progress: Progress = lambda done, total, name: None) -> None:
        """Reads all records and compares their checksums. Raises StoreError, which names layer and expert."""
        reader = self.open_reader()
        try:
            for number, records in enumerate(self.layers.values()):
                _verify(reader, records, self.reads(records))
                progress(number + 1, len(self.layers), records.name)
        finally:
            reader.close()


def _verify(reader: _C.Reader, records: Records, reads: list[tuple[int, int, int, int | None]]) -> None:
    memory = torch.empty(2 * records.record_bytes + PAGE, dtype=torch.uint8)  # one is read while another is awaited
    begin = memory.data_ptr() + -memory.data_ptr() % PAGE
    tickets: list[int] = []

    def wait(expert: int) -> None:
        try:
            reader.wait(tickets[expert], _TIMEOUT)
        except OSError as error:
            raise StoreError(f"{records.name}, expert {expert}: {error}") from error

    try:
        for expert, read in enumerate(reads):
            if expert >= 2:
                wait(expert - 2)
            tickets.append(reader.submit(read, begin + expert % 2 * records.record_bytes))
        for expert in range(max(len(reads) - 2, 0), len(reads)):
            wait(expert)
    except BaseException:
        reader.close()  # before the memory is freed
        raise


def write_store(
    source: nn.Module | AnyPath,
    path: AnyPath,
    form: str | Form = "plain",
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done, total, name: None,
    resume: bool = True,
    **options: Any,
) -> Store:
    """Writes the experts of a model or a checkpoint into a store, and opens it.

        offload.write_store("olmoe/", "olmoe-experts/", "int4", group_size=64)

    One layer is in memory at a time, besides `source` itself if it is a model. Biases, routers and all else stay in the
    model. An interrupted call leaves the finished layers in `path` + ".partial"; the same call continues with them.

    Args:
        source: a model with Experts, or with experts of transformers on the fused kernel, stored or not; or the folder
            of a checkpoint of a model of transformers, published in any form that `load_published` reads; or a GGUF
            file.
        path: of the store; it must not exist.
        form: one of `switchgear.store`, with its options, or "as published": the experts keep their form, and so every
            bit. Published experts that are in `form` already keep their bits, too.
        dtype: of plain weights of a checkpoint; by default that of its config, of a GGUF file float32.
        progress: called as (layers done, layers, name) after each.
        resume: False discards what an interrupted call has written.

    Raises:
        ValueError: `source` has no experts, or some that cannot be stored so; `path` exists.
        StoreError: a file cannot be written, for example because the disk is full; an unfinished store of another form,
            dtype or model is in the way. There is no store then.
    """
    if not isinstance(source, (nn.Module, str, os.PathLike)):
        raise TypeError(f"source: expected a model or the folder of a checkpoint, got {type(source).__name__}")
    wanted = _form(form, options)
    if isinstance(source, nn.Module):
        if dtype is not None:
            raise ValueError(f"dtype: expected none for a model, whose experts have one, got {dtype}")
        found = store_sources.of_model(source, wanted)
    else:
        read = store_sources.of_gguf if is_gguf(source) else store_sources.of_checkpoint
        found = read(Path(source), wanted, dtype)
    text = store_sources.AS_PUBLISHED if wanted is None else str(wanted)
    try:
        write_from(found, Path(path), text, progress, resume)
    finally:
        found.close()
    return Store.open(path)


def _form(form: str | Form, options: dict[str, Any]) -> Form | None:
    if form == "auto":
        names = f"a form's name or {store_sources.AS_PUBLISHED!r}"
        raise ValueError(f"form: expected {names}, got 'auto', which `switchgear.store` alone takes")
    if form != store_sources.AS_PUBLISHED:
        return form_named(form, options)
    if options:
        raise ValueError(f"{next(iter(options))}: expected no options with {form}, got {', '.join(options)}")
    return None


# ---- layer by layer --------------------------------------------------------------------------------------------------


def write_from(source: store_sources.Source, target: Path, form: str, progress: Progress, resume: bool) -> None:
    """Writes a store to `target`, which must not exist. Holds one layer at a time."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"path: expected one that does not exist, got {target}")
    layers = [[layer.name, *layer.sizes] for layer in source.layers]
    identity = {"form": form, "dtype": str(source.dtype), "layers": layers, "version": store_index.VERSION}
    with Unfinished.opened(STORE, target, identity, resume) as unfinished:
        done: dict[str, Records] = {}
        for number, layer in enumerate(source.layers):
            fingerprint = layer.fingerprint()
            records = _find_finished(unfinished, layer.name, fingerprint)
            if records is None:
                file = f"layer-{number:05d}.records"
                records = write_layer(unfinished.folder / file, layer.name, layer.weights())
                unfinished.add(layer.name, {"fingerprint": fingerprint, "records": store_index.encode_records(records)})
            done[layer.name] = records
            progress(number + 1, len(source.layers), layer.name)
        index = unfinished.folder / store_index.INDEX
        unfinished.clear(keep={records.file for records in done.values()})
        with STORE.named_errors(index):
            write_whole(
                index, store_index.encode_index(store_index.Index(form, store_index.hash_layers(done.values()), done))
            )
        unfinished.commit()


def _find_finished(unfinished: Unfinished, name: str, fingerprint: str) -> Records | None:
    """Returns the records of a layer that an earlier run has written from the same numbers."""
    found = unfinished.pieces.get(name)
    if found is None or found.get("fingerprint") != fingerprint:
        return None
    try:
        records = store_index.decode_records(found["records"])
        store_index.verify_file(unfinished.folder, records)
    except (StoreError, store_index.Wrong, KeyError):
        return None
    return records


def write_layer(file: Path, name: str, weights: tuple[Weight, Weight]) -> Records:
    """Writes the records of a layer into a file, which is complete or not there. One record is written past the page
    cache, which would hold what the cache of experts is to hold, while the next one is filled."""
    records = lay_out_records(name, file.name, weights)
    whole = torch.zeros(2 * records.record_bytes + PAGE, dtype=torch.uint8)
    both = whole[-whole.data_ptr() % PAGE :][: 2 * records.record_bytes].view(2, -1)
    checksums = []
    with STORE.named_errors(file), replacing(file) as unfinished, _opened_past_cache(unfinished) as opened:
        _reserve(opened, records.nbytes)
        with ThreadPoolExecutor(1) as writer:
            begun: Future[None] | None = None
            for expert, (size, offset) in enumerate(zip(records.sizes, records.offsets, strict=True)):
                record = both[expert % 2]
                if records.bits:
                    record.zero_()  # an earlier expert may have been longer
                fill(record[None], records, weights, expert)
                checksums.append(_C.checksum(record.data_ptr(), size))
                if begun is not None:
                    begun.result()
                begun = writer.submit(_write_at, opened, bytes_of(record)[:size], offset)
            if begun is not None:
                begun.result()
    return replace(records, checksums=tuple(checksums))


@contextmanager
def _opened_past_cache(path: Path) -> Iterator[int]:
    opened = os.open(path, os.O_WRONLY)
    try:
        _set_direct(opened, True)
        yield opened
        os.fsync(opened)
        if hasattr(os, "posix_fadvise"):  # a file system that caches it all the same
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)


def _set_direct(file: int, direct: bool) -> None:
    """Does nothing where the system or the file system has no O_DIRECT."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)


def _write_at(file: int, memory: memoryview, offset: int) -> None:
    """Whole pages at a page."""
    is_direct = True
    while memory:
        try:
            count = os.pwrite(file, memory, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct:
                raise
            is_direct = False  # a file system that takes the flag, but wants more than whole pages
            _set_direct(file, False)
            continue
        memory, offset = memory[count:], offset + count


def _reserve(file: int, nbytes: int) -> None:
    """Fails at once where there is no room, and gives the file few extents."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve
                raise
