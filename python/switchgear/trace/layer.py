# SPDX-License-Identifier: BSD-3-Clause
"""LayerTrace: sums over the tokens of one layer, counts of pairs of token id and expert, and a sample of tokens.
LayerSummary: the same in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchgear.checks import list_of_names
from switchgear.trace.batches import stacked

KINDS = ("counts", "weights", "entropy", "probabilities", "norms", "inputs", "coactivation")
DEFAULT = ("counts", "weights", "entropy")
_PAIRS = 2**20  # of experts that are counted at a time
_KEYS = 2**62  # enough that two tokens hardly ever draw the same key
_CALLS = 64  # that wait to be summed, so that a call costs one scatter_add


def kinds_of(record: Collection[str]) -> tuple[str, ...]:
    """Raises ValueError for what cannot be recorded. Counts always are."""
    names = list_of_names("record", record)
    if unknown := sorted(set(names) - set(KINDS)):
        raise ValueError(f"record: expected some of {', '.join(KINDS)}; got {unknown[0]}")
    return tuple(kind for kind in KINDS if kind == "counts" or kind in names)


class LayerTrace:
    """Sums over the tokens of a layer with E experts, padding left out. What is not recorded is None.

    Attributes:
        tokens_per_expert: [E] int64, choices that each expert served.
        weight_per_expert: [E] float64, the sum of their weights.
        entropy: float64 scalar, the sum over tokens of the entropy in nats of the softmax of the router's logits; NaN
            if there are no logits.
        probability_per_expert: [E] float64, the sum over tokens of that softmax.
        norm_per_expert: [E] float64, the sum over served choices of the norm of the expert's output, unweighted.
        coactivation: [E,E] int64, tokens that have both experts; the diagonal is tokens_per_expert.
        sample: a TokenSample, inputs with their choices.
        max_violation: float64 scalar, the sum over calls of max load / mean load - 1 (arXiv:2408.15664).
        num_dropped: int64 scalar, choices dropped by a capacity limit.
        num_tokens, num_calls: counts of tokens and calls.
    """

    def __init__(
        self,
        num_experts: int,
        device: torch.device | str = "cpu",
        record: Collection[str] = DEFAULT,
        tokens: int = 1024,
    ) -> None:
        self.num_experts = num_experts
        self.record = kinds = kinds_of(record)
        self._num_tokens: Tensor | int = 0
        self._num_calls = 0
        self._waiting: list[Tensor] = []  # [E+1] choices in each call; the last of them are empty
        self._tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self._max_violation = torch.zeros((), dtype=torch.float64, device=device)
        self._num_dropped = torch.zeros((), dtype=torch.int64, device=device)
        self.pairs = PairCounts()

        def sums(kind: str, *shape: int, dtype: torch.dtype = torch.float64) -> Any:
            return torch.zeros(shape, dtype=dtype, device=device) if kind in kinds else None

        self.weight_per_expert = sums("weights", num_experts)
        self.entropy = sums("entropy")
        self.probability_per_expert = sums("probabilities", num_experts)
        self.norm_per_expert = sums("norms", num_experts)
        self.coactivation = sums("coactivation", num_experts, num_experts, dtype=torch.int64)
        self.sample = TokenSample(tokens) if "inputs" in kinds else None

    @property
    def tokens_per_expert(self) -> Tensor:
        """[E] int64: choices of each expert since the start."""
        self._sum_calls()
        return self._tokens_per_expert

    @property
    def max_violation(self) -> Tensor:
        """float64 scalar: max load / mean load - 1, summed over calls."""
        self._sum_calls()
        return self._max_violation

    @property
    def num_dropped(self) -> Tensor:
        """Choices that a capacity dropped."""
        return self._num_dropped

    @property
    def num_tokens(self) -> int:
        """Tokens that were routed."""
        return int(self._num_tokens)

    @property
    def num_calls(self) -> int:
        """Calls of the layer."""
        return self._num_calls

    @torch.no_grad()
    def add(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        router_logits: Tensor | None = None,
        num_dropped: Tensor | None = None,
        token_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        x: Tensor | None = None,
        norms: Tensor | None = None,
    ) -> None:
        """Adds one call: topk_ids and topk_weights [T,K], -1 for none; router_logits [T,E]; token_ids [T]; token_mask
        [T], False for padding; x [T,H]; norms [T,K] of the experts' outputs."""
        if token_mask is not None:
            topk_ids = topk_ids.masked_fill(~token_mask[:, None], -1)
        slots = torch.where(topk_ids < 0, self.num_experts, topk_ids).long()
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=slots.device)
        self._waiting.append(counts.scatter_add_(0, slots.flatten(), torch.ones_like(slots.flatten())))
        if len(self._waiting) >= _CALLS:
            self._sum_calls()
        if num_dropped is not None:
            self._num_dropped = self._num_dropped + num_dropped
        self._num_tokens = self._num_tokens + (topk_ids.shape[0] if token_mask is None else token_mask.sum())
        self._num_calls += 1
        if self.weight_per_expert is not None:
            self.weight_per_expert = self.weight_per_expert + self._by_expert(slots, topk_weights)
        if self.norm_per_expert is not None and norms is not None:
            self.norm_per_expert = self.norm_per_expert + self._by_expert(slots, norms)
        if self.coactivation is not None:
            self.coactivation = self.coactivation + self._together(slots)
        self._add_logits(router_logits, token_mask)
        if self.sample is not None and x is not None:
            rows = [x, topk_ids, topk_weights]
            self.sample.add(*(row if token_mask is None else row[token_mask] for row in rows))
        if token_ids is not None:
            keys = token_ids[:, None].long() * self.num_experts + topk_ids
            self.pairs.add(keys[topk_ids >= 0])

    def _sum_calls(self) -> None:
        if self._waiting:
            counts = torch.stack(self._waiting)[:, :-1]
            mean = counts.double().mean(1)
            violations = torch.where(mean > 0, counts.amax(1) / mean - 1, 0)
            self._max_violation = self._max_violation + violations.sum()
            self._tokens_per_expert = self._tokens_per_expert + counts.sum(0)
            self._waiting = []

    def _by_expert(self, slots: Tensor, values: Tensor) -> Tensor:
        """[E] float64: sums of values [T,K] by expert."""
        sums = torch.zeros(self.num_experts + 1, dtype=torch.float64, device=slots.device)
        return sums.scatter_add_(0, slots.flatten(), values.double().flatten())[:-1]

    def _together(self, slots: Tensor) -> Tensor:
        wide = self.num_experts + 1
        counts = torch.zeros(wide * wide, dtype=torch.int64, device=slots.device)
        for some in torch.split(slots, max(1, _PAIRS // max(slots.shape[1], 1) ** 2)):
            pairs = (some[:, :, None] * wide + some[:, None, :]).flatten()
            counts.scatter_add_(0, pairs, torch.ones_like(pairs))
        return counts.view(wide, wide)[:-1, :-1]

    def _add_logits(self, router_logits: Tensor | None, token_mask: Tensor | None) -> None:
        if router_logits is None or (self.entropy is None and self.probability_per_expert is None):
            if self.entropy is not None:
                self.entropy = self.entropy + torch.nan
            if self.probability_per_expert is not None:
                self.probability_per_expert = self.probability_per_expert + torch.nan
            return
        log_p = router_logits.float().log_softmax(-1)
        p = log_p.exp()
        kept = 1 if token_mask is None else token_mask[:, None]
        if self.entropy is not None:
            entropy: Tensor = torch.special.entr(p) * kept
            self.entropy = self.entropy + entropy.nan_to_num().sum(dtype=torch.float64)  # rows without finite logits: 0
        if self.probability_per_expert is not None:
            p = (p * kept).nan_to_num()[:, : self.num_experts]
            self.probability_per_expert = self.probability_per_expert + p.sum(0, dtype=torch.float64)

    def tokens_by_id(self) -> dict[int, Tensor]:
        """For each token id, how often each expert served it, [E] int64. Empty without recorded token ids."""
        keys, counts = self.pairs.total()
        result: dict[int, Tensor] = {}
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            row = result.setdefault(key // self.num_experts, torch.zeros(self.num_experts, dtype=torch.int64))
            row[key % self.num_experts] = count
        return result

    # ---- files -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that was recorded, as tensors and numbers, for RoutingTrace.save."""
        keys, counts = self.pairs.total()
        names = [*_LOADS, *(name for name in _SUMS if getattr(self, name) is not None)]
        state: dict[str, Any] = {name: getattr(self, name).cpu() for name in names}
        if self.sample is not None:
            state["sample"] = self.sample.state()
        return {**state, "pairs": keys.cpu(), "counts": counts.cpu(), "sizes": [self.num_tokens, self.num_calls]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> LayerTrace:
        """Raises KeyError, TypeError or ValueError for anything but a `state`."""
        kinds = [kind for name, kind in {**_SUMS, "sample": "inputs"}.items() if name in state]
        layer = cls(len(state["tokens_per_expert"]), record=kinds)
        for name in (*_LOADS, *(name for name in _SUMS if name in state)):
            _check_like(name, state[name], getattr(layer, name))
            setattr(layer, f"_{name}" if name in _LOADS else name, state[name])
        layer._num_tokens, layer._num_calls = (int(size) for size in state["sizes"])
        if "sample" in state:
            layer.sample = TokenSample.of_state(state["sample"])
        keys, counts = state["pairs"], state["counts"]
        for name, tensor in (("pairs", keys), ("counts", counts)):
            _check_like(name, tensor, torch.empty(len(counts), dtype=torch.int64))
        layer.pairs.parts = [(keys, counts)]
        return layer


def recorded(layer: Any, name: str) -> Tensor:
    """An attribute of a layer of a trace, or of `diagnostics.collect`. Raises ValueError if the trace does not record
    it."""
    value: Tensor | None = getattr(layer, name)
    if value is None:
        raise ValueError(f'trace: expected one that records "{_SUMS[name]}", got one without')
    return value


_LOADS = ("tokens_per_expert", "max_violation", "num_dropped")  # properties, which are always recorded
_SUMS = {  # attribute -> what records it
    "weight_per_expert": "weights",
    "entropy": "entropy",
    "probability_per_expert": "probabilities",
    "norm_per_expert": "norms",
    "coactivation": "coactivation",
}


def _check_like(name: str, tensor: Any, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype is not like.dtype:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected {like.dtype} {list(like.shape)}, got {got}")


# ---- pairs and samples -----------------------------------------------------------------------------------------------


class PairCounts:
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


class TokenSample:
    """At most `size` tokens, each with the same probability: every token draws a key, and the largest keys stay.

    Attributes:
        inputs [n,H], topk_ids [n,K] int32, topk_weights [n,K]: of the tokens, in no order.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.inputs = torch.zeros(0, 0)
        self.topk_ids = torch.zeros(0, 0, dtype=torch.int32)
        self.topk_weights = torch.zeros(0, 0)
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        keys = torch.randint(_KEYS, (len(x),), generator=self._generator)
        if len(self._keys) == self.size:
            index = (keys > self._keys.min()).nonzero().flatten()  # on the CPU: nothing waits for the device
        else:
            index = torch.arange(len(keys))
        if not len(index):
            return
        best = keys[index].topk(min(self.size, len(index))).indices
        index = index[best]
        at = index.to(x.device)
        new = [keys[index], x.detach()[at].clone(), topk_ids[at].int(), topk_weights.detach()[at].float()]
        old = [self._keys, self.inputs, self.topk_ids, self.topk_weights]
        merged = [_after(a, b) for a, b in zip(old, new, strict=True)]
        if len(merged[0]) > self.size:
            kept = merged[0].topk(self.size).indices
            merged = [merged[0][kept], *(tensor[kept.to(tensor.device)] for tensor in merged[1:])]
        self._keys, self.inputs, self.topk_ids, self.topk_weights = merged

    def state(self) -> list[Tensor]:
        return [tensor.cpu() for tensor in (self._keys, self.inputs, self.topk_ids, self.topk_weights)]

    @classmethod
    def of_state(cls, state: list[Tensor]) -> TokenSample:
        """Raises TypeError or ValueError for anything but a `state`."""
        keys, inputs, ids, weights = state
        if not (keys.dim() == 1 and inputs.dim() == ids.dim() == 2 and ids.shape == weights.shape):
            raise ValueError("inputs: expected a sample of tokens")
        if not len(keys) == len(inputs) == len(ids) or ids.dtype is not torch.int32:
            raise ValueError("inputs: expected as many inputs as choices")
        if keys.is_floating_point():  # in [0, 1), of earlier versions
            keys = (keys.double() * _KEYS).long()
        sample = cls(len(keys))
        sample._keys, sample.inputs, sample.topk_ids, sample.topk_weights = keys, inputs, ids, weights
        return sample


def _after(old: Tensor, new: Tensor) -> Tensor:
    """The rows of both on the device of the new ones."""
    if not len(old):
        return new
    rows = [old.to(new.device), new]
    return torch.cat(rows) if new.dim() == 1 else stacked(rows, -1 if new.dtype is torch.int32 else 0)


# ---- summary ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSummary:
    """Summary statistics of a layer."""

    name: str
    num_experts: int
    num_tokens: int
    experts_per_token: float  # counts served choices
    mean_weight: float  # per choice; NaN if weights are not recorded
    busiest: int  # the expert with the largest load
    max_violation: float  # over all calls: max load / mean load - 1
    mean_max_violation: float  # the mean over calls
    never_used: int  # experts without a token
    load_entropy: float  # of the load shares, divided by log E: 1 is balanced
    router_entropy: float  # mean over tokens, divided by log E; NaN if it is not recorded, or without logits
    dropped: float  # fraction of the choices


def summary_of(name: str, layer: LayerTrace) -> LayerSummary:
    counts = layer.tokens_per_expert.cpu().double()
    total, tokens = float(counts.sum()), max(layer.num_tokens, 1)
    log_experts = math.log(max(layer.num_experts, 2))
    dropped = int(layer.num_dropped)
    return LayerSummary(
        name=name,
        num_experts=layer.num_experts,
        num_tokens=layer.num_tokens,
        experts_per_token=total / tokens,
        mean_weight=_sum(layer.weight_per_expert) / max(total, 1.0),
        busiest=int(counts.argmax()),
        max_violation=float(counts.max() / counts.mean() - 1) if total else 0.0,
        mean_max_violation=float(layer.max_violation) / max(layer.num_calls, 1),
        never_used=int((counts == 0).sum()),
        load_entropy=float(torch.special.entr(counts / max(total, 1.0)).sum()) / log_experts,
        router_entropy=_sum(layer.entropy) / tokens / log_experts,
        dropped=dropped / max(total + dropped, 1.0),
    )


def _sum(values: Tensor | None) -> float:
    return math.nan if values is None else float(values.sum())
