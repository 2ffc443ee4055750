# SPDX-License-Identifier: BSD-3-Clause
"""The console scripts `switchgear` and `switchgear-bench`. They are outside of the packages, whose import takes a
second or two: Ctrl-C would print a traceback from anywhere inside torch."""

from __future__ import annotations

import importlib
import os
import signal
from types import FrameType


def main() -> int:
    """Runs one command of `switchgear`; Ctrl-C ends it at once with one line, while it is imported, too."""
    return _run("switchgear.cli")


def bench() -> int:
    """Runs one command of `switchgear-bench`, likewise."""
    return _run("switchgear_bench")


def end_on_interrupt() -> None:
    """Lets Ctrl-C end the process until a command runs, unless the program has decided otherwise."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _run(package: str) -> int:
    end_on_interrupt()
    run = importlib.import_module(package).main
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return int(run())


def _end(number: int, frame: FrameType | None) -> None:
    """An exception would be caught, or turned into another one, by whatever is imported."""
    os.write(2, b"switchgear: interrupted\n")
    os._exit(130)
