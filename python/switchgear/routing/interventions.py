# SPDX-License-Identifier: BSD-3-Clause
"""Temporary changes of a router's choice: experts disabled, forced, favoured or amplified, or another selection.

Mixture of Tunable Experts (arXiv:2502.11096) disables or forces a few experts of a trained model; self-contrast
(arXiv:2405.14507) runs it with a weaker selection. The router is restored afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from switchgear.functional import Routing
from switchgear.routing.context import NOTHING_KNOWN, Context, Select

if TYPE_CHECKING:
    from switchgear.routing.router import Router

PerExpert = Mapping[int, float] | Tensor | Sequence[float]


@dataclass(frozen=True)
class Change:
    """A change of the choice among E experts.

    Args:
        disable: experts that no token gets. If fewer than top_k remain, choices stay empty.
        force: experts that every token gets, weighted by their scores, in place of its last choices.
        bias: added to the scores for the choice only, not to the weights.
        gain: multiplies the weights of an expert, after everything else.

    bias and gain map experts to numbers, or are [E]. A selection that ignores its bias (Dense, Random, Lookup) cannot
    force or favour experts. If experts choose tokens (ExpertChoice), a forced expert takes no more tokens than others.
    """

    disable: Collection[int] = ()
    force: Collection[int] = ()
    bias: PerExpert | None = None
    gain: PerExpert | None = None

    def check(self, num_experts: int, top_k: int | None = None) -> None:
        """Raises ValueError for an expert that does not exist, or for contradictory options."""
        for name in ("disable", "force", "bias", "gain"):
            given = getattr(self, name)
            if (
                given is None
                or isinstance(given, Tensor)
                or (name in ("bias", "gain") and not isinstance(given, Mapping))
            ):
                if given is not None and tuple(torch.as_tensor(given).shape) != (num_experts,):
                    raise ValueError(
                        f"{name}: expected {num_experts} numbers, got {list(torch.as_tensor(given).shape)}"
                    )
                continue
            wrong = [expert for expert in given if not 0 <= expert < num_experts]
            if wrong:
                raise ValueError(f"{name}: expected experts from 0 to {num_experts - 1}, got {wrong[0]}")
        both = set(self.disable) & set(self.force)
        if both:
            raise ValueError(f"force: expected experts that are not disabled, got {min(both)}")
        if top_k is not None and len(set(self.force)) > top_k:
            raise ValueError(f"force: expected at most {top_k} (top_k) experts, got {len(set(self.force))}")

    def choice_bias(self, num_experts: int, device: torch.device) -> Tensor | None:
        """[E] float32, added to the scores for the choice; -Inf and +Inf for disabled and forced experts."""
        if not self.disable and not self.force and self.bias is None:
            return None
        values = _per_expert(self.bias, 0.0, num_experts, device)
        for experts, value in ((self.disable, -math.inf), (self.force, math.inf)):
            if experts:
                values[torch.tensor(sorted(experts), device=device)] = value
        return values

    def edit(self, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Applies the change to a finished choice [T,K]: removes disabled experts and multiplies by gains. Ids outside
        [0, E) are empty choices."""
        real = (topk_ids >= 0) & (topk_ids < num_experts)
        index = topk_ids.clamp(0, num_experts - 1).long()
        if self.disable:
            disabled = torch.zeros(num_experts, dtype=torch.bool, device=topk_ids.device)
            disabled[torch.tensor(sorted(self.disable), device=topk_ids.device)] = True
            out = disabled[index] & real
            topk_ids, topk_weights = topk_ids.masked_fill(out, -1), topk_weights.masked_fill(out, 0)
        if self.gain is not None:
            gain = _per_expert(self.gain, 1.0, num_experts, topk_weights.device).to(topk_weights.dtype)
            topk_weights = topk_weights * gain[index]
        return topk_ids, topk_weights


def _per_expert(values: PerExpert | None, default: float, num_experts: int, device: torch.device) -> Tensor:
    if values is None or isinstance(values, Mapping):
        result = torch.full((num_experts,), default, device=device)
        for expert, value in (values or {}).items():
            result[expert] = value
        return result
    return torch.as_tensor(values, dtype=torch.float32, device=device).clone()


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
        from switchgear.integrations.choices import edited

        with edited(found, change):
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


def _hugging_face_experts(model: nn.Module) -> dict[str, nn.Module]:
    try:
        from switchgear.integrations.choices import experts_of
    except ImportError:  # transformers is not installed
        return {}
    return experts_of(model)
