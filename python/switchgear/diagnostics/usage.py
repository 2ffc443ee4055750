# SPDX-License-Identifier: BSD-3-Clause
"""Which experts the tokens use, how sure the router is, and how outcomes depend on the experts used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from switchgear.checks import checked
from switchgear.diagnostics.choices import LayerChoices, get_layers
from switchgear.trace import LayerTrace, RoutingTrace
from switchgear.trace.layer import recorded


@dataclass(frozen=True)
class Usage:
    """How a layer's experts were used."""

    tokens: Tensor  # [E] int64: the choices that each expert served
    share: Tensor  # [E] float64: the same as fractions of all choices
    unused: tuple[int, ...]  # experts without a token


def usage(trace: RoutingTrace | Mapping[str, Any]) -> dict[str, Usage]:
    """How often each expert was used, by layer (arXiv:2502.17187 counts them on a benchmark)."""
    result = {}
    for name, layer in get_layers(trace).items():
        tokens = layer.tokens_per_expert.cpu()
        share = tokens.double() / max(int(tokens.sum()), 1)
        result[name] = Usage(tokens, share, tuple((tokens == 0).nonzero().flatten().tolist()))
    return result


def gate_entropy(trace: RoutingTrace | Mapping[str, Any]) -> dict[str, float]:
    """The mean entropy of the router's softmax in nats, by layer, from 0 (sure) to log E (uniform). NaN without
    logits."""
    layers = get_layers(trace).items()
    return {name: float(recorded(layer, "entropy")) / max(layer.num_tokens, 1) for name, layer in layers}


def affinity(trace: RoutingTrace | Mapping[str, Any]) -> dict[str, Tensor]:
    """Each expert's mean weight, [E] float64, by layer: how much the traced texts depend on it.

    Of what `collect` yields it is the mean over texts of the mean over the tokens of each (SEUF, arXiv:2411.18797). A
    RoutingTrace does not tell texts apart, nor does `collect` on tokens without rows: there it is the mean over all
    tokens, which is the same for texts of equal lengths.

    Unlearning trains the expert with the largest one of all layers alone: finetune.freeze_except, with
    routing.anchor_loss."""
    return {name: _average_weights(layer).cpu() for name, layer in get_layers(trace).items()}


def _average_weights(layer: LayerTrace | LayerChoices) -> Tensor:
    """[E] float64: the mean over examples of their means, or over all tokens if there are no examples."""
    if not isinstance(layer, LayerChoices) or layer.examples is None or not layer.num_tokens:
        return recorded(layer, "weight_per_expert") / max(layer.num_tokens, 1)
    lengths = layer.examples.bincount()
    sums = activation_by_example({"": layer}, by="weight")[""]
    return (sums / lengths.clamp(min=1)[:, None]).sum(0) / (lengths > 0).sum()


@checked
def activation_by_example(
    choices: Mapping[str, LayerChoices], examples: Tensor | None = None, *, by: Literal["count", "weight"] = "count"
) -> dict[str, Tensor]:
    """How strongly each example activates each expert, [N,E] float64, by layer: the choices ("count") or their weights
    ("weight"), summed over the example's tokens.

    examples: [T] integers, the example of each token; those that `collect` recorded if None.
    """
    result = {}
    for name, layer in choices.items():
        of = layer.examples if examples is None else examples
        if of is None or of.shape[0] != layer.num_tokens:
            got = "none" if of is None else f"{of.shape[0]}"
            raise ValueError(f"examples: expected the example of each of {layer.num_tokens} tokens, got {got} ({name})")
        values = torch.ones_like(layer.topk_weights) if by == "count" else layer.topk_weights.detach()
        real = layer.topk_ids >= 0
        number = int(of.max()) + 1 if of.numel() else 0
        index = of[:, None].long() * layer.num_experts + layer.topk_ids.long()
        sums = torch.zeros(number * layer.num_experts, dtype=torch.float64, device=values.device)
        sums = sums.scatter_add(0, index[real], values.double()[real])
        result[name] = sums.view(number, layer.num_experts)
    return result


@dataclass(frozen=True)
class Outcome:
    """Outcomes by whether an expert was active in an example. NaN where no example is of that kind."""

    active: Tensor  # [E] int64: examples in which the expert was active
    with_expert: Tensor  # [E] float64: their mean outcome
    without_expert: Tensor  # [E] float64: the mean outcome of the others

    @property
    def difference(self) -> Tensor:
        """with_expert - without_expert, per token."""
        return self.with_expert - self.without_expert


def outcome_by_expert(
    choices: Mapping[str, LayerChoices], correct: Tensor, examples: Tensor | None = None
) -> dict[str, Outcome]:
    """The mean of `correct` [N] (true or false, or any number) over the examples in which an expert was active, and
    over the others, by layer. An expert is active in an example if any of its tokens chose it. A difference is a
    correlation; `override(disable=)` tests what the expert causes.

    examples: as in `activation_by_example`.
    """
    result = {}
    for name, sums in activation_by_example(choices, examples).items():
        if sums.shape[0] > correct.shape[0]:
            raise ValueError(f"correct: expected {sums.shape[0]} outcomes, got {correct.shape[0]} ({name})")
        active = torch.zeros(correct.shape[0], sums.shape[1], dtype=torch.float64, device=sums.device)
        active[: sums.shape[0]] = (sums > 0).double()
        outcomes = correct.to(sums.device).double()
        number = active.sum(0)
        total = outcomes @ active
        rest = (outcomes.sum() - total) / (correct.shape[0] - number)  # 0 / 0 is NaN
        result[name] = Outcome(number.long(), total / number, torch.where(number < correct.shape[0], rest, math.nan))
    return result
