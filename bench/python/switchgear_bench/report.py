# SPDX-License-Identifier: BSD-3-Clause
"""Documents with tables of a benchmark.

A document marks their places by pairs of lines: `<!-- bench:cases -->` and `<!-- /bench:cases -->`. The text between
them is replaced, and nothing else is. A document with text but without such pairs is refused.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from switchgear.cli.common import CommandError, write_file, write_json

Blocks = dict[str, Callable[[], str]]
_LINE = r"^[ \t]*<!--[ \t]*/?[ \t]*bench:"  # of a mark, also of a mistyped one
_MARK = re.compile(f"{_LINE}.*", re.MULTILINE)
_PLACE = re.compile(
    rf"^([ \t]*<!-- bench:(\w+) -->[ \t]*(\r?\n))((?!{_LINE}).*\n)*([ \t]*<!-- /bench:\2 -->)", re.MULTILINE
)


def section(note: str, table: str, verdicts: Iterable[str]) -> str:
    """A block with a table between a note and a list."""
    return "\n".join([note, table, *(f"- {verdict}" for verdict in verdicts)]) + "\n"


def check(path: str) -> None:
    """CommandError unless the document is empty or has places for tables."""
    _read(path)


def write_blocks(path: str, blocks: Blocks, new: Sequence[str] = ()) -> None:
    """Fills in the tables of the document at `path`. A new one gets those of `new`, all of them by default."""
    text = _read(path) or "\n".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in new or blocks)
    write_file("markdown", path, fill_blocks(text, blocks))


def fill_blocks(text: str, blocks: Blocks) -> str:
    """The text with its tables made anew, with its own ends of lines. CommandError for a table that `blocks` lacks."""

    def block(found: re.Match[str]) -> str:
        first, name, newline, _, last = found.groups()
        if name not in blocks:
            raise CommandError(f"--markdown: expected tables of {', '.join(blocks)}; the document wants {name!r}")
        return first + blocks[name]().replace("\n", newline) + last

    return _PLACE.sub(block, text)


def _read(path: str) -> str:
    """The document; empty if it is new or no file."""
    file = Path(path)
    try:
        text = file.read_bytes().decode() if file.is_file() else ""
    except UnicodeDecodeError:
        raise CommandError(f"--markdown: expected text in UTF-8 in {path}") from None
    alone = _MARK.search(_PLACE.sub("", text))
    if alone:
        raise CommandError(
            "--markdown: expected pairs of lines <!-- bench:NAME --> and <!-- /bench:NAME -->, got "
            f"{alone[0].strip()!r} without the other in {path}"
        )
    if text.strip() and not _PLACE.search(text):
        raise CommandError(
            "--markdown: expected a new file, or a document with pairs of lines <!-- bench:NAME --> and "
            f"<!-- /bench:NAME -->, got {path} without them"
        )
    return text


def write_outputs(args: argparse.Namespace, results: dict[str, Any], blocks: Blocks) -> None:
    """Writes the files of --json and --markdown."""
    if args.json:
        write_json(results, args.json)
    if args.markdown:
        write_blocks(args.markdown, blocks)
        print(f"wrote {args.markdown}")


def threads(count: int) -> str:
    """The count in words."""
    return f"{count} thread{'s' if count != 1 else ''}"
