# SPDX-License-Identifier: BSD-3-Clause
"""What the commands share: errors that are printed as one line, optional packages, types of arguments, words."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import Any


class CommandError(Exception):
    """Something that the user can put right: shown without a traceback, exit status 2."""


def require(module: str) -> Any:
    """Import an optional package (`rich`, `matplotlib.pyplot`, …), or say how to install it. Raises CommandError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise CommandError(f"needs {package} ({error}); install it with: pip install {package}") from None


def optional(module: str) -> tuple[ModuleType | None, str]:
    """A package, or None and the reason why it is absent."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a broken installation raises anything; the reason is what counts here
        return None, f"{type(error).__name__}: {error}"


def console() -> Any:
    """A console of rich that does not fold tables where its output goes into a file."""
    made = require("rich.console").Console()
    if not made.is_terminal:
        made.width = 140
    return made


def positive(text: str) -> int:
    """A type of argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def at_least_two(text: str) -> int:
    """A type of argparse: a sequence of one token has no next token to learn."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 2, got {text}")
    return value


def threads(count: int) -> str:
    """In words."""
    return f"{count} thread{'s' if count != 1 else ''}"
