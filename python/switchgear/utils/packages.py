# SPDX-License-Identifier: BSD-3-Clause
"""Optional packages: whether they are installed, and why an import failed; names that have moved; pages of the site."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

SITE = "https://switchgear.readthedocs.io/en/latest/"  # as in pyproject.toml and mkdocs.yml
EXTRAS = {  # Packages that each extra installs, for error messages.
    "bench": {"rich", "matplotlib", "PIL"},
    "serve": {"fastapi", "uvicorn", "openai"},
    "transformers": {"transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy"},
}


def page(name: str, anchor: str = "") -> str:
    """The address of a page of the documentation, for a message: a wheel has none of docs/."""
    return f"{SITE}{name}/" + (f"#{anchor}" if anchor else "")


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for the message of another one."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def find_origin(error: BaseException) -> BaseException:
    """The import that failed first: transformers imports its names late and raises errors of its own."""
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__
    return error


def is_installed(package: str) -> bool:
    """Whether a package is found, without importing it. False if something else stands for it in sys.modules."""
    with suppress(ImportError, ValueError):  # A finder blocks it, or a stub has no __spec__.
        return importlib.util.find_spec(package) is not None
    return False


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_package(error: BaseException) -> str | None:
    """The package that an import lacks; None if it failed for another reason."""
    error = find_origin(error)
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return name.partition(".")[0] if name else None


def failed_import(error: ImportError, module: str = "") -> str:
    """Why `module` could not be imported, in words for a user: what to install, or what is damaged."""
    of, missing, reason = module.partition(".")[0], missing_package(error), find_origin(error)
    if missing is None:
        if of == "switchgear":  # One of its modules lacks a package.
            of = (getattr(reason, "name", None) or "").partition(".")[0]
        return f"{of} is installed but cannot be imported: {reason}" if of else str(reason)
    extra = next((extra for extra, packages in EXTRAS.items() if {missing, of} & packages), None)
    wanted = missing if extra is None else f"'switchgear[{extra}]'"
    return f"needs {missing} ({reason}); pip install {wanted}"


def find_moved(package: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose table `moved` names the module of each such name.

    MOVED = {"Name": "switchgear.new.place"}
    __getattr__ = find_moved(__name__, MOVED)
    """

    def find(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(moved[name]), name)
        setattr(sys.modules[package], name, value)  # so the next use costs no call
        return value

    return find
