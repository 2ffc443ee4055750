# SPDX-License-Identifier: BSD-3-Clause
"""Pages link files outside of docs/, as on a code host. The site has those files as pages, so links lead there."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Notebooks are executed for their output, without bars of progress, and beside other programs.
os.environ.update(
    HF_HUB_DISABLE_PROGRESS_BARS="1", PYTHONWARNINGS="ignore:IProgress not found", OMP_WAIT_POLICY="passive"
)
LANGUAGES = {
    **{".py": "python", ".pyi": "python", ".cpp": "cpp", ".h": "cpp", ".inl": "cpp", ".cu": "cpp", ".cuh": "cpp"},
    **{".json": "json", ".toml": "toml", ".cmake": "cmake", ".sh": "bash", ".txt": "text", ".yml": "yaml"},
}
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def _linked(text: str, page: str) -> dict[str, Path]:
    """The paths in the repository that a page links outside of docs/, by the text of the link."""
    found = {}
    for link, _ in _LINK.findall(text):
        path = Path(os.path.normpath(ROOT / "docs" / Path(page).parent / link))
        if path.exists() and not path.is_relative_to(ROOT / "docs") and path.is_relative_to(ROOT):
            found[link] = path
    return found


def _source_page(path: Path) -> str:
    """The place of a file's page in the site."""
    return posixpath.join("source", path.relative_to(ROOT).as_posix() + ".md")


def _content(path: Path, pages: dict[str, str]) -> str:
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        rows = [f"- `{entry.name}{'/' if entry.is_dir() else ''}`" for entry in sorted(path.iterdir())
                if not entry.name.startswith((".", "__pycache__"))]  # fmt: skip
        return f"# {name}/\n\n" + "\n".join(rows) + "\n"
    if path.suffix == ".md":  # README and CONTRIBUTING: their links start at the root
        up = "../" * pages[name].count("/")
        return re.sub(r"\]\((?!https?://|#)(?:docs/)?([^)]*)\)", lambda m: f"]({_rooted(m, up)})", path.read_text())
    text = path.read_text()
    fence = "`" * max(4, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"# {name}\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"


def _rooted(match: re.Match[str], up: str) -> str:
    link, whole = match.group(1), match.group(0)
    if "(docs/" in whole:
        return up + link
    path, _, anchor = link.partition("#")
    return up + _source_page(ROOT / path) + (f"#{anchor}" if anchor else "")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each linked file, and for those that the added pages of prose link."""
    paths: set[Path] = set()
    for file in files.documentation_pages():
        paths.update(_linked(Path(str(file.abs_src_path)).read_text(), file.src_uri).values())
    for path in [path for path in paths if path.suffix == ".md"]:
        for link in re.findall(r"\]\((?!https?://|#|docs/)([^)#]*)", path.read_text()):
            if (linked := path.parent / link).exists():
                paths.add(linked.resolve())
    pages = {path.relative_to(ROOT).as_posix(): _source_page(path) for path in paths}
    for path in sorted(paths):
        content = _content(path, pages)
        files.append(File.generated(config, _source_page(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to their pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    linked = _linked(markdown, page.file.src_uri)
    up = "../" * page.file.src_uri.count("/")

    def replaced(match: re.Match[str]) -> str:
        link, anchor = match.group(1), match.group(2) or ""
        return f"]({up}{_source_page(linked[link])}{anchor})" if link in linked else match.group(0)

    return _LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Notebooks link pages by their files, as on a code host. Those links become the pages' places in the site."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def replaced(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match.group(1)))
        file = files.get_file_from_path(path)
        return match.group(0) if file is None else f'href="{file.url_relative_to(page.file)}{match.group(2) or ""}"'

    return re.sub(r'href="([^":#]+\.md)(#[^"]*)?"', replaced, html)
