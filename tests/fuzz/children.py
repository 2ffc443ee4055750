# SPDX-License-Identifier: BSD-3-Clause
"""Runs the cases of a fuzzer in child processes; a new one continues after a crash or a hang."""

from __future__ import annotations

import argparse
import collections
import mmap
import re
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

LIMIT = 20.0  # seconds for a case


class Fuzzer(NamedTuple):
    """Case number i of a seed depends on these two alone."""

    script: str  # the file of the program
    unit: str  # what the cases are called, and the option that counts them
    title: Callable[[int, int], str]  # of a case
    check: Callable[[int, int], str | None]  # runs a case; returns its title and what is wrong, or None


def _work(fuzzer: Fuzzer, seed: int, numbers: range, progress: Path) -> None:
    """Runs cases; writes the number of the current one to a file, and faults to the standard output."""
    warnings.simplefilter("ignore")
    with progress.open("r+b") as file, mmap.mmap(file.fileno(), 8) as shared:
        for number in numbers:
            struct.pack_into("q", shared, 0, number)
            fault = fuzzer.check(seed, number)
            if fault is not None:
                print(f"{number} {fault}".replace("\n", " "), flush=True)
        struct.pack_into("q", shared, 0, -2)


class Child:
    """A child process over a range of cases. It is restarted after a case that ends it."""

    def __init__(self, fuzzer: Fuzzer, seed: int, numbers: range, folder: Path) -> None:
        self.fuzzer, self.seed, self.numbers, self.faults = fuzzer, seed, numbers, list[str]()
        self.progress = folder / f"progress {numbers.start}"
        self.output = folder / f"output {numbers.start}"
        self.start()

    def start(self) -> None:
        self.progress.write_bytes(struct.pack("q", -1))
        numbers = [str(number) for number in (self.numbers.start, self.numbers.stop, self.numbers.step)]
        command = [
            sys.executable,
            self.fuzzer.script,
            "--seed",
            str(self.seed),
            "--child",
            *numbers,
            str(self.progress),
        ]
        with self.output.open("a") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        self.current, self.since = -1, time.monotonic()

    def is_done(self) -> bool:
        """Looks at the process; ends and restarts it if needed."""
        (current,) = struct.unpack("q", self.progress.read_bytes())
        if current != self.current:
            self.current, self.since = current, time.monotonic()
        ended = self.process.poll()
        limit = LIMIT if self.current >= 0 else 300  # the import may be slow
        if ended is None and time.monotonic() - self.since < limit:
            return False
        if self.current == -2 and ended == 0:
            return True
        if ended is None:
            self.process.kill()
            self.process.wait()
        if self.current == -1:
            raise RuntimeError(f"the child process does not start: exit status {ended}")
        what = f"hangs for {LIMIT:.0f} s" if ended is None else f"ends the process: status {ended}"
        self.faults.append(f"{self.current} {self.fuzzer.title(self.seed, self.current)} {what}")
        self.numbers = range(self.current + self.numbers.step, self.numbers.stop, self.numbers.step)
        if not self.numbers:
            return True
        self.start()
        return False


def run(fuzzer: Fuzzer, count: int, seed: int, jobs: int, first: int = 0) -> list[str]:
    """The faults of some cases, each as a line."""
    with tempfile.TemporaryDirectory() as folder:
        children = [Child(fuzzer, seed, range(first + job, first + count, jobs), Path(folder)) for job in range(jobs)]
        try:
            while sum(one.is_done() for one in children) < jobs:
                time.sleep(0.05)
        finally:
            for one in children:
                if one.process.poll() is None:
                    one.process.kill()
        written = [line for one in children for line in one.output.read_text().splitlines()]
        return sorted(
            written + [fault for one in children for fault in one.faults], key=lambda line: int(line.split()[0])
        )


def _kind(fault: str) -> str:
    """Faults that differ in numbers only are shown once."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", fault.partition(" ")[2])


def main(fuzzer: Fuzzer, description: str | None, argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{fuzzer.unit}", dest="count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        _work(fuzzer, args.seed, range(*map(int, args.child[:3])), Path(args.child[3]))
        return 0
    start = time.monotonic()
    faults = run(fuzzer, args.count, args.seed, args.jobs, args.first)
    kinds = collections.Counter(_kind(fault) for fault in faults)
    shown = set()
    for fault in faults:
        kind = _kind(fault)
        if kind not in shown:
            print(f"{kinds[kind]} x, first: {fault}")
            shown.add(kind)
    print(f"{args.count} cases, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0
