# SPDX-License-Identifier: BSD-3-Clause
"""The experts that a run uses, and batches of requests that share experts (Read-ME, arXiv:2410.19123)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from switchgear.checks import Count, NotEmpty, Size, checked, integer
from switchgear.diagnostics.choices import LayerChoices
from switchgear.trace.routing_record import RoutingRecord

Source = Mapping[str, LayerChoices] | RoutingRecord | Sequence[Sequence[Iterable[int | Tensor]]]


@dataclass(frozen=True)
class Accesses:
    """The sets of experts of a run of S steps through L layers. A step is a forward pass: a token that is decoded, or
    the tokens of a prompt.

    Attributes:
        layers: L names, in the order in which layers run.
        num_experts: of each layer.
        steps: `[S][L]`: the distinct experts of each step and layer, ascending.
        tokens: of each step.
    """

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return sum(self.tokens)

    @property
    def num_uses(self) -> int:
        """Experts of all sets: the hits and misses of any cache."""
        return sum(len(experts) for step in self.steps for experts in step)

    def counts(self) -> dict[tuple[int, int], int]:
        """How many sets have the expert, by (layer, expert)."""
        layers = (pair for step in self.steps for pair in enumerate(step))
        return dict(Counter((layer, expert) for layer, experts in layers for expert in experts))

    @checked
    def split(self, steps: int) -> tuple[Accesses, Accesses]:
        """The first steps and the others: to calibrate on one part, and to replay the other."""
        if not 0 <= steps <= len(self.steps):
            raise ValueError(f"steps: expected 0 to {len(self.steps)}, got {steps}")
        first = Accesses(self.layers, self.num_experts, self.steps[:steps], self.tokens[:steps])
        return first, Accesses(self.layers, self.num_experts, self.steps[steps:], self.tokens[steps:])

    @staticmethod
    @checked
    def join(parts: Annotated[Sequence[Accesses], NotEmpty]) -> Accesses:
        """Several runs of one model, one after the other."""
        first = parts[0]
        for part in parts:
            if (part.layers, part.num_experts) != (first.layers, first.num_experts):
                raise ValueError("parts: expected runs of one model, got different layers")
        steps = tuple(step for part in parts for step in part.steps)
        return Accesses(first.layers, first.num_experts, steps, tuple(n for part in parts for n in part.tokens))

    @staticmethod
    @checked
    def of(source: Source, *, prompt: Count | None = 0, num_experts: Size | None = None) -> Accesses:
        """The accesses of a recorded run.

        Args:
            source: what `diagnostics.collect` or `routing.record` yields, or a list: the experts of each step and
                layer, `source[step][layer]`, in any order, -1 for none. A step of a list counts as one token.
            prompt: tokens at the start of each sequence that run in one step; the others run token by token, as in
                decoding. None: a step for each whole sequence. Sequences are those of the record, or the rows of each
                batch that `collect` saw. For a list, leave it out.
            num_experts: of each layer of a list, 1 + its largest id if None. For a record, experts with weights, if the
                router has other classes too (null experts): those are left out.

        Raises:
            ValueError: a layer with another number of tokens than the first (one that runs twice in a pass, or that
                drops tokens); an expert out of range; rows of different lengths. TypeError:
                experts that are no integers.
        """
        if isinstance(source, RoutingRecord):
            if (twice := next((name for name in source.layers if "#" in name), None)) is not None:
                raise ValueError(f"source: expected layers that run once in a pass, got {twice}")
            recorded = {name: (layer.topk_ids(), layer.num_classes) for name, layer in source.layers.items()}
            return _of_ids(recorded, source.lengths.tolist(), prompt, num_experts)
        if isinstance(source, Mapping):
            choices = {name: source[name] for name in source}
            collected = {name: (layer.topk_ids, layer.num_experts) for name, layer in choices.items()}
            return _of_ids(collected, _lengths(choices), prompt, num_experts)
        if prompt != 0:
            raise ValueError(f"prompt: expected 0 for a list, whose steps are given, got {prompt}")
        return _of_list(source, num_experts)


def _lengths(choices: Mapping[str, LayerChoices]) -> list[int]:
    """Tokens of each sequence: runs of one example."""
    first = next(iter(choices.values()), None)
    if first is None:
        return []
    if first.examples is None:
        return [first.num_tokens]
    counts: list[int] = torch.unique_consecutive(first.examples, return_counts=True)[1].tolist()
    return counts


def _of_ids(
    layers: Mapping[str, tuple[Tensor, int]], lengths: Sequence[int], prompt: int | None, num_experts: int | None
) -> Accesses:
    """From topk_ids [T,K] and the number of classes by layer, for sequences of these lengths."""
    widths = [number if num_experts is None else min(num_experts, number) for _, number in layers.values()]
    total = sum(lengths)
    bounds = _bounds(lengths, prompt)
    columns = []
    for (name, (layer, _)), width in zip(layers.items(), widths, strict=True):
        if len(layer) != total:
            raise ValueError(f"source: expected {total} tokens in {name}, got {len(layer)}")
        if num_experts is not None:
            layer = torch.where(layer < num_experts, layer, -1)
        rows = layer.tolist()
        sets = [{expert for row in rows[begin:end] for expert in row} for begin, end in bounds]
        columns.append([_checked(experts, width, name) for experts in sets])
    steps = tuple(tuple(column[i] for column in columns) for i in range(len(bounds)))
    return Accesses(tuple(layers), tuple(widths), steps, tuple(end - begin for begin, end in bounds))


def _bounds(lengths: Sequence[int], prompt: int | None) -> list[tuple[int, int]]:
    """First and last token of each step."""
    result = []
    begin = 0
    for length in lengths:
        end = begin + length
        first = end if prompt is None else min(begin + prompt, end)
        result += [(begin, first)] * (first > begin)
        result += [(token, token + 1) for token in range(first, end)]
        begin = end
    return result


def _of_list(source: Sequence[Sequence[Iterable[int | Tensor]]], num_experts: int | None) -> Accesses:
    steps = [[{to_int("source", expert) for expert in experts} for experts in step] for step in source]
    num_layers = len(steps[0]) if steps else 0
    for step in steps:
        if len(step) != num_layers:
            raise ValueError(f"source: expected {num_layers} layers in each step, got {len(step)}")
    largest = max((expert for step in steps for experts in step for expert in experts), default=-1)
    width = largest + 1 if num_experts is None else num_experts
    names = tuple(map(str, range(num_layers)))
    checked = tuple(tuple(_checked(step[i], width, names[i]) for i in range(num_layers)) for step in steps)
    return Accesses(names, (width,) * num_layers, checked, (1,) * len(checked))


def to_int(name: str, expert: Any) -> int:
    """Converts an integer, also in a tensor. Raises TypeError for anything else."""
    return integer(name, expert.item() if isinstance(expert, Tensor) and expert.numel() == 1 else expert)


def _checked(experts: set[int], num_experts: int, name: str) -> tuple[int, ...]:
    result = tuple(sorted(experts - {-1}))
    if result and not 0 <= result[0] <= result[-1] < num_experts:
        wrong = result[0] if result[0] < 0 else result[-1]
        raise ValueError(f"source: expected experts from -1 to {num_experts - 1} in layer {name}, got {wrong}")
    return result


# ---- Batches ---------------------------------------------------------------------------------------------------------


@checked
def expert_batches(
    queue: Sequence[Collection[Hashable]], max_tokens: Size, tokens: Sequence[Size] | None = None
) -> list[list[int]]:
    """Groups waiting requests so that a batch needs few different experts. Returns the numbers of the requests of each
    batch; every request is in one.

    Each expert has a queue of the requests that need it. A batch starts in the one with the most tokens, and continues
    with the requests that bring the fewest new experts: first those of the fullest queue, then those that wait longest.
    Time grows with the number of requests times that of different sets of experts.

    Args:
        queue: the experts of each request, such as a PreRouter predicts: ids, or (layer, id), also in tensors.
        max_tokens: of a batch; a longer request is a batch alone.
        tokens: of each request; 1 if None.
    """
    sizes = [1] * len(queue) if tokens is None else list(tokens)
    if len(sizes) != len(queue):
        raise ValueError(f"tokens: expected {len(queue)} numbers, got {len(sizes)}")
    groups: dict[frozenset[Hashable], deque[int]] = {}  # requests that need the same experts, in order of arrival
    load: Counter[Hashable] = Counter()  # tokens that wait for an expert
    for request, experts in enumerate(queue):
        needs = frozenset(map(_key, experts))
        groups.setdefault(needs, deque()).append(request)
        load.update(dict.fromkeys(needs, sizes[request]))
    batches = []
    while groups:
        batch: list[int] = []
        room, present = max_tokens, frozenset[Hashable]()
        free = dict.fromkeys(groups)  # those whose next request may fit
        while room > 0 and free:
            chosen = _next(free, present, groups, load)
            waiting = groups[chosen]
            while waiting and (sizes[waiting[0]] <= room or (not batch and sizes[waiting[0]] > max_tokens)):
                batch.append(waiting.popleft())
                room -= sizes[batch[-1]]
                load.subtract(dict.fromkeys(chosen, sizes[batch[-1]]))
                present |= chosen
            del free[chosen]
            if not waiting:
                del groups[chosen]
        batches.append(batch)
    return batches


def _key(expert: Hashable) -> Hashable:
    """Ids in tensors too, which are equal only to themselves."""
    if isinstance(expert, tuple):
        return tuple(map(_key, expert))
    return to_int("queue", expert) if isinstance(expert, Tensor) else expert


def _next(
    free: Collection[frozenset[Hashable]],
    present: frozenset[Hashable],
    groups: Mapping[frozenset[Hashable], deque[int]],
    load: Mapping[Hashable, int],
) -> frozenset[Hashable]:
    def fullest(needs: frozenset[Hashable]) -> int:
        return max((load[expert] for expert in needs - present), default=0)

    if not present:
        return min(free, key=lambda needs: (-fullest(needs), len(needs), groups[needs][0]))
    return min(free, key=lambda needs: (len(needs - present), -fullest(needs), groups[needs][0]))
