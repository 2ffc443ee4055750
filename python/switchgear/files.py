# SPDX-License-Identifier: BSD-3-Clause
"""Files that are whole or not there, the bytes of tensors that go into them, and directories of one writer."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows, where directories are not locked
    fcntl = None  # type: ignore[assignment]

AnyPath = str | os.PathLike[str]

LOCK = "lock"  # a file in a directory that is written
UNFINISHED = ".unfinished"  # suffix of a file that is being written


def unfinished_of(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


@contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """The name to write a file under. It replaces `path`, or what a link there leads to, at once and durably when the
    block ends, with the permissions of that; if the block fails, `path` stays as it was. Raises IsADirectoryError for a
    folder, and ValueError for a pipe or a device, which a file would replace, before the block."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"path: expected a file, got {path}, which is a pipe or a device")
    path = path.resolve()
    unfinished = unfinished_of(path)
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # no earlier file, or a file system without permissions
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once, durably, with the text in UTF-8, line ends as they are. Raises OSError."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(text.encode())


def save_whole(path: AnyPath, value: object) -> None:
    """torch.save, of a whole file or none. Raises OSError or RuntimeError."""
    # Given a name, torch 2.8 takes no notice if the last bytes cannot be written.
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(value, file)


def locked(folder: Path) -> IO[str]:
    """Until the returned file is closed, other calls for the directory raise BlockingIOError, in any process."""
    file = open(folder / LOCK, "w")  # noqa: SIM115
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            file.close()
            raise
    return file


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which it keeps."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
