# SPDX-License-Identifier: BSD-3-Clause
"""Predictors: which experts the next layers will need, so that they are read before their layer runs; and their
recall and precision, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from switchgear.checks import NotNegative, Range, Size, checked
from switchgear.integrations.hook_points import read_logits
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.integrations.routers import call_gate, find_routing_method, is_looked_up
from switchgear.offload.accesses import Accesses, Source, to_int
from switchgear.reference.checks import MAX_EXPERTS
from switchgear.routing.context import Context
from switchgear.routing.router import Router
from switchgear.trace import Observation, observe
from switchgear.trace.pre_router import Listener, PreRouter

Expert = tuple[int, int]  # layer, expert


@runtime_checkable
class Predictor(Protocol):
    """Layers are counted in the order of `moe_blocks(model)`, which is the order in which they run."""

    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Iterable[Expert]:
        """Experts of later layers, the most likely first. Called when `layer` has routed and its experts have not run.

        hidden_states [T,H] is the input of its experts, topk_ids [T,K] its choice, -1 for none. So may be an expert
        that is predicted. Virtual experts that are predicted are not read.
        """

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        """The choice [T,K] that a layer made, for predictors that remember. Called once per layer and step, before or
        after `predict` of this layer."""


def read_predictions(name: str, predicted: Iterable[Expert], num_experts: Sequence[int]) -> list[Expert]:
    """What a predictor says as pairs of int, without those of expert -1. num_experts: of each layer. Raises TypeError
    and ValueError for experts that do not exist."""
    pairs = [(to_int(name, layer), to_int(name, expert)) for layer, expert in predicted]
    for layer, expert in pairs:
        if not 0 <= layer < len(num_experts):
            raise ValueError(f"{name}: expected experts of layers 0 to {len(num_experts) - 1}, got layer {layer}")
        if not -1 <= expert < num_experts[layer]:
            raise ValueError(f"{name}: expected experts 0 to {num_experts[layer] - 1} of layer {layer}, got {expert}")
    return [pair for pair in pairs if pair[1] != -1]


def rank_experts(ids: Tensor, weights: Tensor, num_experts: int) -> list[int]:
    """The experts among ids [T,k], by descending sum of their weights [T,k]; ties go to the lowest id. Ids outside
    [0, num_experts) are none."""
    real = (ids >= 0) & (ids < num_experts)
    index = torch.where(real, ids, num_experts).long().flatten()
    zeros = torch.zeros(num_experts + 1, dtype=torch.float32, device=ids.device)
    sums = zeros.scatter_add(0, index, weights.float().flatten())
    chosen = zeros.scatter_add(0, index, torch.ones_like(index, dtype=torch.float32)) > 0
    chosen[-1] = False
    order = sums.masked_fill(~chosen, -torch.inf).sort(descending=True, stable=True).indices
    result: list[int] = order[: int(chosen.sum())].tolist()
    return result


# ---- Gates of the model itself ---------------------------------------------------------------------------------------


_Gate = Callable[[Tensor], tuple[Tensor, Tensor]]  # x [T,H] -> ids and weights [T,K]


class NextGate:
    """The gate of a later layer, applied to the hidden states of the running one (arXiv:2312.17238). They change little
    from layer to layer, since each adds to a residual.

    Args:
        model: with switchgear's MoE layers, or a Hugging Face model.
        layers_ahead: how far the later layer is; the paper has 1, 2 and 10. The last layers predict nothing.
        top_k: experts of each token, its best; at most as many as the gate chooses. The paper has 1 to 2.

    Raises:
        ValueError: a model without such layers, or a gate that is no function of hidden states alone.
    """

    @checked
    def __init__(self, model: nn.Module, layers_ahead: Size = 1, top_k: Size | None = 2) -> None:
        blocks = list(moe_blocks(model).values())
        if not blocks:
            raise ValueError("model: expected one with MoE layers, got none")
        self.layers_ahead, self.top_k = layers_ahead, top_k
        self.num_experts = [block.num_real for block in blocks]
        self._gates = [_find_gate(block) if i >= layers_ahead else None for i, block in enumerate(blocks)]

    @torch.no_grad()
    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Iterable[Expert]:
        ahead = layer + self.layers_ahead
        gate = self._gates[ahead] if ahead < len(self._gates) else None
        if gate is None:
            return []
        ids, weights = gate(hidden_states)
        if self.top_k is not None and self.top_k < ids.shape[1]:
            weights, best = weights.masked_fill(ids < 0, -torch.inf).topk(self.top_k, dim=1)
            ids = ids.gather(1, best)
        return [(ahead, expert) for expert in rank_experts(ids, weights, self.num_experts[ahead])]

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        """Does nothing: predictions depend on hidden states alone."""


class FromPreGate(NextGate):
    """The choice of a model with pre-gates (`routing.pregate`): the next layer chooses by the hidden states of this
    one, so it is known here, all of it (arXiv:2308.12066)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, layers_ahead=1, top_k=None)
        for name, block in list(moe_blocks(model).items())[1:]:
            if getattr(block.gate, "reads_from", None) is None:
                raise ValueError(f"model: expected pre-gates (routing.pregate), got a gate of its own in {name}")


def _find_gate(block: MoeBlock) -> _Gate:
    """The gate's choice, without hooks: those are of the model's own calls."""
    router = block.gate
    if not isinstance(router, Router):
        return _find_foreign_gate(block)

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = router.selection()(router.logits(x), Context(), router.e_score_correction_bias)
        return routing.topk_ids, routing.topk_weights

    return choose


def _find_foreign_gate(block: MoeBlock) -> _Gate:
    if is_looked_up(block):
        raise ValueError(f"{block.name}: expected a gate of hidden states, got one that looks up token ids")
    method = find_routing_method(block)  # raises ValueError for a gate that cannot be probed
    assert block.top_k is not None
    top_k = block.top_k

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = read_logits(block, call_gate(block, x))
        assert logits is not None
        ids = method.rank(logits, None).topk(top_k, dim=-1).indices
        return ids, method.weigh(logits, ids)

    return choose


# ---- A router outside the model --------------------------------------------------------------------------------------


class FromPreRouter:
    """The experts of the next layers, from a PreRouter that reads the model's embeddings (Read-ME, arXiv:2410.19123).

    Args:
        pre_router: trained on the model's choices.
        embedding: the module whose output [B,S,H] it gets, such as model.get_input_embeddings().
        top_k: experts per token and layer.
        layers_ahead: layers that each prediction covers, the next one first.
    """

    @checked
    def __init__(self, pre_router: PreRouter, embedding: nn.Module, top_k: Size, layers_ahead: Size = 1) -> None:
        self.layers_ahead = layers_ahead
        self._listener = Listener(pre_router, embedding, top_k)

    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> Iterable[Expert]:
        """Layer -1 stands for the embedding: the first layer follows it."""
        chosen = self._listener.topk_ids
        if chosen is None:
            return []
        num_experts = self._listener.pre_router.num_experts
        result: list[Expert] = []
        for ahead in range(layer + 1, min(layer + 1 + self.layers_ahead, len(chosen))):
            ids = chosen[ahead]
            worth = torch.arange(ids.shape[1], 0, -1, device=ids.device)  # earlier choices are likelier
            result += [(ahead, expert) for expert in rank_experts(ids, worth.expand_as(ids), num_experts[ahead])]
        return result

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        """Does nothing: predictions depend on embeddings alone."""

    def close(self) -> None:
        """Stops reading the embedding."""
        self._listener.close()


# ---- Which experts follow which --------------------------------------------------------------------------------------


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
    @checked
    def of(
        cls,
        source: Accesses | Source,
        order: Annotated[int, Range(1, 2)] = 1,
        top_k: Size | None = None,
        smoothing: NotNegative = 0.0,
    ) -> Follows:
        """From Accesses, or what `Accesses.of` takes: token by token.

        Args:
            order: layers that a prediction looks back on, 1 or 2, as in EdgeMoE. A table has E^(order+1) float32 per
                layer.
            top_k: see the class.
            smoothing: steps s added to each context, with the P of one layer less: P(j | i) = (n(i, j) + s·P(j)) /
                (n(i) + s). 0: none.
        """
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
        return [(ahead, expert) for expert in rank_experts(ids, weights, scores.shape[1])]

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


# ---- How often they are right ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRecall:
    """Experts of a layer, summed over steps.

    Attributes:
        used: that ran.
        predicted: before the layer ran.
        right: both.
    """

    name: str
    used: int
    predicted: int
    right: int

    @property
    def recall(self) -> float:
        """Of the experts that ran, the share that was predicted; 0 if none ran."""
        return self.right / max(self.used, 1)

    @property
    def precision(self) -> float:
        """Of the predicted experts, the share that ran: what is read in vain is the rest."""
        return self.right / max(self.predicted, 1)


class Recall:
    """Counts predictions. `predicted` may be called several times before the layer runs; `used` closes its step.

    num_experts: of each layer, to check predictions; None: not known.
    """

    def __init__(self, names: Sequence[str], num_experts: Sequence[int] | None = None) -> None:
        self.names = tuple(names)
        self.num_experts = (MAX_EXPERTS,) * len(self.names) if num_experts is None else tuple(num_experts)
        self._pending: list[set[int]] = [set() for _ in self.names]
        self._counts = [[0, 0, 0] for _ in self.names]

    def predicted(self, experts: Iterable[Expert]) -> None:
        """Counts a prediction."""
        for layer, expert in read_predictions("experts", experts, self.num_experts):
            self._pending[layer].add(expert)

    def used(self, layer: int, topk_ids: Tensor) -> None:
        """Counts what layer `layer` chose, against what was predicted for it. Other ids than experts' are none."""
        used = {expert for row in topk_ids.tolist() for expert in row if 0 <= expert < self.num_experts[layer]}
        counts, pending = self._counts[layer], self._pending[layer]
        for i, number in enumerate((len(used), len(pending), len(used & pending))):
            counts[i] += number
        pending.clear()

    @property
    def layers(self) -> tuple[LayerRecall, ...]:
        """The counts of each layer."""
        return tuple(LayerRecall(name, *counts) for name, counts in zip(self.names, self._counts, strict=True))


@checked
def recall(predictor: Predictor, accesses: Accesses) -> tuple[LayerRecall, ...]:
    """Replays a recorded run through a predictor that needs no hidden states, such as `Follows`; it gets the experts of
    a step as those of one token. `watch` counts any predictor while a model runs."""
    found = Recall(accesses.layers, accesses.num_experts)
    nothing = torch.empty(1, 0)
    for step in accesses.steps:
        for layer, experts in enumerate(step):
            ids = torch.tensor([experts], dtype=torch.int32)
            found.used(layer, ids)
            found.predicted(predictor.predict(layer, nothing, ids))
            predictor.observe(layer, ids)
    return found.layers


@contextmanager
@checked
def watch(model: nn.Module, predictor: Predictor) -> Iterator[Recall]:
    """Inside the block, the predictor predicts while the model runs, and nothing is fetched. Each call of the model is
    a step, so let it decode: a whole text in one call uses nearly all experts.

        with offload.watch(model, offload.NextGate(model)) as found:
            model.generate(prompt, max_new_tokens=100)
        print([layer.recall for layer in found.layers])
    """
    blocks = moe_blocks(model)
    layers = {name: layer for layer, name in enumerate(blocks)}
    num_real, num_all = ([getattr(b, name) for b in blocks.values()] for name in ("num_real", "num_experts"))
    found = Recall(tuple(blocks), num_real)

    def see(name: str, seen: Observation) -> None:
        layer = layers[name]
        found.used(layer, seen.topk_ids)
        predicted = read_predictions(
            "experts", predictor.predict(layer, seen.x.detach(), seen.topk_ids.detach()), num_all
        )
        found.predicted((ahead, expert) for ahead, expert in predicted if expert < num_real[ahead])
        predictor.observe(layer, seen.topk_ids.detach())

    with observe(model, see):
        yield found
