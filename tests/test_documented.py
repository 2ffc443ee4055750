# SPDX-License-Identifier: BSD-3-Clause
"""Every public name has a docstring, and a place on a page of docs/api."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import switchgear

PAGES = "\n".join(page.read_text() for page in sorted((Path(__file__).parents[1] / "docs/api").glob("*.md")))
WRAPPED = (property, classmethod, staticmethod)
LISTED = re.findall(r"^::: (switchgear[.\w]*)$", PAGES, re.M)


def is_package(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


PACKAGES = [name for name in LISTED if is_package(name)]


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if not name.startswith("_") and not isinstance(value, ModuleType):
            yield name, value


def has_docstring(value: object) -> bool:
    text = inspect.getdoc(value) or ""
    return bool(text) and not text.startswith(f"{getattr(value, '__name__', '')}(")  # what dataclasses generate


def undocumented(module: ModuleType) -> list[str]:
    """Methods may leave their text to a base class, or to a protocol of the package."""
    found = dict(public(module))
    protocols = [value for value in found.values() if getattr(value, "_is_protocol", False)]
    missing = [name for name, value in found.items() if callable(value) and not has_docstring(value)]
    for name, value in found.items():
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            if member.startswith("_") or not isinstance(method, (*WRAPPED, FunctionType)):
                continue
            if not any(has_docstring(getattr(base, member, None)) for base in (*value.__mro__, *protocols)):
                missing.append(f"{name}.{member}")
    return missing


def test_all_packages_have_a_page() -> None:
    internal = {"autograd", "cli", "functional", "integrations", "ops", "papers", "reference"}
    inside = Path(switchgear.__file__).parent
    packages = {path.parent.name for path in inside.glob("*/__init__.py")} - internal - {"utils"}
    assert {f"switchgear.{name}" for name in packages} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_list_their_public_names(package: str) -> None:
    """What a star imports is what the page documents."""
    module = importlib.import_module(package)
    assert len(module.__all__) == len({*module.__all__}) > 0
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_docstrings(package: str) -> None:
    native = {"available_cpu_isas", "cpu_isa", "set_cpu_isa"}  # builtins; their text stands where they are imported
    assert not set(undocumented(importlib.import_module(package))) - native
