# SPDX-License-Identifier: BSD-3-Clause
"""record: the choices of a model's routers while it runs, by sequence and position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.routing.batches import Batch, batch_of
from switchgear.routing.records import RoutingRecord
from switchgear.routing.routed_layers import heard, key_of, layers_of
from switchgear.routing.widths import stacked


@contextmanager
def record(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[RoutingRecord]:
    """Records the choices of all routers inside the block. The record is complete at its end.

        with routing.record(model) as choices:
            model.generate(prompts, attention_mask=mask, max_new_tokens=100)
        choices.save("choices.pt")

    Each call of the model adds its sequences: the rows of its tokens without padding (attention_mask [B,S]), or, in a
    packed row, what position_ids or sequence_ids separate. A call with a cache continues the sequences of the call
    before, as in `generate`; beams, which exchange rows, are not followed. Calls that gradient checkpointing repeats
    are left out.

    Args:
        model: has Routers, or routers of Hugging Face (moe_blocks).
        layers: names of layers, as in a RoutingTrace; all if None.

    Raises:
        ValueError: a model without such layers, with capacity limits (dropped choices depend on other tokens), or with
            an encoder; a layer whose tokens are not those of the model.
    """
    found = layers_of(model, layers)
    result, seen = RoutingRecord(), _Recorded()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.begin(batch_of(module, args, kwargs))

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for name, layer in found.items():
            stack.enter_context(heard(layer, seen.listener(name)))
        yield result
    seen.finish(result)


class _Recorded:
    """The choices of the calls so far."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.firsts: list[int] = []  # number of the first sequence of each call
        self.num_sequences = 0
        self.calls: Counter[str] = Counter()
        self.choices: dict[str, list[tuple[int, Tensor]]] = {}
        self.classes: dict[str, int] = {}

    def begin(self, batch: Batch) -> None:
        first = self.num_sequences
        if batch.continues and self.batches:
            if self.batches[-1].num_sequences != batch.num_sequences:
                raise ValueError(
                    f"past_key_values: expected {self.batches[-1].num_sequences} sequences, as in the call before, got "
                    f"{batch.num_sequences}"
                )
            first = self.firsts[-1]
        else:
            self.num_sequences += batch.num_sequences
        self.batches.append(batch)
        self.firsts.append(first)
        self.calls.clear()

    def listener(self, name: str) -> Callable[[Tensor, int], None]:
        def listen(topk_ids: Tensor, num_classes: int) -> None:
            if not self.batches:
                raise ValueError("model: expected calls of the model that is recorded, got one of a part of it")
            tokens = len(self.batches[-1].real)
            if len(topk_ids) != tokens:
                raise ValueError(f"{name}: expected the model's {tokens} tokens, got {len(topk_ids)}")
            key = key_of(name, self.calls[name])
            self.calls[name] += 1
            self.classes[key] = max(num_classes, self.classes.get(key, 0))
            small = torch.int16 if num_classes < 1 << 15 else torch.int32
            self.choices.setdefault(key, []).append((len(self.batches) - 1, topk_ids.detach().to(small)))

        return listen

    def finish(self, result: RoutingRecord) -> None:
        filled = torch.zeros(self.num_sequences, dtype=torch.int64)
        sequences, positions, tokens = [], [], []
        for batch, first in zip(self.batches, self.firsts, strict=True):
            real = batch.real.cpu()
            sequence = batch.sequence.cpu()[real] + first
            positions.append(filled[sequence] + batch.order().cpu()[real])
            sequences.append(sequence)
            filled[first : first + batch.num_sequences] += batch.lengths().cpu()
            tokens.append(None if batch.token_ids is None else batch.token_ids.cpu()[real])
        if not sequences:
            return
        longest = int(filled.max()) + 1 if len(filled) else 1
        order = (torch.cat(sequences) * longest + torch.cat(positions)).argsort()
        for key, calls in self.choices.items():
            if [call for call, _ in calls] != list(range(len(self.batches))):
                raise ValueError(f"{key}: expected this layer in each call of the model, got it in {len(calls)} calls")
        choices = {
            key: stacked([ids.cpu()[self.batches[call].real.cpu()] for call, ids in calls])[order]
            for key, calls in self.choices.items()
        }
        token_ids = None if any(t is None for t in tokens) else torch.cat([t for t in tokens if t is not None])[order]
        complete = RoutingRecord.of(choices, filled, self.classes, token_ids)
        result.layers, result.lengths, result.token_ids = complete.layers, complete.lengths, complete.token_ids
