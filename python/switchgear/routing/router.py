# SPDX-License-Identifier: BSD-3-Clause
"""Router: score, selection, capacity and balance as one module, with the policies of the literature as options."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from switchgear.checks import Finite, FloatDtype, Share, Size, checked, convert, explain_rows
from switchgear.functional import Routing, gate, gate_route, route
from switchgear.routing.balance import count_tokens, sum_over_processes
from switchgear.routing.change import Change, Changed, PerExpert, check_change, overridden_router
from switchgear.routing.context import (
    NOTHING_KNOWN,
    Balance,
    Context,
    Controller,
    Limit,
    Noise,
    Scope,
    Score,
    Select,
    ignoring_bias,
    is_recomputing,
    made,
    modules_in,
    scored,
    takes,
    wrapped,
)
from switchgear.routing.counting import aside
from switchgear.routing.ranking import jittered, scores_of
from switchgear.routing.scores import Uniform, init_uniform
from switchgear.routing.selection import TopK
from switchgear.utils.modules import KeepsFloat32
from switchgear.weights.selected import selection_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Handover:
    """The hidden states that a router passes on to the next one, within a forward."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the block that takes them
        self.hidden_states: Tensor | None = None

    def take(self, like: Tensor) -> Tensor:
        """What the block before left, once; `like` is the input of the block that takes it."""
        hidden_states, self.hidden_states = self.hidden_states, None
        if hidden_states is None:
            raise ValueError(
                f"{self.name}: expected the block before to run first in each forward, got none (pre-gates exclude "
                "activation checkpointing of single blocks)"
            )
        if hidden_states.shape != like.shape:
            raise ValueError(
                f"hidden_states: expected {list(hidden_states.shape)} in {self.name}, as in the block before, got "
                f"{list(like.shape)}"
            )
        return hidden_states


class Policy(TypedDict, total=False):
    """The parts of a router that may be changed in training."""

    select: Select | Callable[..., Any] | None
    capacity: Limit | Callable[..., Any] | None
    balance: Sequence[Balance | Controller | Callable[..., Any]]


_POLICY = get_type_hints(Policy)


class RouterOptions(Policy, total=False):
    """Options of Router that other modules pass on to it, as MoE does."""

    score_function: str
    normalize: bool
    scale: float
    selection_bias: bool
    num_groups: int
    topk_groups: int
    group_score: str
    jitter: float
    score: Score | Callable[..., Any] | None
    isolation: Scope


class Router(KeepsFloat32):
    """Linear router: router_logits = x · weightᵀ, then `route`. Returns the Routing, so forward hooks see all of it.

        router = Router(2048, 64, 8, normalize=True)
        router = Router(2048, 64, select=ExpertChoice(2.0, scope="sequence"), balance=[ZLoss(1e-3)])

    Args:
        hidden_size, num_experts, top_k: H, E, K. Omit top_k with `select`.
        score_function: "softmax" or "sigmoid".
        normalize: divide the chosen scores by their sum (norm_topk_prob).
        scale: multiplies the weights last (routed_scaling_factor).
        selection_bias: add the buffer `e_score_correction_bias` [E] float32 to the scores for the choice only
            (arXiv:2408.15664). It starts at zero, is in the state dict, and stays float32 when the model is cast.
        num_groups, topk_groups, group_score: device-limited routing; see `route`.
        jitter: in training, multiply the router's input by uniform noise in [1 - jitter, 1 + jitter] (Switch
            Transformer, arXiv:2101.03961). A float32 router, or score, does so in float32, as Hugging Face's Switch
            router. Others draw in the dtype of hidden_states, in which Hugging Face's Mixtral and Phi-3.5-MoE draw the
            noise of their whole block: in bfloat16 the mean of the noise is below 1 (0.994 for 0.01), since its numbers
            lie closer below 1 than above.
        float32: compute the logits in float32, whatever the dtype of the model and autocast.
        bias: a learned bias [E] of the logits (gpt-oss).
        score: computes the logits instead of the linear layer (see `Score`); excludes float32 and bias.
        select: makes the choice instead of `route` (see `Select`); excludes the options score_function to group_score,
            except selection_bias.
        capacity: limits the tokens of an expert (see `Limit`); nothing is dropped if None.
        balance: losses (see `Balance`) and controllers (see `Controller`), called in training only.
        isolation: "sequence": under policies in which tokens compete, only those of one sequence do. Sequences come
            from the Context, or are the rows of hidden_states [B,S,H].

    score, select, capacity, and the items of balance may be classes or functools.partial objects of them; the router
    calls them: score with (hidden_size, num_experts, device=, dtype=), the others without arguments, or with
    num_experts= if they take it. A functools.partial of a function that takes the arguments of a part is the part.
    Objects that are modules move to `device`. `set_policy` changes select, capacity and balance later.

    Parameters: weight [E,H], bias [E]; with `score`, those of the submodule score. ValueError for an option that is out
    of range or excluded by another.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    e_score_correction_bias: Tensor | None
    tokens_per_expert: Tensor | None
    counted = ("tokens_per_expert",)
    select: Any
    capacity: Any
    balance: tuple[Any, ...]
    reads_from: Handover | None = None  # hidden states of the block before, to choose by: a pre-gate (see pregate)
    passes_to: Handover | None = None  # those of this block, for the next one

    @checked
    def __init__(
        self,
        hidden_size: Size,
        num_experts: Size,
        top_k: Size | None = None,
        *,
        score_function: str = "softmax",
        normalize: bool = False,
        scale: Finite = 1.0,
        selection_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "max",
        jitter: Share = 0.0,
        float32: bool = False,
        bias: bool = False,
        score: Score | Callable[..., Any] | None = None,
        select: Select | Callable[..., Any] | None = None,
        capacity: Limit | Callable[..., Any] | None = None,
        balance: Sequence[Balance | Controller | Callable[..., Any]] = (),
        isolation: Scope = "batch",
        device: torch.device | str | None = None,
        dtype: FloatDtype | None = None,
    ) -> None:
        super().__init__()
        if type(score) is nn.Linear:
            raise TypeError("score: expected a callable of (x, context), got a Linear; a linear router is the default")
        if select is not None:
            _exclude("select", top_k=top_k is not None, score_function=score_function != "softmax", normalize=normalize,
                     scale=scale != 1, num_groups=num_groups != 1, topk_groups=topk_groups != 1,
                     group_score=group_score != "max")  # fmt: skip
        elif top_k is None or top_k > num_experts:
            raise ValueError(f"top_k: expected 1 to {num_experts} (num_experts), got {top_k}")
        if score is not None:
            _exclude("score", float32=float32, bias=bias)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.score_function, self.normalize, self.scale = score_function, normalize, scale
        self.num_groups, self.topk_groups, self.group_score = num_groups, topk_groups, group_score
        self.jitter, self.float32, self.isolation = jitter, float32, isolation
        self.select = _part("select", select, num_experts, device)
        if score is None and not getattr(self.select, "uses_logits", True):
            score = Uniform
        self.score = made(score, hidden_size, num_experts, device=device, dtype=dtype)
        _check_call("score", self.score)
        self.capacity = _part("capacity", capacity, num_experts, device)
        self.balance = tuple(_part("balance", item, num_experts, device) for item in balance)
        self._register()
        self.overrides: list[Callable[[Select], Select]] = []
        self.weight = self.bias = None
        if self.score is None:
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.register_buffer("e_score_correction_bias", None)
        # of this step; no buffer, which DistributedDataParallel would overwrite with that of rank 0
        self.tokens_per_expert = None
        self._count_and_correct(_needs_bias(self.select, self.balance, selection_bias), device)
        self._group: Any = None
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("select", "capacity", "balance") and "overrides" in self.__dict__:  # after those of __init__
            self.set_policy(**{name: value})
        else:
            super().__setattr__(name, value)

    def set_policy(self, **parts: Unpack[Policy]) -> None:
        """Replaces select, capacity or balance, as far as they are given; so does an assignment to the attribute.

            router.set_policy(select=TopK(4), balance=[*router.balance, ZLoss(1e-3)])

        The parts are made, checked and registered like those given to Router. The selection bias stays, and so do the
        counts of the step as long as there are controllers. Raises TypeError or ValueError, and changes nothing, for
        one that Router would refuse, or that does not go with the other parts.
        """
        if unknown := parts.keys() - _POLICY.keys():
            raise TypeError(f"{min(unknown)}: expected one of {', '.join(_POLICY)}, got another")
        given = {name: convert(name, part, _POLICY[name]) for name, part in parts.items()}
        if "select" in given:
            self._check_select(given["select"])
        tensor = next(chain(self.parameters(), self.buffers()), self.tokens_per_expert)
        device = None if tensor is None else tensor.device
        build = partial(_part, num_experts=self.num_experts, device=device)
        built: dict[str, Any] = {name: build(name, part) for name, part in given.items() if name != "balance"}
        if "balance" in given:
            built["balance"] = tuple(build("balance", item) for item in given["balance"])
        after = {"select": self.select, "balance": self.balance, **built}
        needs_bias = _needs_bias(after["select"], after["balance"], self.e_score_correction_bias is not None)
        for name, part in built.items():
            if not isinstance(part, nn.Module):
                self._modules.pop(name, None)  # which would refuse it
            super().__setattr__(name, part)
        self._register()
        self._count_and_correct(needs_bias, device)

    def _check_select(self, select: Any) -> None:
        """Raises ValueError for a selection that does not go with the other parts of this router."""
        if select is None and self.top_k is None:
            raise ValueError("select: expected a selection in a router without top_k, got None")
        if self.e_score_correction_bias is not None and (name := ignoring_bias(select)) is not None:
            raise ValueError(f"select: expected one that uses the selection bias, got {name}")
        if not getattr(self.select, "uses_logits", True) and getattr(select, "uses_logits", True):
            raise ValueError(f"select: expected one without router_logits, like {self.select}, got {select}")

    def _register(self) -> None:
        """The modules inside of select and balance."""
        self.balance_modules = _registered(self.balance)
        self.select_modules = None if isinstance(self.select, nn.Module) else _registered([self.select])

    def _count_and_correct(self, needs_bias: bool, device: torch.device | str | None) -> None:
        """Makes the selection bias and the counts that the parts need. Those that exist stay."""
        if needs_bias and self.e_score_correction_bias is None:
            self.e_score_correction_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device)
        if not self._controllers:
            self.tokens_per_expert = None
        elif self.tokens_per_expert is None:
            self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=device)

    @property
    def _controllers(self) -> list[Any]:
        inside = [module for part in modules_in(self.select) for module in part.modules()]
        return [part for part in (*self.balance, *inside) if hasattr(part, "after_step")]

    def reset_parameters(self) -> None:
        """Initialises like torch.nn.Linear; zeroes the correction bias. (A score initialises itself.)"""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                init_uniform(parameter, self.hidden_size)
        for counts in (self.e_score_correction_bias, self.tokens_per_expert):
            if counts is not None:
                nn.init.zeros_(counts)

    def _counts_on(self, device: torch.device) -> Tensor:
        """tokens_per_expert, which follow the router to its device."""
        counts = self.tokens_per_expert
        assert counts is not None
        if counts.device != device and device.type != "meta":
            counts = torch.zeros_like(counts, device=device) if counts.is_meta else counts.to(device)
            self.tokens_per_expert = counts
        return counts

    def check_resizable(self, where: str) -> None:
        """Raises ValueError, which begins with `where`, for a part that is made for num_experts experts only, or that
        holds counts of a step in the middle."""
        for part in (self.select, self.capacity, *self.balance):
            modules = [module for each in modules_in(part) for module in each.modules()]
            own = [chain(module.parameters(recurse=False), module.buffers(recurse=False)) for module in modules]
            fits = any(tensor.dim() and tensor.shape[0] == self.num_experts for tensor in chain(*own))
            kind = type(part).__name__
            if fits or getattr(part, "num_experts", None) is not None:
                raise ValueError(f"{where}: expected no part for {self.num_experts} experts only, got {kind}")
            if any(getattr(module, "has_counts", False) for module in modules):
                step = "switchgear.after_step(model) first"
                raise ValueError(f"{where}: expected {step}, got counts of a step in {kind}")

    def resize_counts(self, num_experts: int) -> None:
        """Makes tokens_per_expert fit num_experts: the counts of old experts stay, those of new ones are zero."""
        if self.tokens_per_expert is not None:
            self.tokens_per_expert = pad(self.tokens_per_expert, (0, num_experts - len(self.tokens_per_expert)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}  # of this process, and of the last call

    def logits(self, hidden_states: Tensor, context: Context = NOTHING_KNOWN) -> Tensor:
        """router_logits [T,E] of hidden_states [T,H]."""
        if self.jitter and self.training:
            float32 = self.float32 or getattr(self.score, "float32", False)
            hidden_states = jittered(hidden_states, self.jitter, context, float32)
        if self.score is not None:
            logits: Tensor = self.score(hidden_states, context)
            if logits.shape[-1] != self.num_experts:
                raise ValueError(f"score: expected router_logits [T,E={self.num_experts}], got {list(logits.shape)}")
            return logits
        weight, bias = self._linear()
        return gate(hidden_states, weight, bias, float32=self.float32)

    def _linear(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias; if rows of them are trained alone, differentiable in these."""
        assert self.weight is not None
        if (selection := selection_of(self)) is None:
            return self.weight, self.bias
        return selection.whole(self, "weight"), None if self.bias is None else selection.whole(self, "bias")

    def selection(self) -> Select:
        """The selection in use: `select` or the options of `route`, wrapped by the `overrides`, the last one
        outermost."""
        select: Select = self.select if self.select is not None else self._top_k()
        for override in self.overrides:
            select = override(select)
        return select

    @contextmanager
    def intervene(
        self,
        *,
        disable: Collection[int] = (),
        force: Collection[int] = (),
        bias: PerExpert | None = None,
        gain: PerExpert | None = None,
    ) -> Iterator[None]:
        """Disables, forces, favours or amplifies experts inside the block; see `Change`. Blocks may be nested.

            with moe.gate.intervene(disable=[3], gain={5: 2.0}):
                y = moe(x)

        Raises ValueError for an expert that does not exist, or for contradictory options.
        """
        change = Change(disable, force, bias, gain)
        check_change(change, self.selection(), self.num_experts)
        with overridden_router(self, lambda select: Changed(select, change)):
            yield

    def _top_k(self) -> TopK:
        assert self.top_k is not None
        return TopK(self.top_k, **self._options())

    def forward(self, hidden_states: Tensor, context: Context = NOTHING_KNOWN) -> Routing:
        """Routing of hidden_states [..., H]; leading dimensions are flattened to T."""
        if self.reads_from is not None or self.passes_to is not None:
            hidden_states = self._handed_over(hidden_states)
        try:
            rows = hidden_states
            if rows.dim() != 2:
                rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            if self.weight is not None and self._is_plain() and not (self.jitter and self.training):
                weight, bias = self._linear()
                options = {"bias": bias, "float32": self.float32, "selection_bias": self.e_score_correction_bias}
                return gate_route(rows, weight, self.top_k, **options, **self._options())  # type: ignore[arg-type]
            context = self.complete(context, hidden_states)
            router_logits = self.logits(rows, context)
        except Exception:
            explain_rows("hidden_states", hidden_states, self.hidden_size, self.weight)
            raise
        return self.decide(router_logits, context)

    def _handed_over(self, hidden_states: Tensor) -> Tensor:
        """What a pre-gate chooses by; leaves its block's own for the next one."""
        taken = hidden_states if self.reads_from is None else self.reads_from.take(hidden_states)
        if self.passes_to is not None:
            self.passes_to.hidden_states = hidden_states
        return taken

    def _is_plain(self) -> bool:
        """Whether routing is just `route` on the logits."""
        # Not `not self.balance`, which would break a graph of torch.compile.
        has_parts = self.select is not None or self.capacity is not None or len(self.balance) > 0
        return not has_parts and not self.overrides

    def _route(self, router_logits: Tensor) -> Routing:
        bias = self.e_score_correction_bias
        return route(router_logits, self.top_k, selection_bias=bias, **self._options())  # type: ignore[arg-type]

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of `route` and TopK, but for the selection bias."""
        return {
            "score_function": self.score_function,
            "normalize": self.normalize,
            "scale": self.scale,
            "num_groups": self.num_groups,
            "topk_groups": self.topk_groups,
            "group_score": self.group_score,
        }

    def decide(self, router_logits: Tensor, context: Context = NOTHING_KNOWN) -> Routing:
        """Routing of router_logits [T,E] from any source: selection, capacity limit and losses. `context` comes from
        `complete`."""
        if self._is_plain():
            return self._route(router_logits)
        if self.capacity is not None:
            context = replace(context, changes=[])
        wanted = routing = self._select(router_logits, context)
        if self.capacity is not None:
            if routing.scores is None and getattr(self.capacity, "needs_scores", False):
                score_function = self.score_function
                if self.select is not None or self.overrides:
                    score_function = getattr(scored(self.selection()), "score_function", "softmax")
                routing = routing._replace(scores=scores_of(routing.router_logits, score_function))
            routing = self._limited(routing, context)
        if self.training and self.balance:
            if self._hides_at_random():
                wanted = wanted._replace(router_logits=router_logits)
            losses = self._losses(wanted._replace(num_dropped=routing.num_dropped), context)
            routing = routing._replace(losses=losses)
            self._count(wanted, context)  # last, as a loss may raise
        return routing

    def _hides_at_random(self) -> bool:
        """Whether a mask hides experts from the choice alone, so that losses are of the logits of all."""
        masks = (getattr(part, "mask", None) for part in wrapped(self.select))
        return any(getattr(mask, "hides_at_random", False) for mask in masks)

    def _select(self, router_logits: Tensor, context: Context) -> Routing:
        if self.select is None and not self.overrides:
            return self._route(router_logits)
        routing = self.selection()(router_logits, context, self.e_score_correction_bias)
        if not isinstance(routing, Routing):
            raise TypeError(f"select: expected one that returns Routing, got {type(routing).__name__}")
        return routing

    def _limited(self, routing: Routing, context: Context) -> Routing:
        """The routing within the capacity, under the interventions that the selection left in context.changes."""
        assert self.capacity is not None
        scores = closed = routing.scores
        for change in context.changes or ():
            closed = None if closed is None else change.close(closed)
        routing = self.capacity(routing._replace(scores=closed), context)._replace(scores=scores)
        for change in context.changes or ():
            ids, weights = change.edit(routing.topk_ids, routing.topk_weights, routing.num_experts)
            routing = routing._replace(topk_ids=ids, topk_weights=weights)
        return routing

    def complete(self, context: Context, hidden_states: Tensor) -> Context:
        """Adds what the router knows: its mode, its isolation, and the length of hidden_states [B,S,H]."""
        known: dict[str, Any] = {}
        if context.sequence_length is None and context.sequence_ids is None and hidden_states.dim() > 2:
            *several, length, _ = hidden_states.shape
            known = {"sequence_length": length, "num_sequences": math.prod(several)}
        tokens = math.prod(hidden_states.shape[:-1])
        if context.importance is not None and context.importance.numel() != tokens:
            raise ValueError(f"importance: expected {tokens} tokens, got {context.importance.numel()}")
        isolated = context.isolated or self.isolation == "sequence"
        noise: list[Noise] | None = [] if self.training and self.balance else None
        return replace(context, **known, isolated=isolated, training=self.training, noise=noise)

    def _losses(self, routing: Routing, context: Context) -> dict[str, Tensor]:
        losses: dict[str, Any] = dict(routing.losses)
        for item in self.balance:
            if not callable(item):
                continue  # a controller without a loss
            function = item.func if isinstance(item, partial) else item
            name = str(getattr(item, "name", None) or getattr(function, "__name__", type(item).__name__))
            loss = item(routing, context)
            if loss is None and hasattr(item, "after_step"):
                continue  # a controller that only counts
            if isinstance(loss, Tensor) and loss.dim():
                raise ValueError(f"balance: expected a scalar from {name}, got shape {list(loss.shape)}")
            if not isinstance(loss, (Tensor, float, int)):
                raise TypeError(f"balance: expected a scalar from {name}, got {type(loss).__name__}")
            losses[name] = losses[name] + loss if name in losses else loss
        return losses

    def _count(self, routing: Routing, context: Context) -> None:
        if self.tokens_per_expert is not None and not is_recomputing():
            self._group = context.group
            aside(self._add, routing.topk_ids)

    def _add(self, topk_ids: Tensor) -> None:
        self._counts_on(topk_ids.device).add_(count_tokens(topk_ids, self.num_experts))

    @torch.no_grad()
    def after_step(self) -> None:
        """Call once per optimizer step. Passes the controllers the counts since the last call, summed over the process
        group of the last Context, or over the default group if there is one. Does nothing without controllers."""
        if self.tokens_per_expert is None:
            return
        counts = self._counts_on(next(chain(self.buffers(), self.parameters()), self.tokens_per_expert).device)
        total = sum_over_processes(counts.clone(), self._group)
        for controller in self._controllers:
            controller.after_step(total, self)
        counts.zero_()

    def extra_repr(self) -> str:
        parts = [f"{self.hidden_size}, num_experts={self.num_experts}"]
        if self.select is None:
            parts += [f"top_k={self.top_k}", self.score_function]
        if self.num_groups > 1:
            parts.append(f"groups={self.topk_groups}/{self.num_groups}")
        parts += [name for name in ("normalize", "float32") if getattr(self, name)]
        for name in ("score", "select", "capacity"):
            part = getattr(self, name)
            if part is not None and not isinstance(part, nn.Module):
                parts.append(f"{name}={part}")
        if self.isolation != "batch":
            parts.append(f"isolation={self.isolation}")
        return ", ".join(parts)


def _needs_bias(select: Any, balance: Sequence[Any], selection_bias: bool) -> bool:
    """Whether there is a selection bias. Raises ValueError for one that moves no choice."""
    movers = [type(item).__name__ for item in balance if getattr(item, "needs_selection_bias", False)]
    if (movers or selection_bias) and (name := ignoring_bias(select)) is not None:
        option = f"balance: expected no {movers[0]}" if movers else "selection_bias: expected False"
        raise ValueError(f"{option} for {name}, which ignores a selection bias")
    return selection_bias or bool(movers)


_ARGUMENTS = {
    "score": ("x", "context"),
    "select": ("router_logits", "context", "bias"),
    "capacity": ("routing", "context"),
    "balance": ("routing", "context"),
}


def _check_call(name: str, part: Any) -> None:
    """Raises TypeError for a part that does not take the arguments of its kind. (A controller need not be callable.)"""
    arguments = _ARGUMENTS[name]
    if callable(part) and (reason := takes(part, *arguments)) is not None:
        raise TypeError(f"{name}: expected a callable of ({', '.join(arguments)}), got {part}: {reason}")


def _part(name: str, part: Any, num_experts: int, device: torch.device | str | None) -> Any:
    """Builds the part if needed and moves it to the device."""
    part = made(part, num_experts=num_experts)
    _check_call(name, part)
    if device is not None:
        for module in modules_in(part):
            module.to(device)
    return part


def _registered(parts: Sequence[Any]) -> nn.ModuleList | None:
    """The modules in the parts, for the router to register; None if there are none."""
    modules = [module for part in parts for module in modules_in(part)]
    return nn.ModuleList(modules) if modules else None


def _exclude(by: str, **options: bool) -> None:
    given = [name for name, differs in options.items() if differs]
    if given:
        raise ValueError(f"{given[0]}: expected the default with {by}=, got {', '.join(given)}")
