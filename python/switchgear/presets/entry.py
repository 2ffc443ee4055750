# SPDX-License-Identifier: BSD-3-Clause
"""What a preset says of itself, beside its options: paper, place on the page, how close it is to the paper, example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec

GROUPS = ("score", "selection", "capacity", "balance", "structure", "adapter", "model")

PAPER = "formula of the paper"
CODE = "formula of its code"
OURS = "a choice of ours"

P = ParamSpec("P")


class Example(NamedTuple):
    """A layer that the preset builds, and its call on x [2,12,64].

    Attributes:
        sizes: hidden_size, intermediate_size, num_experts.
        arguments: of the preset; a function makes its value when the example runs.
        inputs: keyword arguments of the layer's forward, by the names that the page gives to tensors.
        options: of the layer, besides the preset's.
    """

    sizes: tuple[int, int, int] = (64, 32, 8)
    arguments: Mapping[str, Any] = {}
    inputs: Mapping[str, str] = {}
    options: Mapping[str, Any] = {}


def read_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an example with the values that its functions make."""
    return {name: value() if callable(value) else value for name, value in arguments.items()}


class Preset(NamedTuple):
    """A preset and its paper.

    Attributes:
        function: returns the options.
        group: one of GROUPS, a table of the page.
        number: the paper's in the list that the names of tests use (test_row49_…); None if it is not in that list.
        paper, source: its title, and "arXiv:…" or an address.
        fidelity: what the formula rests on. unverified: constants that could not be confirmed in the paper.
    """

    function: Callable[..., dict[str, Any]]
    group: str
    number: int | None
    paper: str
    source: str
    fidelity: str
    unverified: str
    example: Example

    @property
    def name(self) -> str:
        """The name of its function."""
        return self.function.__name__

    def options(self, **arguments: Any) -> dict[str, Any]:
        """What the preset returns for the arguments of its example, and for these instead."""
        return self.function(**read_arguments({**self.example.arguments, **arguments}))


PRESETS: dict[str, Preset] = {}
_EXAMPLE = Example()


def preset(
    group: str,
    number: int | None,
    paper: str,
    fidelity: str,
    *,
    unverified: str = "",
    example: Example = _EXAMPLE,
) -> Callable[[Callable[P, dict[str, Any]]], Callable[P, dict[str, Any]]]:
    """Enters the function below into PRESETS, and says paper, fidelity and unverified in its docstring. paper: "its
    title, its source"; see Preset and Example for the others."""
    title, _, source = paper.rpartition(", ")

    def enter(function: Callable[P, dict[str, Any]]) -> Callable[P, dict[str, Any]]:
        PRESETS[function.__name__] = Preset(function, group, number, title, source, fidelity, unverified, example)
        lines = {"Paper": paper, "Rests on": fidelity, "Unverified": unverified}
        said = "".join(f"\n    {name}: {text}" for name, text in lines.items() if text)
        function.__doc__ = f"{function.__doc__}\n{said}"
        return function

    return enter
