# SPDX-License-Identifier: BSD-3-Clause
"""Files that are whole or not there, and the bytes of tensors that go into them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from torch import Tensor

UNFINISHED = ".unfinished"  # suffix of a file that is being written


def unfinished_of(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """The name to write a file under. It replaces `path` at once, durably, when the block ends; if the block fails,
    `path` stays as it was."""
    unfinished = unfinished_of(Path(path))
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once, durably. Raises OSError."""
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which it keeps."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
