# SPDX-License-Identifier: BSD-3-Clause
"""Directory: a checkpoint as a source of tensors, which stay in their files until they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchgear.complaints import failed_import
from switchgear.convert.errors import ConversionError, DamagedCheckpoint
from switchgear.convert.writer import NAMES
from switchgear.files import AnyPath

CONFIG = "config.json"
TEMPLATES = "additional_chat_templates"  # a folder of a checkpoint
BESIDE_WEIGHTS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    "*.jinja", f"{TEMPLATES}/*.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "audio_tokenizer_config.json", "LICENSE*",
)  # fmt: skip


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
            found = json.loads((self.path / CONFIG).read_text())
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


def beside_weights(folder: Path) -> list[Path]:
    """The files of a checkpoint that go with it whatever becomes of weights and config; relative to its folder."""
    found = {file for pattern in BESIDE_WEIGHTS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder) for file in found)


def full_config(source: Directory) -> dict[str, Any]:
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
