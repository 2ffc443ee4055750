# SPDX-License-Identifier: BSD-3-Clause
"""Observes or edits what the routers of a Hugging Face model pass to experts on switchgear, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from switchgear.integrations import experts as running
from switchgear.integrations.swap import is_swapped
from switchgear.integrations.transformers import NAME, is_decorated
from switchgear.integrations.undecorated import patch_of
from switchgear.routing.change import Change

OnChoice = Callable[[str, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model whose experts run on switchgear, by name."""

    def runs_here(module: nn.Module) -> bool:
        if is_decorated(module):
            config: Any = module.config
            return bool(config._experts_implementation == NAME)
        patch = patch_of(module)
        return is_swapped(module) and patch is not None and patch.has_choice

    return {name: module for name, module in model.named_modules() if runs_here(module)}


@contextmanager
def on_choice(modules: Mapping[str, nn.Module], function: OnChoice) -> Iterator[None]:
    """Inside the block, function(name, topk_ids [T,K], topk_weights [T,K], num_experts) is called before the experts
    of each of `modules`. It returns the ids and weights that they use. An id of -1 is an empty slot."""
    current: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: current.append(name)

    def leave(*_: object) -> None:
        current.pop()

    def choice(ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        return function(current[-1], ids, weights, num_experts) if current else (ids, weights)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(enter(name)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        running.on_choice.append(choice)
        stack.callback(running.on_choice.remove, choice)
        yield


@contextmanager
def edited(modules: Mapping[str, nn.Module], change: Change) -> Iterator[None]:
    """Inside the block, `change.edit` is applied to the routing that the experts receive; see Change."""
    for name, module in modules.items():
        count = getattr(module, "num_experts", None)
        try:
            if isinstance(count, int):
                change.check(count)
        except ValueError as error:
            raise ValueError(f"{error} ({name})") from None

    def function(_: str, ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        change.check(num_experts)
        return change.edit(ids, weights, num_experts)

    with on_choice(modules, function):
        yield
