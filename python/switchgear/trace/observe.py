# SPDX-License-Identifier: BSD-3-Clause
"""observe: calls a function with what each MoE layer of a model does, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import check_module, checked, list_of_names
from switchgear.functional import Routing
from switchgear.integrations.choices import watch_choices
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.routing.context import is_recomputing
from switchgear.routing.counting import unseen
from switchgear.routing.router import Router
from switchgear.trace.batches import arguments_by_name, cached_in, real_tokens, rows_and_length, tokens_of
from switchgear.utils.modules import get_inner_model


@dataclass(frozen=True)
class Observation:
    """One call of an MoE layer. Tensors are those of the model, with their graph: detach what is kept.

    Attributes:
        x: [T,H], the input of the experts.
        router_logits: [T,E], or more classes than experts; None if the layer has no router.
        topk_ids: [T,K], -1 for an empty slot.
        topk_weights: [T,K].
        block: the layer; None for a Router of ours without experts.
        token_mask: [T] bool, False for padding; None if the model got no attention_mask [B,L], [B,1,1,L] or [B,1,S,L]
            for these tokens. It is 0 for padding; floating-point numbers of more dimensions, which are added to scores,
            are not 0. Of [B,1,S,L] a token is padding if neither its own query nor a later one sees it.
        token_ids: [T] integers; None if the model got none for these tokens.
        num_experts: E.
        num_dropped: choices that a capacity limit dropped, or None.
    """

    x: Tensor
    router_logits: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    block: MoeBlock | None
    token_mask: Tensor | None
    token_ids: Tensor | None
    num_experts: int
    num_dropped: Tensor | None = None


Observer = Callable[[str, Observation], None]


@dataclass(frozen=True)
class Source:
    """A layer that can be observed: our router, or a block of Hugging Face."""

    block: MoeBlock | None
    router: Router | None


@checked
@contextmanager
def observe(model: nn.Module, function: Observer, layers: Collection[str] | None = None) -> Iterator[list[str]]:
    """Inside the block, function(name, Observation) is called at each call of an MoE layer, before its experts run.
    Yields the names.

        with observe(model, lambda name, seen: print(name, seen.topk_ids.shape)):
            model(**batch)

    The logits of Hugging Face's routers come from the gate module, so that it does not matter whether the model returns
    them, or what runs its experts. Calls that gradient checkpointing repeats in backward are left out.

    Args:
        layers: names of blocks (moe_blocks), or of layers in a RoutingTrace; all if None.

    Raises:
        ValueError: the model has no MoE layer, or none of a given name.
    """
    sources = {block.name: Source(block, _router(block)) for block in moe_blocks(model).values()}
    picked = pick(sources, layers)
    with watch(model, picked, function):
        yield list(picked)


def traceable(model: nn.Module) -> dict[str, Source]:
    """The layers of a RoutingTrace by name: all our routers, or else the blocks of Hugging Face."""
    check_module("model", model)
    blocks = moe_blocks(model)
    by_gate = {id(block.gate): block for block in blocks.values()}
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    if routers:
        return {name: Source(by_gate.get(id(router)), router) for name, router in routers.items()}
    return {block.layer: Source(block, None) for block in blocks.values()}


def pick(sources: Mapping[str, Source], layers: Collection[str] | None) -> dict[str, Source]:
    """The sources of these names: those of blocks, or of layers in a RoutingTrace. Raises ValueError for an unknown
    name."""
    if not sources:
        raise ValueError("model: expected one with routers, or Hugging Face's MoE layers, got none")
    if layers is None:
        return dict(sources)
    wanted = set(list_of_names("layers", layers))
    names = {
        name: {name} | ({source.block.name, source.block.layer} if source.block is not None else set())
        for name, source in sources.items()
    }
    missing = sorted(wanted - set().union(*names.values()))
    if missing:
        raise ValueError(f"layers: expected some of {', '.join(sources)}; got {missing[0]}")
    return {name: source for name, source in sources.items() if names[name] & wanted}


@contextmanager
def watch(model: nn.Module, sources: Mapping[str, Source], function: Observer) -> Iterator[None]:
    """As `observe`, for given sources."""
    with ExitStack() as stack:
        inputs = stack.enter_context(inputs_of(model))
        for name, source in sources.items():
            if source.router is not None:
                hook = _router_hook(name, source, inputs, function)
                stack.callback(source.router.register_forward_hook(hook).remove)
            else:
                assert source.block is not None
                stack.enter_context(watch_choices(source.block, _choice_hook(name, source.block, inputs, function)))
        yield


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[Inputs]:
    """Inside the block, the inputs of the model's current forward."""
    inputs = Inputs()
    with ExitStack() as stack:
        stack.callback(get_inner_model(model).register_forward_pre_hook(inputs.remember, with_kwargs=True).remove)
        stack.callback(inputs.forget)
        yield inputs


def _router(block: MoeBlock) -> Router | None:
    return block.gate if isinstance(block.gate, Router) else None


def _router_hook(name: str, source: Source, inputs: Inputs, function: Observer) -> Callable[..., None]:
    def hook(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        if is_recomputing():
            return
        tokens = routing.topk_ids.shape[0]
        with unseen(args[0]):
            x = args[0].reshape(-1, args[0].shape[-1])
            function(name, Observation(
                x, routing.router_logits, routing.topk_ids, routing.topk_weights, source.block,
                inputs.mask(name, tokens), inputs.ids(name, tokens), routing.num_experts, routing.num_dropped,
            ))  # fmt: skip

    return hook


def _choice_hook(name: str, block: MoeBlock, inputs: Inputs, function: Observer) -> Callable[[Any], None]:
    def hook(choice: Any) -> None:
        if is_recomputing():
            return
        ids = choice.topk_ids
        tokens = ids.shape[0]
        with unseen(ids):
            ids = torch.where(ids < block.num_experts, ids, -1)  # classes without weights are no experts
            function(name, Observation(
                choice.x, choice.router_logits, ids, choice.topk_weights, block,
                inputs.mask(name, tokens), inputs.ids(name, tokens), block.num_experts,
            ))  # fmt: skip

    return hook


class Inputs:
    """The token ids and attention masks of the model's current forward."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._ids: dict[str, Tensor] = {}
        self._masks: dict[str, Any] = {}
        self._rows = 1
        self._cached: int | None = None

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forget()
        named = arguments_by_name(module, args, kwargs)
        for prefix in ("", "decoder_"):
            ids = [named.get(f"{prefix}input_ids"), named.get("token_ids")]
            if not prefix:
                ids += list(args)
            found = next((v for v in ids if isinstance(v, Tensor) and _has_integers(v)), None)
            if found is not None:
                self._ids[prefix] = found
            if (mask := named.get(f"{prefix}attention_mask")) is not None:
                self._masks[prefix] = mask
        if (tokens := tokens_of(named, args)) is not None:
            self._rows, _ = rows_and_length(tokens)
        if any(not isinstance(mask, Tensor) or mask.dim() > 2 for mask in self._masks.values()):
            self._cached = cached_in(named)  # a mask [B,L] needs no reading of a device

    def ids(self, name: str, tokens: int) -> Tensor | None:
        """[T], for a layer of this name with T tokens."""
        ids = self._of(self._ids, name)
        return None if ids is None or ids.numel() != tokens else ids.reshape(-1)

    def mask(self, name: str, tokens: int) -> Tensor | None:
        """[T] bool, False for padding."""
        mask = self._of(self._masks, name)
        rows = len(mask) if isinstance(mask, Tensor) and mask.dim() > 1 and len(mask) != 1 else self._rows
        if mask is None or not tokens or not rows or tokens % rows:
            return None
        real = real_tokens(mask, rows, tokens // rows, self._cached)
        return None if real is None else real.reshape(-1)

    def _of(self, values: Mapping[str, Any], name: str) -> Any:
        side = "decoder_" if "decoder" in name.split(".") and "decoder_" in self._ids else ""
        return values.get(side)


def _has_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
