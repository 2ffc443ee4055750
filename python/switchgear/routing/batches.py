# SPDX-License-Identifier: BSD-3-Clause
"""Which sequence and position each token of a model's call has, from the model's arguments.

A call has rows of tokens [B,S] with padding (attention_mask), or several sequences packed into a row (position_ids that
begin anew, or sequence_ids). A call with a cache continues the sequences of the one before.
"""

from __future__ import annotations

import inspect
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
        continues: whether these are the next tokens of the sequences of the call before.
        token_ids: [T], or None.
    """

    real: Tensor
    sequence: Tensor
    num_sequences: int
    continues: bool
    token_ids: Tensor | None

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
    """Raises ValueError for a call that has no tokens among its arguments."""
    named = _by_name(model, args, kwargs)
    tokens = _tokens(named, args)
    is_ids = not tokens.is_floating_point()
    rows, length = _shape(tokens, is_ids)
    device = tokens.device
    mask = named.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < length:
        mask = None
    cached = mask.shape[1] - length if mask is not None else _cached(named)
    real = torch.ones(rows, length, dtype=torch.bool, device=device) if mask is None else mask[:, -length:].bool()
    real = real.to(device)
    row = torch.arange(rows, device=device)[:, None].expand(rows, length)
    sequence, count = row, rows
    if not cached:
        if isinstance(ids := named.get("sequence_ids"), Tensor) and ids.numel() == rows * length:
            _, numbers = torch.unique(ids.to(device).reshape(-1), return_inverse=True)
            first = torch.full((int(numbers.max()) + 1,), rows * length, device=device)
            first = first.scatter_reduce(0, numbers, torch.arange(rows * length, device=device), "amin")
            sequence, count = (
                first.argsort().argsort()[numbers].view(rows, length),
                len(first),
            )  # in order of appearance
        elif isinstance(positions := named.get("position_ids"), Tensor) and positions.shape[-1] == length:
            positions = positions.reshape(-1, length)[-rows:].to(device).expand(rows, length)
            starts = (positions == 0) & real
            if bool((starts.sum(1) > 1).any()):
                sequence = starts.flatten().cumsum(0).view(rows, length) - 1
                count = int(starts.sum())
    return Batch(
        real.flatten(), sequence.flatten(), count, cached > 0, tokens.reshape(-1) if is_ids else None
    )  # fmt: skip


def _tokens(named: dict[str, Any], args: tuple[Any, ...]) -> Tensor:
    names = ("input_ids", "token_ids", "inputs_embeds", "hidden_states", "x")
    for value in (*(named.get(name) for name in names), *args, *named.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
    raise ValueError("model: expected tokens among its arguments, got none")


def _shape(tokens: Tensor, is_ids: bool) -> tuple[int, int]:
    """(B,S): leading dimensions are rows."""
    shape = list(tokens.shape) if is_ids else list(tokens.shape[:-1])
    length = shape[-1] if shape else 1
    return (tokens.numel() if is_ids else tokens[..., 0].numel()) // max(length, 1), length


def cached_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of each sequence that a call of a model has in its cache: 0 unless it continues sequences."""
    return _cached(_by_name(module, args, kwargs))


def _cached(named: dict[str, Any]) -> int:
    """Tokens in the cache, by either name that transformers has for it."""
    past: Any = named.get("past_key_values") if named.get("cache") is None else named["cache"]
    try:
        return int(past.get_seq_length())
    except (AttributeError, TypeError):
        return 0


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **bound.get("kwargs", {}), **bound.get("context", {}), **kwargs}
