# SPDX-License-Identifier: BSD-3-Clause
"""skip_experts: tokens skip experts whose weight is small beside that of their first, by a calibrated ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from switchgear.complaints import check_module
from switchgear.compress.calibration import Calibration
from switchgear.compress.sums import Domains
from switchgear.functional import as_number
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.routing.context import Select
from switchgear.routing.router import Router
from switchgear.routing.selection import SkipBelow

Importance = Callable[[Tensor], Tensor]


@dataclass
class Skipped:
    """What `skip_experts` has done so far. ratios: beta by layer."""

    ratios: dict[str, float]
    choices: int = 0  # of Hugging Face's layers
    skipped: int = 0

    @property
    def share(self) -> float:
        """The share of choices that were skipped."""
        return self.skipped / max(self.choices, 1)


@contextmanager
def skip_experts(
    model: nn.Module,
    calibration: Calibration,
    *,
    protect: float = 0.0,
    importance: Importance | None = None,
    domains: Domains = None,
) -> Iterator[Skipped]:
    """Inside the block, a token skips the experts whose weight is below beta times that of its first, and the other
    weights are scaled up to the same sum. beta is the median of second / first weight in each layer of the calibration
    (NAEE, arXiv:2402.14800; `Skipped.ratios`).

        with compress.skip_experts(model, calibration, protect=0.02) as skipped:
            model.generate(**inputs)
        print(skipped.share)

    Args:
        model: has switchgear's MoE layers, whose selections become SkipBelow, or those of Hugging Face.
        protect: the share of the tokens of a call that skip nothing (MC-MoE, arXiv:2410.06270: 0.02), by importance.
        importance: x [T,H] -> [T], for Hugging Face; by default ‖x‖₁. (The paper multiplies it by the attention that a
            token receives, which a layer of experts does not see.) switchgear's layers take it from their context,
            moe(x, importance=…).

    Raises ValueError for a calibration of another model, one without second choices, or an option out of range.
    """
    check_module("model", model)
    if not 0 <= as_number("protect", protect) <= 1:
        raise ValueError(f"protect: expected a share of the tokens in [0, 1], got {protect}")
    calibration.check(model)
    blocks = moe_blocks(model)
    ratios = {name: calibration.layers[name].ratio_median(domains) for name in blocks}
    if empty := [name for name, ratio in ratios.items() if ratio != ratio]:
        raise ValueError(f"calibration: expected tokens with two experts, got none in {empty[0]}")
    done = Skipped(ratios)
    with ExitStack() as stack:
        for name, block in blocks.items():
            if isinstance(block.gate, Router):
                wrapper = _wrapper(ratios[name], protect)
                block.gate.overrides.append(wrapper)
                stack.callback(block.gate.overrides.remove, wrapper)
            else:
                stack.enter_context(_edited(block, ratios[name], protect, importance or _norm, done))
        yield done


def _wrapper(ratio: float, protect: float) -> Callable[[Select], Select]:
    return lambda select: SkipBelow(select, ratio, protect)


def _norm(x: Tensor) -> Tensor:
    return x.detach().float().abs().sum(-1)


def _edited(block: MoeBlock, ratio: float, protect: float, importance: Importance, done: Skipped) -> Any:
    from switchgear.integrations.choices import Choice, edited

    def edit(choice: Choice) -> Choice:
        kept = kept_choices(choice.topk_weights.masked_fill(choice.topk_ids < 0, 0), ratio)
        if protect:
            count = round(protect * len(choice.x))
            kept[importance(choice.x).topk(count).indices] = True
        weights = choice.topk_weights.masked_fill(~kept, 0)
        scale = choice.topk_weights.sum(-1, keepdim=True) / (weights.sum(-1, keepdim=True) + 1e-20)
        present = choice.topk_ids >= 0
        done.choices += int(present.sum())
        done.skipped += int((present & ~kept).sum())
        return choice._replace(topk_ids=choice.topk_ids.masked_fill(~kept, -1), topk_weights=weights * scale)

    return edited(block, edit)


def kept_choices(topk_weights: Tensor, ratio: float) -> Tensor:
    """[T,K] bool: whether a choice has at least `ratio` times the largest weight of its token."""
    detached = topk_weights.detach()
    kept: Tensor = detached >= ratio * detached.amax(-1, keepdim=True)
    return kept
