# SPDX-License-Identifier: BSD-3-Clause
"""Which part of switchgear may import which: a core, capabilities around it, and the commands on top. All imports
count, those inside functions too; imports for type checkers alone do not."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import switchgear

ROOT = Path(switchgear.__file__).parent

CORE = frozenset({
    "_C", "arrays", "backends", "checks", "cuda", "experts", "files", "functional", "layers",
    "modules", "ops", "reference", "routing", "testing", "utils", "weights",
})  # fmt: skip
BELOW_CAPABILITIES = CORE | {"papers", "adapters", "integrations", "trace"}
CAPABILITIES = (
    "analysis", "compress", "convert", "diagnostics", "distill", "finetune", "generation", "offload", "optim",
    "parallel",
)  # fmt: skip
MAY_IMPORT = {
    **dict.fromkeys(CORE, CORE),
    "papers": CORE,
    "adapters": CORE | {"papers"},
    "integrations": CORE | {"adapters"},
    "trace": CORE | {"adapters", "integrations"},
    **dict.fromkeys(CAPABILITIES, BELOW_CAPABILITIES),
    "presets": CORE | {"papers", "adapters"},
    "monitoring": CORE | {"trace"},
    "cli": BELOW_CAPABILITIES | {*CAPABILITIES, "presets", "monitoring", "cli"},
    "__main__": frozenset({"cli"}),
    "bench": frozenset(),  # another name of switchgear_bench
}
# Capabilities that know another one.
PAIRS = {
    ("compress", "diagnostics"),  # merges the experts that are most alike
    ("offload", "convert"),  # saves a model through a plan of tensors
    ("offload", "diagnostics"),  # the accesses of a trace
    ("offload", "parallel"),  # the experts of this rank
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}
NATIVE = {"switchgear._C", "switchgear._cuda"}


def find_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports, but those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            is_not = isinstance(child.test, ast.UnaryOp)
            for statement in child.body if is_not else child.orelse:
                yield from find_statements(ast.Module([statement], []))
        else:
            yield from find_statements(child)


def find_imports(module: str, text: str) -> set[str]:
    """The modules of switchgear that a module imports."""
    found: set[str] = set()
    for statement in find_statements(ast.parse(text)):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        package = module.split(".") if FILES.get(module, ROOT).name == "__init__.py" else module.split(".")[:-1]
        base = package[: len(package) - statement.level + 1] if statement.level else []
        source = ".".join([*base, *filter(None, [statement.module])])
        names = {f"{source}.{alias.name}" for alias in statement.names}
        modules = {name for name in names if name in FILES or name in NATIVE}
        found |= modules if modules == names else {*modules, source}
    return {name for name in found if name.split(".")[0] == "switchgear"}


@cache
def imports() -> dict[str, set[str]]:
    return {module: find_imports(module, path.read_text()) for module, path in FILES.items()}


def part_of(module: str) -> str:
    """The folder or file of switchgear that a module is in; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The names on a circle; empty if there is none."""
    done: set[str] = set()

    def follow(path: list[str]) -> list[str]:
        for name in sorted(graph.get(path[-1], ())):
            if name in path:
                return [*path[path.index(name) :], name]
            if name not in done and (circle := follow([*path, name])):
                return circle
        done.add(path[-1])
        return []

    return next((circle for start in graph if (circle := follow([start]))), [])


def find_forbidden(module: str, imported: set[str]) -> list[str]:
    own = part_of(module)
    may = MAY_IMPORT[own] | {own}
    return sorted(name for name in imported if part_of(name) not in may and (own, part_of(name)) not in PAIRS)


def test_imports_keep_the_direction() -> None:
    found = {module: find_forbidden(module, imported) for module, imported in imports().items() if part_of(module)}
    assert not {module: forbidden for module, forbidden in found.items() if forbidden}


def test_the_table_names_what_exists() -> None:
    parts = {part_of(module) for module in FILES} - {""}
    assert parts == set(MAY_IMPORT) - {"_C"}
    used = {(part_of(module), part_of(name)) for module, imported in imports().items() for name in imported}
    assert used >= PAIRS


def test_modules_import_in_no_circle() -> None:
    """A module needs the packages around those that it imports, except its own, which are being imported already."""
    graph = {}
    for module, imported in imports().items():
        needed = {".".join(name.split(".")[:end]) for name in imported for end in range(2, name.count(".") + 2)}
        graph[module] = {name for name in needed if name in FILES and not f"{module}.".startswith(f"{name}.")}
    assert "switchgear.weights" in graph["switchgear.functional.layer"]
    assert not find_circle(graph)


def test_folders_import_in_no_circle() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, imported in imports().items():
        graph[part_of(module)] |= {part_of(name) for name in imported} - {part_of(module)}
    assert not find_circle(graph)


def test_a_wrong_import_is_found() -> None:
    text = "def f():\n    from switchgear import reference, routing\n    import switchgear"
    assert find_forbidden("switchgear.ops.layer", find_imports("switchgear.ops.layer", text)) == ["switchgear"]
    assert find_forbidden("switchgear.papers", {"switchgear.trace.observe"}) == ["switchgear.trace.observe"]
    assert not find_imports("switchgear.ops", "if TYPE_CHECKING:\n    import switchgear")
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("package", [name for name, path in FILES.items() if "\nMOVED = " in path.read_text()])
def test_moved_names_import_from_where_they_were(package: str) -> None:
    module = importlib.import_module(package)
    for name, place in module.MOVED.items():
        if not place.endswith(".callback"):  # imports transformers
            assert getattr(module, name) is getattr(importlib.import_module(place), name)
    assert set(module.MOVED) <= set(module.__all__)


def test_import_is_light() -> None:
    """`import switchgear` imports none of torch's packages that take a second, and no other library."""
    code = "import sys, torch; before = set(sys.modules); import switchgear; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = ("torch.distributed", "torch._dynamo", "torch._inductor", "torch.fx", "transformers", "numpy", "matplotlib")
    assert [name for name in done.stdout.split() if name.startswith(heavy)] == []
