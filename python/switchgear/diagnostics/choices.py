# SPDX-License-Identifier: BSD-3-Clause
"""The choices of every token, layer by layer: what the diagnostics per token and per example are computed from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.trace import LayerTrace, RoutingTrace, observe
from switchgear.trace.batches import arguments_by_name, cached_in, stacked
from switchgear.utils.modules import get_inner_model


@dataclass(frozen=True)
class LayerChoices:
    """The choices of a layer's T tokens. It has the sums of a LayerTrace as properties, so that a function of these
    takes either."""

    topk_ids: Tensor  # [T,K] integers, -1 for none
    topk_weights: Tensor  # [T,K]
    num_experts: int
    router_logits: Tensor | None = None  # [T,E]
    examples: Tensor | None = None  # [T] int64: the token's row of the model's input, counted over all calls

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.topk_ids.shape[0]

    @property
    def tokens_per_expert(self) -> Tensor:
        """[E] int64."""
        return _scatter(self, torch.ones_like(self.topk_ids, dtype=torch.int64))

    @property
    def weight_per_expert(self) -> Tensor:
        """[E] float64."""
        return _scatter(self, self.topk_weights.detach().double())

    @property
    def entropy(self) -> Tensor:
        """float64 scalar: the sum over tokens of the entropy of softmax(router_logits), NaN without logits."""
        if self.router_logits is None:
            return torch.tensor(torch.nan, dtype=torch.float64)
        entropy: Tensor = torch.special.entr(self.router_logits.detach().double().softmax(-1))
        return entropy.nan_to_num().sum()  # rows without finite logits: 0, as in a LayerTrace


def get_layers(trace: RoutingTrace | Mapping[str, Any]) -> Mapping[str, LayerTrace | LayerChoices]:
    """The layers of a RoutingTrace, or of what `collect` yields, by name."""
    return trace if isinstance(trace, Mapping) else trace.layers


def _scatter(choices: LayerChoices, values: Tensor) -> Tensor:
    """[E]: the sums of values [T,K] by expert."""
    ids = choices.topk_ids.long().flatten()
    ids = torch.where(ids < 0, choices.num_experts, ids)
    sums = torch.zeros(choices.num_experts + 1, dtype=values.dtype, device=values.device)
    return sums.scatter_add(0, ids, values.flatten())[:-1]


class Choices(Mapping[str, LayerChoices]):
    """LayerChoices by layer name. Calls are joined when a layer is read."""

    def __init__(self) -> None:
        self._calls: dict[str, list[LayerChoices]] = {}

    def add(self, name: str, choices: LayerChoices) -> None:
        """Appends the choices of one call of the layer `name`."""
        self._calls.setdefault(name, []).append(choices)

    def __getitem__(self, name: str) -> LayerChoices:
        calls = self._calls[name]
        if len(calls) > 1:
            calls[:] = [_join(calls)]
        return calls[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)


def _join(calls: list[LayerChoices]) -> LayerChoices:
    def cat(of: Callable[[LayerChoices], Tensor | None]) -> Tensor | None:
        parts = [part for part in map(of, calls) if part is not None]
        return torch.cat(parts) if len(parts) == len(calls) else None

    ids = stacked([call.topk_ids for call in calls])
    weights = stacked([call.topk_weights for call in calls], 0)
    return LayerChoices(
        ids, weights, calls[0].num_experts, cat(lambda call: call.router_logits), cat(lambda call: call.examples)
    )


@contextmanager
def collect(model: nn.Module, *, logits: bool = True, layers: Collection[str] | None = None) -> Iterator[Choices]:
    """Keeps the choices of every token while the model runs, without the padding.

        with collect(model) as choices:
            for batch in batches:
                model(**batch)
        choices["layers.0.mlp.gate"].topk_ids

    Layers have the names of a RoutingTrace, which keeps sums only. Here memory grows with the tokens: 8·K bytes per
    token and layer, and 4·E more for logits.

    Each row of a call is an example. Of tokens [T,H] without rows, each token is one: pass a text as [1,T,H]. A call
    with tokens in its cache, as the steps of `generate`, continues the examples of the call before.

    Args:
        logits: keep router_logits too, where the router has them.
        layers: names of layers; all if None.
    """
    choices = Choices()
    shape: list[tuple[int, int]] = []  # (rows before the running batch, its rows)
    count = first = 0  # first: tokens in the cache before the batch, as those of a prefix

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count, first
        rows = next((v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1), 0)
        cached = cached_in(arguments_by_name(module, args, kwargs)) or 0
        if shape and rows == shape[0][1] and cached > first:
            return  # the rows of the call before continue
        shape[:], first = [(count, rows)], cached
        count += rows

    def see(name: str, seen: Any) -> None:
        ids = seen.topk_ids.detach()
        weights = seen.topk_weights.detach()
        kept = seen.router_logits.detach().float() if logits and seen.router_logits is not None else None
        mask = slice(None) if seen.token_mask is None else seen.token_mask.bool()
        others = (None if rows is None else rows[mask] for rows in (kept, _number_examples(shape, ids)))
        layer = name if seen.block is None else seen.block.layer
        choices.add(layer, LayerChoices(ids[mask], weights[mask], seen.num_experts, *others))

    handle = get_inner_model(model).register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with observe(model, see, layers):
            yield choices
    finally:
        handle.remove()


def _number_examples(shape: list[tuple[int, int]], ids: Tensor) -> Tensor | None:
    """[T] int64, or None if the tokens are not those of a batch of equal rows."""
    before, rows = shape[0] if shape else (0, 0)
    if not rows or ids.shape[0] % rows:
        return None
    return torch.arange(rows, device=ids.device).repeat_interleave(ids.shape[0] // rows) + before
