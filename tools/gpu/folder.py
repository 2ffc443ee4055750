# SPDX-License-Identifier: BSD-3-Clause
"""The folder of results: a JSON file per case, written when the case starts and again when it ends, so that a run that
is cut off leaves all it found. FOLDER/STEP/JOB.CASE.json; logs are FOLDER/STEP/JOB.log."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def slug(text: str) -> str:
    """A name for a file; different texts have different ones."""
    short = re.sub(r"[^A-Za-z0-9_.=-]+", "-", text)[:80].strip("-.")
    return short if short == text else f"{short}-{zlib.crc32(text.encode()):08x}"


def write(path: Path, value: Any) -> None:
    """All or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}")
    half.write_text(json.dumps(value, indent=1, default=str) + "\n")
    half.replace(path)


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: str) -> None:
        """Puts results of an earlier run of this step aside."""
        old = self.path / step
        if old.exists():
            aside = self.path / "earlier"
            aside.mkdir(exist_ok=True)
            os.rename(old, aside / f"{step}-{time.strftime('%H%M%S')}-{len(list(aside.iterdir()))}")
        old.mkdir(parents=True)

    def note(self, step: str, job: str, row: Row) -> None:
        name = f"{slug(job)}.{slug(row['case'])}.json"
        write(self.path / step / name, {"step": step, "job": job, **row})

    def log(self, step: str, job: str) -> Path:
        return self.path / step / f"{slug(job)}.log"

    def rows(self, step: str) -> list[Row]:
        """The rows of a step in the order in which they were written."""
        files = sorted((self.path / step).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        rows = []
        for file in files:
            try:
                rows.append(json.loads(file.read_text()))
            except ValueError:
                continue
        return [row for row in rows if isinstance(row, dict) and {"step", "case", "verdict"} <= row.keys()]

    def values(self, name: str) -> Any:
        """A file of the run itself, or None."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None
