# SPDX-License-Identifier: BSD-3-Clause
"""Which sequence and position each token of a model's call has, from the model's arguments.

A call has rows of tokens [B,S] with padding (attention_mask), or several sequences packed into a row (position_ids that
begin anew, or sequence_ids). A call with more in its cache than the first of its sequences continues them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """The T tokens of a call.

    Attributes:
        real: [T] bool, False for padding.
        sequence: [T] int64, counted from the first of the call; any value for padding.
        num_sequences: of the call.
        token_ids: [T], or None.
        rows: B; the tokens of a row follow each other.
        cached: tokens of each row, padding included, that the cache holds before the call.
        kept: [B,cached] bool, False for cached tokens that the call's mask calls padding; None if it does not tell.
        cache: what counts `cached` now; None if nothing does.
    """

    real: Tensor
    sequence: Tensor
    num_sequences: int
    token_ids: Tensor | None
    rows: int
    cached: int
    kept: Tensor | None = None
    cache: Any = None

    @property
    def length(self) -> int:
        """S: tokens of a row."""
        return len(self.real) // max(self.rows, 1)

    def order(self) -> Tensor:
        """[T] int64: how many tokens of its sequence come before each one in this call."""
        sequence = torch.where(self.real, self.sequence, self.num_sequences)
        by_sequence = sequence.argsort(stable=True)
        counts = torch.bincount(sequence, minlength=self.num_sequences + 1)
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(sequence), device=sequence.device) - starts[sequence[by_sequence]]
        return torch.zeros_like(sequence).scatter(0, by_sequence, places)

    def lengths(self) -> Tensor:
        """[num_sequences] int64: tokens of this call."""
        return torch.bincount(self.sequence[self.real], minlength=self.num_sequences)


def batch_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Raises ValueError for a call that has no tokens among its arguments, or a mask that does not tell padding."""
    named = arguments_by_name(model, args, kwargs)
    tokens = tokens_of(named, args)
    if tokens is None:
        raise ValueError("model: expected tokens among its arguments, got none")
    rows, length = rows_and_length(tokens)
    device = tokens.device
    mask, cache = mask_of(named.get("attention_mask")), _cache(named)
    counted = cached_in(named)
    real = real_tokens(mask, rows, length, counted)
    if real is None and isinstance(mask, Tensor) and mask.dim() > 2:
        raise ValueError(
            f"attention_mask: expected [B,L], or [B,1,1,L] or [B,1,S,L] with {rows} rows and columns for the cache and "
            f"{length} tokens, got {list(mask.shape)}"
        )
    cached, kept = counted or 0, None
    if real is not None and isinstance(mask, Tensor) and mask.dim() == 2:
        cached = mask.shape[1] - length
        kept = mask[:, :cached].bool().expand(rows, cached)
    real = (torch.ones(rows, length, dtype=torch.bool) if real is None else real).to(device)
    row = torch.arange(rows, device=device)[:, None].expand(rows, length)
    packed = None if cached else _packed(named, real)
    sequence, count = (row, rows) if packed is None else packed
    token_ids = None if tokens.is_floating_point() else tokens.reshape(-1)
    counter = cache if counted == cached else None
    return Batch(real.flatten(), sequence.flatten(), count, token_ids, rows, cached, kept, counter)


def _packed(named: Mapping[str, Any], real: Tensor) -> tuple[Tensor, int] | None:
    """The sequence of each token [B,S] int64, counted in order of appearance, and their number, if a call's arguments
    tell of sequences in a row. real: [B,S], as of `real_tokens`."""
    rows, length = real.shape
    if not real.numel():
        return None
    if isinstance(ids := named.get("sequence_ids"), Tensor) and ids.numel() == real.numel():
        values, numbers = torch.unique(ids.to(real.device).reshape(-1), return_inverse=True)
        places = torch.arange(real.numel(), device=real.device)
        first = places.new_full(values.shape, real.numel()).scatter_reduce(0, numbers, places, "amin")
        return first.argsort().argsort()[numbers].view(rows, length), len(values)
    if isinstance(positions := named.get("position_ids"), Tensor) and positions.shape[-1] == length:
        positions = positions.reshape(-1, length)[-rows:].to(real.device).expand(rows, length)
        starts = (positions == 0) & real
        if bool((starts.sum(1) > 1).any()):
            return starts.flatten().cumsum(0).view(rows, length) - 1, int(starts.sum())
    return None


def tokens_of(named: Mapping[str, Any], args: tuple[Any, ...]) -> Tensor | None:
    """The token ids [...,S] or embeddings [...,S,H] among a call's arguments."""
    names = ("input_ids", "token_ids", "inputs_embeds", "hidden_states", "x")
    for value in (*(named.get(name) for name in names), *args, *named.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
    return None


def rows_and_length(tokens: Tensor) -> tuple[int, int]:
    """(B,S) of token ids [...,S] or embeddings [...,S,H]: leading dimensions are rows."""
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
    length = shape[-1] if shape else 1
    return shape.numel() // max(length, 1), length


def mask_of(mask: Any) -> Any:
    """A call's attention_mask; of a dict of masks by kind of layer, as transformers makes for some models, the one of
    full attention if there is one, else the first. None: nothing is masked but what is causal."""
    return mask.get("full_attention", next(iter(mask.values()), None)) if isinstance(mask, Mapping) else mask


def real_tokens(mask: Any, rows: int, length: int, cached: int | None) -> Tensor | None:
    """[B,S] bool, False for padding, from a call's attention_mask; None if the mask does not tell.

    A mask [B,L] is 0 for padding and ends with the call's tokens. A mask [B,1,Q,L] (Q is 1 or S) says what queries see:
    True, or 0 if it is added to scores. The call's columns follow those of the cache; unfilled ones may be behind them.
    A token is padding if neither its own query nor a later one sees it.

    mask: or a dict of masks, as in mask_of. cached: None if the call has no cache that tells: columns end with the
    call's tokens.
    """
    mask = mask_of(mask)
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[0] not in (1, rows):
        return None
    first = mask.shape[-1] - length  # also where a sliding window has dropped the first columns
    if mask.dim() > 2 and cached is not None:
        first = min(first, cached)
    if first < 0:
        return None
    own = mask[..., first : first + length]
    if own.dim() == 2:
        return own.bool().expand(rows, length)
    seen = own == 0 if own.is_floating_point() else own.bool()
    while seen.dim() > 3:
        seen = seen.any(1)
    if seen.shape[1] not in (1, length):
        return None
    return (seen[:, 0] if seen.shape[1] == 1 else seen.tril().any(1)).expand(rows, length)


def cached_in(named: Mapping[str, Any]) -> int | None:
    """Tokens of each row in the cache among a call's arguments; None without one that tells."""
    try:
        return int(_cache(named).get_seq_length())
    except (AttributeError, TypeError, ValueError):  # ValueError: transformers' caches of linear attention alone
        return None


def _cache(named: Mapping[str, Any]) -> Any:
    """By either name that transformers has for it."""
    return named.get("past_key_values") if named.get("cache") is None else named["cache"]


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names in the module's forward, those of its **kwargs among them."""
    if not args:
        return kwargs
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}


def stacked(parts: Sequence[Tensor], fill: float = -1) -> Tensor:
    """Rows [n,K] of at least one part, one after the other, with `fill` up to the largest K: -1 for ids, 0 for
    weights."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
