# SPDX-License-Identifier: BSD-3-Clause
"""Follows: a table of which experts follow which, counted in a recorded run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from switchgear.functional import as_number
from switchgear.offload.accesses import Accesses, Source
from switchgear.offload.predictors import Expert, ranked
from switchgear.reference import check_size

_STEPS = 256  # that are counted at a time


class Follows:
    """Predicts the experts of the next layer from those of the last ones (EdgeMoE, arXiv:2308.14352).

        predictor = Follows.of(calibration)

    For one expert per layer it is the argmax of the empirical conditional P(j | i) = n(i, j) / n(i): of the steps that
    had i, those that had j next; of order 2, P(j | h, i). A layer with several experts averages over them, or their
    pairs, and several tokens add up. After the last layer comes the first one of the next step. A context that was
    never seen has the P of one layer less, at last the frequencies P(j). Ties go to the lowest id.

    Attributes:
        tables: `[order][layer]`: P of the layer's experts, [E,…,E] with a dimension for each layer before; the last
            dimension is the layer's own. tables[0] has the frequencies.
        top_k: experts predicted per token; as many as it has choices if None.
    """

    def __init__(self, tables: Sequence[Sequence[Tensor]], top_k: int | None = None) -> None:
        self.tables, self.top_k = tables, top_k
        self._seen: list[tuple[int, Tensor]] = []  # layers and their choices, the latest last

    @property
    def order(self) -> int:
        """The number of layers before the last one that it looks at."""
        return len(self.tables) - 1

    @classmethod
    def of(cls, source: Accesses | Source, order: int = 1, top_k: int | None = None, smoothing: float = 0.0) -> Follows:
        """From Accesses, or what `Accesses.of` takes: token by token.

        Args:
            order: layers that a prediction looks back on, 1 or 2, as in EdgeMoE. A table has E^(order+1) float32 per
                layer.
            top_k: see the class.
            smoothing: steps s added to each context, with the P of one layer less: P(j | i) = (n(i, j) + s·P(j)) /
                (n(i) + s). 0: none.
        """
        if order not in (1, 2):
            raise ValueError(f"order: expected 1 or 2, got {order}")
        if top_k is not None:
            check_size("top_k", top_k)
        if not 0 <= as_number("smoothing", smoothing) < float("inf"):
            raise ValueError(f"smoothing: expected a number of at least 0, got {smoothing}")
        run = source if isinstance(source, Accesses) else Accesses.of(source)
        used = [_memberships(run, layer) for layer in range(len(run.layers))]
        frequencies = [member.mean(0) if len(member) else member.sum(0) for member in used]
        tables = [frequencies]
        for length in range(1, order + 1):
            fewer = tables[-1]
            tables.append([_conditional(used, layer, length, fewer[layer], smoothing) for layer in range(len(used))])
        return cls(tables, top_k)

    @torch.no_grad()
    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Iterable[Expert]:
        num_layers = len(self.tables[0])
        ahead = (layer + 1) % num_layers
        scores = self._scores(ahead, [*self._before(layer, topk_ids), topk_ids])
        count = min(topk_ids.shape[1] if self.top_k is None else self.top_k, scores.shape[1])
        weights, ids = scores.sort(dim=1, descending=True, stable=True)
        weights, ids = weights[:, :count], ids[:, :count]
        ids = ids.masked_fill(weights <= 0, -1)
        return [(ahead, expert) for expert in ranked(ids, weights, scores.shape[1])]

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        self._seen = [*self._seen, (layer, topk_ids)][-self.order - 1 :]

    def _before(self, layer: int, topk_ids: Tensor) -> list[Tensor]:
        """The choices of the layers before `layer`, as far as they are known and of the same tokens."""
        num_layers, seen = len(self.tables[0]), self._seen
        if seen and seen[-1][0] == layer and (num_layers > 1 or seen[-1][1] is topk_ids):
            seen = seen[:-1]  # this choice, observed already
        result: list[Tensor] = []
        for back in range(1, min(self.order, len(seen) + 1)):
            at, ids = seen[-back]
            if at != (layer - back) % num_layers or len(ids) != len(topk_ids):
                break
            result.insert(0, ids)
        return result

    def _scores(self, ahead: int, contexts: list[Tensor]) -> Tensor:
        """[T,E]: the mean of P over the combinations of the choices [T,K] of each layer."""
        table, frequencies = self.tables[len(contexts)][ahead], self.tables[0][ahead]
        num_tokens = len(contexts[0])
        rows = table[None]
        known = torch.ones(num_tokens, 1, dtype=torch.bool, device=table.device)
        for ids in contexts:  # contracted from the first layer on, with equal weights of its experts, none of -1
            size, ids = rows.shape[1], ids.to(table.device)
            index = torch.where((ids >= 0) & (ids < size), ids, size).long()
            weights = table.new_zeros(num_tokens, size + 1).scatter(1, index, 1.0)[:, :size]
            total = weights.sum(1, keepdim=True)
            known &= total > 0
            weights = (weights / total.clamp(min=1))[:, None]
            rows = (weights @ rows.flatten(2)).view(num_tokens, *rows.shape[2:])
        return torch.where(known > 0, rows, frequencies)


def _memberships(run: Accesses, layer: int) -> Tensor:
    """[S,E] float32: 1 where the step uses the expert."""
    result = torch.zeros(len(run.steps), run.num_experts[layer])
    steps = [step for step, sets in enumerate(run.steps) for _ in sets[layer]]
    result[steps, [expert for sets in run.steps for expert in sets[layer]]] = 1
    return result


def _conditional(used: list[Tensor], layer: int, length: int, fewer: Tensor, smoothing: float) -> Tensor:
    """P [E,…,E] of the experts of `layer`, given those of the `length` layers before. fewer: the P of one layer less.
    Counts are exact in float32 up to 2^24 steps."""
    num_layers, num_steps = len(used), len(used[layer])
    # The moment of layer l in step s is s·L + l; the context of its moment m are those from m - length to m - 1.
    moments = [layer - back for back in range(length, 0, -1)]
    late = max(0, -(moments[0] // num_layers))  # steps at the start without a whole context
    members = [used[m % num_layers][late + m // num_layers : num_steps + m // num_layers] for m in moments]
    target = used[layer][late:]
    contexts = torch.zeros([member.shape[1] for member in members])
    pairs = torch.zeros([*contexts.shape, target.shape[1]])
    letters = "abc"[:length]
    named = ",".join(f"s{letter}" for letter in letters)
    for begin in range(0, len(target), _STEPS):
        parts = [member[begin : begin + _STEPS] for member in members]
        contexts += torch.einsum(f"{named}->{letters}", *parts)
        pairs += torch.einsum(f"{named},sz->{letters}z", *parts, target[begin : begin + _STEPS])
    seen = contexts[..., None] + smoothing
    return torch.where(seen > 0, (pairs + smoothing * fewer) / seen.clamp(min=1e-30), fewer)
