# SPDX-License-Identifier: BSD-3-Clause
"""Change: what an intervention does to the choice of experts, for routers of ours and for choices that others made."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from switchgear.functional import Routing
from switchgear.routing.context import NOTHING_KNOWN, Context, Select, ignoring_bias, most_experts

if TYPE_CHECKING:
    from switchgear.routing.router import Router

PerExpert = Mapping[int, float] | Tensor | Sequence[float]


@dataclass(frozen=True)
class Change:
    """A change of the choice among E experts.

    Args:
        disable: experts that no token gets, from a capacity that reroutes neither. If fewer than top_k remain, choices
            stay empty.
        force: experts that every token gets, weighted by their scores, in place of its last choices.
        bias: added to the scores for the choice only, not to the weights.
        gain: multiplies the weights of an expert, after everything else, a capacity included.

    bias and gain map experts to numbers, or are [E]. Where no bias moves the choice (Dense, a soft GumbelSoftmax,
    Lookup; inside replay and decouple), force and bias are refused. If experts choose tokens (ExpertChoice), a forced
    expert takes no more tokens than others.
    """

    disable: Collection[int] = ()
    force: Collection[int] = ()
    bias: PerExpert | None = None
    gain: PerExpert | None = None

    def check(self, num_experts: int, top_k: int | None = None) -> None:
        """Raises TypeError for anything but numbers of experts, and ValueError for an expert that does not exist or for
        contradictory options."""
        for name in ("disable", "force"):
            _check_ids(name, getattr(self, name), num_experts)
        for name in ("bias", "gain"):
            given = getattr(self, name)
            if isinstance(given, Mapping):
                _check_ids(name, given, num_experts)
            elif given is not None and tuple(shape := torch.as_tensor(given).shape) != (num_experts,):
                raise ValueError(f"{name}: expected {num_experts} numbers, got {list(shape)}")
        both = set(self.disable) & set(self.force)
        if both:
            raise ValueError(f"force: expected experts that are not disabled, got {min(both)}")
        if top_k is not None and len(set(self.force)) > top_k:
            raise ValueError(f"force: expected at most {top_k} (top_k) experts, got {len(set(self.force))}")

    def choice_bias(self, num_experts: int, device: torch.device) -> Tensor | None:
        """[E] float32, added to the scores for the choice; -Inf and +Inf for disabled and forced experts."""
        if not self.disable and not self.force and self.bias is None:
            return None
        values = per_expert(self.bias, 0.0, num_experts, device)
        for experts, value in ((self.disable, -math.inf), (self.force, math.inf)):
            if experts:
                values[torch.tensor(sorted(experts), device=device)] = value
        return values

    def close(self, scores: Tensor) -> Tensor:
        """scores [T,E] with 0 for disabled experts: a capacity sends no token to those."""
        if not self.disable:
            return scores
        return scores.index_fill(1, torch.tensor(sorted(self.disable), device=scores.device), 0)

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
            gain = per_expert(self.gain, 1.0, num_experts, topk_weights.device).to(topk_weights.dtype)
            topk_weights = torch.where(real, topk_weights * gain[index], topk_weights)
        return topk_ids, topk_weights


def _check_ids(name: str, experts: Any, num_experts: int) -> None:
    if not isinstance(experts, Collection) or isinstance(experts, (str, Tensor)):
        raise TypeError(f"{name}: expected a list of numbers of experts, got {type(experts).__name__}")
    for expert in experts:
        if not hasattr(expert, "__index__"):
            raise TypeError(f"{name}: expected numbers of experts, got {type(expert).__name__}")
        if not 0 <= expert < num_experts:
            raise ValueError(f"{name}: expected experts from 0 to {num_experts - 1}, got {expert}")


def per_expert(values: PerExpert | None, default: float, num_experts: int, device: torch.device) -> Tensor:
    if values is None or isinstance(values, Mapping):
        result = torch.full((num_experts,), default, device=device, dtype=torch.float32)
        for expert, value in (values or {}).items():
            result[expert] = value
        return result
    return torch.as_tensor(values, dtype=torch.float32, device=device).clone()


@dataclass(frozen=True)
class Changed:
    """A selection under a Change. num_experts is E, if the logits have more classes."""

    select: Select
    change: Change = field(default_factory=Change)
    num_experts: int | None = None

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        classes = router_logits.shape[-1]
        num_experts = self.num_experts or classes
        extra = self.change.choice_bias(num_experts, router_logits.device)
        if extra is not None:
            extra = pad(extra, (0, classes - num_experts))
            bias = extra if bias is None else bias + extra
        routing = self.select(router_logits, context, bias)
        change = self.change
        if context.changes is not None:  # gains wait for the router's capacity
            context.changes.append(change)
            change = replace(change, gain=None)
        ids, weights = change.edit(routing.topk_ids, routing.topk_weights, num_experts)
        return routing._replace(topk_ids=ids, topk_weights=weights)


def check_change(change: Change, select: Any, num_experts: int) -> None:
    """Change.check for a selection. Raises ValueError too if its choice cannot be moved as the change wants."""
    change.check(num_experts, most_experts(select))
    name = "force" if change.force else "bias"
    if (change.force or change.bias is not None) and (ignoring := ignoring_bias(select)) is not None:
        raise ValueError(f"{name}: expected none for {ignoring}, which ignores a bias")


@contextmanager
def overridden_router(router: Router, wrapper: Callable[[Select], Select]) -> Iterator[None]:
    """Inside the block, `wrapper` of the router's selection selects. The last wrapper is the outermost."""
    router.overrides.append(wrapper)
    try:
        yield
    finally:
        at = next(i for i in reversed(range(len(router.overrides))) if router.overrides[i] is wrapper)
        del router.overrides[at]
