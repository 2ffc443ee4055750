# SPDX-License-Identifier: BSD-3-Clause
"""A stand-in for any program of a run on a card, which works, or fails in one way. For tests of tools/gpu.

    fake_device.py [--cases N] [--seconds S] [--fault KIND] [--at N] [--plain] [--from N]

KIND: hang (and ignores requests to end), talk (prints on, but does not get on), wrong, raise, fault (a signal),
abrupt (exit status 3), orphan (leaves a child that holds its output), import (fails before the first case), slow.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from gpu.lines import Finding, parser_of, serve

KINDS = ("hang", "talk", "wrong", "raise", "fault", "abrupt", "orphan", "import", "slow", "finding")


def fail(kind: str) -> None:
    if kind in ("hang", "talk"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            if kind == "talk":
                print("still here", flush=True)
            time.sleep(0.02)
    if kind == "wrong":
        raise AssertionError("relative error 2.0e+00, expected at most 3.1e-02")
    if kind == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if kind == "finding":
        raise Finding("other bits than with swapped operands")
    if kind == "fault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "abrupt":
        os._exit(3)
    if kind == "orphan":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if kind == "slow":
        time.sleep(60)


def case(number: int, seconds: float, kind: str, at: int) -> dict[str, Any]:
    time.sleep(seconds)
    if number == at:
        fail(kind)
    return {"number": number}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each case")
    parser.add_argument("--fault", choices=KINDS)
    parser.add_argument("--at", type=int, default=1, help="the case that fails")
    parser.add_argument("--plain", action="store_true", help="print no lines of lines.py")
    args = parser.parse_args()
    if args.fault == "import":
        raise ImportError("libcudart.so.13: cannot open shared object file")
    if args.plain:
        for number in range(args.cases):
            case(number, args.seconds, args.fault or "", args.at)
        return 0
    cases = [(f"case {i}", partial(case, i, args.seconds, args.fault or "", args.at)) for i in range(args.cases)]
    return serve(cases, args.first)


if __name__ == "__main__":
    sys.exit(main())
