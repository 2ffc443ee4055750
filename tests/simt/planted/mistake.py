# SPDX-License-Identifier: BSD-3-Clause
"""What a mistake in a real kernel is. planted.py explains how it is used."""

from __future__ import annotations

from dataclasses import dataclass

BOTH = ("asan", "race")
ASAN = ("asan",)
RACE = ("race",)


@dataclass(frozen=True)
class Mistake:
    name: str
    builds: tuple[str, ...]  # that must detect it
    header: str  # in csrc/cuda
    before: str  # occurs in the header exactly once
    after: str
    source: str  # that includes the header
    program: str
    tests: tuple[str, ...] = ()  # of the program; () means all
