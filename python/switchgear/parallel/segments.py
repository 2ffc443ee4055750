# SPDX-License-Identifier: BSD-3-Clause
"""Memory that processes of one machine share. It has no name in any file system, so a killed process leaves nothing.

A rank publishes its process, the file's number there, and the name that it gave to the memory. That is not yet proof:
the process may have ended, and its number may belong to another one. So a segment is mapped only if it is anonymous
memory of the same user with exactly this name, which contains a random number, and as large as expected. Seals keep
it so: a file that shrinks later would kill each process that reads its end.
"""

from __future__ import annotations

import mmap
import os
import secrets
from typing import NamedTuple


class Address(NamedTuple):
    """Where another process finds a segment."""

    process: int
    file: int
    name: str


def random_name(what: str) -> str:
    return f"switchgear-{what}-{secrets.token_hex(8)}"


def create(name: str, size: int) -> tuple[int, mmap.mmap]:
    """A new segment of zeros: its file, and its map."""
    import fcntl  # not on every system, as memfd_create

    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(file, 0o600)
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return file, mmap.mmap(file, size)
    except BaseException:
        os.close(file)
        raise


def attach(address: Address, size: int) -> mmap.mmap:
    """Maps a segment of another process.

    Raises:
        OSError: it cannot be opened, for instance since the process is gone or belongs to another user.
        ValueError: it is something else, or of another size.
    """
    import fcntl

    process, file, name = int(address.process), int(address.file), str(address.name)
    opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.readlink(f"/proc/self/fd/{opened}")
        if found != f"/memfd:{name} (deleted)":
            raise ValueError(f"segment: expected {name} of process {process}, got {found}")
        status = os.fstat(opened)
        if status.st_uid != os.geteuid():
            raise ValueError(f"segment: expected memory of user {os.geteuid()}, got user {status.st_uid}'s")
        if status.st_size != size or not fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError(f"segment: expected {size} bytes that cannot shrink, got {status.st_size}")
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)
