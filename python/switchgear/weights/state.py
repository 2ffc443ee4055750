# SPDX-License-Identifier: BSD-3-Clause
"""What switchgear keeps on a module, its own or another library's, and how integrations make their modules known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn


@dataclass(frozen=True)
class Lora:
    """Options of a projection's own adapter: W + alpha/rank · B·A."""

    rank: int
    alpha: float
    dropout: float = 0.0
    merged: Any = None  # what unmerging needs, while the adapter is merged into W

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Factors(NamedTuple):
    """An adapter of a parameter, in the parameter's own layout: parameter + scale · left·right for each expert."""

    left: Tensor  # [E,D1,r], or [E·D1,r] for a parameter [E·D1,D2]
    right: Tensor  # [E,r,D2], or [r,D2]
    scale: float


Borrowed = Mapping[str, Sequence[Factors]]  # key: the parameter's name


class State(NamedTuple):
    """The record of one module. A change replaces the whole record: shallow copies of a module, such as the replicas of
    DataParallel, share it and must not see each other's changes."""

    stored: Any = None  # StoredProjections: how the projections are stored
    adapters: Mapping[str, Lora] = {}  # key: the projection's name
    borrowed: Mapping[str, Sequence[Factors]] = {}  # factors of another library's wrapper, for the duration of a call
    selection: Any = None  # Selection: the parameters of which some experts train alone
    packed: tuple[str, ...] | None = None  # parameters that `store(model, "plain")` laid out anew
    guard: Any = None  # the handle of a hook that refuses calls which would miss adapters or trained experts
    flags: Mapping[str, bool] = {}  # requires_grad of the parameters before freeze_except
    hooks: tuple[str, ...] = ()  # names of the hooks that the module has for good; they do nothing without the rest


_KEY = "_switchgear"
NOTHING = State()


def get_state(module: nn.Module) -> State:
    """The module's record; an empty one if switchgear keeps nothing on it."""
    state: State = module.__dict__.get(_KEY, NOTHING)
    return state


def set_state(module: nn.Module, **changes: Any) -> None:
    """Changes fields of the module's record. An empty record is removed."""
    state = get_state(module)._replace(**changes)
    if any(state):
        vars(module)[_KEY] = state  # setattr of a compiled module would go to the one inside
    else:
        vars(module).pop(_KEY, None)


def hook_once(module: nn.Module, name: str, register: Callable[[Any], Any]) -> None:
    """Calls register(module), unless a call with this name has before."""
    hooks = get_state(module).hooks
    if name not in hooks:
        register(module)
        set_state(module, hooks=(*hooks, name))


# ---- modules of other libraries --------------------------------------------------------------------------------------

Kind = Literal["layout", "linear", "embedding", "hint", "site", "reader", "wrapper"]
FINDERS: dict[Kind, list[Callable[..., Any]]] = {kind: [] for kind in get_args(Kind)}


def extend(kind: Kind, finder: Callable[..., Any]) -> None:
    """Makes modules of another library known. Each finder answers for its own kind of module, and None for others.

    layout: module -> Layout, with which `store` stores the projections of experts.
    linear: module -> Layout of a linear layer.
    embedding: module -> Layout of an embedding.
    hint: module -> str: why the module has no layout now.
    site: (path, module) -> list[Site] of switchgear.adapters: its projections that can have adapters. It raises
        ValueError if they cannot have any as they are now.
    reader: (module, name) -> True if a call of the module reads the factors that it borrows for its parameter `name`.
    wrapper: () -> None. It is called when a wrapper is around a module or may come, and makes the wrappers of its
        library lend their factors.
    """
    FINDERS[kind].append(finder)


def find(kind: Kind, *arguments: Any) -> Any:
    """The first answer that is not None; None if no finder knows the module."""
    return next((found for finder in FINDERS[kind] if (found := finder(*arguments)) is not None), None)
