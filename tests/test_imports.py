# SPDX-License-Identifier: BSD-3-Clause
"""The modules of switchgear have no import cycles: each can be read, and tested, after the modules that it imports.
They keep the order of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import switchgear

ROOT = Path(switchgear.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not function bodies, nor `if TYPE_CHECKING`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            yield from statements(statement.orelse)
        elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for block in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, block, []))


def imported_by(module: str, text: str) -> set[str]:
    """The modules of switchgear that a module imports, including the packages that this runs."""
    found: set[str] = set()
    for statement in statements(ast.parse(text).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            package = module.split(".") if FILES.get(module, ROOT).name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) - statement.level + 1] if statement.level else []
            source = ".".join([*base, *filter(None, [statement.module])])
            names = {f"{source}.{alias.name}" for alias in statement.names}
            found |= {name for name in names if name in FILES}
            if any(name not in FILES for name in names):
                found.add(source)
    packages = {".".join(name.split(".")[:end]) for name in found for end in range(1, name.count(".") + 2)}
    own = {".".join(module.split(".")[:end]) for end in range(1, module.count(".") + 2)}  # already running
    return {name for name in packages if name in FILES} - own


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One cycle through each module that is in a cycle."""
    found = []
    for start in graph:
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            for following in sorted(graph.get(path[-1], ())):
                if following == start:
                    found.append([*path, start])
                    paths.clear()
                    break
                if following not in seen:
                    seen.add(following)
                    paths.append([*path, following])
    return found


@cache
def imports() -> dict[str, set[str]]:
    return {module: imported_by(module, path.read_text()) for module, path in FILES.items()}


def test_there_are_no_circles() -> None:
    graph = imports()
    assert len(graph) > 100
    assert "switchgear.ops" in graph["switchgear.functional.layer"]
    assert "switchgear.weights" in graph["switchgear.functional.layer"]  # the package of weights.weight
    assert not ["\n  -> ".join(circle) for circle in circles(graph)]


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c", "b"], ["c", "b", "c"]]
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import switchgear.trace\n"
    assert imported_by("switchgear.ops.layer", text) == set()
    assert imported_by("switchgear.ops.layer", "from . import native\ndef f():\n    import switchgear.trace") == {
        "switchgear.ops.native"
    }


@cache
def package_order() -> dict[str, int]:
    """The number of each module's group in the list of docs/architecture.md."""
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text()
    (listed,) = re.findall(r"^```\n(files,[^`]+)", page, re.M)
    return {name: index for index, group in enumerate(listed.split("→")) for name in re.findall(r"\w+", group)}


def imports_from_later(module: str, imported: set[str]) -> list[str]:
    group = {name: package_order().get(name.split(".")[1]) for name in {module, *imported} if "." in name}
    own = group.get(module)  # the package itself and __main__ have none
    return [] if own is None else [name for name in sorted(imported & set(group)) if (group[name] or 0) > own]


def test_imports_keep_the_order() -> None:
    assert {module.split(".")[1] for module in FILES if "." in module} - set(package_order()) == {"__main__"}
    found = {module: imports_from_later(module, imported) for module, imported in imports().items()}
    assert not {module: later for module, later in found.items() if later}


def test_an_import_from_a_later_module_is_found() -> None:
    imported = imported_by("switchgear.ops.layer", "from switchgear import reference, routing")
    assert imports_from_later("switchgear.ops.layer", imported) == ["switchgear.routing"]
