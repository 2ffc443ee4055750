# SPDX-License-Identifier: BSD-3-Clause
"""Reads and writes GGUF files, the checkpoints of llama.cpp. Needs nothing but torch.

    magic "GGUF", version uint32 (2 or 3), number of tensors uint64, number of metadata uint64
    metadata  key string, type uint32, value
              string: length uint64, bytes; array: type uint32, length uint64, values; others: little-endian numbers
    tensors   name string, number of dimensions uint32, each uint64 (columns first), type uint32, offset uint64
    padding, then the bytes of the tensors; offsets count from there and are multiples of "general.alignment" (32)

A model may be split into files, name-00001-of-00003.gguf. A file is mapped into memory, and tensors are views of it.
Sizes and offsets of a file are checked before anything is read or allocated by them.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.files import AnyPath, bytes_of, reading, writing
from switchgear.reference import gguf
from switchgear.utils.progress import show_progress

__all__ = ["Array", "DeferredTensor", "GgufFile", "GgufTensor", "Value", "read_gguf", "write_gguf"]

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
MOST_METADATA = 1 << 28  # bytes before the tensors of a file; vocabularies of 256,000 words take 10 MB
MOST_KEYS, MOST_TENSORS, MOST_ARRAYS = 1 << 16, 1 << 18, 1 << 16  # of a file: each takes more memory than its bytes
MOST_DEPTH = 4  # arrays in arrays
MOST_DIMS = 4
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

# Types of metadata by number: name, format of struct, dtype of arrays
_NUMBERS = (
    ("uint8", "B", torch.uint8),
    ("int8", "b", torch.int8),
    ("uint16", "H", torch.uint16),
    ("int16", "h", torch.int16),
    ("uint32", "I", torch.uint32),
    ("int32", "i", torch.int32),
    ("float32", "f", torch.float32),
    ("bool", "?", torch.bool),
    ("string", "", None),
    ("array", "", None),
    ("uint64", "Q", torch.uint64),
    ("int64", "q", torch.int64),
    ("float64", "d", torch.float64),
)
_TYPE_NUMBERS = {name: number for number, (name, _, _) in enumerate(_NUMBERS)}
_STRING, _ARRAY = _TYPE_NUMBERS["string"], _TYPE_NUMBERS["array"]

# Types of tensors. dtype: None for blocks, whose rows are bytes
PLAIN = {
    "f32": (0, torch.float32),
    "f16": (1, torch.float16),
    "i8": (24, torch.int8),
    "i16": (25, torch.int16),
    "i32": (26, torch.int32),
    "i64": (27, torch.int64),
    "f64": (28, torch.float64),
    "bf16": (30, torch.bfloat16),
}
_UNKNOWN_BLOCKS = {  # that no kernel of ours reads: number, columns and bytes of a block
    "q8_1": (9, 32, 40),
    "q8_k": (15, 256, 292),
    "iq2_xxs": (16, 256, 66),
    "iq2_xs": (17, 256, 74),
    "iq3_xxs": (18, 256, 98),
    "iq1_s": (19, 256, 50),
    "iq3_s": (21, 256, 110),
    "iq2_s": (22, 256, 82),
    "iq1_m": (29, 256, 56),
    "tq1_0": (34, 256, 54),
    "tq2_0": (35, 256, 66),
}


class _TensorType(NamedTuple):
    name: str
    number: int
    columns: int  # of a block
    bytes: int
    dtype: torch.dtype | None

    def size(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor."""
        return math.prod(shape) // self.columns * self.bytes


_TYPES = {
    kind.name: kind
    for kind in (
        *(_TensorType(name, number, 1, dtype.itemsize, dtype) for name, (number, dtype) in PLAIN.items()),
        *(_TensorType(name, kind.ggml, kind.columns, kind.bytes, None) for name, kind in gguf.TYPES.items()),
        *(_TensorType(name, *sizes, None) for name, sizes in _UNKNOWN_BLOCKS.items()),
    )
}
_BY_NUMBER = {kind.number: kind for kind in _TYPES.values()}


class Array(NamedTuple):
    """An array of metadata. items: a tensor [n] of numbers or bools, or a list of strings or of Arrays."""

    type: str  # of the items, as of Value
    items: Any

    def tolist(self) -> list[Any]:
        """The items as Python's values."""
        if isinstance(self.items, Tensor):
            return list(self.items.tolist())
        return [item.tolist() if isinstance(item, Array) else item for item in self.items]


class Value(NamedTuple):
    """A value of metadata, with its type in the file: uint8, int8, …, float64, bool, string or array."""

    type: str
    value: Any  # a number, bool, str or Array


class GgufTensor(NamedTuple):
    """A tensor of a file. data: of the plain types [*shape] in their dtype; of blocks [*shape[:-1], bytes of a row]
    uint8, in reference/gguf.py's formats or others."""

    type: str  # f32, f16, bf16, f64, i8, …, or a type of blocks, such as q4_k
    shape: tuple[int, ...]  # rows first, columns last
    data: Tensor


class DeferredTensor(NamedTuple):
    """A tensor to write. make: returns the data of a GgufTensor, which is freed before that of the next one is made."""

    type: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class GgufFile:
    """What a GGUF file, or all files of a split one, hold.

    Attributes:
        path: the file, of a split one the first.
        metadata: values by key, in the file's order, of a split file those of the first.
        tensors: by name, in the file's order: views of the mapped files.
        maps: by the address of their memory.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]
    maps: dict[int, mmap.mmap]

    def release(self, data: Tensor) -> None:
        """Frees the pages of a tensor that was copied, if it is one of the file. They are read again when used."""
        memory = data.untyped_storage().data_ptr()
        if memory in self.maps and hasattr(mmap, "MADV_DONTNEED"):
            begin = data.data_ptr() - memory
            first, end = -(-begin // mmap.PAGESIZE), (begin + data.nbytes) // mmap.PAGESIZE
            if first < end:  # others may be in a page, too
                length = (end - first) * mmap.PAGESIZE
                self.maps[memory].madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, length)

    def get(self, key: str, default: Any = None) -> Any:
        """A value of metadata as Python's: a number, bool, str or list. `default` without such a key."""
        if key not in self.metadata:
            return default
        value = self.metadata[key].value
        return value.tolist() if isinstance(value, Array) else value


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_gguf(path: AnyPath) -> GgufFile:
    """Maps a GGUF file into memory, with the other files of a split one, and reads what is before its tensors.

    path: a file, of a split one any. Tensors are views of the map: pages are read when they are used, and writing into
    a tensor does not change the file. Another program must not shorten the file meanwhile.

    Raises:
        ValueError: it is no GGUF file of version 2 or 3, or not a whole one. The message names the file, and the key
            or tensor. OSError: a file cannot be read, such as a missing one of a split.
    """
    path = Path(path)
    found = _SHARD.search(path.name)
    if found is None:
        metadata, tensors, own = _read_file(path)
        if (count := _read_count(path, metadata, SPLIT_COUNT, 1)) > 1:
            raise ValueError(f"{path}: expected a name with -00001-of-{count:05}.gguf for a split file")
        return GgufFile(path, metadata, tensors, own)
    count = int(found[2])
    shards = [path.with_name(f"{path.name[: found.start()]}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]
    if path not in shards:
        raise ValueError(f"{path}: expected a number from 1 to {count}, got {found[1]}")
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise FileNotFoundError(f"{path}: expected {count} files, {len(missing)} are missing, such as {missing[0]}")
    merged: dict[str, GgufTensor] = {}
    first: dict[str, Value] = {}
    maps: dict[int, mmap.mmap] = {}
    for number, shard in enumerate(shards):
        metadata, tensors, own = _read_file(shard)
        for key, wanted in ((SPLIT_COUNT, count), (SPLIT_NO, number)):
            if (got := _read_count(shard, metadata, key, wanted)) != wanted:
                raise ValueError(f"{shard}: key {key!r}: expected {wanted}, got {got}")
        if repeated := merged.keys() & tensors.keys():
            raise ValueError(f"{shard}: tensor {min(repeated)!r}: expected one, got another in an earlier file")
        first = first or metadata
        merged |= tensors
        maps |= own
    wanted = _read_count(shards[0], first, SPLIT_TENSORS, len(merged))
    if wanted != len(merged):
        raise ValueError(
            f"{path}: key {SPLIT_TENSORS!r}: expected {len(merged)}, the tensors of all files, got {wanted}"
        )
    return GgufFile(shards[0], first, merged, maps)


def _read_count(path: Path, metadata: Mapping[str, Value], key: str, default: int) -> int:
    value = metadata[key].value if key in metadata else default
    if type(value) is not int:
        raise ValueError(f"{path}: key {key!r}: expected an integer, got {metadata[key].type}")
    return value


def _map(path: Path) -> mmap.mmap:
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise ValueError(f"{path}: expected a GGUF file, got {size} bytes")
        if hasattr(mmap, "MAP_PRIVATE"):  # no memory is reserved for pages that nobody writes to
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)
            return mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


class _Cursor:
    """Reads what is before the tensors. `what`: the key or tensor for errors."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self._path, self._memory = path, memory
        self._end = min(len(memory), MOST_METADATA)
        self.at, self.what, self._arrays = 0, "header", 0

    def error(self, expected: str, got: object) -> ValueError:
        return ValueError(f"{self._path}: {self.what}: expected {expected}, got {got}")

    def require(self, count: int, size: int, what: str) -> None:
        """That so many items of at least `size` bytes follow."""
        if count * size > self._end - self.at:
            left = self._end - self.at
            if self._end < len(self._memory):
                raise self.error(f"at most {MOST_METADATA} bytes before the tensors", f"{count} {what} after them")
            raise self.error(f"at most {left} bytes, which are left of the file", f"{count} {what}")

    def take(self, count: int) -> bytes:
        self.require(count, 1, "bytes")
        begin, self.at = self.at, self.at + count
        return self._memory[begin : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, size: int, what: str) -> int:
        """A number of items that follow, of at least `size` bytes each."""
        count: int = self.number("Q")
        self.require(count, size, what)
        return count

    def string(self) -> str:
        """Any bytes, those that are no UTF-8 as surrogates."""
        return self.take(self.count(1, "bytes of a string")).decode("utf-8", "surrogateescape")

    def type(self) -> int:
        number: int = self.number("I")
        if number >= len(_NUMBERS):
            raise self.error(f"a type from 0 to {len(_NUMBERS) - 1}", number)
        return number

    def value(self, number: int, depth: int = 0) -> Any:
        if number == _STRING:
            return self.string()
        if number == _ARRAY:
            return self.array(depth + 1)
        name, code, _ = _NUMBERS[number]
        if name == "bool":
            self.check_bools(byte := self.take(1))
            return bool(byte[0])
        return self.number(code)

    def check_bools(self, values: bytes) -> None:
        if values.translate(None, b"\0\1"):
            raise self.error("bools of 0 or 1", next(value for value in values if value > 1))

    def array(self, depth: int) -> Array:
        self._arrays += 1
        if depth > MOST_DEPTH or self._arrays > MOST_ARRAYS:
            raise self.error(f"at most {MOST_DEPTH} arrays in arrays, and {MOST_ARRAYS} in a file", "more")
        name, code, dtype = _NUMBERS[number := self.type()]
        if dtype is None:
            count = self.count(8 if number == _STRING else 12, "items")
            return Array(name, [self.value(number, depth) for _ in range(count)])
        count = self.count(dtype.itemsize, "numbers")
        values = self.take(count * struct.calcsize("<" + code))
        if dtype is torch.bool:
            self.check_bools(values)
        if not count:
            return Array(name, torch.empty(0, dtype=dtype))
        return Array(name, torch.frombuffer(bytearray(values), dtype=dtype))


def _read_file(path: Path) -> tuple[dict[str, Value], dict[str, GgufTensor], dict[int, mmap.mmap]]:
    memory = _map(path)
    cursor = _Cursor(path, memory)
    if (magic := cursor.take(4)) != MAGIC:
        raise cursor.error(f"{MAGIC!r}", f"{magic!r}")
    if (version := cursor.number("I")) not in VERSIONS:
        other = " (the file is big-endian)" if version >> 24 else ""
        raise cursor.error("version 2 or 3", f"{version}{other}")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    if num_values > MOST_KEYS or num_tensors > MOST_TENSORS:
        expected = f"at most {MOST_KEYS} values of metadata and {MOST_TENSORS} tensors"
        raise cursor.error(expected, f"{num_values} and {num_tensors}")
    metadata: dict[str, Value] = {}
    for index in range(num_values):
        cursor.what = f"key {index}"
        key = cursor.string()
        cursor.what = f"key {key!r}"
        if key in metadata:
            raise cursor.error("it once", "it twice")
        number = cursor.type()
        metadata[key] = Value(_NUMBERS[number][0], cursor.value(number))
    alignment = _read_count(path, metadata, ALIGNMENT_KEY, ALIGNMENT)
    if alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 31:
        cursor.what = f"key {ALIGNMENT_KEY!r}"
        raise cursor.error("a power of two from 8 on", alignment)
    placed = [_read_tensor(cursor, index, alignment) for index in range(num_tensors)]
    begin = -(-cursor.at // alignment) * alignment
    _check_places(cursor, placed, len(memory) - begin)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return metadata, {tensor.name: tensor.view(whole, begin) for tensor in placed}, {whole.data_ptr(): memory}


class _Placed(NamedTuple):
    """Where a tensor is. shape: rows first."""

    name: str
    type: _TensorType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.type.size(self.shape)

    def view(self, memory: Tensor, begin: int) -> GgufTensor:
        data = memory[begin + self.offset : begin + self.offset + self.nbytes]
        if self.type.dtype is not None:
            return GgufTensor(self.type.name, self.shape, data.view(self.type.dtype).view(self.shape))
        return GgufTensor(self.type.name, self.shape, data.view(*self.shape[:-1], -1))


def _read_tensor(cursor: _Cursor, index: int, alignment: int) -> _Placed:
    cursor.what = f"tensor {index}"
    name = cursor.string()
    cursor.what = f"tensor {name!r}"
    if (dims := cursor.number("I")) > MOST_DIMS:
        raise cursor.error(f"at most {MOST_DIMS} dimensions", dims)
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    if (kind := _BY_NUMBER.get(number)) is None:
        raise cursor.error("a type that ggml has", number)
    if 0 in shape or (shape[-1] if shape else 1) % kind.columns:
        raise cursor.error(f"sizes from 1 on, and columns in blocks of {kind.columns}", list(shape))
    if offset % alignment:
        raise cursor.error(f"an offset that is a multiple of {alignment}", offset)
    return _Placed(name, kind, shape, offset)


def _check_places(cursor: _Cursor, placed: list[_Placed], size: int) -> None:
    """That tensors are within the `size` bytes of data, none in another's place, and have different names."""
    names: set[str] = set()
    end, before = 0, ""
    for tensor in sorted(placed, key=lambda tensor: tensor.offset):
        cursor.what = f"tensor {tensor.name!r}"
        if tensor.name in names:
            raise cursor.error("it once", "it twice")
        names.add(tensor.name)
        if tensor.offset < end:
            raise cursor.error(f"an offset from {end} on, where {before!r} ends", tensor.offset)
        end, before = tensor.offset + tensor.nbytes, tensor.name
        if end > size:
            raise cursor.error(
                f"it within the {max(size, 0)} bytes of data", f"{tensor.nbytes} from {tensor.offset} on"
            )


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_gguf(
    path: AnyPath, metadata: Mapping[str, Value], tensors: Mapping[str, GgufTensor | DeferredTensor]
) -> None:
    """Writes a GGUF file of version 3, which replaces `path` when it is whole. What `read_gguf` gives of one file of
    this version without gaps is written with the same bytes.

    metadata: with "general.alignment" offsets are multiples of it. tensors: data in CPU memory, as GgufTensor says.

    Raises:
        ValueError: a key, name, type or shape that a file cannot have. OSError: the file cannot be written.
    """
    alignment = metadata[ALIGNMENT_KEY].value if ALIGNMENT_KEY in metadata else ALIGNMENT
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"metadata: expected a power of two from 8 on as {ALIGNMENT_KEY}, got {alignment}")
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, (name, value) in metadata.items():
        head += (_pack_string(key), struct.pack("<I", _number_of(key, name)), *_pack_value(key, name, value))
    offset = 0
    for name, tensor in tensors.items():
        kind = _check_shape(name, tensor.type, tensor.shape)
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        head += (_pack_string(name), sizes, struct.pack("<IQ", kind.number, offset))
        offset += -(-kind.size(tensor.shape) // alignment) * alignment
    with writing(path) as file:
        written = sum(map(file.write, head))
        file.write(bytes(-written % alignment))
        for name, tensor in show_progress(tensors.items(), f"writing {path}"):
            written = file.write(bytes_of(_make_data(name, tensor)))
            file.write(bytes(-written % alignment))


def _check_shape(name: str, type: str, shape: tuple[int, ...]) -> _TensorType:
    kind = _TYPES.get(type)
    if kind is None:
        raise ValueError(f"tensors[{name!r}]: expected a type of {', '.join(_TYPES)}, got {type!r}")
    if len(shape) > MOST_DIMS or 0 in shape or (shape[-1] if shape else 1) % kind.columns:
        expected = f"at most {MOST_DIMS} sizes from 1 on, and columns in blocks of {kind.columns}"
        raise ValueError(f"tensors[{name!r}]: expected {expected}, got {list(shape)}")
    return kind


def _make_data(name: str, tensor: GgufTensor | DeferredTensor) -> Tensor:
    kind, shape = _TYPES[tensor.type], tensor.shape
    stored = shape if kind.dtype is not None else (*shape[:-1], shape[-1] // kind.columns * kind.bytes)
    data = tensor.data if isinstance(tensor, GgufTensor) else tensor.make()
    if tuple(data.shape) != stored or data.dtype is not (kind.dtype or torch.uint8) or data.device.type != "cpu":
        expected = f"{kind.dtype or torch.uint8} {list(stored)} in CPU memory"
        got = f"{data.dtype} {list(data.shape)} on {data.device}"
        raise ValueError(f"tensors[{name!r}]: expected data {expected}, got {got}")
    return data.detach().contiguous()


def _number_of(key: str, name: str) -> int:
    if name not in _TYPE_NUMBERS:
        raise ValueError(f"metadata[{key!r}]: expected a type of {', '.join(_TYPE_NUMBERS)}, got {name!r}")
    return _TYPE_NUMBERS[name]


def _pack_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pack_value(key: str, name: str, value: Any) -> Iterator[bytes]:
    if name == "string":
        yield _pack_string(value)
    elif name == "array":
        number = _number_of(key, value.type)
        yield struct.pack("<IQ", number, len(value.items))
        if (dtype := _NUMBERS[number][2]) is not None:
            yield bytes_of(value.items.to(dtype).contiguous()).tobytes()
            return
        for item in value.items:
            yield from _pack_value(key, value.type, item)
    else:
        try:
            yield struct.pack("<" + _NUMBERS[_number_of(key, name)][1], value)
        except struct.error as error:
            raise ValueError(f"metadata[{key!r}]: expected {name}, got {value!r}") from error
