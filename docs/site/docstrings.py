# SPDX-License-Identifier: BSD-3-Clause
"""Docstrings are plain text. In the site, aligned lines keep their columns, and <name> is not taken for HTML.
Names in a table MOVED are listed where users import them."""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Alias, Extension, Module, Object

_PLACEHOLDER = re.compile(r"(`[^`]*`)|<([\w/]+)>")
_ALIGNED = re.compile(r"\S {2,}\S|^[\w/]+\.py ", re.MULTILINE)


def markdown(docstring: str) -> str:
    """The docstring with aligned paragraphs as blocks of text, and placeholders escaped elsewhere."""
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        if _ALIGNED.search(paragraph) and not paragraph.startswith((" ", "Args:", "Returns:", "Raises:")):
            paragraphs.append(f"```text\n{paragraph}\n```")
        else:
            paragraphs.append(_PLACEHOLDER.sub(lambda m: m.group(1) or f"&lt;{m.group(2)}&gt;", paragraph))
    return "\n\n".join(paragraphs)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_module_members(self, *, mod: Module, **_: Any) -> None:
        if "MOVED" in mod.members:
            moved: dict[str, str] = ast.literal_eval(str(mod.members["MOVED"].value))
            for name, module in moved.items():
                mod.set_member(name, Alias(name, f"{module}.{name}", parent=mod))
            mod.exports = [name for name in mod.exports or () if isinstance(name, str)] + list(moved)
