# SPDX-License-Identifier: BSD-3-Clause
"""Maps the tensors of a published checkpoint to those of a model, and checks that they fit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from switchgear.integrations.checkpoint_files import Header

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of dtypes
SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"  # suffixes of a weight's name
QWEIGHT, QZEROS, QSCALES, GROUPS_OF = ".qweight", ".qzeros", ".scales", ".g_idx"  # instead of .weight
CT_PACKED, CT_ZEROS, CT_SCALE = ".weight_packed", ".weight_zero_point", ".weight_scale"
CT_SHAPE, CT_GROUPS = ".weight_shape", ".weight_g_idx"
OF_GROUPS = (QWEIGHT, QZEROS, QSCALES, GROUPS_OF, CT_PACKED, CT_ZEROS, CT_SCALE, CT_SHAPE, CT_GROUPS)
SUFFIXES = (SCALE, BLOCKS, SCALES, *OF_GROUPS)
SHOWN = 8  # complaints listed at a time


class Piece(NamedTuple):
    """Which part of a model's tensor a tensor of a checkpoint is."""

    suffix: str = ""  # one of pieces_of; empty for the weight itself
    expert: int | None = None  # None: all experts
    source: int = 0  # of tensors that are joined: 0 for gates, 1 for ups


Pieces = dict[Piece, str]  # each piece and its key


def pieces_of(
    model: Any, keys: Iterable[str], state: dict[str, Tensor], suffixes: Sequence[str] = SUFFIXES
) -> dict[str, Pieces]:
    """The keys for each tensor of the model, by its name. transformers maps published names to its own. `suffixes`
    follow the name of a weight; those of groups, and those that begin with .weight_, stand instead of .weight."""
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
        is_instead = suffix in OF_GROUPS or suffix.startswith(".weight_")
        name = key.removesuffix(suffix) + (".weight" if is_instead else "")
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
        """ValueError if there are complaints."""
        if self.problems:
            rest = f"; and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else ""
            raise ValueError(f"path: {path} does not fit the model: {'; '.join(self.problems[:SHOWN])}{rest}")


def _name(target: str, piece: Piece) -> str:
    of_expert = "" if piece.expert is None else f" of expert {piece.expert}, part {piece.source}"
    return f"{target}{piece.suffix}{of_expert}"


def matches(patterns: Iterable[str] | None, name: str) -> bool:
    """Whether `name` matches one of transformers' patterns."""
    return any(re.search(pattern, name) for pattern in patterns or ())
