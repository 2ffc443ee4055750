# SPDX-License-Identifier: BSD-3-Clause
"""Files and folders that are complete or not there, whatever interrupts their writing, and the bytes of tensors."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor, nn

from switchgear.utils.packages import first_line

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

AnyPath = str | os.PathLike[str]

SHARED = 16 << 20  # bytes by which tensors of a file may exceed it, since tied ones count twice
PARTIAL = ".partial"  # suffix of a folder that is being written
UNFINISHED = ".unfinished"  # suffix of a file that is being written
JOURNAL, LOCK = "journal.json", "lock"  # files in a folder that is being written
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NEW = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_AT_ONCE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # a pipe would wait for a writer
MOST_JSON = 1 << 28  # bytes: the index of a store with a million experts has 20 MB


class DiskFull(OSError):
    """There is no room for a file. What was complete before still is."""

    def __str__(self) -> str:
        return str(self.strerror) if self.filename is None else super().__str__()


# ---- one file --------------------------------------------------------------------------------------------------------


def unfinished_of(path: Path) -> Path:
    """A random name beside the path: no two processes write to the same file, and no link can be planted there."""
    return path.with_name(f"{path.name[:48]}.{secrets.token_hex(6)}{UNFINISHED}")


@contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Yields an empty file to write to. It replaces `path`, or what a link there leads to, at once and durably when the
    block ends, with the permissions that were there; if the block fails, `path` stays as it was.

    Raises:
        IsADirectoryError: path is a folder. ValueError: path is a pipe or a device. Both before the block.
        DiskFull: there is no room. OSError: the file cannot be written for another reason.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists():
        require_regular(path, path.stat())
    path = path.resolve()
    unfinished = unfinished_of(path)
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_EXCL | _NEW, 0o666))
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # no earlier file, or a file system without permissions
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if (number := _number_of(error)) in NO_ROOM and not isinstance(error, DiskFull):
            raise DiskFull(number, os.strerror(number), str(path)) from error
        raise


def _number_of(error: BaseException) -> int:
    """The system's number of an error; 0 for none. safetensors has it in the text."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else 0


@contextmanager
def writing(path: AnyPath) -> Iterator[IO[bytes]]:
    """Like `replacing`, and opens the file."""
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        yield file


def write_whole(path: AnyPath, text: str) -> None:
    """Writes text in UTF-8, line ends as they are, like `writing`."""
    with writing(path) as file:
        file.write(text.encode())


def save_whole(path: AnyPath, value: object) -> None:
    """Calls torch.save, like `writing`. Given a path, torch 2.8 ignores a failed final write."""
    with writing(path) as file:
        torch.save(value, file)


# ---- files of others -------------------------------------------------------------------------------------------------


def require_regular(path: AnyPath, found: os.stat_result) -> None:
    """ValueError for a pipe or a device, which may have no end. found: of stat."""
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"path: expected a file, got {path}, which is a pipe, a device or a folder")


@contextmanager
def reading(path: AnyPath) -> Iterator[IO[bytes]]:
    """Opens a file to read, or what a link there leads to.

    Raises:
        ValueError: path is a pipe or a device. OSError: it cannot be read.
    """
    with open(path, "rb", opener=lambda name, _: os.open(name, _AT_ONCE)) as file:
        require_regular(path, os.fstat(file.fileno()))
        yield file


def is_gguf(path: AnyPath) -> bool:
    """Whether a name is one of a GGUF file."""
    return Path(path).suffix == ".gguf"


def read_json(path: AnyPath, **options: Any) -> Any:
    """The value of a JSON file of at most MOST_JSON bytes. options: of json.loads.

    Raises:
        ValueError: any other file. OSError: it cannot be read.
    """
    with reading(path) as file:
        data = file.read(MOST_JSON + 1)
    if len(data) > MOST_JSON:
        raise ValueError(f"path: expected at most {MOST_JSON} bytes of JSON, got more in {path}")
    try:
        return json.loads(data, **options)
    except RecursionError as error:
        raise ValueError(f"path: expected JSON, got brackets in brackets in {path}") from error


def load_saved(path: AnyPath) -> Any:
    """What torch.save has written: tensors, numbers and texts, in dicts, lists and tuples. Runs no code from the file.

    Raises:
        ValueError: any other file, and one that describes more than it holds, such as a tensor with strides of 0.
        OSError: it cannot be read.
    """
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            _require_uncompressed(file)
            value = torch.load(file, map_location="cpu", weights_only=True)
            _require_held(value, size + SHARED)
        except Exception as error:  # torch.load raises many kinds for files of others
            raise ValueError(f"path: expected a file of torch.save, got {path} ({first_line(error)})") from error
    return value


def _require_uncompressed(file: IO[bytes]) -> None:
    """torch.save compresses nothing, torch.load decompresses whatever it gets."""
    is_archive = file.read(2) == b"PK"
    file.seek(0)
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
        file.seek(0)


def _require_held(value: Any, left: int) -> None:
    """Every entry of a container takes a byte of the file, and so does every byte of a tensor. Entries that occur twice
    count twice, for whoever walks through them or copies them does so as often."""
    waiting = [value]
    while waiting and left >= 0:
        item = waiting.pop()
        if isinstance(item, Tensor):
            if type(item) not in (Tensor, nn.Parameter) or item.layout is not torch.strided or item.is_quantized:
                raise ValueError("it has tensors that are not plain")
            if item.device.type != "cpu" or item.nbytes > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor {list(item.shape)} is larger than its memory")
            left -= item.nbytes
        elif isinstance(item, (dict, list, tuple, set)) and (left := left - len(item)) >= 0:
            waiting += (*item.keys(), *item.values()) if isinstance(item, dict) else item
    if left < 0:
        raise ValueError("it describes more than it holds")


# ---- a folder that is written piece by piece -------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What is written into a folder, for messages, and how its errors are raised."""

    name: str  # such as "store"
    argument: str  # of the public function: where it is written
    pieces: str  # such as "layers"; the journal lists them under this key
    inputs: str  # what it is made from, such as "form or model"
    error: type[Exception]
    full: type[DiskFull]  # a subclass of `error`, too

    @contextmanager
    def named_errors(self, path: Path) -> Iterator[None]:
        """Raises an OSError in the block as an error of this kind that names the path."""
        try:
            yield
        except OSError as error:
            if isinstance(error, self.error):
                raise
            reason = error.strerror or str(error)
            if error.errno in NO_ROOM:
                advice = f"free some and write the same {self.name} again; finished {self.pieces} stay"
                raise self.full(error.errno, f"{path}: no room ({reason}); {advice}") from error
            raise self.error(f"{path}: {reason}") from error


class Unfinished:
    """A folder that is written piece by piece. It has another name until all are there (`commit`).

    A journal in it lists the finished pieces, so that an interrupted run can go on. If no piece is finished, the folder
    is removed.

    Attributes:
        folder: to write into.
        pieces: an entry of JSON's types for each finished piece.
    """

    def __init__(self, kind: Kind, target: Path, identity: Any) -> None:
        self.kind, self.target, self.folder = kind, target, target.with_name(target.name + PARTIAL)
        self.pieces: dict[str, Any] = {}
        self._identity = identity

    @classmethod
    @contextmanager
    def opened(cls, kind: Kind, target: Path, identity: Any, resume: bool) -> Iterator[Unfinished]:
        """Goes on with an earlier run of equal identity, of JSON's types, or begins; without `resume`, begins anew.

        Raises:
            kind.error: there is a folder of something else; another process writes there; it cannot be written.
        """
        unfinished = cls(kind, target, identity)
        folder = unfinished.folder
        with kind.named_errors(folder):
            if has_links(folder):
                unfinished._refuse(f"expected no links in {folder}, through which files elsewhere would be written")
            is_ours = (folder / JOURNAL).is_file() or not folder.exists()
            if not is_ours and any(file.name != LOCK and file.suffix != UNFINISHED for file in folder.iterdir()):
                unfinished._refuse(f"expected no {folder}, got a folder that is no unfinished {kind.name}")
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = locked(folder)
            except BlockingIOError:
                unfinished._refuse(f"another process is writing {folder}")
        with lock:
            if resume:
                unfinished._read()
            try:
                unfinished.clear(file.name for file in folder.iterdir() if resume and file.suffix != UNFINISHED)
                unfinished._save()
                yield unfinished
            except BaseException:
                if not unfinished.pieces:
                    unfinished._remove()
                raise

    def add(self, piece: str, entry: Any) -> None:
        """A piece is finished."""
        self.pieces[piece] = entry
        self._save()

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Removes all other files."""
        names = {JOURNAL, LOCK, *keep}
        for file in self.folder.iterdir():
            if file.name not in names and not file.is_dir():
                file.unlink()

    def commit(self) -> None:
        """Gives the folder the name of the target."""
        with self.kind.named_errors(self.target):
            _sync(self.folder)
            os.rename(self.folder, self.target)
            for name in (JOURNAL, LOCK):
                (self.target / name).unlink(missing_ok=True)
            _sync(self.target.parent)

    def _read(self) -> None:
        """Takes over what an earlier run has finished."""
        file = self.folder / JOURNAL
        if not file.is_file():
            return
        try:
            found = read_json(file)
            identity, pieces = found["identity"], dict(found[self.kind.pieces])
        except (ValueError, KeyError, TypeError):
            self._refuse(f"expected the journal of an unfinished {self.kind.name}, got another file {file}")
        if identity != self._identity:
            self._refuse(
                f"{self.folder} holds an unfinished {self.kind.name} of another {self.kind.inputs}; remove it, or "
                "start again with resume=False"
            )
        self.pieces = pieces

    def _save(self) -> None:
        file = self.folder / JOURNAL
        with self.kind.named_errors(file):
            write_whole(file, json.dumps({"identity": self._identity, self.kind.pieces: self.pieces}))

    def _remove(self) -> None:
        with suppress(OSError):  # it has its name already, or there is a folder in it
            self.clear()
            for name in (JOURNAL, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def _refuse(self, reason: str) -> NoReturn:
        raise self.kind.error(f"{self.kind.argument}: {reason}")


def has_links(folder: Path) -> bool:
    """Whether a folder is a link, or anything in it. A run that writes there makes none."""
    return folder.is_symlink() or (folder.is_dir() and any(file.is_symlink() for file in folder.rglob("*")))


def locked(folder: Path) -> IO[str]:
    """Until the returned file is closed, other calls for the folder raise BlockingIOError, in any process."""
    file = open(os.open(folder / LOCK, os.O_WRONLY | _NEW, 0o666), "w")  # noqa: SIM115
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            file.close()
            raise
    return file


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


# ---- memory ----------------------------------------------------------------------------------------------------------


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which it keeps alive."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
