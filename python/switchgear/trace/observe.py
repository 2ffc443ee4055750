# SPDX-License-Identifier: BSD-3-Clause
"""observe: calls a function with what each MoE layer of a model does, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import checked
from switchgear.integrations.hook_points import Choice
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.routing.router import Router
from switchgear.trace.batches import arguments_by_name, cached_in, real_tokens, rows_and_length, tokens_of
from switchgear.trace.routed_layers import RoutedLayer, pick
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
    blocks = moe_blocks(model)
    routers = {name: block.gate if isinstance(block.gate, Router) else None for name, block in blocks.items()}
    picked = pick({name: RoutedLayer(block, routers[name]) for name, block in blocks.items()}, layers)
    with watch(model, picked, function):
        yield list(picked)


@contextmanager
def watch(model: nn.Module, layers: Mapping[str, RoutedLayer], function: Observer) -> Iterator[None]:
    """As `observe`, for given layers."""
    with ExitStack() as stack:
        inputs = stack.enter_context(inputs_of(model))
        for name, layer in layers.items():
            stack.enter_context(layer.watched(_call_with_observations(name, layer, inputs, function)))
        yield


def _call_with_observations(
    name: str, layer: RoutedLayer, inputs: Inputs, function: Observer
) -> Callable[[Choice, int, Tensor | None], None]:
    def see(choice: Choice, num_experts: int, num_dropped: Tensor | None) -> None:
        x, ids, tokens = choice.x.reshape(-1, choice.x.shape[-1]), choice.topk_ids, len(choice.topk_ids)
        if layer.router is None:
            ids = torch.where(ids < num_experts, ids, -1)  # classes without weights are no experts
        function(name, Observation(
            x, choice.router_logits, ids, choice.topk_weights, layer.block,
            inputs.mask(name, tokens), inputs.ids(name, tokens), num_experts, num_dropped,
        ))  # fmt: skip

    return see


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[Inputs]:
    """Inside the block, the inputs of the model's current forward."""
    inputs = Inputs()
    with ExitStack() as stack:
        stack.callback(get_inner_model(model).register_forward_pre_hook(inputs.remember, with_kwargs=True).remove)
        stack.callback(inputs.forget)
        yield inputs


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
            integers = (v for v in ids if isinstance(v, Tensor) and not (v.is_floating_point() or v.is_complex()))
            found = next((v for v in integers if v.dtype is not torch.bool), None)
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
