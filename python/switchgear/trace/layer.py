# SPDX-License-Identifier: BSD-3-Clause
"""LayerTrace: sums over the tokens of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LayerTrace:
    """Sums over the tokens of a layer with E experts.

    Attributes:
        tokens_per_expert: [E] int64, choices that each expert served.
        weight_per_expert: [E] float64, the sum of their weights.
        entropy: float64 scalar, the sum over tokens of the entropy in nats of the router's softmax; NaN if its logits
            are not available (Hugging Face models).
        max_violation: float64 scalar, the sum over calls of max load / mean load - 1 (arXiv:2408.15664).
        num_dropped: int64 scalar, choices dropped by a capacity limit.
        num_tokens, num_calls: counts of tokens and calls.
    """

    def __init__(self, num_experts: int, device: torch.device | str = "cpu") -> None:
        self.num_experts = num_experts
        self.num_tokens = self.num_calls = 0
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.weight_per_expert = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)
        self.max_violation = torch.zeros((), dtype=torch.float64, device=device)
        self.num_dropped = torch.zeros((), dtype=torch.int64, device=device)
        self.pairs = _Counts()

    def add(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        router_logits: Tensor | None = None,
        num_dropped: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        """Adds one call: topk_ids and topk_weights [T,K], -1 for none; router_logits [T,E]; token_ids [T]."""
        experts = torch.where(topk_ids < 0, self.num_experts, topk_ids).long().flatten()
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=topk_ids.device)
        counts = counts.scatter_add(0, experts, torch.ones_like(experts))[:-1]
        weights = torch.zeros(self.num_experts + 1, dtype=torch.float64, device=topk_ids.device)
        weights = weights.scatter_add(0, experts, topk_weights.detach().double().flatten())[:-1]
        self.tokens_per_expert = self.tokens_per_expert + counts
        self.weight_per_expert = self.weight_per_expert + weights
        mean = counts.double().mean()
        self.max_violation = self.max_violation + torch.where(mean > 0, counts.max() / mean - 1, 0)
        if router_logits is None:
            self.entropy = self.entropy + torch.nan
        else:
            self.entropy = self.entropy + _entropy(router_logits.detach())
        if num_dropped is not None:
            self.num_dropped = self.num_dropped + num_dropped
        self.num_tokens += topk_ids.shape[0]
        self.num_calls += 1
        if token_ids is not None:
            keys = token_ids[:, None].long() * self.num_experts + topk_ids
            self.pairs.add(keys[topk_ids >= 0])

    def tokens_by_id(self) -> dict[int, Tensor]:
        """For each token id, how often each expert served it, [E] int64. Empty without recorded token ids."""
        keys, counts = self.pairs.total()
        result: dict[int, Tensor] = {}
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            row = result.setdefault(key // self.num_experts, torch.zeros(self.num_experts, dtype=torch.int64))
            row[key % self.num_experts] = count
        return result

    def state(self) -> dict[str, Any]:
        keys, counts = self.pairs.total()
        tensors = {name: getattr(self, name).cpu() for name in _SUMS}
        return {**tensors, "pairs": keys.cpu(), "counts": counts.cpu(), "sizes": [self.num_tokens, self.num_calls]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> LayerTrace:
        """Raises KeyError, TypeError or ValueError for anything but a `state`."""
        layer = cls(len(state["tokens_per_expert"]))
        for name in _SUMS:
            _check_like(name, state[name], getattr(layer, name))
            setattr(layer, name, state[name])
        keys, counts = state["pairs"], state["counts"]
        for name, tensor in (("pairs", keys), ("counts", counts)):
            _check_like(name, tensor, torch.empty(len(counts), dtype=torch.int64))
        layer.num_tokens, layer.num_calls = (int(size) for size in state["sizes"])
        layer.pairs.parts = [(keys, counts)]
        return layer


_SUMS = ("tokens_per_expert", "weight_per_expert", "entropy", "max_violation", "num_dropped")


def _check_like(name: str, tensor: Any, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype is not like.dtype:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected {like.dtype} {list(like.shape)}, got {got}")


class _Counts:
    """How often each key occurred. Parts are merged as they grow, so memory grows with the distinct keys only."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, keys: Tensor) -> None:
        self.parts.append(torch.unique(keys, return_counts=True))
        if len(self.parts) > 16:
            self.total()

    def total(self) -> tuple[Tensor, Tensor]:
        if not self.parts:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        keys, index = torch.unique(torch.cat([keys for keys, _ in self.parts]), return_inverse=True)
        counts = torch.zeros_like(keys).scatter_add(0, index, torch.cat([counts for _, counts in self.parts]))
        self.parts = [(keys, counts)]
        return keys, counts


def _entropy(router_logits: Tensor) -> Tensor:
    """The sum over tokens; rows without finite logits count as 0."""
    log_p = router_logits.float().log_softmax(-1)
    entropy: Tensor = torch.special.entr(log_p.exp())
    return entropy.nan_to_num().sum(dtype=torch.float64)
