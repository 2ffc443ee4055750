# SPDX-License-Identifier: BSD-3-Clause
"""Whether a model can tell good compression from bad: what losing experts costs, and whether domains route differently.

Three conditions, on text that was held out from training:
    1. without the busiest expert of each layer, the loss grows by at least 0.1 nat per byte;
    2. half of the experts pruned by frequency and at random differ by more than the standard deviation of three seeds;
    3. the loads of two domains differ at least twice as much as those of two halves of one domain.
A pruned expert's tokens go to their next best expert, as in a model without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn

from .model import gates_of
from .text import Domain, evenly

LEAST_COST = 0.1
SEEDS = 3


@dataclass(frozen=True)
class Sensitivity:
    """Losses are in nats per byte."""

    losses: dict[str, float]  # by domain
    busiest: list[float]  # growth of the mean loss without the busiest expert of one layer, layer by layer
    all_busiest: float  # without all of them
    by_frequency: float  # growth of the mean loss with half of the experts, the most frequent ones
    at_random: list[float]  # with random halves
    between_domains: float  # total variation of the loads of two domains, mean over their pairs and the layers
    within_domains: float  # of two halves of one domain, mean over domains and layers

    @property
    def spread(self) -> float:
        """Standard deviation of the random prunings."""
        return stdev(self.at_random)

    @property
    def mean_at_random(self) -> float:
        return sum(self.at_random) / len(self.at_random)

    def conditions(self) -> dict[str, bool]:
        """The three conditions in words, and whether they hold."""
        busiest = f"without each layer's busiest expert the loss grows by {self.all_busiest:.3f} nat"
        single = ", ".join(f"{cost:.3f}" for cost in self.busiest)
        halves = f"half of the experts by frequency: {self.by_frequency:+.3f} nat, at random {self.mean_at_random:+.3f}"
        routes = f"loads of two domains differ by {self.between_domains:.1%} of the choices"
        return {
            f"{busiest} (at least {LEAST_COST}; one layer alone: {single})": self.all_busiest >= LEAST_COST,
            f"{halves} (standard deviation of {len(self.at_random)} seeds {self.spread:.3f})": (
                abs(self.mean_at_random - self.by_frequency) > self.spread
            ),
            f"{routes}, of two halves of a domain by {self.within_domains:.1%} (at least twice as much)": (
                self.between_domains >= 2 * self.within_domains
            ),
        }

    @property
    def accepted(self) -> bool:
        return all(self.conditions().values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"accepted": self.accepted}


@torch.no_grad()
def measure(model: Any, domains: Sequence[Domain], *, count: int = 48, length: int = 128, seed: int = 0) -> Sensitivity:
    """Reads `count` windows of `length` bytes, as long as in training, of each domain's held-out text."""
    batches = {domain.name: evenly(domain.held_out, count, length) for domain in domains}
    base = held_out_losses(model, batches)
    loads = {name: _loads(model, batch) for name, batch in batches.items()}
    mean = torch.stack(list(loads.values())).mean(0)  # [layers,E]

    def cost(pruned: Mapping[int, Tensor]) -> float:
        with without(model, pruned):
            return _mean(held_out_losses(model, batches)) - _mean(base)

    num_experts, layers = mean.shape[1], range(len(mean))
    busiest = {layer: mean[layer].argmax()[None] for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    half = num_experts // 2
    random = [
        {layer: torch.randperm(num_experts, generator=generator)[:half] for layer in layers} for _ in range(SEEDS)
    ]
    names, variation = list(loads), []
    for i, first in enumerate(names):
        variation += [_variation(loads[first], loads[second]) for second in names[i + 1 :]]
    halves = [_variation(_loads(model, batch[::2]), _loads(model, batch[1::2])) for batch in batches.values()]
    return Sensitivity(
        losses=base,
        busiest=[cost({layer: experts}) for layer, experts in busiest.items()],
        all_busiest=cost(busiest),
        by_frequency=cost({layer: mean[layer].argsort()[:half] for layer in layers}),
        at_random=[cost(pruned) for pruned in random],
        between_domains=sum(variation) / max(len(variation), 1),
        within_domains=sum(halves) / len(halves),
    )


@torch.no_grad()
def held_out_losses(model: Any, batches: Mapping[str, Tensor]) -> dict[str, float]:
    """Nats per byte of each batch [count, length]."""
    losses = {}
    for name, batch in batches.items():
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        losses[name] = float(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()))
    return losses


@contextmanager
def without(model: Any, pruned: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block, the router of layer l cannot choose the experts pruned[l]."""

    def hook(gate: Any, args: tuple[Tensor, ...], output: tuple[Tensor, ...], experts: Tensor) -> tuple[Tensor, ...]:
        logits = output[0].index_fill(-1, experts, -torch.inf)
        weights, ids = logits.float().softmax(-1).topk(gate.top_k)
        if gate.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(output[1].dtype), ids

    gates = gates_of(model)
    with ExitStack() as stack:
        for layer, experts in pruned.items():
            changed = gates[layer].register_forward_hook(
                lambda gate, args, output, experts=experts: hook(gate, args, output, experts)
            )
            stack.callback(changed.remove)
        yield


def _loads(model: Any, batch: Tensor) -> Tensor:
    """Each expert's share of the choices, [layers,E]."""
    loads: list[Tensor] = []

    def count(gate: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ids = output[2].flatten()
        loads.append(torch.bincount(ids, minlength=output[0].shape[-1]) / ids.numel())

    with ExitStack() as stack:
        for gate in gates_of(model):
            stack.callback(gate.register_forward_hook(count).remove)
        model(input_ids=batch, use_cache=False)
    return torch.stack(loads)


def _variation(first: Tensor, second: Tensor) -> float:
    """Half of the absolute difference of two loads [layers,E], the mean over the layers."""
    return float((first - second).abs().sum(-1).mean() / 2)


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)
