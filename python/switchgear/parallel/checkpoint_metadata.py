# SPDX-License-Identifier: BSD-3-Clause
"""The metadata of a checkpoint of torch.distributed.checkpoint, read without running code from it.

`.metadata` is a pickle, and a pickle can call any function. Here each class in it becomes an inert record of its own
for this one read, and any other name is refused. What the records say is checked before it is used: files lie in the
checkpoint's folder, chunks cover their tensor, and a tensor is no larger than its bytes on disk, so that a few bytes of
metadata cannot allocate all memory.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from switchgear.files import AnyPath

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "builtins": {"getattr"},  # members of enums in Python 3.11.0 and later patches
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}  # fmt: skip


class _Record:
    """Stands for an object in the pickle: keeps what it was to be made of, and does nothing with it."""

    state: object = None

    def __new__(cls, *args: object) -> _Record:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._records: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)  # neither can be changed by a pickle
        if name not in _CLASSES.get(module, ()):
            raise ValueError(f"expected classes of torch.distributed.checkpoint, got {module}.{name}")
        key = (module, name)
        return self._records.setdefault(key, type(name, (_Record,), {}))  # its own: a pickle may set attributes of it


class Reader(FileSystemReader):
    """Reads the tensors of a checkpoint whose metadata was read by `read_metadata`."""

    def __init__(self, path: AnyPath, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(path: AnyPath) -> Metadata:
    """Raises:
    ValueError: it is not the metadata of a checkpoint, names anything else, or does not fit the files beside it.
    """
    file = Path(path) / ".metadata"
    data = file.read_bytes()
    try:
        _check_sizes(data)
        return _metadata(_Unpickler(data).load(), Path(path))
    except Exception as error:  # a damaged pickle may raise any
        is_ours = isinstance(error, ValueError) and "expected" in str(error)
        text = str(error) if is_ours else f"expected a checkpoint, got {type(error).__name__}: {error}"
        raise ValueError(f"{file}: {text}") from error


def _check_sizes(data: bytes) -> None:
    """A few bytes of a pickle can make Python's unpickler allocate all memory: as a length, which pickletools checks
    against the file, or as an index of the memo, an array of up to 2^32 pointers. Picklers count from 0."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > len(data):
            raise ValueError(f"expected a memo of at most {len(data)} entries, got the index {argument}")


def _metadata(root: object, folder: Path) -> Metadata:
    fields = _fields(root, "Metadata")
    storage = _storage(fields["storage_data"], folder)
    stored = _typed("state_dict_metadata", fields["state_dict_metadata"], dict)
    entries = {_typed("names", name, str): _entry(name, entry, storage) for name, entry in stored.items()}
    return Metadata(entries, storage_data=storage, storage_meta=StorageMeta())


def _storage(stored: object, folder: Path) -> dict[MetadataIndex, _StorageInfo]:
    """Where the bytes of each chunk are."""
    storage = {}
    sizes: dict[str, int] = {}
    for key, value in _typed("storage_data", stored, dict).items():
        index, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        name, offset = _typed("names", index["fqn"], str), index.get("offset")
        path = _typed("relative_path", info["relative_path"], str)
        if path in ("", ".", "..") or Path(path).name != path:
            raise ValueError(f"{name}: expected a file of the checkpoint's folder, got {path!r}")
        if info.get("transform_descriptors"):
            raise ValueError(f"{name}: expected no transformed data, got {info['transform_descriptors']!r}")
        if path not in sizes:
            if not (folder / path).is_file():
                raise ValueError(f"{name}: expected the file {path}, got none")
            sizes[path] = (folder / path).stat().st_size
        (begin, length) = _numbers(name, (info["offset"], info["length"]))
        if begin + length > sizes[path]:
            raise ValueError(f"{name}: expected {begin + length} bytes in {path}, got {sizes[path]}")
        storage[MetadataIndex(name, None if offset is None else _numbers(name, offset))] = _StorageInfo(
            path, begin, length
        )
    return storage


def _entry(
    name: str, entry: object, storage: Mapping[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    properties = getattr(fields["properties"], "state", None)
    dtype = _typed(name, _typed(name, properties, tuple)[0], torch.dtype)
    size = _numbers(name, fields["size"])
    chunks = []
    for chunk in _typed(name, fields["chunks"], list):
        part = _fields(chunk, "ChunkStorageMetadata")
        offsets, lengths = _numbers(name, part["offsets"]), _numbers(name, part["sizes"])
        if len(offsets) != len(size) or any(o + n > s for o, n, s in zip(offsets, lengths, size, strict=True)):
            raise ValueError(f"{name}: expected chunks of {list(size)}, got {list(lengths)} at {list(offsets)}")
        info = storage.get(MetadataIndex(name, offsets))
        needed = math.prod(lengths) * dtype.itemsize
        if info is None or info.length < needed:
            raise ValueError(f"{name}: expected {needed} bytes, got {info.length if info else 'none'}")
        chunks.append(ChunkStorageMetadata(offsets, lengths))
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(size) or len({chunk.offsets for chunk in chunks}) != len(chunks):
        raise ValueError(f"{name}: expected chunks of {math.prod(size)} elements, got {covered}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _fields(record: object, name: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != name or not isinstance(record.state, dict):
        raise ValueError(f"expected a {name}, got {type(record).__name__}")
    return record.state


def _typed(name: str, value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _numbers(name: str, values: object) -> torch.Size:
    numbers = _typed(name, values, tuple)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{name}: expected sizes of at least 0, got {numbers}")
    return torch.Size(numbers)
