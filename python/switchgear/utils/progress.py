# SPDX-License-Identifier: BSD-3-Clause
"""A bar of progress for functions that take long."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")


def show_progress(items: Collection[T], title: str) -> Iterable[T]:
    """The items. While a loop takes them, tqdm, if installed, shows a bar with the time left after five seconds, if
    standard error is a terminal."""
    try:
        tqdm: Any = import_module("tqdm")
    except ImportError:
        return items
    bar: Iterable[T] = tqdm.tqdm(items, title, leave=False, delay=5, disable=None)
    return bar
