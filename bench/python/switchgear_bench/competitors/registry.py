# SPDX-License-Identifier: BSD-3-Clause
"""The list of competitors, and where their packages are found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..case import Case, Layer

BOTH = ("forward", "train")
FLOATS = ("bf16", "fp32")
GROUPS = ("groups4", "groups3", "groups2", "groups1")
DECODED = (*FLOATS, "fp8", "mxfp4", *GROUPS)  # for competitors that multiply decoded weights in bfloat16
FOLDER = "SWITCHGEAR_COMPETITORS"  # environment variable: a folder with one folder per package


class Skip(Exception):
    """Why a competitor does not run a case."""


class Competitor(NamedTuple):
    make: Callable[[Case], Layer]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    default: bool  # part of a run without --competitors
    about: str

    def runs(self, dtype: str, mode: str) -> bool:
        return dtype in self.dtypes and mode in self.modes


COMPETITORS: dict[str, Competitor] = {}


def competitor(
    name: str, *, dtypes: tuple[str, ...] = FLOATS, modes: tuple[str, ...] = BOTH, default: bool = True
) -> Callable[[Callable[[Case], Layer]], Callable[[Case], Layer]]:
    def register(make: Callable[[Case], Layer]) -> Callable[[Case], Layer]:
        COMPETITORS[name] = Competitor(make, dtypes, modes, default, (make.__doc__ or "").strip().splitlines()[0])
        return make

    return register


def folder() -> Path | None:
    """The folder named by SWITCHGEAR_COMPETITORS."""
    path = os.environ.get(FOLDER)
    return Path(path) if path else None


def look_in_folder() -> None:
    """Appends what `pip install --no-deps --target FOLDER/<package>` installed to the import path."""
    place = folder()
    for package in sorted(place.iterdir()) if place and place.is_dir() else ():
        if package.is_dir() and str(package) not in sys.path:
            sys.path.append(str(package))
