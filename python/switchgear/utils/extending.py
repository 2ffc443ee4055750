# SPDX-License-Identifier: BSD-3-Clause
"""Extends functions of other libraries in place, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MARK = "switchgear_original"


def extend_once(owner: Any, name: str, extended: Callable[[Any], Any]) -> None:
    """Replaces a function of a class or a module by extended(function). Does nothing if that has been done, or if the
    owner is None or lacks it, as in other versions of a library."""
    original = getattr(owner, name, None)
    if original is not None and not is_extended(original):
        function = extended(original)
        setattr(function, _MARK, original)
        setattr(owner, name, function)


def is_extended(function: Any) -> bool:
    return hasattr(function, _MARK)
