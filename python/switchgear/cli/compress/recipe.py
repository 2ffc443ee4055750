# SPDX-License-Identifier: BSD-3-Clause
"""Recipes of `switchgear compress`. Every mistake is named before anything is loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from switchgear import compress
from switchgear.checks import Range, Size, convert, convert_arguments
from switchgear.compress.levels import Widths, choose_form

from ..common import CommandError

STEPS = ("prune_experts", "merge_experts", "prune_weights", "quantize")  # of switchgear.compress
GIVEN = ("model", "calibration")  # arguments that the command passes itself
MIXED = ("of", "average", "alpha", "beta", "gamma", "tolerance")  # options of bits by expert
CALIBRATION = {"text": [], "tokens": 65536, "length": None}


@dataclass(frozen=True)
class Step:
    do: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(compress, self.do)
        return found

    @property
    def needs_hessians(self) -> bool:
        return self.options.get("method") == "gptq"

    @property
    def needs_calibration(self) -> bool:
        """Random pruning, and rounding to a fixed number of bits, need none."""
        if self.do == "prune_experts":
            return self.options.get("criterion") != "random"
        if self.do == "prune_weights":
            return self.options.get("metric") != "magnitude"
        return self.do != "quantize" or self.needs_hessians or self.distributes_bits

    @property
    def distributes_bits(self) -> bool:
        """Whether `bits` says what allocate_bits distributes, not how many bits layers get."""
        bits = self.options.get("bits")
        return isinstance(bits, Mapping) and any(name in bits for name in MIXED)


@dataclass(frozen=True)
class Recipe:
    steps: tuple[Step, ...]
    text: tuple[str, ...]  # files, each a domain
    tokens: int  # of each
    length: int | None  # of a sequence; see checkpoint.length_for

    def as_dict(self) -> dict[str, Any]:
        steps = [{"do": step.do, **step.options} for step in self.steps]
        files = [Path(file).name for file in self.text]
        return {"calibration": {"text": files, "tokens": self.tokens, "length": self.length}, "steps": steps}


def read(path: str) -> Recipe:
    """CommandError with the place of the mistake. Paths of texts are relative to the recipe."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise CommandError(f"--recipe: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"--recipe: {path} is not JSON: {error}") from None
    return parse(data, Path(path).parent)


def parse(data: Any, folder: Path) -> Recipe:
    _check_keys("recipe", data, ("calibration", "steps"))
    how = data.get("calibration", {})
    _check_keys("recipe: calibration", how, tuple(CALIBRATION))
    how = CALIBRATION | how
    files = how["text"] if isinstance(how["text"], list) else None
    if files is None or not all(isinstance(file, str) for file in files):
        raise CommandError(f"recipe: calibration.text: expected a list of files, got {how['text']!r}")
    try:
        convert("tokens", how["tokens"], Size)
        convert("length", how["length"], Annotated[int, Range(2, 2**31 - 1)] | None)
    except (TypeError, ValueError) as error:
        raise CommandError(f"recipe: calibration.{error}") from None
    steps = data.get("steps")
    if not isinstance(steps, list) or not steps:
        raise CommandError(f"recipe: steps: expected a list of at least one, got {steps!r}")
    parsed = tuple(_step(f"recipe: steps[{i}]", step) for i, step in enumerate(steps))
    return Recipe(parsed, tuple(str(folder / file) for file in files), how["tokens"], how["length"])


def _step(place: str, data: Any) -> Step:
    if not isinstance(data, dict) or data.get("do") not in STEPS:
        got = data.get("do") if isinstance(data, dict) else data
        raise CommandError(f"{place}: do: expected one of {', '.join(STEPS)}, got {got!r}")
    signature = inspect.signature(getattr(compress, data["do"]))
    known = [name for name in signature.parameters if name not in GIVEN]
    options = {name: value for name, value in data.items() if name != "do"}
    for name in options:
        if name not in known:
            raise CommandError(f"{place}: expected options of {data['do']} ({', '.join(known)}), got {name!r}")
    if data["do"] == "quantize":
        options.setdefault("store", False)  # from_pretrained does not know the stored form
    step = Step(data["do"], options)
    if step.distributes_bits:
        _check_keys(f"{place}: bits", options["bits"], MIXED)
    try:
        signature.bind(None, **options, calibration=None)  # all functions take one, and merge_experts needs it
        _check_values(step)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{place}: {data['do']}: {error}") from None
    return step


def _check_values(step: Step) -> None:
    """Raises TypeError or ValueError for values that suit no model, by the annotations of the functions."""
    options = dict(step.options)
    if step.distributes_bits:
        bits = dict(options.pop("bits"))
        convert("of", bits.pop("of", [1]), Widths)
        _check(compress.allocate_bits, bits)
    _check(step.function, options)
    if step.do == "quantize":
        defaults = {"bits": 1 if step.distributes_bits else 4, "group_size": 128, "symmetric": True}
        choose_form(**{name: options.get(name, default) for name, default in defaults.items()}, store=options["store"])


def _check(function: Callable[..., Any], options: dict[str, Any]) -> None:
    convert_arguments(function, inspect.signature(function), options)


def _check_keys(place: str, data: Any, known: tuple[str, ...]) -> None:
    if not isinstance(data, dict):
        raise CommandError(f"{place}: expected an object with {', '.join(known)}, got {type(data).__name__}")
    for name in data:
        if name not in known:
            raise CommandError(f"{place}: expected {', '.join(known)}, got {name!r}")
