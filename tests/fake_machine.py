# SPDX-License-Identifier: BSD-3-Clause
"""A machine that has a card and every tool, for tests of tools/gpu: nothing is looked up or run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from gpu import machine


@contextlib.contextmanager
def hopper() -> Iterator[None]:
    """Everything is installed, on an H100."""
    replies = {"compute_cap": "9.0", "name": "NVIDIA H100 80GB HBM3", "--help": "--kernel-name ARG", "import ": ""}

    def answers(*command: str) -> str | None:
        text = " ".join(command)
        return next((reply for word, reply in replies.items() if word in text), None)

    tools = {name: f"/usr/local/cuda/bin/{name.replace('_', '-')}" for name in ("nvcc", "compute_sanitizer", "ncu")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(machine, "answers", answers))
        for name, path in tools.items():
            stack.enter_context(mock.patch.object(machine, name, return_value=path))
        yield


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Nothing is installed, and there is no card."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(machine, "answers", return_value=None))
        for name in ("nvcc", "compute_sanitizer", "ncu"):
            stack.enter_context(mock.patch.object(machine, name, return_value=None))
        yield
