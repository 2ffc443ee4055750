# SPDX-License-Identifier: BSD-3-Clause
"""Directories of checkpoints: read as a Source, whose tensors stay in their files until they are read, and written one
tensor at a time, atomically and resumably. The errors of conversions.

After any of these errors the target does not exist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchgear import files
from switchgear.convert.plans import Item
from switchgear.files import AnyPath, bytes_of, read_json, reading, write_whole, writing
from switchgear.utils.packages import failed_import

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"  # a folder of a checkpoint
BESIDE_WEIGHTS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    "*.jinja", f"{TEMPLATES}/*.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "audio_tokenizer_config.json", "LICENSE*",
)  # fmt: skip
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
NAMES = {name: dtype for dtype, name in DTYPES.items()}
Progress = Callable[[int, int, str], None]


class ConversionError(Exception):
    """A checkpoint could not be converted."""


class RecipeError(ConversionError, ValueError):
    """A recipe with an unknown operation or option, or one that the source cannot satisfy."""


class DamagedCheckpoint(ConversionError, ValueError):
    """A source with missing, truncated or changed files."""


class DiskFull(ConversionError, files.DiskFull):
    """No room for the result. Finished shards stay, and the conversion resumes."""


CONVERSION = files.Kind("conversion", "target", "shards", "recipe or source", ConversionError, DiskFull)


class Directory:
    """A Source of a checkpoint directory (safetensors)."""

    def __init__(self, path: AnyPath) -> None:
        from switchgear.integrations.checkpoint_files import CheckpointFiles, Reader  # import safetensors

        self.path = Path(path)
        try:
            self._files = CheckpointFiles(self.path)
        except ValueError as error:
            raise DamagedCheckpoint(str(error)) from error
        self._reader = Reader(self._files.headers)
        for key, header in self._files.headers.items():
            if header.dtype not in NAMES:
                raise DamagedCheckpoint(f"{key}: expected a dtype of torch, got {header.dtype}")

    def keys(self) -> Iterable[str]:
        return self._files.headers.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._header(key).shape
        return shape

    def dtype(self, key: str) -> torch.dtype:
        return NAMES[self._header(key).dtype]

    def read(self, key: str) -> Tensor:
        self._header(key)
        return self._reader.tensor(key)

    def config(self) -> dict[str, Any]:
        try:
            found = read_json(self.path / CONFIG)
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"path: expected JSON in {self.path / CONFIG}, got {error}") from error
        if not isinstance(found, dict):
            raise DamagedCheckpoint(f"path: expected a JSON object in {self.path / CONFIG}")
        return found

    def identity(self) -> list[Any]:
        """Changes when a file of the checkpoint does."""
        files = sorted({header.file for header in self._files.headers.values()} | {self.path / CONFIG})
        return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def _header(self, key: str) -> Any:
        if key not in self._files.headers:
            raise DamagedCheckpoint(f"path: expected {key} in {self.path}, got none")
        return self._files.headers[key]


def list_beside_weights(folder: Path) -> list[Path]:
    """The files of a checkpoint that go with it whatever becomes of weights and config; relative to its folder."""
    found = {file for pattern in BESIDE_WEIGHTS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder) for file in found)


def read_full_config(source: Directory) -> dict[str, Any]:
    """The config with the defaults of its family. ConversionError if transformers cannot be imported."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise ConversionError(failed_import(error, "transformers")) from error
    found = source.config()
    model_type = str(found.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"source: expected a model_type of transformers in {source.path / CONFIG}, got {model_type}")
    try:
        made = CONFIG_MAPPING[model_type].from_dict(found)
    except Exception as error:  # transformers raises many kinds for files of others
        raise DamagedCheckpoint(
            f"path: expected a config of transformers in {source.path / CONFIG}, got {error}"
        ) from error
    full: dict[str, Any] = made.to_dict()
    return {**full, "architectures": found.get("architectures")}


# ---- writing ---------------------------------------------------------------------------------------------------------


def count_bytes(item: Item) -> int:
    return int(torch.Size(item.shape).numel()) * item.dtype.itemsize


def divide_into_shards(items: Sequence[Item], most: int) -> dict[str, list[Item]]:
    """The tensors of each file, in order. A tensor larger than `most` has a file of its own."""
    groups: list[list[Item]] = [[]]
    total = 0
    for item in items:
        if groups[-1] and total + count_bytes(item) > most:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += count_bytes(item)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_shard(path: Path, items: Sequence[Item], progress: Callable[[int, str], None]) -> str:
    """Writes a safetensors file, and returns its sha256. Until it is complete it has another name. Holds one tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for item in items:
        end = start + count_bytes(item)
        header[item.key] = {"dtype": DTYPES[item.dtype], "shape": list(item.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with CONVERSION.named_errors(path), writing(path) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for item in items:
            data = _make_bytes(item)
            file.write(data)
            digest.update(data)
            progress(len(data), item.key)
    return digest.hexdigest()


def write_index(folder: Path, shards: Mapping[str, Sequence[Item]]) -> None:
    """Writes which file has which tensor, if there are several."""
    if len(shards) > 1:
        weight_map = {item.key: name for name, items in shards.items() for item in items}
        total = sum(count_bytes(item) for items in shards.values() for item in items)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2))


def _make_bytes(item: Item) -> Any:
    tensor: Tensor = item.make()
    if tuple(tensor.shape) != item.shape or tensor.dtype is not item.dtype:
        raise DamagedCheckpoint(
            f"{item.key}: expected {list(item.shape)} {item.dtype}, got {list(tensor.shape)} {tensor.dtype}"
        )
    flat = tensor.detach().cpu().contiguous().view(-1)
    if not flat.numel():
        return b""
    return bytes_of(flat)


def write_text(path: Path, text: str) -> None:
    with CONVERSION.named_errors(path):
        write_whole(path, text)


def compute_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with reading(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
