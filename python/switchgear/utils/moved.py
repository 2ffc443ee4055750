# SPDX-License-Identifier: BSD-3-Clause
"""Names that a package still offers, but that are defined elsewhere now: imported on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def find_moved(package: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose table `moved` names the module of each such name.

    MOVED = {"Name": "switchgear.new.place"}
    __getattr__ = find_moved(__name__, MOVED)
    """

    def find(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(moved[name]), name)
        setattr(sys.modules[package], name, value)  # so the next use costs no call
        return value

    return find
