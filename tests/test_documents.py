# SPDX-License-Identifier: BSD-3-Clause
"""The documents are correct: their Python runs, and links, names, paths and make targets exist."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import switchgear  # registers the ops
from forked import run_script
from switchgear.utils.packages import SITE

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")


def prose(document: Path) -> str:
    return _FENCE.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """The anchors of a page's headings: lower case, words joined by hyphens, punctuation dropped."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def script(document: Path) -> str:
    """The Python of a document, each block at its line numbers."""
    text = document.read_text()
    code = ""
    for match in _FENCE.finditer(text):
        if match[1] == "python":
            code += "\n" * (text.count("\n", 0, match.start(2)) - code.count("\n")) + match[2]
    return code


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if script(path)], ids=lambda path: path.name)
def test_python_blocks_run(document: Path, tmp_path: Path) -> None:
    """Runs the blocks in order, as one script in a separate process."""
    code = script(document)
    if "transformers" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / document.name).write_text(code)
    exit_code, output = run_script(tmp_path / document.name, timeout=300)
    assert exit_code == 0, output


@documents
def test_links_resolve(document: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(document)):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


_TEXT_AND_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
_DEFINITION = {".py": "def {}(", ".cpp": "TEST({})"}


@documents
def test_linked_tests_exist(document: Path) -> None:
    """[test_name](file): the file defines the test."""
    missing = []
    for text, link in _TEXT_AND_LINK.findall(prose(document)):
        target = document.parent / link
        if re.fullmatch(r"test_\w+", text) and _DEFINITION[target.suffix].format(text) not in target.read_text():
            missing.append(f"{text} in {link}")
    assert not missing


@documents
def test_names_exist(document: Path) -> None:
    """`switchgear.a.b`, `path/to/file`, `make target` and `SWITCHGEAR_…` in the text."""
    makefile = (ROOT / "Makefile").read_text()
    files = [
        ROOT / "pyproject.toml",
        *ROOT.glob("csrc/**/*.cpp"),
        *ROOT.glob("python/**/*.py"),
        *ROOT.glob("bench/python/**/*.py"),
    ]
    sources = "".join(path.read_text() for path in files)
    missing = []
    for span in _SPAN.findall(prose(document)):
        if name := re.match(r"switchgear((?:\._?[A-Za-z]\w*)+)", span):
            exists = _has(name[1].removeprefix(".").split("."))
        elif target := re.fullmatch(r"make ([\w-]+)( .*)?", span):
            exists = re.search(rf"^{target[1]}:", makefile, re.MULTILINE) is not None
        elif variable := re.match(r"SWITCHGEAR_[A-Z_]+", span):
            exists = variable[0] in sources
        elif re.fullmatch(r"[\w./-]+/[\w.-]*|[\w-]+\.(py|cpp|h|inl|toml|txt|md)", span):
            exists = _is_file(span)
        else:
            continue
        if not exists:
            missing.append(span)
    assert not missing


def _has(names: list[str]) -> bool:
    value: object = switchgear
    for name in names:
        if not hasattr(value, name):
            try:
                importlib.import_module(f"{getattr(value, '__name__', '')}.{name}")
            except ImportError:
                return False
        value = getattr(value, name)
    return True


def _is_file(span: str) -> bool:
    """A path from the root, or the end of some file's path: `token_sum.cpp`, `cpu/token_sum.cpp`."""
    if (ROOT / span).exists():
        return True
    folders = (ROOT / name for name in ("csrc", "include", "python", "tests", "bench", "docs", "examples"))
    return any(path.as_posix().endswith(f"/{span}".rstrip("/")) for folder in folders for path in folder.rglob("*"))


def test_messages_name_pages_of_the_site() -> None:
    """A wheel has no docs/. The address is one, and each page and anchor exists."""
    for name, key in (("pyproject.toml", "Documentation = "), ("mkdocs.yml", "site_url: ")):
        (line,) = (line for line in (ROOT / name).read_text().splitlines() if line.startswith(key))
        assert line.removeprefix(key).strip('"') == SITE
    calls = []
    for path in sorted((ROOT / "python").rglob("*.py")):
        text = path.read_text()
        calls += re.findall(r"""\bpage\(["']([\w-]+)["'](?:, ["']([\w-]+)["'])?\)""", text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                assert "docs/" not in ast.unparse(node), path
    assert len(calls) >= 6
    for name, anchor in calls:
        assert not anchor or anchor in anchors(ROOT / "docs" / f"{name}.md")
        assert (ROOT / "docs" / f"{name}.md").exists()


def test_pictures_and_results_are_small() -> None:
    files = [
        path for folder in ("docs/images", "bench/results") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    assert files
    large = [path.name for path in files if path.stat().st_size > 100_000]
    assert not large
    shown = {(document.parent / link).resolve() for document in DOCUMENTS for link in _LINK.findall(prose(document))}
    assert {path for path in files if path.suffix == ".png"} <= shown  # a picture that no page shows is unused


def test_architecture_lists_the_ops() -> None:
    table = re.findall(r"^\| `(\w+)` \| \[", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("switchgear::")
    }
    gradients = {name for name in registered if name.endswith(("_backward", "_wgrad"))}
    assert set(table) == registered - gradients
    text = (ROOT / "docs/architecture.md").read_text()
    assert all(f"`{name}`" in text for name in gradients)


def test_architecture_lists_the_package() -> None:
    """Each folder and module of it has a line."""
    text = (ROOT / "docs/architecture.md").read_text()
    diagram = text[text.index("\npython/switchgear/") : text.index("\ncsrc/bindings.cpp")]
    inside = [path for path in (ROOT / "python/switchgear").iterdir() if not path.name.startswith("_")]
    names = {path.name + "/" * path.is_dir() for path in inside if path.is_dir() or path.suffix == ".py"}
    named = re.findall(r"(?:^  |; )([a-z]+(?:/|\.py)) ", diagram.replace(":", " "), re.MULTILINE)
    assert names <= set(named)
    folders = [name for name in named if name.endswith("/")]
    assert len(folders) == len(set(folders))


def test_architecture_names_every_folder_of_the_top_level() -> None:
    """A folder that a command left behind must not be committed."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a clone of the repository")
    command = [git, "-c", f"safe.directory={ROOT}", "ls-files"]  # also in a clone of another user, as in a container
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = {name.split("/")[0] for name in tracked if "/" in name} - {".github"}
    text = (ROOT / "docs/architecture.md").read_text()
    assert not [folder for folder in sorted(folders) if not re.search(rf"(?<!\w){re.escape(folder)}/", text)]


def test_help_of_make_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) - {"help"}
    command = ["make", "--no-print-directory", "help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) == targets
