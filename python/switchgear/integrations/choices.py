# SPDX-License-Identifier: BSD-3-Clause
"""Sees and changes the choices of a Hugging Face model's routers, whatever runs the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from switchgear.integrations.moe_blocks import MoeBlock
from switchgear.integrations.places import Choice, place_of
from switchgear.integrations.routers import Given, RoutingMethod, SelectByMethod, is_looked_up
from switchgear.routing.context import Context, Select

Wrapper = Callable[[Select], Select]
Watch = Callable[[Choice], None]


@contextmanager
def overridden(block: MoeBlock, method: RoutingMethod, wrapper: Wrapper) -> Iterator[None]:
    """Inside the `with` block, experts get what `wrapper` makes of the router's selection. As in Router.overrides, the
    last wrapper is the outermost."""
    with _tapped(block) as tap:
        tap.method = method
        tap.overrides.append(wrapper)
        try:
            yield
        finally:
            _remove(tap.overrides, wrapper)


def selection_under(block: MoeBlock) -> Any:
    """What the overrides in force make of the model's own selection; None if there are none."""
    tap = _taps.get(block.experts)
    select: Any = None
    for wrapper in tap.overrides if tap is not None else ():
        select = wrapper(select)
    return select


@contextmanager
def watched(block: MoeBlock, watch: Watch) -> Iterator[None]:
    """Inside the `with` block, `watch` sees each choice after all overrides."""
    with _tapped(block) as tap:
        tap.watches.append(watch)
        try:
            yield
        finally:
            _remove(tap.watches, watch)


class _Tap:
    """The hooks of a block, as long as a user overrides or watches."""

    def __init__(self, block: MoeBlock) -> None:
        self.block, self.users = block, 0
        self.method: RoutingMethod | None = None
        self.overrides: list[Wrapper] = []
        self.watches: list[Watch] = []
        self.logits: Tensor | None = None
        self.place = place_of(block)
        self.handles = self.place.attach(block, self)

    def pass_by(self, choice: Choice) -> Choice:
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
            method = Given(method, choice.topk_ids)
        select: Select = SelectByMethod(method, choice.topk_ids.shape[1])
        for wrapper in self.overrides:
            select = wrapper(select)
        routing = select(logits, Context(training=self.block.block.training), None)
        weights = routing.topk_weights.to(choice.topk_weights.dtype)
        return choice._replace(topk_ids=routing.topk_ids.long(), topk_weights=weights)


_taps: WeakKeyDictionary[nn.Module, _Tap] = WeakKeyDictionary()  # by module of experts


@contextmanager
def _tapped(block: MoeBlock) -> Iterator[_Tap]:
    tap = _taps.get(block.experts)
    if tap is None:
        tap = _taps[block.experts] = _Tap(block)
    tap.users += 1
    try:
        yield tap
    finally:
        tap.users -= 1
        if not tap.users:
            for handle in tap.handles:
                handle.remove()
            del _taps[block.experts]


def _remove(items: list[Any], item: Any) -> None:
    at = next(i for i in reversed(range(len(items))) if items[i] is item)
    del items[at]
