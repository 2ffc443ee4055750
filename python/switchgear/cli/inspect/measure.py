# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of an inspection: layer by layer, of the choices of all tokens and of the experts' weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from switchgear.diagnostics import LayerChoices, cacheability, coactivation, collect, gate_entropy, usage
from switchgear.diagnostics.similarity import compute_product_cosines
from switchgear.integrations.blocks import expert_layer
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks

SEGMENT = 16  # consecutive tokens that share a cache, or all of a shorter sequence
COLUMNS = 1 << 22  # elements of a slice of weights


@dataclass
class Layer:
    """One MoE layer. Matrices are [E,E]; shares sum to 1."""

    name: str
    num_experts: int
    top_k: int
    load: dict[str, list[float]]  # domain: each expert's share of the choices
    router_entropy: float  # divided by log E; NaN without logits
    coactivation: Tensor  # [i,j]: the fraction of the tokens of i that choose j too
    similarity: Tensor | None  # cosine of all weights; None if they are not stacked in two parameters
    hits: dict[int, float]  # slots: the best hit rate of a cache that is refilled every Inspection.segment tokens
    locality: float  # SRP, 0 to 1
    experts_per_segment: float

    @property
    def mean_load(self) -> list[float]:
        return torch.tensor(list(self.load.values()), dtype=torch.float64).mean(0).tolist()

    @property
    def unused(self) -> int:
        return sum(share == 0 for share in self.mean_load)

    @property
    def max_violation(self) -> float:
        return max(self.mean_load) * self.num_experts - 1

    @property
    def load_entropy(self) -> float:
        return -sum(p * math.log(p) for p in self.mean_load if p > 0) / math.log(max(self.num_experts, 2))

    @property
    def mean_similarity(self) -> float:
        """Of two different experts."""
        if self.similarity is None:
            return math.nan
        return float(self.similarity[torch.ones_like(self.similarity, dtype=torch.bool).triu(1)].mean())

    def alike(self, count: int = 3) -> list[tuple[int, int, float]]:
        """The pairs of experts with the most similar weights."""
        return [] if self.similarity is None else _find_largest(self.similarity, count)

    def together(self, count: int = 3) -> list[tuple[int, int, float]]:
        """The pairs that most often serve the same token."""
        return _find_largest((self.coactivation + self.coactivation.T) / 2, count) if self.top_k > 1 else []

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "num_experts": self.num_experts, "top_k": self.top_k, "load": self.load,
            "router_entropy": _count(self.router_entropy), "load_entropy": self.load_entropy,
            "max_violation": self.max_violation, "unused": self.unused, "hits": self.hits, "locality": self.locality,
            "experts_per_segment": self.experts_per_segment, "mean_similarity": _count(self.mean_similarity),
            "alike": [(i, j, _count(value)) for i, j, value in self.alike()], "together": self.together(),
        }  # fmt: skip


@dataclass
class Inspection:
    layers: list[Layer]
    domains: dict[str, int]  # tokens that were read
    losses: dict[str, float]  # nats per token
    segment: int  # consecutive tokens that share a cache
    about: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        layers = [layer.as_dict() for layer in self.layers]
        return {
            **self.about, "domains": self.domains, "segment": self.segment, "layers": layers,
            "losses": {name: _count(loss) for name, loss in self.losses.items()},
        }  # fmt: skip


@torch.no_grad()
def inspect(
    model: Any,
    batches: Mapping[str, Sequence[Tensor]],
    length: int,
    report: Callable[[int, int, str], None] = lambda done, total, words: None,
) -> Inspection:
    """Reads the batches [rows, length] of each domain. ValueError if the model has no MoE layer."""
    choices: dict[str, dict[str, LayerChoices]] = {}
    losses: dict[str, float] = {}
    done, total = 0, sum(map(len, batches.values()))
    for domain, rows in batches.items():
        summed = 0.0
        with collect(model) as seen:
            for ids in rows:
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                summed += float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
                done += 1
                report(done, total, domain)
        choices[domain] = dict(seen)
        losses[domain] = summed / sum(ids[:, 1:].numel() for ids in rows)
    blocks = {block.layer: block for block in moe_blocks(model).values()}
    first = next(iter(choices.values()))
    segment = min(SEGMENT, length)
    layers = [
        _measure_layer(blocks[name], {domain: of[name] for domain, of in choices.items()}, length, segment)
        for name in first
    ]
    tokens = {domain: sum(ids.numel() for ids in rows) for domain, rows in batches.items()}
    about = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    return Inspection(layers, tokens, losses, segment, about)


def _measure_layer(block: MoeBlock, choices: Mapping[str, LayerChoices], length: int, segment: int) -> Layer:
    ids = torch.cat([of.topk_ids for of in choices.values()])
    num_experts, top_k = block.num_experts, ids.shape[1]
    slots = sorted({min(many * top_k, num_experts) for many in (1, 2, 4)})
    caches = [cacheability(ids, num_experts, segment=segment, slots=n, sequence_length=length) for n in slots]
    entropy = [value * of.num_tokens for of in choices.values() for value in gate_entropy({"": of}).values()]
    return Layer(
        block.name, num_experts, top_k,
        {domain: usage({"": of})[""].share.tolist() for domain, of in choices.items()},
        sum(entropy) / len(ids) / math.log(max(num_experts, 2)),
        coactivation(ids, num_experts, conditional=True), measure_similarity(block),
        {cache.slots: cache.sch for cache in caches}, caches[0].srp, caches[0].experts_per_segment,
    )  # fmt: skip


def measure_similarity(block: MoeBlock) -> Tensor | None:
    """Cosine similarity of the experts' weights, [E,E] float64, in slices: those of a whole layer in float64 could be
    larger than the model. None if the experts are not stacked."""
    try:
        layer = expert_layer(block)
    except ValueError:
        return None
    if layer.num_experts != block.num_experts:  # Virtual ones have no weights.
        return None
    products = torch.zeros(block.num_experts, block.num_experts, dtype=torch.float64)
    for parameter in layer.parameters:
        weight = parameter.tensor[: block.num_experts]  # LongCat's first one has rows of zero experts, too
        for part in torch.split(weight.flatten(1), max(COLUMNS // block.num_experts, 1), dim=1):
            rows = part.cpu().double()
            products += rows @ rows.T
    return compute_product_cosines(products)


def _find_largest(matrix: Tensor, count: int) -> list[tuple[int, int, float]]:
    above = torch.triu_indices(len(matrix), len(matrix), 1)
    values = matrix[above[0], above[1]]
    order = values.argsort(descending=True)[:count]
    return [(int(above[0, i]), int(above[1, i]), float(values[i])) for i in order]


def _count(value: float) -> float | None:
    """None for what JSON cannot say."""
    return value if math.isfinite(value) else None
