# SPDX-License-Identifier: BSD-3-Clause
"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from switchgear.cli.common import require


@contextmanager
def training_progress(
    names: Sequence[str], steps: int, tokens_per_step: int
) -> Iterator[Callable[[str, list[Any]], None]]:
    """One bar per implementation with its loss and tokens per second; call the result after each step."""
    progress = require("rich.progress")
    columns = (
        progress.TextColumn("{task.description:<12}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:>6}  {task.fields[speed]:>15}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns) as bars:
        tasks = {name: bars.add_task(name, total=steps, loss="", speed="") for name in names}

        def advance(name: str, taken: list[Any]) -> None:
            speed = tokens_per_step / median(step.seconds for step in taken[-5:])
            fields = {"loss": f"{taken[-1].loss:.3f}", "speed": f"{speed:,.0f} tokens/s"}
            bars.update(tasks[name], advance=1, **fields)
            if not bars.console.is_terminal and len(taken) % 10 == 0:  # bars don't move in a log
                bars.console.print(
                    f"{name}: step {len(taken)}, loss {fields['loss']}, {fields['speed']}", highlight=False
                )

        yield advance
