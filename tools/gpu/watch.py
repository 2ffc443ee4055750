# SPDX-License-Identifier: BSD-3-Clause
"""Runs a program so that nothing it does ends the run: it may hang, crash, print what it likes, or not exist.

A program has a process group of its own, which is killed as a whole. `run` runs a plain program with a time limit.
`guide` runs one that prints lines.py's lines: it kills the program if a case is silent for too long, notes which case
that was, and starts the program again after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.lines import MARK

Row = dict[str, Any]  # case, verdict, seconds, detail, and results of the case
GOOD = ("passed", "finding", "skipped")
GRACE = 1.0  # seconds between asking a program to end and killing it
ENDING = 10.0  # seconds that a program has after its last output: a device's memory is freed then
MOST_RESTARTS = 6  # each costs the start of a process, and a device that hangs six times is not worth more
MOST_LINE = 1 << 20  # bytes; a longer line is no line of lines.py


@dataclass(frozen=True)
class Program:
    command: list[str]
    log: Path
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict)


def _start(program: Program, output: int | None = None) -> subprocess.Popen[bytes]:
    program.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **program.environment}
    with open(program.log, "ab") as log:
        log.write(f"$ {' '.join(program.command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            program.command, cwd=program.cwd, env=environment, stdin=subprocess.DEVNULL,
            stdout=log if output is None else output, stderr=log, start_new_session=True,
        )  # fmt: skip


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and all processes of its group. Returns even if one cannot be killed, as inside a driver call."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):  # children that outlive the program
        os.killpg(process.pid, signal.SIGKILL)


def verdict_of(status: int | None) -> tuple[str, str]:
    """(verdict, detail) of an exit status."""
    if status == 0:
        return "passed", ""
    if status is None:
        return "failed", "it did not end"
    if status < 0:
        return "fault", f"killed by {signal.Signals(-status).name}"
    return "failed", f"exit status {status}"


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log: what a program said last."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-count:] if line.strip())[-400:]


def run(name: str, program: Program, limit: float) -> Row:
    """Runs a plain program; its row."""
    start = time.monotonic()
    try:
        process = _start(program)
    except OSError as error:
        return {"case": name, "verdict": "missing", "seconds": 0.0, "detail": str(error)}
    try:
        verdict, detail = verdict_of(process.wait(limit))
    except subprocess.TimeoutExpired:
        verdict, detail = "time", f"not done within {limit:.0f} s"
    finally:
        end_group(process)
    if verdict != "passed":
        detail = f"{detail}: {last_lines(program.log)}"
    return {"case": name, "verdict": verdict, "seconds": time.monotonic() - start, "detail": detail}


# ---- programs that print lines ---------------------------------------------------------------------------------------


def _lines(process: subprocess.Popen[bytes], log: Path, wait: Callable[[], float]) -> Iterator[Row | None]:
    """The program's lines as they come; None when `wait` seconds have passed without one. Ends with its output."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    os.set_blocking(descriptor, False)
    rest = b""
    with selectors.DefaultSelector() as selector, open(log, "ab") as file:
        selector.register(descriptor, selectors.EVENT_READ)
        last = time.monotonic()
        while True:
            if not selector.select(max(0.0, min(0.5, last + wait() - time.monotonic()))):
                if process.poll() is not None and not selector.select(0.1):
                    return  # ended; a child of it may hold the pipe
                if time.monotonic() - last >= wait():
                    yield None
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-MOST_LINE:]
            for line in lines:
                value = _parsed(line)
                if value is None:
                    file.write(line + b"\n")
                else:
                    last = time.monotonic()
                    yield value
            file.flush()
            if time.monotonic() - last >= wait():  # it talks, but does not get on
                yield None


def _parsed(line: bytes) -> Row | None:
    if not line.startswith(MARK.encode()):
        return None
    try:
        value = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Guide:
    """Runs a program of many cases to its end, with restarts. `note` is called with the row of a case when it starts
    (verdict running) and when it ends."""

    def __init__(
        self, name: str, program: Program, note: Callable[[Row], None], *, limit: float, silence: float,
        first: float = 60.0,
    ) -> None:  # fmt: skip
        """limit: seconds for all; silence: for a case; first: until the first case (imports, and the device's start)"""
        self.name, self.program, self.note = name, program, note
        self.end, self.silence, self.first = time.monotonic() + limit, silence, first
        self.cases: list[str] = []
        self.rows: dict[int, Row] = {}
        self.current: int | None = None
        self.started, self.since = False, 0.0

    def run(self) -> list[Row]:
        begin = 0
        for _ in range(MOST_RESTARTS + 1):
            following = self._once(begin)
            if following is None:
                break
            begin = following
        for number in range(len(self.cases)):
            if number not in self.rows:
                reason = "no time was left" if time.monotonic() >= self.end else "the program had ended"
                self._end(number, "left out", reason)
        return [row for _, row in sorted(self.rows.items())]

    def _end(self, number: int, verdict: str, detail: str, /, **values: Any) -> None:
        seconds = round(time.monotonic() - self.since, 3) if self.current == number else 0.0
        name = self.cases[number] if 0 <= number < len(self.cases) else self.name
        self.rows[number] = {"case": name, "verdict": verdict, "seconds": seconds, "detail": detail, **values}
        self.note(self.rows[number])
        self.current = None

    def _take(self, line: Row) -> None:
        if "cases" in line:
            self.cases = [str(name) for name in line["cases"]]
        elif "starts" in line:
            self.current, self.since, self.started = int(line["starts"]), time.monotonic(), True
            self.note({"case": self.cases[self.current], "verdict": "running", "seconds": 0.0, "detail": ""})
        elif "ends" in line:
            values = {key: value for key, value in line.items() if key not in ("ends", "verdict", "detail")}
            verdict = str(line.get("verdict", "passed"))
            self._end(int(line["ends"]), verdict, str(line.get("detail", "")), **values)

    def _once(self, begin: int) -> int | None:
        """Runs the program from case `begin`; the case to go on with, or None at the end."""
        command = [*self.program.command, *(["--from", str(begin)] if begin else [])]
        program = Program(command, self.program.log, self.program.cwd, self.program.environment)
        try:
            process = _start(program, subprocess.PIPE)
        except OSError as error:
            self._end(-1, "missing", str(error))
            return None
        self.current, self.started = None, False
        quiet = ""
        try:
            for line in _lines(process, program.log, lambda: self._patience()):
                if line is None:
                    over = time.monotonic() >= self.end
                    quiet = "time" if over else "hang"
                    break
                self._take(line)
            if not quiet:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING)
        finally:
            end_group(process)
            if process.stdout is not None:
                process.stdout.close()
        return self._after(quiet, process.poll(), begin)

    def _patience(self) -> float:
        return max(0.0, min(self.silence if self.started else self.first, self.end - time.monotonic()))

    def _after(self, quiet: str, status: int | None, begin: int) -> int | None:
        verdict, detail = verdict_of(status)
        if quiet:
            verdict, detail = quiet, "no time was left" if quiet == "time" else f"silent for {self.silence:.0f} s"
        at = self.current
        if at is None:  # before the first case, between two, or after the last
            done = [number for number in self.rows if number >= begin]
            if not quiet and done and status in (0, 1):
                return None  # 1: a case failed, as its row says
            verdict = "failed" if verdict == "passed" else verdict
            self._end(-1, verdict, f"{detail or 'no case'}: {last_lines(self.program.log)}")
            at = max(done, default=len(self.cases))
        else:
            self._end(at, verdict if verdict != "passed" else "failed", f"{detail}: {last_lines(self.program.log)}")
        following = at + 1
        return following if following < len(self.cases) and time.monotonic() < self.end else None
