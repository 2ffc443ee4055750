# SPDX-License-Identifier: BSD-3-Clause
"""The options that several subcommands have, and what a subcommand does before it measures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from typing import Any

import torch

from switchgear.cli.common import CommandError, above_zero, positive

from . import machine
from .competitors.registry import FOLDER
from .results import open_outputs

MODES = ("forward", "train")
FILES = {
    "source": "measure nothing: tables and pictures of the results in it",
    "json": "write medians, with the machine, beside those that the file has",
    "csv": "write one row per result",
    "markdown": "write tables, or fill in those of a document",
    "plot": "write pictures to this folder",
}


def add_files(parser: argparse.ArgumentParser, kinds: str) -> None:
    """kinds: words of FILES."""
    for kind in kinds.split():
        flag, metavar = {"source": "from"}.get(kind, kind), "DIR" if kind == "plot" else "FILE"
        parser.add_argument(f"--{flag}", dest=kind, metavar=metavar, help=FILES[kind])


def add_shapes(parser: argparse.ArgumentParser, known: Collection[str], default: str = "") -> None:
    """Without a default, all of them are."""
    parser.add_argument("--shapes", metavar="LIST", help=f"of {', '.join(known)} (default: {default or 'all'})")


def add_cases(parser: argparse.ArgumentParser, dtypes: Collection[str], default: str, tokens: str) -> None:
    """default, tokens: what is said of the default dtypes and tokens."""
    add_tokens(parser, tokens)
    parser.add_argument("--dtypes", metavar="LIST", type=listed(dtypes),
                        help=f"of the weights: {', '.join(dtypes)} (default: {default})")  # fmt: skip


def add_tokens(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--tokens", metavar="LIST", type=positives, help=f"tokens per call (default: {default})")


def add_modes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--modes", metavar="LIST", type=listed(MODES), default="forward,train",
                        help="forward, train (forward and backward)")  # fmt: skip


def add_routing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--routing", choices=("balanced", "zipf"), default="balanced",
                        help="balanced: experts equally likely; zipf: expert e 1/(e+1) times as likely")  # fmt: skip


def add_competitors_folder(parser: argparse.ArgumentParser) -> None:
    about = f"folder of competitors that cannot be installed beside this torch (default: ${FOLDER})"
    parser.add_argument("--competitors-folder", metavar="DIR", help=about)


def add_quick(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--quick", action="store_true", help=what)


def add_budget(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--budget", type=above_zero, metavar="SECONDS", help=f"for all cases (default: {default})")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")


def positives(text: str) -> tuple[int, ...]:
    """A comma-separated list."""
    return tuple(map(positive, text.split(",")))


def listed(known: Collection[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of known names."""

    def names(text: str) -> list[str]:
        found = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        if not found or not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"expected a list of {', '.join(known)}; got {text!r}")
        return found

    return names


def choose(option: str, text: str, known: Collection[str]) -> list[str]:
    """`listed`, for an option whose names depend on other options. CommandError for an unknown name."""
    try:
        return listed(known)(text)
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"--{option}: {error}") from None


def begin(args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None]) -> dict[str, Any]:
    """Describes the machine, for --json. CommandError, before minutes of work, for a file that cannot be written, and
    for an option that --from would ignore."""
    if args.source:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        for name, default in sorted(vars(parser.parse_args([])).items()):
            if name not in FILES and getattr(args, name) != default:
                raise CommandError(f"--{name.replace('_', '-')}: not with --from, which measures nothing")
    if getattr(args, "competitors_folder", None):
        os.environ[FOLDER] = args.competitors_folder  # the processes of the cases inherit it
    open_outputs(args)
    return machine.describe(getattr(args, "threads", torch.get_num_threads()))
