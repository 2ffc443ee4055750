# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear-bench tables`: writes the tables of documents again, from the files of results that their marks name."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from switchgear.cli.common import CommandError

from .report import find_marks

LAYERS = ("machine", "cases", "decoded", "summary", "targets")  # tables of the command `layers`
COMMANDS = {
    "compression": "compress",
    "models": "offload",
    **dict.fromkeys(LAYERS, "layers"),
}  # others have their table's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "Markdown files with marks such as <!-- bench:cases cpu-amx --> (default: README.md and docs/**/*.md)"
    parser.add_argument("documents", nargs="*", metavar="FILE", help=about)
    parser.add_argument("--results", metavar="DIR", default="bench/results", help="the files of results")


def run(args: argparse.Namespace) -> int:
    from switchgear_bench import main

    documents = args.documents or ["README.md", *sorted(map(str, Path("docs").rglob("*.md")))]
    for document in documents:
        try:
            marks = find_marks(Path(document).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{document}: {error}") from error
        for command, source in sorted({(COMMANDS.get(table, table), source) for table, source in marks}):
            with contextlib.redirect_stdout(io.StringIO()):
                status = main([command, "--from", f"{args.results}/{source}.json", "--markdown", document])
            if status:
                return status
    return 0
