# SPDX-License-Identifier: BSD-3-Clause
"""Generates docs/presets.md from the presets' docstrings and return values."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import presets
from switchgear.presets.fidelity import FIDELITY, GROUPS

_PAPER = re.compile(r"^Paper: (?P<title>.+), (?P<source>arXiv:\d{4}\.\d{4,5}|https://\S+)$", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example: (?P<example>.+)$", re.MULTILINE)

HEADER = """# Presets

A paper is a dict of options. A preset takes its constants as arguments: `presets.mixtral(top_k=4)`. What each preset
sets, and what to call:

- `switchgear.MoE(2048, 1024, 64, **switchgear.presets.expert_choice())` works for most of them;
- `switchgear.presets.build(2048, 1024, 64, **switchgear.presets.multi_head())` works for all, including compositions of
layers;
- those of *adapters as experts* are options of `switchgear.adapters.add_lora_experts(model, …)` and `mixture(model, …)`
([adapter_experts.md](adapter_experts.md)); `build` makes one such layer, a Linear of hidden_size to intermediate_size.

In the examples, x is [2,12,64], `token_ids` [2,12] are vocabulary ids, `task` [2,24] has one embedding per sequence,
and `kinds` [2] are integers.
The trainer adds the losses of `balance`: `loss + switchgear.balance_loss(model)`. Presets with a controller or an
interval need `switchgear.after_step(model)` after each optimizer step. [routing.md](routing.md) describes the parts and
how to write your own.

The column *fidelity* says what the formula rests on: the paper's text, its authors' or a widely used code, or a choice
of ours. Unverified are constants that could not be confirmed in the paper. *No.* is the number that tests carry in
their names (`test_row49_…`). `python tests/papers_table.py` prints how far each preset is from a plain float64 loop.

This page is generated: `python tools/pages/presets.py > docs/presets.md`.
"""

TABLE = """
## {title}

| preset | no. | paper | sets | fidelity | example |
|---|---|---|---|---|---|
"""

TITLES = {
    "score": "Scores",
    "selection": "Selections",
    "capacity": "Capacity",
    "balance": "Balance",
    "structure": "Structure",
    "adapter": "Adapters as experts",
    "model": "Models",
}


class Entry(NamedTuple):
    name: str
    summary: str
    title: str
    source: str  # "arXiv:…" or an address
    example: str


def entries() -> list[Entry]:
    """All presets, by name. ValueError if a docstring has no line "Paper: …, arXiv:…" or "Example: …"."""
    found = []
    for name in presets.__all__:
        if name == "build":
            continue
        text = inspect.getdoc(getattr(presets, name)) or ""
        paper, example = _PAPER.search(text), _EXAMPLE.search(text)
        if paper is None or example is None:
            raise ValueError(f"{name}: expected lines 'Paper: …, arXiv:…' and 'Example: …' in its docstring")
        summary = " ".join(text.split("\n\n")[0].split())
        found.append(Entry(name, summary, paper["title"], paper["source"], example["example"]))
    return found


def options_of(entry: Entry) -> dict[str, Any]:
    """The dict that the preset returns for the arguments of its example."""
    for node in ast.walk(ast.parse(entry.example, mode="eval")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == entry.name:
            options: dict[str, Any] = eval(ast.unparse(node), {"presets": presets, "torch": torch})
            return options
    raise ValueError(f"{entry.name}: expected presets.{entry.name}(…) in its example, got {entry.example!r}")


def written(value: Any) -> str:
    """A value as source code: the first argument, and what differs from its default."""
    if isinstance(value, functools.partial):
        positional = [written(item) for item in value.args]
        named = [f"{name}={written(item)}" for name, item in value.keywords.items() if item is not None]
        if not positional and not named:
            return _name(value.func)
        return f"{_name(value.func)}({', '.join(positional + named)})"
    if is_dataclass(value) and not isinstance(value, type):
        parts: list[str] = []
        for place, field in enumerate(fields(value)):
            item = getattr(value, field.name)
            if place and field.default is not MISSING and item == field.default:
                continue
            parts.append(written(item) if place == len(parts) else f"{field.name}={written(item)}")
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, dict):
        return ", ".join(f"{name}={written(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, Tensor):
        return "counts" if value.dim() == 1 else "table"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _name(value) if callable(value) else repr(value)


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", function))


def page() -> str:
    """The Markdown of docs/presets.md."""
    parts = [HEADER]
    for group in GROUPS:
        parts.append(TABLE.format(title=TITLES[group]))
        parts.extend(_row(entry) for entry in entries() if FIDELITY[entry.name].group == group)
    return "".join(parts)


def _row(entry: Entry) -> str:
    address = entry.source.replace("arXiv:", "https://arxiv.org/abs/")
    paper = f"[{entry.title}]({address})" + f", {entry.source[6:]}" * entry.source.startswith("arXiv:")
    found = FIDELITY[entry.name]
    fidelity = found.formula + (f"; unverified: {found.unverified}" if found.unverified else "")
    cells = (
        f"`{entry.name}`", str(found.number or ""), f"{entry.summary} {paper}", f"`{written(options_of(entry))}`",
        fidelity, f"`{entry.example}`",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    print(page(), end="")
