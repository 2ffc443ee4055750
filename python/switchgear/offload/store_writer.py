# SPDX-License-Identifier: BSD-3-Clause
"""Writes a store layer by layer, in a folder beside it that gets its name at the end. A layer that is finished stays
when the rest is interrupted; a journal lists them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchgear import _C
from switchgear.files import LOCK, bytes_of, locked, unfinished_of, write_whole
from switchgear.offload import store_index
from switchgear.offload.errors import StoreError
from switchgear.offload.store_records import PAGE, Records, fill, records_for
from switchgear.offload.store_sources import Source
from switchgear.weights.weight import Weight

Progress = Callable[[int, int, str], None]
JOURNAL, SUFFIX = "journal.json", ".partial"


def write(source: Source, target: Path, form: str, progress: Progress, resume: bool) -> None:
    """Writes a store to `target`, which must not exist. Holds one layer at a time."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"path: expected one that does not exist, got {target}")
    with _Unfinished.opened(target, _identity(source, form), resume) as unfinished:
        done: dict[str, Records] = {}
        for number, layer in enumerate(source.layers):
            fingerprint = layer.fingerprint()
            records = unfinished.finished(layer.name, fingerprint)
            if records is None:
                file = f"layer-{number:05d}.records"
                records = write_layer(unfinished.folder / file, layer.name, layer.weights())
                unfinished.add(records, fingerprint)
            done[layer.name] = records
            progress(number + 1, len(source.layers), layer.name)
        unfinished.commit(store_index.Index(form, store_index.hash_of(done.values()), done))


def _identity(source: Source, form: str) -> dict[str, Any]:
    layers = [[layer.name, *layer.sizes] for layer in source.layers]
    return {"form": form, "dtype": str(source.dtype), "layers": layers, "version": store_index.VERSION}


def write_layer(file: Path, name: str, weights: tuple[Weight, Weight]) -> Records:
    """Writes the records of a layer; until they are all there the file has another name."""
    records = records_for(name, file.name, weights)
    record = _aligned(records.record_bytes)
    memory = bytes_of(record)
    checksums = []
    unfinished = unfinished_of(file)
    with _naming(file):
        try:
            with open(unfinished, "wb", buffering=0) as opened:
                _reserve(opened.fileno(), records.nbytes)
                for expert, size in enumerate(records.sizes):
                    if records.bits:
                        record.zero_()  # of the last expert, which may be longer
                    fill(record[None], records, weights, expert)
                    checksums.append(_C.checksum(record.data_ptr(), size))
                    _write_all(opened, memory[:size])
                os.fsync(opened.fileno())
                if hasattr(os, "posix_fadvise"):  # the page cache would hold what the cache of experts is to hold
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(unfinished, file)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    return replace(records, checksums=tuple(checksums))


def _write_all(file: Any, memory: memoryview) -> None:
    written = 0
    while written < len(memory):
        written += file.write(memory[written:])


def _reserve(file: int, nbytes: int) -> None:
    """Fails at once where there is no room, and gives the file few extents."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that cannot
                raise


def _aligned(nbytes: int) -> Tensor:
    """Zeros that start at a page."""
    whole = torch.zeros(nbytes + PAGE, dtype=torch.uint8)
    begin = -whole.data_ptr() % PAGE
    return whole[begin : begin + nbytes]


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"{file}: no room ({os.strerror(error.errno)}); free some and write the same store again, finished "
                "layers stay"
            ) from error
        raise StoreError(f"{file}: {error}") from error


class _Unfinished:
    """The folder of an unfinished store."""

    def __init__(self, target: Path, identity: dict[str, Any]) -> None:
        self.target, self.folder = target, target.with_name(target.name + SUFFIX)
        self._identity = identity
        self._layers: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def opened(cls, target: Path, identity: dict[str, Any], resume: bool) -> Iterator[_Unfinished]:
        """Goes on with an earlier run, or begins; without `resume`, empties the folder."""
        unfinished = cls(target, identity)
        folder = unfinished.folder
        with _naming(folder):
            is_ours = (folder / JOURNAL).is_file() or not folder.exists()
            if not is_ours and any(file.name != LOCK for file in folder.iterdir()):
                raise StoreError(f"path: expected no {folder}, got a folder that is no unfinished store")
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = locked(folder)
            except BlockingIOError as error:
                raise StoreError(f"path: another process is writing {folder}") from error
            with lock:
                unfinished._begin(resume)
                try:
                    yield unfinished
                except BaseException:
                    if not unfinished._layers:
                        unfinished._remove()
                    raise

    def _begin(self, resume: bool) -> None:
        file = self.folder / JOURNAL
        if resume and file.is_file():
            try:
                found = json.loads(file.read_text())
                identity, self._layers = found["identity"], dict(found["layers"])
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{file}: expected the journal of an unfinished store, got {error}") from error
            for key, value in self._identity.items():
                if identity.get(key) != value:
                    is_named = key in ("form", "dtype")
                    what = f"{key} {value}, got {identity.get(key)}" if is_named else f"the same {key}, got others"
                    raise StoreError(
                        f"path: {self.folder} holds an unfinished store: expected {what}; remove it, or pass "
                        "resume=False"
                    )
        else:
            for other in self.folder.iterdir():
                if other.name != LOCK and other.is_file():
                    other.unlink()
        self._save()

    def finished(self, name: str, fingerprint: str) -> Records | None:
        """The records of a layer that an earlier run has written from the same numbers."""
        found = self._layers.get(name)
        if found is None or found.get("fingerprint") != fingerprint:
            return None
        try:
            records = store_index.records_from(found["records"])
            store_index.check_file(self.folder, records)
        except (StoreError, store_index.Wrong, KeyError):
            return None
        return records

    def add(self, records: Records, fingerprint: str) -> None:
        self._layers[records.name] = {"fingerprint": fingerprint, "records": store_index.entry_of(records)}
        self._save()

    def _remove(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    def _save(self) -> None:
        text = json.dumps({"identity": self._identity, "layers": self._layers})
        _write_text(self.folder / JOURNAL, text)

    def commit(self, index: store_index.Index) -> None:
        """The folder becomes the store."""
        files = {records.file for records in index.layers.values()}
        _write_text(self.folder / store_index.INDEX, store_index.text_of(index))
        for file in self.folder.iterdir():
            if file.name not in files and file.name != store_index.INDEX:
                file.unlink()
        _sync(self.folder)
        os.rename(self.folder, self.target)
        _sync(self.target.parent)


def _write_text(file: Path, text: str) -> None:
    with _naming(file):
        write_whole(file, text)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
