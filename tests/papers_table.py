# SPDX-License-Identifier: BSD-3-Clause
"""python tests/papers_table.py [backend]: how far each preset is from its plain float64 loop, as a Markdown table.

Runs the tests of papers on one backend (default: reference) and records what `loops.assert_agrees` compares: outputs
and gradients of x and all parameters, in float32 and float64. A number is the largest difference, relative to the
largest element of its tensor. A preset without a loop of the whole layer has none.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]

import loops  # noqa: E402
from switchgear import presets  # noqa: E402

Worst = dict[tuple[torch.dtype, bool], float]


class Recorder:
    """A pytest plugin: remembers the last preset that the running test requested."""

    def __init__(self) -> None:
        self.worst: dict[str, Worst] = defaultdict(lambda: defaultdict(float))
        self.tests: dict[str, set[str]] = defaultdict(set)
        self.preset: str | None = None
        self.test = ""

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.preset, self.test = None, item.name.partition("[")[0]

    def asked(self, name: str, preset: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(preset)
        def wrapper(*args: Any, **options: Any) -> Any:
            self.preset = name
            return preset(*args, **options)

        return wrapper

    def compared(self, check: Callable[..., None]) -> Callable[..., None]:
        def wrapper(actual: Tensor, wanted: Tensor, length: int, name: str) -> None:
            if self.preset is not None and actual.numel():
                size = max(float(wanted.abs().max()), 1e-3)
                error = float((actual.double() - wanted.double()).abs().max()) / size
                key = actual.dtype, name.startswith("output")
                worst = self.worst[self.preset]
                worst[key] = max(worst[key], error)
                self.tests[self.preset].add(self.test)
            check(actual, wanted, length, name)

        return wrapper


def table(recorder: Recorder) -> str:
    lines = ["| preset | output, float32 | gradients, float32 | output, float64 | gradients, float64 | test |"]
    lines.append("|---|---|---|---|---|---|")
    for name in sorted(set(presets.__all__) - {"build"}):
        worst = recorder.worst.get(name)
        keys = [(dtype, is_output) for dtype in (torch.float32, torch.float64) for is_output in (True, False)]
        cells = [f"{worst[key]:.1e}" if worst and key in worst else "" for key in keys]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {', '.join(sorted(recorder.tests.get(name, ())))} |")
    return "\n".join(lines)


def record(backend: str = "reference") -> tuple[Recorder, int]:
    """The differences, and pytest's exit code. Replaces functions of loops and presets: call it once per process."""
    recorder = Recorder()
    for name in set(presets.__all__) - {"build"}:
        setattr(presets, name, recorder.asked(name, getattr(presets, name)))
    loops.assert_same = recorder.compared(loops.assert_same)
    files = sorted(str(path) for path in HERE.glob("test_papers_*.py"))
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-k", f"[{backend}", *files], plugins=[recorder])
    return recorder, int(code)


if __name__ == "__main__":
    found, exit_code = record(*sys.argv[1:2])
    print(table(found))
    sys.exit(exit_code)
