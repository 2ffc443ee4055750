# SPDX-License-Identifier: BSD-3-Clause
"""Runs a program so that nothing it does ends the run: it may hang, crash, print what it likes, or not exist.

A program has a process group of its own, which is killed as a whole. One that prints lines.py's lines is also killed if
a case is silent for too long, and started again after that case.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

from gpu.lines import MARK

Row = dict[str, Any]  # case, verdict, seconds, detail, and results of the case
GOOD = ("passed", "finding", "skipped")
GRACE = 1.0  # seconds between asking a program to end and killing it
ENDING = 10.0  # seconds that a program has after its last output: a device's memory is freed then
START = 60.0  # seconds until the first case: imports, and the device's start
MOST_RESTARTS = 6  # each costs the start of a process, and a device that hangs six times is not worth more
MOST_LINE = 1 << 20  # bytes; a longer line is no line of lines.py


@dataclass(frozen=True)
class Job:
    """A program. With `silence` it prints lines.py's lines, and a case silent for so many seconds has hung."""

    name: str
    command: list[str]
    limit: float  # seconds
    silence: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and all processes of its group. Returns even if one cannot be killed, as inside a driver call."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            break
    with contextlib.suppress(ProcessLookupError):  # children that outlive the program
        os.killpg(process.pid, signal.SIGKILL)


def describe_status(status: int | None) -> tuple[str, str]:
    """(verdict, detail) of an exit status."""
    if status == 0:
        return "passed", ""
    if status is None:
        return "failed", "it did not end"
    if status < 0:
        return "fault", f"killed by {signal.Signals(-status).name}"
    return "failed", f"exit status {status}"


def parse_line(line: bytes) -> Row | None:
    if not line.startswith(MARK.encode()):
        return None
    try:
        value = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_lines(output: IO[bytes], lines: SimpleQueue[bytes]) -> None:
    for line in iter(partial(output.readline, MOST_LINE), b""):
        lines.put(line)


class Watch:
    """Runs a job to its end, with restarts. `note` is called with the row of a case when it starts (verdict running)
    and when it ends; a program without lines.py's lines is one case."""

    def __init__(self, job: Job, log: Path, folder: Path, note: Callable[[Row], None]) -> None:
        """folder: in which the program runs."""
        self.job, self.log, self.folder, self.note = job, log, folder, note
        self.end = time.monotonic() + job.limit
        self.cases: list[str] = []
        self.rows: dict[int, Row] = {}  # by number of the case; -1: the program
        self.current: int | None = None
        self.since = 0.0
        self.said: deque[str] = deque(maxlen=3)

    def run(self) -> list[Row]:
        following: int | None = 0
        for _ in range(MOST_RESTARTS + 1):
            if following is not None:
                following = self._run_from(following)
        for number in range(len(self.cases)):
            if number not in self.rows:
                is_over = time.monotonic() >= self.end
                self._end_case(number, "left out", "no time was left" if is_over else "the program had ended")
        return [row for _, row in sorted(self.rows.items())]

    def _start_case(self, number: int) -> None:
        self.current, self.since = number, time.monotonic()
        self.note({"case": self._name(number), "verdict": "running", "seconds": 0.0, "detail": ""})

    def _end_case(self, number: int, verdict: str, detail: str, /, **values: Any) -> None:
        seconds = round(time.monotonic() - self.since, 3) if self.current == number else 0.0
        case = self._name(number)
        self.rows[number] = {"case": case, "verdict": verdict, "seconds": seconds, "detail": detail, **values}
        self.note(self.rows[number])
        self.current = None

    def _name(self, number: int) -> str:
        return self.cases[number] if 0 <= number < len(self.cases) else self.job.name

    def _take(self, line: Row) -> None:
        if "cases" in line:
            self.cases = [str(name) for name in line["cases"]]
        elif "starts" in line:
            self._start_case(int(line["starts"]))
        elif "ends" in line:
            number, verdict, detail = int(line.pop("ends")), line.pop("verdict", "passed"), line.pop("detail", "")
            self._end_case(number, str(verdict), str(detail), **line)

    def _run_from(self, begin: int) -> int | None:
        """Runs the program from case `begin`; the case to go on with, or None at the end."""
        command = [*self.job.command, *(["--from", str(begin)] if begin else [])]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.current = None
        if not self.job.silence:
            self._start_case(-1)
        with open(self.log, "ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            try:
                process = subprocess.Popen(
                    command, cwd=self.folder, env={**os.environ, "PYTHONUNBUFFERED": "1", **self.job.environment},
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self._end_case(-1, "missing", str(error))
                return None
            quiet = ""
            try:
                for line in self._lines(process):
                    if line is None:
                        quiet = "time" if time.monotonic() >= self.end else "hang"
                        break
                    value = parse_line(line)
                    if value is not None and self.job.silence:
                        self._take(value)
                    else:
                        log.write(line)
                        self.said.extend([line.decode(errors="replace").strip()] if line.strip() else [])
                if not quiet:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(ENDING)
            finally:
                end_group(process)
        return self._go_on(quiet, process.poll(), begin)

    def _lines(self, process: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
        """What the program prints, as it comes; None when it is silent for too long. Ends with the program: a child of
        it may hold its output open."""
        assert process.stdout is not None
        lines: SimpleQueue[bytes] = SimpleQueue()
        Thread(target=read_lines, args=(process.stdout, lines), daemon=True).start()
        last = time.monotonic()
        while True:
            patience = START if self.current is None and not self.rows else self.job.silence
            until = min(self.end, last + patience) if self.job.silence else self.end
            has_ended = process.poll() is not None
            if time.monotonic() >= until:  # it may talk, but does not get on
                yield None
            with contextlib.suppress(Empty):
                line = lines.get(timeout=0.1)
                last = time.monotonic() if line.startswith(MARK.encode()) else last
                yield line
                continue
            if has_ended:
                return

    def _go_on(self, quiet: str, status: int | None, begin: int) -> int | None:
        verdict, detail = describe_status(status)
        if quiet:
            verdict, detail = quiet, f"silent for {self.job.silence:.0f} s" if quiet == "hang" else "no time was left"
        number = self.current
        if number is None:  # before the first case, between two, or after the last
            done = [number for number in self.rows if number >= begin]
            if not quiet and done and status in (0, 1):
                return None  # 1: a case failed, as its row says
            number, last = -1, max(done, default=len(self.cases))
        else:
            last = number
        if verdict == "passed" and self.job.silence:
            verdict, detail = "failed", "it ended within a case" if number >= 0 else "no case"
        said = f": {' | '.join(self.said)[-400:]}" if verdict != "passed" else ""
        self._end_case(number, verdict, detail + said)
        is_last = last < 0 or last + 1 >= len(self.cases)
        return None if is_last or time.monotonic() >= self.end else last + 1
