# SPDX-License-Identifier: BSD-3-Clause
"""The environment in which Python loads a module that was built with the address sanitizer."""

from __future__ import annotations

import os
import subprocess

OPTIONS = (
    "detect_leaks=0",  # of Python itself
    "alloc_dealloc_mismatch=0",  # torch and _C allocate in one library and free in another
    "detect_stack_use_after_return=0",  # gcc before 14 does not align its frames for vectors of 64 bytes
)


def environment(malloc_context_size: int) -> dict[str, str]:
    """Python is not instrumented, so the runtime comes first by LD_PRELOAD. The size: frames that a report shows."""
    libraries = " ".join(map(_compilers_library, ("libasan.so", "libstdc++.so")))
    options = ":".join((*OPTIONS, f"malloc_context_size={malloc_context_size}"))
    return {**os.environ, "LD_PRELOAD": libraries, "ASAN_OPTIONS": options}


def _compilers_library(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
