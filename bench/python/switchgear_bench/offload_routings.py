# SPDX-License-Identifier: BSD-3-Clause
"""Choices for a model of random weights, whose own router would choose nearly at random: uniform, skewed, or as local
as a trained model's.

    uniform   each expert is equally likely
    zipf      the n-th expert of a layer is n^-ZIPF times as likely as the first, as `switchgear plan` assumes
    trace     what the model of `switchgear train-tiny` chose on text that it has never seen, scaled (`scale`)

Weights of the chosen experts are the model's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from switchgear import routing
from switchgear.cli.plan import ZIPF
from switchgear.functional import Routing
from switchgear.parallel.cost import draw_routing

from .tiny.cache import Tiny
from .tiny.text import evenly

UNIFORM, ZIPF_LAW, TRACE = "uniform", "zipf", "trace"
ROUTINGS = (UNIFORM, ZIPF_LAW, TRACE)
WORDS = {
    UNIFORM: "uniform: each expert is equally likely",
    ZIPF_LAW: f"zipf: the n-th expert of a layer is n^-{ZIPF} times as likely as the first",
    TRACE: "trace: recorded from the tiny model of `train-tiny` and scaled: an LRU of the same share of the experts "
    "hits as often",
}
TEXTS, LENGTH = 4, 128  # of each domain of the tiny model; its longest text


def record(tiny: Tiny) -> list[Tensor]:
    """What the tiny model chooses on held-out text: [T,K] for each layer."""
    model = tiny.model()
    texts = torch.cat([evenly(domain.held_out, TEXTS, LENGTH) for domain in tiny.domains]).long()
    with torch.no_grad(), routing.record(model) as found:
        for text in texts:
            model(text[None], use_cache=False)
    return [layer.topk_ids() for layer in found.layers.values()]


def draw(name: str, layers: Sequence[tuple[int, int]], count: int, traces: Sequence[Tensor] = ()) -> list[Tensor]:
    """[count, top_k] for each of the layers (num_experts, top_k)."""
    if name == TRACE:
        return [
            scale(traces[number % len(traces)], num_experts, top_k, count, seed=number)
            for number, (num_experts, top_k) in enumerate(layers)
        ]
    skew = ZIPF if name == ZIPF_LAW else 0.0
    return [draw_routing(count, *layer, skew, seed=number) for number, layer in enumerate(layers)]


def scale(trace: Tensor, num_experts: int, top_k: int, count: int, seed: int = 0) -> Tensor:
    """[count, top_k] choices of `num_experts` that are as local as those of a trace [T,k].

    An access of the trace is a place in the list of experts by last use; what an LRU hits follows from these places
    alone. The choices have the same places in relation to the number of experts.
    """
    drawn, places = random.Random(seed), _places(trace)
    number = int(trace.max()) + 1
    recent = list(range(num_experts))
    drawn.shuffle(recent)
    at = drawn.randrange(len(places))
    rows = []
    for _ in range(count):
        free = list(range(num_experts))
        chosen = []
        for _ in range(top_k):
            wanted = int((places[at % len(places)] + drawn.random()) * num_experts / number)
            place = min(free, key=lambda one: abs(one - wanted))
            free.remove(place)
            chosen.append(recent[place])
            at += 1
        recent = chosen + [expert for expert in recent if expert not in chosen]
        rows.append(chosen)
    return torch.tensor(rows, dtype=torch.int32)


def _places(trace: Tensor) -> list[int]:
    """Of each access, in the list by last use before its token."""
    recent = list(range(int(trace.max()) + 1))
    places = []
    for row in trace.tolist():
        places += [recent.index(expert) for expert in row]
        recent = row + [expert for expert in recent if expert not in row]
    return places


@contextmanager
def chosen(model: Any, names: Sequence[str], choices: Sequence[Tensor]) -> Iterator[list[Given]]:
    """Inside the block, the tokens of each layer get the next rows of its choices; after the last, the first."""
    layers = [Given(rows) for rows in choices]
    with ExitStack() as stack:
        for name, layer in zip(names, layers, strict=True):
            stack.enter_context(routing.override(model, select=layer, layers=[name]))
        yield layers


class Given:
    """A selection that ignores the logits."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.at = rows, 0

    def __call__(self, router_logits: Tensor, context: Any = None, bias: Tensor | None = None) -> Routing:
        count = len(router_logits)
        ids = self.rows[torch.arange(self.at, self.at + count) % len(self.rows)]
        self.at += count
        return Routing(ids, torch.ones(ids.shape), router_logits, router_logits.shape[1])

    def next_row(self) -> list[int]:
        """The choice of the next token."""
        row: list[int] = self.rows[self.at % len(self.rows)].tolist()
        return row


class Foreseen:
    """A predictor of drawn choices: while a token is decoded, each layer names as many experts of the next one as that
    will choose, each right with the probability `recall`. Gates that look ahead cannot foresee what is drawn.

    Attributes:
        layers: what will be chosen; none: nothing is predicted.
    """

    def __init__(self, num_experts: int, recall: float) -> None:
        self.num_experts, self.recall, self.layers = num_experts, recall, list[Given]()
        self._drawn = random.Random(0)

    def predict(self, layer: int, hidden_states: Tensor, topk_ids: Tensor) -> list[tuple[int, int]]:
        if layer + 1 >= len(self.layers) or len(topk_ids) > 1:
            return []
        row = self.layers[layer + 1].next_row()
        others = [expert for expert in range(self.num_experts) if expert not in row]
        right = [self._drawn.random() < self.recall or not others for _ in row]
        named = [expert if holds else self._drawn.choice(others) for expert, holds in zip(row, right, strict=True)]
        return [(layer + 1, expert) for expert in named]

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        pass
