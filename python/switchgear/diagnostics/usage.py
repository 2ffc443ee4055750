# SPDX-License-Identifier: BSD-3-Clause
"""Which experts the tokens use, how sure the router is, how outcomes depend on the experts used, which experts tell two
kinds of text apart, and what happens without them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import checked
from switchgear.diagnostics.choices import LayerChoices, get_layers
from switchgear.trace import LayerTrace, RoutingTrace
from switchgear.trace.layer import recorded
from switchgear.trace.override import override


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


# ---- two kinds of text -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertScores:
    """A number for every expert of a model."""

    by_layer: Mapping[str, Tensor]  # [E] float64 by layer

    def ranked(self, count: int) -> list[tuple[str, int, float]]:
        """The `count` experts with the largest scores of the whole model, as (layer, expert, score), best first."""
        found = [
            (name, expert, float(score))
            for name, scores in self.by_layer.items()
            for expert, score in enumerate(scores.tolist())
        ]
        return sorted(found, key=lambda row: -row[2])[:count]

    def top(self, count: int) -> dict[str, list[int]]:
        """The same experts by layer, for `steered`."""
        result: dict[str, list[int]] = {}
        for name, expert, _ in self.ranked(count):
            result.setdefault(name, []).append(expert)
        return result

    def __neg__(self) -> ExpertScores:
        """The scores with the other sign: what the other kind of text uses."""
        return ExpertScores({name: -scores for name, scores in self.by_layer.items()})


@checked
def ftri(
    positive: RoutingTrace | Mapping[str, Any],
    negative: RoutingTrace | Mapping[str, Any],
    *,
    by: Literal["weight", "count"] = "weight",
    prompts: tuple[int, int] | None = None,
) -> ExpertScores:
    """Functional token resonance imaging (Mixture of Tunable Experts, arXiv:2502.11096): each expert's activation,
    summed over the tokens of a prompt and averaged over the prompts that show a behaviour, minus that over the prompts
    that do not. Disabling the few experts with the largest difference suppresses the behaviour.

        with RoutingTrace(model) as refused: ...       # a call per prompt
        with RoutingTrace(model) as answered: ...
        with steered(model, ftri(refused, answered).top(10), disable=True):
            model.generate(...)

    Args:
        positive, negative: traces of the two kinds of prompts.
        by: "weight", the experts' weights, or "count", how often they were chosen.
        prompts: their numbers; if None, those that `collect` recorded, or the calls of a RoutingTrace.
    """
    attribute = "weight_per_expert" if by == "weight" else "tokens_per_expert"
    sides = []
    for at, trace in enumerate((positive, negative)):
        side = {}
        for name, layer in get_layers(trace).items():
            number = _prompts(layer, name) if prompts is None else prompts[at]
            side[name] = recorded(layer, attribute).cpu().double() / max(number, 1)
        sides.append(side)
    return _subtract(*sides)


def _prompts(layer: Any, name: str) -> int:
    if not isinstance(layer, LayerChoices):
        return int(layer.num_calls)
    if layer.examples is None:
        raise ValueError(f"prompts: expected their numbers, as {name} recorded no examples, got None")
    return int(torch.unique(layer.examples).numel())


def contrastive_activation(
    positive: RoutingTrace | Mapping[str, Any], negative: RoutingTrace | Mapping[str, Any]
) -> ExpertScores:
    """Contrastive expert activation (arXiv:2410.15438): how much more often an expert is chosen per token in one kind
    of text than in another, from -1 to 1. The core experts of the first have the largest scores, of the second the
    smallest."""
    return _subtract(_count_frequency(positive), _count_frequency(negative))


def _count_frequency(trace: RoutingTrace | Mapping[str, Any]) -> dict[str, Tensor]:
    """The fraction of the tokens that choose each expert, [E] float64 by layer."""
    layers = get_layers(trace).items()
    return {name: layer.tokens_per_expert.cpu().double() / max(layer.num_tokens, 1) for name, layer in layers}


def _subtract(positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> ExpertScores:
    if set(positive) != set(negative):
        missing = sorted(set(positive) ^ set(negative))
        raise ValueError(f"negative: expected the layers of positive, got another {missing[0]}")
    return ExpertScores({name: positive[name] - negative[name] for name in positive})


def core_activation(
    choices: Mapping[str, LayerChoices],
    core: Mapping[str, Collection[int]],
    examples: Tensor | None = None,
) -> Tensor:
    """The fraction of each example's choices that fall on the experts `core`, {layer: experts}, over those layers,
    [N] float64. It predicts the kind of a new text (arXiv:2410.15438: whether the model knows enough); `auc` says how
    well."""
    if not core:
        raise ValueError("core: expected experts of a layer, got none")
    for name, chosen in core.items():
        if name not in choices:
            raise ValueError(f"core: expected layers of choices ({', '.join(choices)}), got {name}")
        if wrong := [expert for expert in chosen if not 0 <= expert < choices[name].num_experts]:
            last = choices[name].num_experts - 1
            raise ValueError(f"core: expected experts from 0 to {last} of {name}, got {wrong[0]}")
    sums = activation_by_example({name: choices[name] for name in core}, examples)
    number = max(rows.shape[0] for rows in sums.values())
    hits, total = torch.zeros(number, dtype=torch.float64), torch.zeros(number, dtype=torch.float64)
    for name, rows in sums.items():
        hits[: rows.shape[0]] += rows[:, sorted(set(core[name]))].sum(1).cpu()
        total[: rows.shape[0]] += rows.sum(1).cpu()
    return hits / total.clamp(min=1)


def auc(scores: Tensor, labels: Tensor) -> float:
    """The area under the ROC curve: how often an example with label 1 has a higher score than one with 0; ties are
    half. 0.5 is chance. NaN if a label does not occur."""
    if scores.shape != labels.shape:
        raise ValueError(f"labels: expected {list(scores.shape)} like scores, got {list(labels.shape)}")
    positive, negative = scores[labels.bool()].double(), scores[~labels.bool()].double()
    if not positive.numel() or not negative.numel():
        return float("nan")
    order = negative.sort().values
    below = torch.searchsorted(order, positive)
    up_to = torch.searchsorted(order, positive, right=True)
    return float((below + up_to).double().mean() / (2 * negative.numel()))


@contextmanager
def steered(
    model: nn.Module,
    experts: Mapping[str, Collection[int]],
    *,
    disable: bool = False,
    force: bool = False,
    bias: float | None = None,
    gain: float | None = None,
) -> Iterator[None]:
    """`override` with other experts in each layer: {layer: experts}, as from `ExpertScores.top`.

    disable, force: no token, or every token, gets them. bias: added to their scores for the choice. gain: multiplies
    their weights. Layers have the names that the trace shows. Raises ValueError as `override` does; nothing is changed
    then.
    """
    if not (disable or force) and bias is None and gain is None:
        raise ValueError("disable: expected one of disable, force, bias and gain, got none")
    with ExitStack() as stack:
        for name, chosen in experts.items():
            stack.enter_context(
                override(
                    model,
                    disable=tuple(chosen) if disable else (),
                    force=tuple(chosen) if force else (),
                    bias=None if bias is None else dict.fromkeys(chosen, bias),
                    gain=None if gain is None else dict.fromkeys(chosen, gain),
                    layers=[name],
                )
            )
        yield
