# SPDX-License-Identifier: BSD-3-Clause
"""Fails if the built site lacks a public name: python docs/site/check.py build/site"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

PAGES = Path(__file__).parents[1] / "api"


def public_names(package: str) -> list[str]:
    """The documented names of a package: those of __all__ that are neither modules nor dunders."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == package
    ]  # fmt: skip
    return [name for name in names if not name.startswith("__") and not isinstance(getattr(module, name), ModuleType)]


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
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
