# SPDX-License-Identifier: BSD-3-Clause
"""Temporary changes of a router's choice: experts disabled, forced, favoured or amplified, or another selection.

Mixture of Tunable Experts (arXiv:2502.11096) disables or forces a few experts of a trained model; self-contrast
(arXiv:2405.14507) runs it with a weaker selection. The router is restored afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from switchgear.functional import Routing
from switchgear.routing.change import Change, PerExpert
from switchgear.routing.context import NOTHING_KNOWN, Context, Select

if TYPE_CHECKING:
    from switchgear.routing.router import Router


@dataclass(frozen=True)
class Changed:
    """A selection under a Change."""

    select: Select
    change: Change = field(default_factory=Change)

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        num_experts = router_logits.shape[-1]
        extra = self.change.choice_bias(num_experts, router_logits.device)
        if extra is not None:
            bias = extra if bias is None else bias + extra
        routing = self.select(router_logits, context, bias)
        ids, weights = self.change.edit(routing.topk_ids, routing.topk_weights, num_experts)
        return routing._replace(topk_ids=ids, topk_weights=weights)


def intervene(router: Router, change: Change) -> Iterator[None]:
    change.check(router.num_experts, router.top_k)
    yield from _overridden(router, lambda select: Changed(select, change))


def _overridden(router: Router, wrapper: Callable[[Select], Select]) -> Iterator[None]:
    router.overrides.append(wrapper)
    try:
        yield
    finally:
        at = next(i for i in reversed(range(len(router.overrides))) if router.overrides[i] is wrapper)
        del router.overrides[at]


def _constant(select: Select) -> Callable[[Select], Select]:
    return lambda _: select


@contextmanager
def override(
    model: nn.Module,
    *,
    select: Select | None = None,
    disable: Collection[int] = (),
    force: Collection[int] = (),
    bias: PerExpert | None = None,
    gain: PerExpert | None = None,
    layers: Collection[str] | None = None,
) -> Iterator[list[str]]:
    """Changes the choices of a model's routers inside the block. Yields the names of the affected layers.

        with switchgear.override(model, disable=[3, 17]):
            y = model(x)
        with switchgear.override(model, select=RankK((2,)), layers=["layers.0.mlp.gate"]):
            y = model(x)

    Args:
        model: its switchgear Routers are overridden. For a Hugging Face model whose experts run on switchgear, the
            output of its own routers is changed: only `disable` and `gain` are possible, since the choice is made.
        select: the selection instead of the routers' own; see `switchgear.routing`.
        disable, force, bias, gain: see `Change`; they apply to `select` too.
        layers: names of modules, as in model.named_modules(); all if None.

    Raises:
        ValueError: an expert that a layer does not have, a layer that the model does not have, or an option that is
            impossible there; nothing is changed in that case.
    """
    from switchgear.routing.router import Router

    change = Change(disable, force, bias, gain)
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    foreign = {} if routers else _hugging_face_experts(model)
    found: dict[str, Any] = routers or foreign
    if not found:
        raise ValueError("model: expected one with routers, or with experts that run on switchgear, got none")
    if layers is not None:
        missing = sorted(set(layers) - set(found))
        if missing:
            raise ValueError(f"layers: expected some of {', '.join(found)}; got {missing[0]}")
        found = {name: module for name, module in found.items() if name in set(layers)}
    if foreign and (select is not None or force or bias is not None):
        given = "select" if select is not None else "force" if force else "bias"
        raise ValueError(
            f"{given}: expected none for a Hugging Face model, whose routers choose before switchgear does"
        )
    if foreign:
        from switchgear.integrations.choices import Choice, edited

        for name, block in foreign.items():
            try:
                change.check(block.num_experts)
            except ValueError as error:
                raise ValueError(f"{error} ({name})") from None

        def edit(block: Any) -> Any:
            def apply(choice: Choice) -> Choice:
                ids, weights = change.edit(choice.topk_ids, choice.topk_weights, block.num_experts)
                return choice._replace(topk_ids=ids, topk_weights=weights)

            return apply

        with ExitStack() as stack:
            for block in found.values():
                stack.enter_context(edited(block, edit(block)))
            yield list(found)
        return
    for router in found.values():
        change.check(router.num_experts, router.top_k if select is None else None)
    with ExitStack() as stack:
        for router in found.values():
            if select is not None:
                stack.enter_context(contextmanager(_overridden)(router, _constant(select)))
            stack.enter_context(contextmanager(intervene)(router, change))
        yield list(found)


def _hugging_face_experts(model: nn.Module) -> dict[str, Any]:
    from switchgear.integrations.moe_blocks import moe_blocks

    return {block.layer: block for block in moe_blocks(model).values()}
