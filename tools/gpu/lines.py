# SPDX-License-Identifier: BSD-3-Clause
"""What a program that runs cases prints, so that watch.py can tell which case runs, and go on after one that hangs.

    @gpu {"cases": [NAME, …]}                                        first: all cases, in order
    @gpu {"starts": NUMBER}                                          before a case touches the device
    @gpu {"ends": NUMBER, "verdict": VERDICT, "detail": TEXT, …}     after it; more keys are its results

VERDICT is passed, failed, finding (worth a look, no failure) or skipped. With `--from NUMBER` a program leaves out the
cases before that one. Everything else that a program prints is its log.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

MARK = "@gpu "


class Finding(Exception):
    """Raised by a case whose result is worth a look, but no failure."""


def say(descriptor: int = 1, /, **values: Any) -> None:
    """Prints a line at once, in one write, whatever else buffers standard output, or has begun a line there."""
    sys.stdout.flush()
    os.write(descriptor, f"\n{MARK}{json.dumps(values)}\n".encode())


def parser_of(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N", help="leave out the cases before N")
    return parser


def serve(cases: Sequence[tuple[str, Callable[[], dict[str, Any] | None]]], first: int = 0) -> int:
    """Runs the cases; each returns its results, or raises. Returns the exit status."""
    say(cases=[name for name, _ in cases])
    failed = False
    for number, (_, case) in enumerate(cases):
        if number < first:
            continue
        say(starts=number)
        try:
            say(ends=number, verdict="passed", **(case() or {}))
        except Finding as finding:
            say(ends=number, verdict="finding", detail=str(finding))
        except Exception as error:
            traceback.print_exc()
            say(ends=number, verdict="failed", detail=f"{type(error).__name__}: {error}"[:500])
            failed = True
    return 1 if failed else 0
