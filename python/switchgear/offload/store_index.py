# SPDX-License-Identifier: BSD-3-Clause
"""index.json of a store, and its checks. The file may come from anyone: every number in it is compared with the others
and with the sizes of files before it is used."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from switchgear.checks import Range, convert
from switchgear.files import is_gguf, read_json
from switchgear.offload.store_records import ALIGNMENT, PAGE, Part, Records, StoreError, whole_tensors
from switchgear.reference import formats
from switchgear.weights.module import Kind

INDEX, NAME, VERSION = "index.json", "switchgear experts", 1
_MOST = 1 << 40  # of any number
_Side = Annotated[int, Range(1, 1 << 31)]
_Offset = Annotated[int, Range(0, _MOST)]
_Bits = Annotated[int, Range(0, 8)]
_FILE = re.compile(r"layer-\d{5,9}\.records")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int32)
}
_DtypeName: Any = Literal[tuple(_DTYPES)]
_FormatName: Any = Literal[tuple(formats.FORMATS)]
_FIELDS = ("data", *(field for field in formats.FIELDS if field != "slots"))


class Index(NamedTuple):
    form: str
    config_hash: str
    layers: dict[str, Records]


def hash_layers(layers: Iterable[Records]) -> str:
    """Identifies models whose experts fit the same store: names, numbers and sizes of the experts of each layer."""
    sizes = [[r.name, r.num_experts, *((kind.rows, kind.cols) for kind in r.kinds)] for r in layers]
    return hashlib.sha256(json.dumps(sizes, separators=(",", ":")).encode()).hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------------


def encode_index(index: Index) -> str:
    entries = {
        "format": NAME,
        "version": VERSION,
        "form": index.form,
        "config_hash": index.config_hash,
        "layers": [encode_records(records) for records in index.layers.values()],
    }
    return json.dumps({**entries, "digest": _digest(entries)}, indent=1)


def encode_records(records: Records) -> dict[str, Any]:
    return {
        "name": records.name,
        "file": records.file,
        "num_experts": records.num_experts,
        "record_bytes": records.record_bytes,
        "projections": [
            {**kind._asdict(), "dtype": _name(kind.dtype), "elements": _name(kind.elements)} for kind in records.kinds
        ],
        "parts": [{**part._asdict(), "dtype": _name(part.dtype)} for part in records.parts],
        **({"bits": records.bits} if records.bits else {}),
        "checksums": [f"{checksum:016x}" for checksum in records.checksums],
    }


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _digest(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """What is wrong with an entry."""


def read(folder: Path) -> Index:
    """The index of a store. Raises StoreError, which names the file and what is wrong."""
    file = folder / INDEX
    try:
        if not file.is_file():
            reason = ""
            if is_gguf(folder):
                reason = ", where an expert's parts lie apart, not on whole pages; write_store makes a store of it"
            raise StoreError(f"path: expected a store with {INDEX}, got {folder}{reason}")
        found = read_json(file, parse_constant=_no_constant)
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: expected JSON, got {str(error).partition(chr(10))[0][:200]}") from error
    try:
        return _index(found, folder)
    except Wrong as error:
        raise StoreError(f"{file}: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _index(found: Any, folder: Path) -> Index:
    if _get(found, "format", str) != NAME:
        raise Wrong(f"format: expected {NAME!r}")
    if (version := _get(found, "version", int)) != VERSION:
        raise Wrong(f"version: expected {VERSION}, got {version}; write the store again")
    rest = {key: value for key, value in found.items() if key != "digest"}
    if _get(found, "digest", str) != _digest(rest):
        raise Wrong("expected the text that its digest is of, got a changed one")
    layers: dict[str, Records] = {}
    for entry in _get(found, "layers", list):
        records = decode_records(entry)
        if records.name in layers or any(records.file == other.file for other in layers.values()):
            raise Wrong(f"layers: expected each name and file once, got {records.name}, {records.file}")
        verify_file(folder, records)
        layers[records.name] = records
    if not layers:
        raise Wrong("layers: expected at least one")
    config_hash = _get(found, "config_hash", str)
    if config_hash != hash_layers(layers.values()):
        raise Wrong("config_hash: expected that of the layers, got another")
    return Index(_get(found, "form", str), config_hash, layers)


def decode_records(entry: Any) -> Records:
    """The inverse of encode_records."""
    name, file = _get(entry, "name", str), _get(entry, "file", str)
    if not _FILE.fullmatch(file):
        raise Wrong(f"file: expected a name like layer-00000.records, got {file[:80]!r}")
    num_experts = _get(entry, "num_experts", Annotated[int, Range(1, 1 << 24)])
    record_bytes = _get(entry, "record_bytes", Annotated[int, Range(PAGE, _MOST)])
    if record_bytes % PAGE:
        raise Wrong(f"record_bytes: expected a multiple of {PAGE}, got {record_bytes}")
    projections = _get(entry, "projections", list)
    if len(projections) != 2:
        raise Wrong(f"projections: expected 2, got {len(projections)}")
    kinds = _kind(projections[0]), _kind(projections[1])
    parts = tuple(_part(part) for part in _get(entry, "parts", list))
    checksums = _get(entry, "checksums", list)
    if len(checksums) != num_experts:
        raise Wrong(f"checksums: expected {num_experts}, got {len(checksums)}")
    for checksum in checksums:
        if not isinstance(checksum, str) or not re.fullmatch(r"[0-9a-f]{16}", checksum):
            raise Wrong("checksums: expected 16 hexadecimal digits each")
    numbers = tuple(int(checksum, 16) for checksum in checksums)
    bits = _bits(entry, num_experts) if "bits" in entry else ()
    records = Records(name, file, num_experts, record_bytes, kinds, parts, numbers, bits)
    _check_parts(records)
    return records


def _bits(entry: Any, num_experts: int) -> tuple[tuple[int, int], ...]:
    found = _get(entry, "bits", list[list[_Bits]])
    if len(found) != num_experts or any(len(pair) != 2 for pair in found):
        raise Wrong(f"bits: expected {num_experts} pairs")
    return tuple((first, second) for first, second in found)


def _kind(entry: Any) -> Kind:
    fields = _get(entry, "fields", list)
    if any(field not in _FIELDS for field in fields) or len(set(map(str, fields))) != len(fields):
        raise Wrong(f"fields: expected some of {', '.join(_FIELDS)}, once each")
    is_exact = _get(entry, "is_exact", bool)
    format, dtype = _get(entry, "format", _FormatName), _DTYPES[_get(entry, "dtype", _DtypeName)]
    elements = _DTYPES.get(_get(entry, "elements", _DtypeName | None))
    rows, cols = _get(entry, "rows", _Side), _get(entry, "cols", _Side)
    parts = _get(entry, "parts", Annotated[int, Range(1, 2)])
    group_size = _get(entry, "group_size", Annotated[int, Range(0, 1 << 31)])
    if not dtype.is_floating_point or (elements is not None and not elements.is_floating_point):
        raise Wrong("dtype: expected a floating one")
    if (format == "compact") != (elements is not None):
        raise Wrong("elements: expected a dtype for compact alone")
    return Kind(format, rows, cols, dtype, parts, group_size, elements, is_exact, tuple(fields))


def _part(entry: Any) -> Part:
    shape = _get(entry, "shape", list[Annotated[int, Range(1, _MOST)]])
    if not 1 <= len(shape) <= 8 or math.prod(shape) > _MOST:
        raise Wrong(f"shape: expected 1 to 8 sizes, at most {_MOST} elements, got {shape[:9]}")
    projection, field = _get(entry, "projection", Annotated[int, Range(0, 1)]), _get(entry, "field", str)
    dtype = _DTYPES[_get(entry, "dtype", _DtypeName)]
    return Part(projection, field, _get(entry, "offset", _Offset), tuple(shape), dtype)


def _check_parts(records: Records) -> None:
    """Parts are the tensors of both projections, aligned, one after the other in the record, as their formats need."""
    end = 0
    for part in records.parts:
        if part.offset % ALIGNMENT or part.offset < end:
            raise Wrong(f"offset: expected a multiple of {ALIGNMENT} from {end} on, got {part.offset}")
        end = part.offset + part.nbytes
    if end > records.record_bytes:
        raise Wrong(f"record_bytes: expected at least {end}, got {records.record_bytes}")
    for index, kind in enumerate(records.kinds):
        expected = [field for field in kind.fields if field != "records"]
        got = [part.field for part in records.parts if part.projection == index]
        if sorted(got) != sorted(expected) or ("records" in kind.fields) != (kind.format == "groups"):
            raise Wrong(f"parts: expected {', '.join(expected)} of projection {index}, got {', '.join(got)[:80]}")
    try:
        for kind, tensors in whole_tensors(
            records, torch.empty(1, records.record_bytes, dtype=torch.uint8, device="meta")
        ):
            weight = kind.weight(tensors)
            dtype = weight.elements or weight.dtype  # compact rows are of either
            formats.check_weight("record", weight.tensors, weight.form, (None, kind.rows, kind.cols), dtype)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise Wrong(f"parts: {str(error).partition(chr(10))[0][:200]}") from None
    if records.bits:
        _check_bits(records)


def _check_bits(records: Records) -> None:
    """Planes come last, and an expert has at most as many as there is room for."""
    planes = [records.has_planes(part) for part in records.parts]
    if planes != sorted(planes):
        raise Wrong("parts: expected planes of bits to be the last ones")
    most = [0, 0]
    for part in filter(records.has_planes, records.parts):
        most[part.projection] = part.shape[0]
    for own in records.bits:
        if any((bits == 0) != (limit == 0) or bits > limit for bits, limit in zip(own, most, strict=True)):
            raise Wrong(f"bits: expected at most {most}, and some where there are any, got {list(own)}")


def verify_file(folder: Path, records: Records) -> None:
    """Raises StoreError unless the file of a layer, or what a link there leads to, has the bytes of all records."""
    file = folder / records.file
    if not file.is_file():
        raise StoreError(f"{file}: expected a regular file with the experts of {records.name}, got none")
    if (size := file.stat().st_size) != records.nbytes:
        raise StoreError(f"{file}: expected {records.nbytes} bytes, {records.num_experts} records, got {size}")


# ---- entries ---------------------------------------------------------------------------------------------------------


def _get(entry: Any, key: str, hint: Any) -> Any:
    """The value of a key. Raises Wrong unless it is what the annotation `hint` (checks.py) allows."""
    if not isinstance(entry, dict):
        raise Wrong(f"{key}: expected an entry of an object, got {type(entry).__name__}")
    try:
        return convert(key, entry.get(key), hint)
    except (TypeError, ValueError) as error:
        raise Wrong(str(error)[:200]) from None
