# SPDX-License-Identifier: BSD-3-Clause
"""The tensors of a checkpoint in a directory of safetensors files, read one at a time; which tensors of a model they
are, and whether they fit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from switchgear.files import read_json, require_regular

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
            found = read_headers(path / name)
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
            listed = read_json(index)["weight_map"]
            return {str(key): Path(str(name)).name for key, name in listed.items()}  # never another directory
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path: expected a weight_map in {index}, got {error}") from error


def read_headers(file: Path) -> dict[str, Header]:
    """The tensors of a file, which has them all. Raises ValueError for another file."""
    try:
        require_regular(file, file.stat())
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (not a mapping)
            return {key: Header(file, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"path: expected a safetensors file, got {file}: {error}") from error


# ---- names of tensors ------------------------------------------------------------------------------------------------

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of dtypes
SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"  # suffixes of a weight's name
_INSTEAD = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_")  # suffixes that begin so stand instead of .weight
SHOWN = 8  # complaints listed at a time


class Piece(NamedTuple):
    """Which part of a model's tensor a tensor of a checkpoint is."""

    suffix: str = ""  # one of pieces_of; empty for the weight itself
    expert: int | None = None  # None: all experts
    source: int = 0  # of tensors that are joined: 0 for gates, 1 for ups


Pieces = dict[Piece, str]  # each piece and its key


def pieces_of(model: Any, keys: Iterable[str], state: dict[str, Tensor], suffixes: Sequence[str]) -> dict[str, Pieces]:
    """The keys for each tensor of the model, by its name. transformers maps published names to its own. `suffixes`
    follow the name of a weight."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    sources = {pattern: index for entry in converters for index, pattern in enumerate(entry.source_patterns)}
    split = {pattern for entry in converters if len(entry.target_patterns) > 1 for pattern in entry.source_patterns}

    def target_of(key: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:  # as transformers does: a renaming was not meant for this key
            return key, None
        return target, pattern

    found: dict[str, Pieces] = defaultdict(dict)
    for key in keys:
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), "")
        name = key.removesuffix(suffix) + (".weight" if suffix.startswith(_INSTEAD) else "")
        target, pattern = target_of(name)
        if suffix and target not in state:  # a name that only happens to end so
            suffix, (target, pattern) = "", target_of(key)
        if pattern in split:
            raise ValueError(f"path: expected a tensor for each of the model's, got {key}, which transformers splits")
        expert = re.search(r"\bexperts\.(\d+)\.", key) if pattern is not None else None
        piece = Piece(suffix, int(expert[1]) if expert else None, sources.get(pattern or "", 0))
        if (other := found[target].setdefault(piece, key)) != key:
            raise ValueError(f"path: expected one tensor for {target}, got {other} and {key}")
    return found


class Checks:
    """Compares a checkpoint with what the model expects. All complaints are raised together."""

    def __init__(self, headers: dict[str, Header]) -> None:
        self.headers = headers
        self.problems: list[str] = []

    def expect(self, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...] | None) -> None:
        header = self.headers[key]
        if header.shape != shape:
            self.problems.append(f"{key}: expected shape {list(shape)}, got {list(header.shape)}")
        elif dtypes is not None and header.dtype not in dtypes:
            self.problems.append(f"{key}: expected {' or '.join(dtypes)}, got {header.dtype}")

    def expect_all(self, target: str, pieces: Pieces, expected: list[Piece]) -> bool:
        """Whether `pieces` are the expected ones for `target`."""
        absent = [piece for piece in expected if piece not in pieces]
        self.problems += [f"missing {_name(target, piece)}" for piece in absent]
        self.problems += [f"unexpected {key}" for piece, key in pieces.items() if piece not in expected]
        return not absent

    def complain(self, path: Path) -> None:
        if self.problems:
            rest = f"; and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else ""
            raise ValueError(f"path: {path} does not fit the model: {'; '.join(self.problems[:SHOWN])}{rest}")


def _name(target: str, piece: Piece) -> str:
    of_expert = "" if piece.expert is None else f" of expert {piece.expert}, part {piece.source}"
    return f"{target}{piece.suffix}{of_expert}"


def matches(patterns: Iterable[str] | None, name: str) -> bool:
    """Whether `name` matches one of transformers' patterns."""
    return any(re.search(pattern, name) for pattern in patterns or ())
