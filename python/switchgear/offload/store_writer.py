# SPDX-License-Identifier: BSD-3-Clause
"""Writes a store layer by layer. Finished layers stay if the rest is interrupted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchgear import _C
from switchgear.files import Kind, Unfinished, bytes_of, write_whole, writing
from switchgear.offload import store_index
from switchgear.offload.store_records import PAGE, Records, StoreError, StoreFull, fill, lay_out_records
from switchgear.offload.store_sources import Source
from switchgear.weights.weight import Weight

Progress = Callable[[int, int, str], None]
STORE = Kind("store", "path", "layers", "form, dtype or model", StoreError, StoreFull)


def write(source: Source, target: Path, form: str, progress: Progress, resume: bool) -> None:
    """Writes a store to `target`, which must not exist. Holds one layer at a time."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"path: expected one that does not exist, got {target}")
    with Unfinished.opened(STORE, target, _identity(source, form), resume) as unfinished:
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


def _identity(source: Source, form: str) -> dict[str, Any]:
    layers = [[layer.name, *layer.sizes] for layer in source.layers]
    return {"form": form, "dtype": str(source.dtype), "layers": layers, "version": store_index.VERSION}


def _find_finished(unfinished: Unfinished, name: str, fingerprint: str) -> Records | None:
    """Returns the records of a layer that an earlier run has written from the same numbers."""
    found = unfinished.pieces.get(name)
    if found is None or found.get("fingerprint") != fingerprint:
        return None
    try:
        records = store_index.decode_records(found["records"])
        store_index.check_file(unfinished.folder, records)
    except (StoreError, store_index.Wrong, KeyError):
        return None
    return records


def write_layer(file: Path, name: str, weights: tuple[Weight, Weight]) -> Records:
    """Writes the records of a layer into a file, which is complete or not there."""
    records = lay_out_records(name, file.name, weights)
    record = _allocate_aligned(records.record_bytes)
    memory = bytes_of(record)
    checksums = []
    with STORE.named_errors(file), writing(file) as opened:
        _reserve(opened.fileno(), records.nbytes)
        for expert, size in enumerate(records.sizes):
            if records.bits:
                record.zero_()  # the last expert may have been longer
            fill(record[None], records, weights, expert)
            checksums.append(_C.checksum(record.data_ptr(), size))
            opened.write(memory[:size])
        opened.flush()
        os.fsync(opened.fileno())
        if hasattr(os, "posix_fadvise"):  # the page cache would hold what the cache of experts is to hold
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return replace(records, checksums=tuple(checksums))


def _reserve(file: int, nbytes: int) -> None:
    """Fails at once where there is no room, and gives the file few extents."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve
                raise


def _allocate_aligned(nbytes: int) -> Tensor:
    """Zeros that start at a page."""
    whole = torch.zeros(nbytes + PAGE, dtype=torch.uint8)
    begin = -whole.data_ptr() % PAGE
    return whole[begin : begin + nbytes]
