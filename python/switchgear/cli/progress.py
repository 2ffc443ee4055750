# SPDX-License-Identifier: BSD-3-Clause
"""A progress bar, by rich if it is installed and the output is a terminal; otherwise a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from .common import optional

Advance = Callable[[int, int, str], None]
SECONDS = 10.0  # between two lines


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """Yields a function of (done, total, words): call it as often as you like."""
    rich, _ = optional("rich.progress")
    if rich is None or not sys.stderr.isatty():
        yield _lines(title)
        return
    console, _ = optional("rich.console")
    assert console is not None
    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TextColumn("{task.percentage:>3.0f}%"),
        rich.TextColumn("{task.fields[words]}"), rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=console.Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None, words="")
        yield lambda done, total, words: bars.update(task, completed=done, total=total, words=words)


def _lines(title: str) -> Advance:
    start = perf_counter()
    latest = start

    def advance(done: int, total: int, words: str) -> None:
        nonlocal latest
        now = perf_counter()
        if now - latest < SECONDS and done < total:
            return
        latest = now
        left = (now - start) * (total - done) / max(done, 1)
        print(f"{title}: {done} of {total}, {words}, {left:.0f} s left", file=sys.stderr, flush=True)

    return advance
