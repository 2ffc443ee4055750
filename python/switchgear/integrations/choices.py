# SPDX-License-Identifier: BSD-3-Clause
"""Sees and changes the choices of a Hugging Face model's routers, whatever runs the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from switchgear.integrations.hook_points import Choice, find_hook_point
from switchgear.integrations.moe_blocks import MoeBlock
from switchgear.integrations.routers import LookupMethod, RoutingMethod, SelectByMethod, is_looked_up
from switchgear.routing.context import Context, Select

Wrapper = Callable[[Select], Select]
Watch = Callable[[Choice], None]


@contextmanager
def override_selection(block: MoeBlock, method: RoutingMethod, wrapper: Wrapper) -> Iterator[None]:
    """Inside the `with` block, experts get what `wrapper` makes of the router's selection. As in Router.overrides, the
    last wrapper is the outermost."""
    with _hook(block) as hooks:
        hooks.method = method
        hooks.overrides.append(wrapper)
        try:
            yield
        finally:
            _remove(hooks.overrides, wrapper)


def get_override(block: MoeBlock) -> Any:
    """What the overrides in force make of the model's own selection; None if there are none."""
    hooks = _hooks.get(block.experts)
    select: Any = None
    for wrapper in hooks.overrides if hooks is not None else ():
        select = wrapper(select)
    return select


@contextmanager
def watch_choices(block: MoeBlock, watch: Watch) -> Iterator[None]:
    """Inside the `with` block, `watch` sees each choice after all overrides."""
    with _hook(block) as hooks:
        hooks.watches.append(watch)
        try:
            yield
        finally:
            _remove(hooks.watches, watch)


class _Hooks:
    """The hooks of a block, as long as a user overrides or watches. Receives its choices."""

    def __init__(self, block: MoeBlock) -> None:
        self.block, self.users = block, 0
        self.method: RoutingMethod | None = None
        self.overrides: list[Wrapper] = []
        self.watches: list[Watch] = []
        self.logits: Tensor | None = None
        self.handles = find_hook_point(block).register(block, self)

    def receive(self, choice: Choice) -> Choice:
        if self.overrides:
            choice = self._reselect(choice)
        for watch in self.watches:
            watch(choice)
        return choice

    def _reselect(self, choice: Choice) -> Choice:
        logits, method = choice.router_logits, self.method
        assert method is not None
        if logits is None:
            raise ValueError(f"{self.block.name or 'model'}: expected a router that ran before the experts, got none")
        if is_looked_up(self.block):
            method = LookupMethod(method, choice.topk_ids)
        select: Select = SelectByMethod(method, choice.topk_ids.shape[1])
        for wrapper in self.overrides:
            select = wrapper(select)
        routing = select(logits, Context(training=self.block.block.training), None)
        weights = routing.topk_weights.to(choice.topk_weights.dtype)
        return choice._replace(topk_ids=routing.topk_ids.long(), topk_weights=weights)


_hooks: WeakKeyDictionary[nn.Module, _Hooks] = WeakKeyDictionary()  # key: the module of experts


@contextmanager
def _hook(block: MoeBlock) -> Iterator[_Hooks]:
    hooks = _hooks.get(block.experts)
    if hooks is None:
        hooks = _hooks[block.experts] = _Hooks(block)
    hooks.users += 1
    try:
        yield hooks
    finally:
        hooks.users -= 1
        if not hooks.users:
            for handle in hooks.handles:
                handle.remove()
            del _hooks[block.experts]


def _remove(items: list[Any], item: Any) -> None:
    at = next(i for i in reversed(range(len(items))) if items[i] is item)
    del items[at]
