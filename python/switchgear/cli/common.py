# SPDX-License-Identifier: BSD-3-Clause
"""Shared by the commands: one-line errors, optional packages, files, tables, plots, progress, argument types."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Annotated, Any, get_args

from ..checks import NotNegative, Positive, Range, Seed, convert
from ..files import AnyPath, write_whole
from ..utils.packages import failed_import

DIGITS = 8  # of a number in a file of results
Advance = Callable[[int, int, str], None]
SECONDS = 10.0  # between two lines of progress


class CommandError(Exception):
    """An error that the user can fix: shown without a traceback, exit status 2."""


def require(module: str) -> Any:
    """Import an optional package (`rich`, `matplotlib.pyplot`, …). CommandError says what is missing."""
    try:
        found = importlib.import_module(module)
        if module == "transformers":
            _ = found.AutoConfig  # its names are imported when they are used
        return found
    except ImportError as error:
        raise CommandError(failed_import(error, module)) from None


def optional(module: str) -> tuple[ModuleType | None, str]:
    """A package, or None and the reason why it cannot be imported."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a broken installation can raise anything; only the reason matters here
        return None, f"{type(error).__name__}: {error}"


def name_options(error: Exception) -> str:
    """The message of an error of a function that can resume, with the command's option instead of its argument."""
    return str(error).replace("resume=False", "--fresh")


def require_writable(folder: Path) -> None:
    """Creates the folder. CommandError if no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"--out: cannot write to {folder}: {error.strerror}") from None


def require_new(option: str, path: AnyPath) -> None:
    """CommandError if there is something, also a link that leads nowhere."""
    if os.path.lexists(path):
        raise CommandError(f"--{option}: expected a folder that does not exist, got {path}")


def check_file(option: str, path: AnyPath) -> None:
    """CommandError if `write_file` could not write it. Changes nothing."""
    target = Path(path)
    try:
        missing = not target.exists()
        open(target, "ab").close()
        if missing:
            target.resolve().unlink()
        if missing or target.is_file():
            with tempfile.TemporaryFile(dir=target.resolve().parent):
                pass
    except OSError as error:
        raise CommandError(f"--{option}: cannot write {path}: {error.strerror}") from None


def write_file(option: str, path: AnyPath, text: str) -> None:
    """Replaces a file at once; a pipe, which has nothing to keep, is written to. CommandError if it cannot be."""
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            write_whole(target, text)
    except OSError as error:
        raise CommandError(f"--{option}: cannot write {path}: {error.strerror}") from None


def write_json(value: dict[str, Any], path: str) -> None:
    """One line per object in a list, numbers rounded to DIGITS digits: small files with readable diffs."""
    write_file("json", path, _lines(rounded(value)) + "\n")


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """The value as stored in a file, so that tables of a run and of its file are equal."""
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(_lines, value)) + "\n]"
    if isinstance(value, dict):
        separator = ",\n" if "schema" in value else ", "
        return "{" + separator.join(f"{json.dumps(name)}: {_lines(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


# ---- tables and words ------------------------------------------------------------------------------------------------


def console() -> Any:
    """A rich console that does not wrap tables when the output goes to a file."""
    made = require("rich.console").Console(highlight=False)
    made.on_broken_pipe = _raise_again  # rich itself exits with 1
    if not made.is_terminal:
        made.width = 140
    return made


def _raise_again() -> None:
    raise


def table(*columns: str, wrap: bool = False) -> Any:
    """A rich table: the first column is left-aligned; the others, numbers, are right-aligned."""
    made = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=not wrap)
    return made


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns in `left` are left-aligned; the others, numbers, are right-aligned."""
    rule = ["---" if index in left else "---:" for index in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


# ---- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """Yields a function of (done, total, words), to be called as often as you like. It shows a bar by rich, if that is
    installed and the output is a terminal, or else a line now and then."""
    rich, _ = optional("rich.progress")
    if rich is None or not sys.stderr.isatty():
        yield _print_now_and_then(title)
        return
    console: Any = importlib.import_module("rich.console")
    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TextColumn("{task.percentage:>3.0f}%"),
        rich.TextColumn("{task.fields[words]}"), rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=console.Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None, words="")
        yield lambda done, total, words: bars.update(task, completed=done, total=total, words=words)


def _print_now_and_then(title: str) -> Advance:
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


# ---- types of argparse -----------------------------------------------------------------------------------------------


def _number(hint: Any, words: str) -> Callable[[str], Any]:
    """Numbers that the annotation `hint` (checks.py) allows."""
    kind, *_ = get_args(hint)

    def number(text: str) -> Any:
        try:
            return convert("", kind(text), hint)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}") from None

    return number


def at_least(least: int) -> Callable[[str], Any]:
    return _number(Annotated[int, Range(least, math.inf)], f"an integer of at least {least}")


positive = at_least(1)
above_zero = _number(Positive, "a number above 0")
share = _number(Annotated[float, Range(0, 1)], "a number from 0 to 1")
not_negative = _number(NotNegative, "a number of at least 0")
seed = _number(Seed, "an integer of 64 bits")
UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", "K", "M", "G", "T"))}


def size(text: str) -> int:
    """Bytes: 8G, 512M, 1.5G; units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    number = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a size like 8G or 512M, got {text!r}")
    return number


def settings(texts: Iterable[str], what: str, taken: Collection[str] = (), *, option: str = "set") -> dict[str, Any]:
    """The options of `what` that --set NAME=VALUE gives (or --`option`), a value as JSON or a word. CommandError for a
    text of another form, a name that the command sets itself, and a name that comes twice."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in taken:
            raise CommandError(f"--{option}: expected NAME=VALUE, an option of {what}, got {text!r}")
        if name in found:
            raise CommandError(f"--{option}: expected each option once, got {name} twice")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


INK, FAINT, GRID = "#22303c", "#7a8791", "#e3e7ea"
_KNOWN = {"eager": "#a9b4bd", "grouped_mm": "#3f7cac", "batched_mm": "#95b8d1", "switchgear": "#e4572e"}
_OTHERS = (  # as many as lines in one plot
    "#5b8e7d", "#8e6c8a", "#c9a227", "#2e4057", "#bc4b51", "#7fb800", "#00a6ed", "#0d0221", "#f7a1c4", "#8d5524",
    "#9e9e9e", "#00695c",
)  # fmt: skip


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour per name. A name has the same colour in every plot."""
    unknown = [name for name in names if name.removeprefix("hf_") not in _KNOWN]
    spare = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(unknown)}
    return {name: _KNOWN.get(name.removeprefix("hf_"), "") or spare[name] for name in names}


def pyplot() -> Any:
    """matplotlib.pyplot without a display, in the common style."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    plt.rcParams.update({
        "font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK,
        "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
        "axes.edgecolor": FAINT, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
        "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 120, "figure.constrained_layout.use": True,
    })  # fmt: skip
    return plt


def save(figure: Any, path: Path) -> None:
    """Saves a PNG with a small palette. Lines and letters need no more colours, and the file is a third of the size."""
    figure.savefig(path, facecolor="white")
    pyplot().close(figure)
    image = require("PIL.Image")  # a dependency of matplotlib
    with image.open(path) as picture:
        few = picture.convert("RGB").quantize(64)
    few.save(path, optimize=True)
