# SPDX-License-Identifier: BSD-3-Clause
"""Repeats a Hugging Face router's selection from its logits, by its own routing method.

transformers has some seventy router classes, and few ways to select: a score, groups or none, a bias for the choice,
and weights that are normalised or scaled. `find_routing_method` tries them on the router with random tokens. The one
that reproduces its choice and its weights is its routing method; if none does, the router cannot be overridden.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.functional import Routing
from switchgear.integrations.hook_points import read_choice
from switchgear.integrations.moe_blocks import MoeBlock
from switchgear.routing.context import NOTHING_KNOWN, Context
from switchgear.routing.ranking import SCORE_FUNCTIONS
from switchgear.utils.modules import set_eval

_SCALES = ("routed_scaling_factor", "route_scale", "router_scaling_factor")
_TOKENS = 64  # The probe is this long.

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.float().softmax(-1),
    "sigmoid": lambda logits: logits.float().sigmoid(),
    "sqrt_softplus": lambda logits: F.softplus(logits.float()).sqrt(),
    "logits": lambda logits: logits.float(),
}


class RoutingMethod(Protocol):
    """How a router selects and weighs."""

    @property
    def score_function(self) -> str:
        """A name of SCORES: what the choice is made of."""

    def rank(self, router_logits: Tensor, bias: Tensor | None) -> Tensor:
        """[T,C], whose best are chosen. bias [C] is added to the scores; -inf excludes a class."""

    def weigh(self, router_logits: Tensor, ids: Tensor) -> Tensor:
        """Weights [T,K] float32 of any ids, differentiable; 0 for -1."""


@dataclass(frozen=True)
class TopKMethod:
    """The top_k best scores, weighted by them.

    Attributes:
        block: its gate has the constants, which are read at each call.
        score_function: of SCORES, for the choice.
        weight: of SCORES; "logits" for a softmax over the chosen logits alone.
        normalize: divide by the sum.
        scaled: by the product of the gate's scaling factors; by_top_k: divided by top_k.
        group_score: "" without groups, else "max" or "top2" ranks them. fill: the score of experts in other groups.
    """

    block: MoeBlock
    score_function: str
    weight: str
    normalize: bool
    scaled: bool
    by_top_k: bool = False
    group_score: str = ""
    fill: float = -math.inf

    @property
    def learned(self) -> nn.Parameter | None:
        """A learned factor per expert, which Gemma 4 has."""
        found = getattr(self.block.gate, "per_expert_scale", None)
        return found if isinstance(found, nn.Parameter) else None

    def rank(self, router_logits: Tensor, bias: Tensor | None) -> Tensor:
        scores = SCORES[self.score_function](router_logits.detach())
        own = self.block.selection_bias()
        if own is not None and own.shape[0] == scores.shape[1]:
            scores = scores + own.float()
        if bias is not None:
            scores = scores + bias
        if self.group_score:
            scores = self._within_groups(scores, bias)
        return scores

    def _within_groups(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        groups = self.block.groups()
        assert groups is not None
        by_group = scores.view(len(scores), groups[0], scores.shape[1] // groups[0])  # no -1: there may be no tokens
        best = by_group.topk(min(1 if self.group_score == "max" else 2, by_group.shape[-1]), dim=-1).values
        if bias is not None:  # a group stays open for its best expert if the second is excluded
            best[..., 1:] = best[..., 1:].masked_fill(best[..., 1:] == -math.inf, 0)
        best = best.sum(-1)
        chosen = torch.zeros_like(best).scatter(1, best.topk(groups[1], dim=-1).indices, 1).bool()
        kept = chosen[..., None].expand_as(by_group).reshape_as(scores)
        scores = scores.masked_fill(~kept, self.fill)
        if bias is None:
            return scores
        excluded = bias == -math.inf
        few = (kept & ~excluded).sum(-1, keepdim=True) < (self.block.top_k or 1)  # choices stay empty then
        return scores.masked_fill(excluded | (few & ~kept), -math.inf)

    def weigh(self, router_logits: Tensor, ids: Tensor) -> Tensor:
        index, empty = ids.clamp(min=0), ids < 0
        weights = SCORES[self.weight](router_logits).gather(1, index)
        if self.weight == "logits":
            # An all-empty row would be softmax of -inf alone: NaN, also in its gradient.
            weights = weights.masked_fill(empty, -math.inf).masked_fill(empty.all(1, keepdim=True), 0).softmax(-1)
        weights = weights.masked_fill(empty, 0)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.scaled:
            weights = weights * _multiply_scales(self.block.gate)
        weights = weights / (self.block.top_k or 1) if self.by_top_k else weights
        return weights if self.learned is None else weights * self.learned.float()[index]


@dataclass(frozen=True)
class SparseMixerMethod:
    """SparseMixer of Phi-3.5 as in evaluation: one expert after the other, each weighted by a softmax over those near
    the best of the rest."""

    gate: Any
    score_function: str = "logits"

    def rank(self, router_logits: Tensor, bias: Tensor | None) -> Tensor:
        scores = router_logits.detach().float()
        return scores if bias is None else scores + bias

    def weigh(self, router_logits: Tensor, ids: Tensor) -> Tensor:
        logits, weights = router_logits.float(), []
        taken = torch.zeros_like(logits, dtype=torch.bool)
        for slot in ids.T:
            picked = slot.clamp(min=0)[:, None]
            rest = logits.detach().masked_fill(taken, -math.inf)
            best = rest.max(-1, keepdim=True).values
            far = (best - logits.detach()) / logits.detach().abs().clamp(min=best) > 2 * self.gate.router_jitter_noise
            hidden = (taken | far).scatter(1, picked, False)  # the softmax is over the picked one at least
            weight = logits.masked_fill(hidden, -math.inf).softmax(-1).gather(1, picked)[:, 0]
            weights.append(weight.masked_fill(slot < 0, 0))
            taken = taken.scatter(1, picked, (slot >= 0)[:, None])
        return torch.stack(weights, 1)


@dataclass(frozen=True)
class LookupMethod:
    """A choice that the model looks up (DeepSeek V4 by token id). What it chose comes first, then the best scores."""

    inner: RoutingMethod
    topk_ids: Tensor

    @property
    def score_function(self) -> str:
        return self.inner.score_function

    def rank(self, router_logits: Tensor, bias: Tensor | None) -> Tensor:
        scores = SCORES[self.score_function](router_logits.detach())
        top_k = self.topk_ids.shape[1]
        order = torch.arange(top_k, 0, -1, device=scores.device, dtype=scores.dtype)
        best = scores.max() if len(scores) else 0
        first = best + 1 + order.expand_as(self.topk_ids)  # above all scores, in the order of the table
        scores = scores.scatter(1, self.topk_ids.clamp(min=0), first)
        return scores if bias is None else scores + bias

    def weigh(self, router_logits: Tensor, ids: Tensor) -> Tensor:
        return self.inner.weigh(router_logits, ids)


@dataclass(frozen=True)
class SelectByMethod:
    """A Select: the choice of `select`, or the method's own if None, with the weights of the method."""

    method: RoutingMethod
    top_k: int
    select: Any = None
    selection_bias: Tensor | None = None

    @classmethod
    def of(cls, block: MoeBlock, method: RoutingMethod, select: Any) -> SelectByMethod:
        """Another selection for the router of `block`, which scores and weighs as the model does."""
        assert block.top_k is not None  # find_routing_method has checked it
        return cls(method, block.top_k, match_score(select, method.score_function), block.selection_bias())

    @property
    def score_function(self) -> str:
        return self.method.score_function

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        if self.select is None:
            scores, ids = self.method.rank(router_logits, bias).topk(self.top_k, dim=-1)
            ids = ids.masked_fill(scores == -math.inf, -1)
        else:
            seen, total = router_logits.detach(), bias
            if (own := self.selection_bias) is not None and self.score_function == "logits":
                seen = seen + own.float()
            elif own is not None:
                total = own.float() if bias is None else own.float() + bias
            ids = self.select(seen, context, total).topk_ids.long()
        weights = self.method.weigh(router_logits, ids)
        return Routing(ids, weights, router_logits, router_logits.shape[1])


def match_score(select: Any, score_function: str) -> Any:
    """The selection with the model's score function if its own is the default, softmax; otherwise as it is."""
    names = {f.name for f in fields(select)} if is_dataclass(select) else set()
    if score_function not in SCORE_FUNCTIONS or getattr(select, "score_function", None) != "softmax":
        return select
    return replace(select, score_function=score_function) if "score_function" in names else select


# ---- the routing method of a router ----------------------------------------------------------------------------------


@torch.no_grad()
def find_routing_method(block: MoeBlock) -> RoutingMethod:
    """How the block's router selects: the first routing method that does the same with random tokens.

    Its weights and its bias are random during the probe, since those of a new model tell little: zeros make ties, and
    hide how a bias is used.

    Raises:
        ValueError: it has no router, or one of an unknown selection; the message names the block and the class.
    """
    name = block.name or "model"
    if block.gate is None or not block.top_k:
        raise ValueError(f"{name}: expected a router whose selection can be repeated, got none")
    gate: Any = block.gate
    devices = {p.device for p in gate.parameters() if p.is_cuda}
    with _randomize(block), torch.random.fork_rng(list(devices)):
        with set_eval(gate):  # jitter and sampling are not part of the method
            seen = _record_answer(block)
        for method in _list_candidates(block):
            if _reproduces(method, seen, block):
                return method
    raise ValueError(
        f"{name}: expected a router whose selection is known, got {type(block.gate).__name__}, which no known score, "
        f"groups and normalisation reproduce on {len(seen.ids)} random tokens"
    )


class _Seen(NamedTuple):
    """The router's own answer to random tokens."""

    logits: Tensor
    ids: Tensor
    weights: Tensor
    tolerance: float  # relative


@contextmanager
def _randomize(block: MoeBlock) -> Iterator[None]:
    """Random matrices of the gate, and a random selection bias; afterwards the same tensors as before, and the same
    attributes: NLLB-MoE's router keeps the capacity of a call."""
    generator = torch.Generator().manual_seed(0)
    assert block.gate is not None
    attributes = vars(block.gate)
    own = dict(attributes)
    scales: dict[Tensor, float] = {p: 2 * p.shape[1] ** -0.5 for p in block.gate.parameters() if p.dim() == 2}
    if (bias := block.selection_bias(flat=False)) is not None:
        scales[bias] = 0.05
    plain = [t for t in scales if type(t.data) is Tensor and not t.is_meta and t.is_floating_point()]
    before = [(tensor, tensor.data) for tensor in plain]
    try:
        for tensor, data in before:
            random = torch.randn(data.shape, generator=generator) * scales[tensor]
            tensor.data = random.to(data.device, data.dtype)  # not in place: graphs of earlier forwards stay valid
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
        for name in attributes.keys() - own.keys():
            del attributes[name]
        attributes.update(own)


def _record_answer(block: MoeBlock) -> _Seen:
    gate: Any = block.gate
    name = block.name or "model"
    like = block.gate_weight()
    if like is None:
        like = next((p for p in gate.parameters() if p.dim() == 2), None)
    if like is None or like.is_meta:
        raise ValueError(f"{name}: expected a router with weights to probe it, got none")
    generator = torch.Generator().manual_seed(1)
    floating = (p.dtype for p in block.experts.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1)
    dtype = next(floating, like.dtype)  # of hidden states: routers in float32 convert them
    x = torch.randn(_TOKENS, like.shape[1], generator=generator).to(like.device, dtype)
    extra: dict[str, Any] = {}
    if "input_ids" in inspect.signature(gate.forward).parameters:
        extra["input_ids"] = torch.randint(len(gate.tid2eid), (_TOKENS,), generator=generator).to(like.device)
    try:
        output = call_gate(block, x, **extra)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        kind = type(gate).__name__
        raise ValueError(f"{name}: expected a router that can be probed, got {kind} ({error})") from error
    choice = read_choice(block, x, output)
    if choice is None or choice.router_logits is None:
        raise ValueError(f"{name}: expected a router that returns its logits and choice, got {type(gate).__name__}")
    # Weights pass through a handful of roundings of float32 and a few to the dtype of the logits or of the model.
    eps = max(torch.finfo(t).eps for t in (choice.router_logits.dtype, choice.topk_weights.dtype, torch.float32))
    return _Seen(choice.router_logits.float(), choice.topk_ids, choice.topk_weights.float(), 16 * eps)


def call_gate(block: MoeBlock, x: Tensor, **extra: Any) -> Any:
    """The output of the gate for x [T,H], without its hooks, which belong to the model's own calls."""
    gate: Any = block.gate
    for parameter in inspect.signature(gate.forward).parameters:
        if parameter in ("e_score_correction_bias", "expert_bias"):
            extra[parameter] = block.selection_bias()
    try:
        return gate.forward(x.clone(), **extra)  # some add jitter in place
    except (ValueError, RuntimeError, IndexError):
        return gate.forward(x[None].clone(), **extra)  # it takes [B,S,H] only


def _list_candidates(block: MoeBlock) -> Iterator[RoutingMethod]:
    gate: Any = block.gate
    if type(gate).__name__ == "PhimoeTopKRouter":
        yield SparseMixerMethod(gate)
        return
    groups: list[tuple[str, float]] = [("", -math.inf)]
    if block.groups() is not None:
        groups = [*itertools.product(("top2", "max"), (-math.inf, 0.0)), *groups]
    scales = [(True, False)] if _multiply_scales(gate) != 1 else [(False, False)]
    scales.append((False, True))
    # the score of the choice, that of the weight
    pairs = [("softmax", "softmax"), ("sigmoid", "sigmoid"), ("sqrt_softplus", "sqrt_softplus")]
    pairs += [("logits", "logits"), ("logits", "sigmoid")]
    for pair, group, scale, normalize in itertools.product(pairs, groups, scales, (False, True)):
        yield TopKMethod(block, *pair, normalize, *scale, *group)


def _reproduces(method: RoutingMethod, seen: _Seen, block: MoeBlock) -> bool:
    """Whether the routing method gives the weights that were seen, and ranks what was chosen above the rest."""
    weights = method.weigh(seen.logits, seen.ids)
    error = (weights - seen.weights.masked_fill(seen.ids < 0, 0)).abs().amax(-1)
    if bool((error > seen.tolerance * seen.weights.abs().amax(-1)).any()):
        return False
    if is_looked_up(block):
        return True
    scores = method.rank(seen.logits, None)
    index = seen.ids.clamp(min=0)
    least = scores.gather(1, index).amin(-1)
    rest = scores.scatter(1, index, -math.inf).amax(-1)
    right = (least >= rest - seen.tolerance * least.abs()) | (seen.ids < 0).any(-1)
    # Equal scores are common in 16 bits, and then two groups may be equally good.
    return float(right.float().mean()) >= (1.0 if seen.tolerance < 1e-4 else 0.9)


def is_looked_up(block: MoeBlock) -> bool:
    return hasattr(block.gate, "tid2eid")


def _multiply_scales(gate: Any) -> Any:
    return math.prod(getattr(gate, name, 1.0) for name in _SCALES)
