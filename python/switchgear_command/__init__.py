# SPDX-License-Identifier: BSD-3-Clause
"""The console script `switchgear`. It is outside the package, whose import takes a second or two: Ctrl-C would print a
traceback from anywhere inside torch."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> int:
    """Runs one command of `switchgear`; Ctrl-C ends it at once with one line, while it is imported, too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from switchgear.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _end(number: int, frame: FrameType | None) -> None:
    """An exception would be caught, or turned into another one, by whatever is imported."""
    os.write(2, b"switchgear: interrupted\n")
    os._exit(130)
