# SPDX-License-Identifier: BSD-3-Clause
"""What a GGUF file holds, as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...integrations.gguf_file import Array, GgufFile, Value, read_gguf
from ..common import CommandError

MOST_ITEMS, MOST_LETTERS = 6, 100  # of an array, of a string


def describe(path: Path) -> str:
    """Metadata, tensors, and the sums of each type. CommandError if the file cannot be read."""
    try:
        file = read_gguf(path)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    keys = [(repr(key)[1:-1], value.type, _show(value)) for key, value in file.metadata.items()]
    tensors = [
        (repr(name)[1:-1], tensor.type, "x".join(map(str, tensor.shape)), f"{tensor.data.nbytes:,}")
        for name, tensor in file.tensors.items()
    ]
    return "\n".join([*_align(keys), "", *_align([("tensor", "type", "shape", "bytes"), *tensors]), "", *_sums(file)])


def _sums(file: GgufFile) -> list[str]:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in file.tensors.values():
        numbers = 1
        for size in tensor.shape:
            numbers *= size
        for index, value in enumerate((1, numbers, tensor.data.nbytes)):
            counts[tensor.type][index] += value
            counts["all"][index] += value
    rows = [("type", "tensors", "numbers", "bytes", "bits of a number")]
    for name in sorted(counts, key=lambda name: (name == "all", -counts[name][2])):
        number, numbers, nbytes = counts[name]
        rows.append((name, str(number), f"{numbers:,}", f"{nbytes:,}", f"{8 * nbytes / numbers:.2f}"))
    return _align(rows)


def _show(value: Value) -> str:
    if not isinstance(value.value, Array):
        return _shorten(value.value)
    count = len(value.value.items)
    items = Array(value.value.type, value.value.items[:MOST_ITEMS]).tolist()
    return f"{count} {value.value.type}: " + ", ".join(map(_shorten, items)) + (", …" if count > len(items) else "")


def _shorten(value: Any) -> str:
    text = repr(value)  # shows control characters, which a terminal would obey
    return text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + "…"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
