# SPDX-License-Identifier: BSD-3-Clause
"""Fails if the built site lacks a public name or has a dead link: python docs/site/check.py build/site"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

PAGES = Path(__file__).parents[1] / "api"


def public_names(package: str) -> list[str]:
    """The documented names of a package: those of __all__ that are neither modules nor dunders."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == package
    ]  # fmt: skip
    return [name for name in names if not name.startswith("__") and not isinstance(getattr(module, name), ModuleType)]


def dead_links(site: Path) -> list[str]:
    """Links and pictures of all pages that lead nowhere inside the site. mkdocs checks those in Markdown alone."""
    dead = []
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # shown for any address, so its links start at that of the site
            continue
        for link in re.findall(r'(?:href|src)="([^"#?]+)[^"]*"', page.read_text()):
            if re.match(r"[a-z]+:|//", link):
                continue
            target = site / unquote(link).lstrip("/") if link.startswith("/") else page.parent / unquote(link)
            if not (target / "index.html").exists() and not target.is_file():
                dead.append(f"{page.relative_to(site)}: {link}")
    return dead


def main(site: Path) -> int:
    anchors: set[str] = set()
    for page in (site / "api").rglob("*.html"):
        anchors.update(re.findall(r'id="(switchgear[\w.]*)"', page.read_text()))
    text = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
    packages = re.findall(r"^::: (switchgear[.\w]*)$", text, re.M)
    missing = []
    for package in packages:
        try:
            names = public_names(package)
        except ModuleNotFoundError:  # a function, listed by itself because a module has its name
            continue
        module = importlib.import_module(package)
        for name in names:
            value = getattr(module, name)
            defined = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
            if not {f"{package}.{name}", defined} & anchors:
                missing.append(f"{package}.{name}")
    print(f"{len(anchors)} documented names; missing: {', '.join(missing) or 'none'}")
    dead = dead_links(site)
    print("dead links:", ", ".join(dead) or "none")
    return int(bool(missing or dead))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
