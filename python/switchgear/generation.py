# SPDX-License-Identifier: BSD-3-Clause
"""Decoding with the experts that a router leaves out: self-contrast (arXiv:2405.14507).

One pass does the work of two. The batch is doubled; routers choose by the strong selection in its first half and by the
weak one in the second. So weights are read once per token, and one cache holds the keys of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Fraction, NotNegative, checked
from switchgear.functional import Routing
from switchgear.integrations.choices import override_selection
from switchgear.integrations.moe_blocks import MoeBlock
from switchgear.integrations.routers import SelectByMethod, find_routing_method
from switchgear.routing.change import overridden_router
from switchgear.routing.context import NOTHING_KNOWN, Context, Select, is_recomputing
from switchgear.routing.selection import RankK
from switchgear.trace.batches import stacked
from switchgear.trace.routed_layers import pick, traceable
from switchgear.utils.modules import get_inner_model

__all__ = ["Halves", "SelfContrast"]

_MEDIA = ("pixel_", "image_", "video_", "input_features", "feature_")  # inputs with a row per image or clip
_CACHES = ("cache", "past_key_values")  # transformers renamed it in 5.24
_SHARED = (*_CACHES, "cache_position", "logits_to_keep")  # inputs of both halves alike
THIRD = RankK((2,), normalize=True)  # the third expert alone, with the weight 1


@checked
@dataclass(frozen=True)
class SelfContrast:
    """Scores tokens by (1 + beta) · strong - beta · weak, the logits of a strong and a weak routing of one model.
    Tokens that the strong routing finds unlikely, with a probability below alpha times its best, are excluded.

        with SelfContrast(weak=RankK((2,), normalize=True)).applied(model):
            model.generate(**inputs, max_new_tokens=100)

    Args:
        weak: the selection of the weak pass; RankK((2,)) is the third expert alone. Layers of ours use its weights;
            those of Hugging Face weigh its choice as they weigh their own.
        strong: the selection of the strong pass; the model's own if None.
        beta: 0 for the strong logits alone.
        alpha: 0 to exclude nothing.
    """

    weak: Select = THIRD
    strong: Select | None = None
    beta: NotNegative = 0.5
    alpha: Fraction = 0.1

    def __call__(self, strong_logits: Tensor, weak_logits: Tensor) -> Tensor:
        """The scores of two passes' logits [..., V], in float32 (float64 stays); -Inf for excluded tokens."""
        dtype = torch.promote_types(strong_logits.dtype, torch.float32)
        strong, weak = strong_logits.to(dtype), weak_logits.to(dtype)
        scores = (1 + self.beta) * strong - self.beta * weak
        excluded = strong == -math.inf  # the model excludes these; the difference to the weak logits may be NaN
        if self.alpha:
            excluded = excluded | (strong < strong.amax(-1, keepdim=True) + math.log(self.alpha))
        return scores.masked_fill(excluded, -math.inf)

    @checked
    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block, the model's logits are the scores, in `generate` with any of its strategies, or in a loop
        of your own with a cache or without. A cache begun outside has one half only and cannot be continued.

        model: its MoE layers are ours or Hugging Face's; it returns logits [B,S,V], alone or as `logits`. Other outputs
            have the rows of both passes. It may be inside PEFT, DistributedDataParallel, FSDP or torch.compile.

        Raises:
            ValueError: a model inside such a block, an encoder-decoder model, one without MoE layers, a router with a
                capacity (the passes would compete for it), or one of Hugging Face that `override` cannot select for;
                at a call, one of a part of the model.
        """
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        if any(isinstance(getattr(hook, "__self__", None), _Doubled) for hook in hooks):
            raise ValueError("model: expected one outside the block of a SelfContrast, got one inside")
        config = getattr(get_inner_model(model), "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("model: expected a decoder, got an encoder-decoder model")
        found = pick(traceable(model), None)
        for name, layer in found.items():
            if layer.router is not None and layer.router.capacity is not None:
                raise ValueError(f"model: expected routers without a capacity, got one in {name}")
        blocks = [layer.block for layer in found.values() if layer.router is None]
        methods = [(block, find_routing_method(block)) for block in blocks]  # raises for one that is not known
        doubled, inner = _Doubled(self), get_inner_model(model)
        with ExitStack() as stack:
            for layer in found.values():
                if layer.router is not None:
                    stack.enter_context(
                        overridden_router(layer.router, lambda own: Halves(doubled, self.strong or own, self.weak))
                    )
            for block, method in methods:
                stack.enter_context(_override_block(block, method, doubled))
            stack.callback(doubled.forget)
            # Before the hooks of traces and the like, so that those see the tokens that the layers see.
            stack.callback(inner.register_forward_pre_hook(doubled.enter, prepend=True, with_kwargs=True).remove)
            stack.callback(inner.register_forward_hook(doubled.leave).remove)
            stack.callback(inner.register_forward_hook(doubled.end, always_call=True).remove)
            yield


@dataclass(frozen=True)
class Halves:
    """One selection for the first half of the tokens, another for the second, in calls of a model that is doubled.

    whole: the first selects for all tokens, as one that looks up each token must; its second half is not used."""

    doubled: _Doubled
    first: Select
    second: Select
    whole: bool = False

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        if not self.doubled.is_running and not is_recomputing():
            raise ValueError("model: expected calls of the model under SelfContrast, got one of a part of it")
        rows = router_logits.reshape(-1, router_logits.shape[-1])
        middle, odd = divmod(rows.shape[0], 2)
        if odd:
            raise ValueError(f"model: expected layers that see all tokens of both halves, got one with {len(rows)}")
        halves = [
            select(rows[at], _slice(context, at, rows.shape[0]), bias)
            for select, at in (
                (self.first, slice(None) if self.whole else slice(middle)),
                (self.second, slice(middle, None)),
            )
        ]
        ids = stacked([half.topk_ids[:middle] for half in halves])
        weights = stacked([half.topk_weights[:middle] for half in halves], 0)
        return Routing(ids, weights, rows, rows.shape[1])


def _slice(context: Context, at: slice, num_tokens: int) -> Context:
    """The context of some of the tokens."""
    names = ("token_ids", "sequence_ids", "importance", "embedding")
    values = {name: getattr(context, name) for name in names}
    rows = {name: value for name, value in values.items() if value is not None and value.shape[0] == num_tokens}
    return replace(context, **{name: value[at] for name, value in rows.items()}) if rows else context


def _override_block(block: MoeBlock, method: Any, doubled: _Doubled) -> AbstractContextManager[None]:
    strong, weak = (
        None if select is None else SelectByMethod.of(block, method, select)
        for select in (doubled.contrast.strong, doubled.contrast.weak)
    )
    return override_selection(block, method, lambda own: Halves(doubled, strong or own, weak or own, whole=not strong))


class _Doubled:
    """Hooks of a model: its inputs twice, and the scores for its logits."""

    def __init__(self, contrast: SelfContrast) -> None:
        self.contrast = contrast
        self.caches: list[Any] = []
        self.is_running = False

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("labels") is not None:
            raise ValueError("labels: expected None under SelfContrast, got labels")
        batch = _find_batch(args, kwargs)
        for name in _CACHES:
            self._reorder_both(kwargs.get(name))
        self.is_running = True
        return (
            tuple(_double("", value, batch) for value in args),
            {name: value if name in _SHARED else _double(name, value, batch) for name, value in kwargs.items()},
        )

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Also runs after a call that raised."""
        self.is_running = False

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.contrast(*output.chunk(2))
        if isinstance(output, tuple):
            return (self.contrast(*output[0].chunk(2)), *output[1:])
        for name in _CACHES:
            self._reorder_both(getattr(output, name, None))
        output.logits = self.contrast(*output.logits.chunk(2))
        return output

    def _reorder_both(self, cache: Any) -> None:
        """Beam search moves the rows of the cache, and knows those of one half."""
        if not hasattr(cache, "reorder_cache") or any(cache is known for known in self.caches):
            return
        reorder = cache.reorder_cache
        cache.reorder_cache = lambda rows: reorder(torch.cat([rows, rows + rows.shape[0]]))
        self.caches.append(cache)

    def forget(self) -> None:
        for cache in self.caches:
            del cache.reorder_cache
        self.caches.clear()


def _find_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """B of the model's first input [B,…]."""
    rest = [value for name, value in kwargs.items() if name not in _SHARED and not name.startswith(_MEDIA)]
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *rest):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[0]
    raise ValueError("model: expected an input [B,S] or [B,S,H] under SelfContrast, got none with two dimensions")


def _double(name: str, value: Any, batch: int) -> Any:
    """A value with the batch doubled: rows of tensors, of tensors in mappings, and the second dimension of position ids
    [3,B,S]."""
    if isinstance(value, Mapping):
        return {key: _double(name, item, batch) for key, item in value.items()}
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if name == "position_ids" and value.dim() == 3 and value.shape[1] == batch:
        return torch.cat([value, value], 1)
    return torch.cat([value, value]) if value.shape[0] == batch or name.startswith(_MEDIA) else value
