# SPDX-License-Identifier: BSD-3-Clause
"""Temporary changes of a router's choice: experts disabled, forced, favoured or amplified, or another selection.

Mixture of Tunable Experts (arXiv:2502.11096) disables or forces a few experts of a trained model; self-contrast
(arXiv:2405.14507) runs it with a weaker selection. The router is restored afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from switchgear.integrations.choices import get_override
from switchgear.integrations.routers import SelectByMethod, find_routing_method, is_looked_up
from switchgear.routing.change import Change, Changed, PerExpert, check_change
from switchgear.routing.context import Select
from switchgear.trace.routed_layers import RoutedLayer, pick, traceable


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
        model: its switchgear Routers are overridden, or the routers of a Hugging Face model, whatever runs it. There
            the choice is made anew from the router's logits, and weighted as the model does.
        select: the selection instead of the routers' own; see `switchgear.routing`. In a Hugging Face model it has the
            model's score function, unless another than softmax is given.
        disable, force, bias, gain: see `Change`; they apply to `select` too.
        layers: names of modules, as in model.named_modules(); all if None.

    Raises:
        ValueError: an expert that a layer does not have, a layer that the model does not have, or a router of Hugging
            Face whose selection is not reproduced exactly from its logits; nothing is changed in that case.
    """
    change = Change(disable, force, bias, gain)
    found = pick(traceable(model), layers)
    for name, layer in found.items():
        _check(name, layer, select, change)
    methods = {
        name: find_routing_method(layer.block) if layer.router is None else None for name, layer in found.items()
    }
    with ExitStack() as stack:
        for name, layer in found.items():
            wrapper = partial(_wrap, layer=layer, method=methods[name], select=select, change=change)
            stack.enter_context(layer.overridden(wrapper, methods[name]))
        yield list(found)


def _check(name: str, layer: RoutedLayer, select: Select | None, change: Change) -> None:
    """Raises ValueError for a change that the layer cannot make."""
    if layer.router is not None:
        check_change(change, layer.router.selection() if select is None else select, layer.router.num_experts)
        return
    block = layer.block
    try:
        change.check(block.num_experts, block.top_k if select is None else None)
        check_change(change, get_override(block) if select is None else select, block.num_experts)
    except ValueError as error:
        raise ValueError(f"{error} ({name})") from None
    if is_looked_up(block) and change.bias is not None and select is None:
        raise ValueError(f"bias: expected none for {name}, whose experts are looked up by token id")


def _wrap(own: Select, layer: RoutedLayer, method: Any, select: Select | None, change: Change) -> Select:
    if layer.router is not None:
        return Changed(own if select is None else select, change)
    chosen = own if select is None else SelectByMethod.of(layer.block, method, select)
    return Changed(chosen, change, layer.block.num_experts)
