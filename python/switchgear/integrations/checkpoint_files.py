# SPDX-License-Identifier: BSD-3-Clause
"""The tensors of a checkpoint in a directory of safetensors files, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAPPED = 64 << 20  # bytes read before files are mapped anew, beside one tensor


class Header(NamedTuple):
    """What a file's header says about a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "BF16", "F8_E4M3", "U8", …


class Reader:
    """Reads tensors of memory-mapped files. Pages that were read count as memory of the process while their file is
    mapped, so files are mapped anew after some of it."""

    def __init__(self, headers: dict[str, Header]) -> None:
        self._headers = headers
        self._files: dict[Path, Any] = {}
        self._read = 0  # bytes, since files were mapped

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, in the memory of its file: the caller must copy it."""
        return self._counted(self._file(key).get_tensor(key))

    def part(self, key: str, index: int) -> Tensor:
        """[1, …]: the slice at `index` of the first dimension."""
        return self._counted(self._file(key).get_slice(key)[index : index + 1])

    def close(self) -> None:
        self._files.clear()
        self._read = 0

    def _counted(self, tensor: Tensor) -> Tensor:
        self._read += tensor.nbytes
        return tensor

    def _file(self, key: str) -> Any:
        if self._read > MAPPED:
            self.close()
        path = self._headers[key].file
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]


class CheckpointFiles:
    """The tensors of a directory, as transformers chooses them: those of model.safetensors, else those of the index. If
    there is neither, those of all safetensors files, each in one file.

    Raises ValueError, which names the file, if there are none, or if one is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        if not (path / CONFIG).is_file():
            raise ValueError(f"path: expected a directory with {CONFIG}, got {path}")
        self.path = path
        self.headers: dict[str, Header] = {}
        listed: dict[str, str] = {}
        if (path / WHOLE).is_file():  # an index beside it is of an earlier save
            names = [WHOLE]
        elif (path / INDEX).is_file():
            listed = self._listed(path / INDEX)
            names = sorted(set(listed.values()))
        else:
            names = sorted(file.name for file in path.glob("*.safetensors"))
        if not names:
            raise ValueError(f"path: expected safetensors files in {path}, got none")
        for name in names:
            found = self._headers_of(path / name)
            if not listed and (twice := sorted(found.keys() & self.headers.keys())):
                other = self.headers[twice[0]].file.name
                raise ValueError(f"path: expected {twice[0]} in one file of {path}, got it in {other} and {name}")
            self.headers |= found
        for key, name in listed.items():
            if key not in self.headers:
                raise ValueError(f"path: expected {key} in {path / name}, as {INDEX} says")

    @staticmethod
    def _listed(index: Path) -> dict[str, str]:
        try:
            listed = json.loads(index.read_text())["weight_map"]
            return {str(key): Path(str(name)).name for key, name in listed.items()}  # never another directory
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"path: expected a weight_map in {index}, got {error}") from error

    @staticmethod
    def _headers_of(file: Path) -> dict[str, Header]:
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (not a mapping)
                return {key: Header(file, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no file can have
            raise ValueError(f"path: expected a safetensors file, got {file}: {error}") from error
