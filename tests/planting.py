# SPDX-License-Identifier: BSD-3-Clause
"""Plants a mistake in a module of switchgear, in this process, to see that a test detects it."""

from __future__ import annotations

import gc
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType


@dataclass(frozen=True)
class Mistake:
    file: str  # in the package
    name: str
    before: str  # occurs in the file exactly once, in a function
    after: str


@contextmanager
def planted(package: str, mistake: Mistake) -> Iterator[None]:
    """All functions of the module have the mistake, wherever they have been imported."""
    module = importlib.import_module(f"{package}.{mistake.file.removesuffix('.py').replace('/', '.')}")
    source = Path(inspect.getfile(module)).read_text()
    assert source.count(mistake.before) == 1, f"{mistake.file}, {mistake.name}"
    right, wrong = map(_codes, (source, source.replace(mistake.before, mistake.after)))
    replaced = {old: new for old, new in zip(right, wrong, strict=True) if old != new}
    functions = [(f, f.__code__) for f in _functions(module.__name__) if f.__code__ in replaced]
    assert functions, f"{mistake.file}, {mistake.name}: no function differs"
    for function, code in functions:
        function.__code__ = replaced[code]
    try:
        yield
    finally:
        for function, code in functions:
            function.__code__ = code


@cache
def _functions(module: str) -> list[FunctionType]:
    """Whatever they are wrapped in."""
    return [f for f in gc.get_objects() if type(f) is FunctionType and f.__module__ == module]


def _codes(source: str) -> list[CodeType]:
    """Of all functions and classes, the outer ones first; not of lambdas and comprehensions, which belong to those."""
    found = [compile(source, "planted", "exec", dont_inherit=True)]
    for code in found:
        inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
        found += (each for each in inner if not each.co_name.startswith("<"))
    return found
