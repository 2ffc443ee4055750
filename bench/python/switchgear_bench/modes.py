# SPDX-License-Identifier: BSD-3-Clause
"""What `switchgear bench` measures beside whole layers, and the options that each of these modes takes."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from switchgear.cli.common import CommandError


class Mode(NamedTuple):
    """A module of this package with a function `run`, and the names of its options, as argparse stores them."""

    module: str
    options: frozenset[str]
    describes: bool  # the machine, which `run` is passed for that


def _mode(module: str, options: str, describes: bool = True) -> Mode:
    return Mode(module, frozenset(options.split()), describes)


FILES = frozenset({"source", "json", "csv", "markdown", "plot"})
LAYERS = _mode("run", "shapes tokens dtypes modes competitors competitors_folder routing pages allocator quick budget "
    "threads source json csv markdown plot")  # fmt: skip
# By the option that chooses it.
MODES = {
    "list": _mode("tables", "", False),
    "device": _mode("cuda", "shapes tokens modes competitors routing budget json csv markdown", False),
    "model": _mode("model", "shapes routing json", False),
    "threads_model": _mode("threads_tables", "shapes tokens dtypes modes routing source json markdown"),
    "parallel": _mode(
        "parallel", "shapes tokens dtypes modes routing quick nodes bandwidth gflops json plot", False
    ),
    "routers": _mode("routers", "shapes threads source json markdown"),
    "adapters": _mode("adapters", "shapes tokens dtypes ranks competitors competitors_folder budget threads "
        "source json markdown"),
    "compress": _mode("compress", "checkpoint quick threads source json markdown plot"),
    "quality": _mode("quality", "quick threads source json markdown"),
    "offload": _mode("offload", "competitors competitors_folder checkpoint quick threads source json markdown"),
    "generate": _mode("generate", "shapes competitors_folder quick threads source json markdown"),
}  # fmt: skip


def mode_of(given: Set[str]) -> Mode:
    """The mode that the given options choose. CommandError for a second one, or an option that it does not take."""
    chosen = next((name for name in MODES if name in given), None)
    mode = MODES[chosen] if chosen else LAYERS
    rest = given - {chosen}
    for option in sorted(rest - mode.options):
        raise CommandError(f"{_flag(option)}: {_where(option, chosen)}")
    for option in sorted(rest - FILES) if "source" in given else ():
        raise CommandError(f"{_flag(option)}: not with --from, which measures nothing")
    return mode


def _where(option: str, chosen: str | None) -> str:
    if chosen:
        return f"not with {_flag(chosen)}"
    return "only with " + " or ".join(_flag(name) for name, mode in MODES.items() if option in mode.options)


def _flag(option: str) -> str:
    names = {"source": "--from", "device": "--device cuda"}
    return names.get(option, f"--{option.replace('_', '-')}")
