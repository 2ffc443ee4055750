# SPDX-License-Identifier: BSD-3-Clause
"""Files that are whole or not there, and the bytes of tensors that go into them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from torch import Tensor

UNFINISHED = ".unfinished"  # suffix of a file that is being written


def unfinished_of(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once, durably. Raises OSError."""
    unfinished = unfinished_of(path)
    with open(unfinished, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which it keeps."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
