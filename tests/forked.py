# SPDX-License-Identifier: BSD-3-Clause
"""Processes forked from one that has imported torch, which takes longer than most of what they do."""

from __future__ import annotations

import multiprocessing as mp
import os
import runpy
import sys
import traceback
from pathlib import Path

CTX = mp.get_context("forkserver")  # imports once, and forks before any thread starts
CTX.set_forkserver_preload(["torch.distributed", "switchgear.parallel", "transformers.modeling_utils"])


def run_script(path: Path, timeout: float) -> tuple[int | None, str]:
    """Runs a script in its folder. Returns its exit code, None if it did not end in time, and what it wrote."""
    log = path.with_suffix(".log")
    process = CTX.Process(target=_run, args=(path, log))
    process.start()
    process.join(timeout)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, log.read_text() if log.exists() else ""


def _run(path: Path, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(path.parent)
    sys.argv = [path.name]
    sys.path[0] = str(path.parent)
    try:
        runpy.run_path(path.name, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
