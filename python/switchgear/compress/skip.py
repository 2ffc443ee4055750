# SPDX-License-Identifier: BSD-3-Clause
"""skip_experts: tokens skip experts whose weight is small beside their first expert's, by a calibrated ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from switchgear.checks import Fraction, checked
from switchgear.compress.calibration import Calibration
from switchgear.compress.sums import Domains
from switchgear.functional import Routing
from switchgear.integrations.choices import override_selection
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.integrations.routers import find_routing_method
from switchgear.papers.parts.selections import SkipBelow
from switchgear.routing.change import overridden_router
from switchgear.routing.context import NOTHING_KNOWN, Context, Select
from switchgear.routing.router import Router

Importance = Callable[[Tensor], Tensor]


@dataclass
class Skipped:
    """What `skip_experts` has done so far. ratios: beta by layer."""

    ratios: dict[str, float]
    choices: int = 0
    skipped: int = 0

    @property
    def share(self) -> float:
        """The share of choices that were skipped."""
        return self.skipped / max(self.choices, 1)


@checked
@contextmanager
def skip_experts(
    model: nn.Module,
    calibration: Calibration,
    *,
    protect: Fraction = 0.0,
    importance: Importance | None = None,
    domains: Domains = None,
) -> Iterator[Skipped]:
    """Inside the block, a token skips the experts whose weight is below beta times its largest one, and the other
    weights are scaled up to the same sum. beta is the median of second / first weight in each layer of the calibration
    (NAEE, arXiv:2402.14800; `Skipped.ratios`).

        with compress.skip_experts(model, calibration, protect=0.02) as skipped:
            model.generate(**inputs)
        print(skipped.share)

    Args:
        model: has MoE layers of switchgear, whose selections become SkipBelow, or of Hugging Face.
        protect: the share of the tokens of a call that skip nothing (MC-MoE, arXiv:2410.06270: 0.02), by importance;
            their number is rounded to the nearest, in the paper's code down.
        importance: x [T,H] -> [T], for Hugging Face; by default ‖x‖₁. (The paper multiplies it by the attention that a
            token receives, which a layer of experts does not see.) switchgear's layers take it from their context,
            moe(x, importance=…).

    Raises ValueError for a calibration of another model, one without second choices, a router of Hugging Face whose
    selection is not known (override), or an option out of range.
    """
    calibration.check(model, domains=domains)
    blocks = moe_blocks(model)
    ratios = {name: calibration.layers[name].ratio_median(domains) for name in blocks}
    if empty := [name for name, ratio in ratios.items() if ratio != ratio]:
        raise ValueError(f"calibration: expected tokens with two experts, got none in {empty[0]}")
    done = Skipped(ratios)
    # Raises before anything changes.
    methods = {name: find_routing_method(block) for name, block in blocks.items() if not block.is_ours}
    with ExitStack() as stack:
        for name, block in blocks.items():
            if isinstance(block.gate, Router):
                wrapper = partial(_CountedSkipBelow, ratio=ratios[name], protect=protect, done=done)
                stack.enter_context(overridden_router(block.gate, wrapper))
            else:
                _skip_on_hugging_face(stack, block, methods[name], ratios[name], protect, importance or _norm, done)
        yield done


class _CountedChoices:
    """A selection whose choices are counted."""

    def __init__(self, select: Select, done: Skipped) -> None:
        self.select, self.done = select, done

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        routing = self.select(router_logits, context, bias)
        self.done.choices += int((routing.topk_ids >= 0).sum())
        return routing


class _CountedSkipBelow:
    """SkipBelow, counted. `select` leads to the selection that it wraps: routers look for its score function there."""

    def __init__(self, select: Select, ratio: float, protect: float, done: Skipped) -> None:
        self.select, self.done = SkipBelow(_CountedChoices(select, done), ratio, protect), done

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        before = self.done.choices
        routing = self.select(router_logits, context, bias)
        self.done.skipped += self.done.choices - before - int((routing.topk_ids >= 0).sum())
        return routing


def _norm(x: Tensor) -> Tensor:
    return x.detach().float().abs().sum(-1)


class _SkipOnHuggingFace:
    """A selection of Hugging Face's router without the choices of little weight; the number of places stays."""

    def __init__(self, select: Select, ratio: float, protect: float, done: Skipped, seen: list[Tensor]) -> None:
        """seen: the importance of the tokens that the router sees now, to protect some."""
        self.select, self.ratio, self.protect, self.done, self.seen = select, ratio, protect, done, seen

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        routing = self.select(router_logits, context, bias)
        present, weights = routing.topk_ids >= 0, routing.topk_weights.masked_fill(routing.topk_ids < 0, 0)
        kept = weights.detach() >= self.ratio * weights.detach().amax(-1, keepdim=True)
        for importance in self.seen:
            kept[importance.topk(round(self.protect * len(kept))).indices] = True
        self.done.choices += int(present.sum())
        self.done.skipped += int((present & ~kept).sum())
        left = weights.masked_fill(~kept, 0)
        scale = weights.sum(-1, keepdim=True) / (left.sum(-1, keepdim=True) + 1e-20)
        return routing._replace(topk_ids=routing.topk_ids.masked_fill(~kept, -1), topk_weights=left * scale)


def _skip_on_hugging_face(
    stack: ExitStack, block: MoeBlock, method: Any, ratio: float, protect: float, importance: Importance, done: Skipped
) -> None:
    seen: list[Tensor] = []

    def keep(gate: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [importance(args[0].reshape(-1, args[0].shape[-1]))]

    assert block.gate is not None
    if protect:
        stack.callback(block.gate.register_forward_pre_hook(keep).remove)
    wrapper = partial(_SkipOnHuggingFace, ratio=ratio, protect=protect, done=done, seen=seen)
    stack.enter_context(override_selection(block, method, wrapper))
