# SPDX-License-Identifier: BSD-3-Clause
"""A limit on the memory of a process: a control group of Linux (v1 or v2), made for one run and removed after it.

The kernel counts the process's own pages and the pages of files that it is the first to read. A process that needs more
than the limit loses pages of files, and is killed when there are none.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """A control group with a limit."""

    folder: Path
    limit: int  # bytes

    def command(self, command: Sequence[str]) -> list[str]:
        """The command, run in this group from its first instruction on."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder), *command]

    def own_bytes(self) -> int:
        """Pages of the processes themselves, which cannot be dropped: no pages of files."""
        stat = (self.folder / "memory.stat").read_text()
        found = re.search(r"^(?:total_rss|anon) (\d+)", stat, re.MULTILINE)
        return int(found.group(1)) if found else 0

    def peak_bytes(self) -> int | None:
        """The most that was counted at once, pages of files included; None where the kernel does not say."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with suppress(OSError, ValueError):
                return int((self.folder / name).read_text())
        return None


@contextmanager
def memory_limit(nbytes: int) -> Iterator[MemoryGroup | str]:
    """A group of `nbytes`, or why none can be made."""
    reasons = []
    for parent, name in _parents():
        folder = parent / f"switchgear-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            try:
                (folder / name).write_text(str(nbytes))
            except OSError as error:
                reasons.append(f"{folder / name}: {error.strerror}")
                continue
            yield MemoryGroup(folder, nbytes)
            return
        finally:
            _remove(folder)
    yield "; ".join(reasons) or "this system has no control groups for memory"


def _parents() -> Iterator[tuple[Path, str]]:
    """Groups that may have a child, with the name of its limit. A child of our own group keeps the limits around it. In
    v2 a group with processes has no limited children, so its parent comes next."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    own = {controllers: path.strip("/") for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers, path in own.items():
        if "memory" in controllers.split(","):
            folder = ROOT / "memory" / path
            yield (folder if folder.is_dir() else ROOT / "memory"), "memory.limit_in_bytes"
            return
    if "" in own:
        folder = ROOT / own[""]
        for parent in (folder, *folder.parents):
            if parent != ROOT and ROOT not in parent.parents:
                return
            with suppress(OSError):
                if "memory" in (parent / "cgroup.subtree_control").read_text().split():
                    yield parent, "memory.max"


def _remove(folder: Path) -> None:
    """The kernel lets go of a group a moment after its last process has ended."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)
