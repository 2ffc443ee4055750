# SPDX-License-Identifier: BSD-3-Clause
"""Generates docs/presets.md from the entries of presets, their docstrings and what they return."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from torch import Tensor

from switchgear.presets.entry import GROUPS, PRESETS, Preset, read_arguments

HEADER = """# Presets

What each preset of a paper or model sets. A preset is a dict of options and takes its constants as arguments:
`presets.mixtral(top_k=4)`. What to call:

- `switchgear.MoE(2048, 1024, 64, **switchgear.presets.expert_choice())` works for most of them;
- `switchgear.presets.build(2048, 1024, 64, **switchgear.presets.multi_head())` works for all, including compositions of
layers;
- those of *adapters as experts* are options of `switchgear.adapters.add_lora_experts(model, …)` and `mixture(model, …)`
([adapter_experts.md](adapter_experts.md)); `build` makes one such layer, a Linear of hidden_size to intermediate_size.

No example: `MoE(64, 32, 8, **presets.NAME())(x)`. In the examples, x is [2,12,64], `token_ids` [2,12] are vocabulary
ids, `task` [2,24] has one embedding per sequence, `kinds` [2] are integers, `counts` [100] the frequencies of ids, and
`table` [8,24] the centroids of clusters.
The trainer adds the losses of `balance`: `loss + switchgear.balance_loss(model)`. Presets with a controller or an
interval need `switchgear.after_step(model)` after each optimizer step. [routing.md](routing.md) describes the parts and
how to write your own.

*Fidelity* is what the formula rests on: the paper's text, its authors' or a widely used code, or a choice of ours.
Unverified are constants that could not be confirmed in the paper.

This page is generated: `python tools/pages/presets.py > docs/presets.md`.
"""

TABLE = """
## {title}

| preset | paper | sets | fidelity | example |
|---|---|---|---|---|
"""

LEFT_OUT = """
## What was left out

Of the papers that this package goes back to, these have no function of their own, and why:

| source | what is here | what is not, and why |
|---|---|---|
"""

OTHERS = (
    (
        "A Survey on Mixture of Experts; A Survey on Model MoErging; Convergence Rates for Mixture-of-Experts; "
        "Symbolic Mixture-of-Experts; P-Adapters; Mixture-of-Prompts; MRKL Systems",
        "",
        "surveys, a theorem, choices of whole models or prompts: no layer",
    ),
    ("GLoME, BLoME", "the gate, `routing.Gaussian`", "the number of experts chosen by a penalty"),
    ("Toward Inference-optimal MoE; Scaling Laws for Upcycling", "laws in `switchgear.analysis`", "trainings"),
    ("DMoERM", "`adapters`, with a router of sequences", "two stages of reward models"),
    ("JiuZhang 2.0", "`convert.upcycle`", "a curriculum of tasks"),
    ("Exploring the Benefits of Training Expert Language Models", "`convert.merge_models`", "choice by nearest prompt"),
    ("The Obscure Limitation of Modular Multilingual Language Models", "`routing.Lookup` of a language", "a study"),
    ("GShard", "`presets.gshard`", "the second expert drawn at random: all of a token's choices count"),
    ("Branch-Train-Stitch", "`presets.branch_train_stitch`", "the training of its language models"),
)

TITLES = {
    "score": "Scores",
    "selection": "Selections",
    "capacity": "Capacity",
    "balance": "Balance",
    "structure": "Structure",
    "adapter": "Adapters as experts",
    "model": "Models",
}


def example_of(entry: Preset) -> str:
    """The call of a preset's example as source code."""
    options = entry.options()
    sizes, arguments, inputs, others = entry.example
    given = ", ".join(f"{name}={written(value)}" for name, value in read_arguments(arguments).items())
    layer = "presets.build" if "layer" in options else "MoE"
    parts = [
        *map(str, sizes),
        f"**presets.{entry.name}({given})",
        *(f"{name}={written(others[name])}" for name in others),
    ]
    call = ", ".join(["x", *(f"{name}={tensor}" for name, tensor in inputs.items())])
    return f"{layer}({', '.join(parts)})({call})" + "[0]" * bool(options.get("return_routing"))


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
        parts.extend(_row(PRESETS[name]) for name in sorted(PRESETS) if PRESETS[name].group == group)
    return "".join([*parts, LEFT_OUT, *(f"| {' | '.join(row)} |\n" for row in OTHERS)])


def _row(entry: Preset) -> str:
    address = entry.source.replace("arXiv:", "https://arxiv.org/abs/")
    paper = f"[{entry.paper}]({address})"
    summary = " ".join((inspect.getdoc(entry.function) or "").split("\n\n")[0].split())
    example = example_of(entry)
    fidelity = entry.fidelity + (f"; unverified: {entry.unverified}" if entry.unverified else "")
    cells = (
        f"`{entry.name}`", f"{summary} {paper}", f"`{written(entry.options())}`", fidelity,
        f"`{example}`" * (example != f"MoE(64, 32, 8, **presets.{entry.name}())(x)"),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    print(page(), end="")
