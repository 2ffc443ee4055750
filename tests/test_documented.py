# SPDX-License-Identifier: BSD-3-Clause
"""Every public name has a docstring, and a place on a page of docs/api."""

from __future__ import annotations

import ast
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
    internal = {"autograd", "bench", "cli", "functional", "integrations", "ops", "reference", "utils"}
    inside = Path(switchgear.__file__).parent
    packages = {path.parent.name for path in inside.glob("*/__init__.py")} - internal
    assert {f"switchgear.{name}" for name in packages} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_docstrings(package: str) -> None:
    native = {"available_cpu_isas", "cpu_isa", "set_cpu_isa"}  # builtins; their text stands where they are imported
    assert not set(undocumented(importlib.import_module(package))) - native


def test_a_missing_docstring_is_found() -> None:
    module = ModuleType("example")
    namespace: dict[str, object] = {}
    exec("class A:\n  'Has one.'\n  def f(self): 'Has one.'\n  def g(self): pass\ndef h(): pass", namespace)
    module.__dict__.update(namespace, __all__=["A", "h"])
    assert undocumented(module) == ["h", "A.g"]


def listed_files(package: Path) -> set[str]:
    """The files that a package's docstring lists, one or more in a line that begins with a name."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    lists = [part for part in text.split("\n\n") if re.match(r"\w+\.py[, ]", part)]
    return set(re.findall(r"\b\w+\.py\b", "\n".join(lists)))


def test_lists_of_files_are_complete() -> None:
    packages = [path.parent for path in Path(switchgear.__file__).parent.rglob("__init__.py")]
    lists = {package: files for package in packages if (files := listed_files(package))}
    large = {"convert", "integrations", "offload", "ops", "parallel", "reference", "routing", "weights"}
    assert large <= {package.name for package in lists}
    for package, files in lists.items():
        assert files == {path.name for path in package.glob("*.py")} - {"__init__.py"}, package.name


def test_a_file_missing_in_a_list_is_found(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text('"""Text of x.py.\n\na.py  one; b.py: two\nc.py  three\n\nNot d.py."""\n')
    assert listed_files(tmp_path) == {"a.py", "b.py", "c.py"}
