# SPDX-License-Identifier: BSD-3-Clause
"""record: the choices of a model's routers while it runs, by sequence and position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.routing.batches import Batch, batch_of
from switchgear.routing.context import is_recomputing
from switchgear.routing.counting import unseen
from switchgear.routing.records import RoutingRecord
from switchgear.routing.routed_layers import key_of, layers_of, observed
from switchgear.routing.widths import stacked


@contextmanager
def record(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[RoutingRecord]:
    """Records the choices of all routers inside the block. The record is complete at its end.

        with routing.record(model) as choices:
            model.generate(prompts, attention_mask=mask, max_new_tokens=100)
        choices.save("choices.pt")

    Each call of the model adds its sequences: the rows of its tokens without padding (attention_mask [B,S]), or, in a
    packed row, what position_ids or sequence_ids separate. A call with a cache continues the sequences of the call
    before, as in `generate`; beams, which exchange rows, are not followed. Calls that raise and calls that gradient
    checkpointing repeats are left out.

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
        if not is_recomputing():
            with unseen(*args, *kwargs.values()):
                seen.begin(batch_of(module, args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not is_recomputing():
            seen.end()

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for name, layer in found.items():
            stack.enter_context(observed(layer, seen.listener(name)))
        stack.callback(model.register_forward_hook(after).remove)  # behind those of a layer that is the model
        yield result
    seen.finish(result)


@dataclass
class _Call:
    """A call of the model."""

    batch: Batch
    first: int  # number of its first sequence
    counts: Counter[str] = field(default_factory=Counter)  # calls of each layer
    choices: dict[str, Tensor] = field(default_factory=dict)


class _Recorded:
    """The choices of the calls so far."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.running: _Call | None = None
        self.num_sequences = 0
        self.classes: dict[str, int] = {}

    def begin(self, batch: Batch) -> None:
        first = self.num_sequences
        if batch.continues and self.calls:
            before = self.calls[-1]
            if before.batch.num_sequences != batch.num_sequences:
                raise ValueError(
                    f"past_key_values: expected {before.batch.num_sequences} sequences, as in the call before, got "
                    f"{batch.num_sequences}"
                )
            first = before.first
        self.running = _Call(batch, first)  # in place of one that raised

    def end(self) -> None:
        """The call did not raise."""
        if (call := self.running) is not None:
            self.calls.append(call)
            self.num_sequences = max(self.num_sequences, call.first + call.batch.num_sequences)
        self.running = None

    def listener(self, name: str) -> Callable[[Tensor, int], None]:
        def listen(topk_ids: Tensor, num_classes: int) -> None:
            if (call := self.running) is None:
                raise ValueError("model: expected calls of the model that is recorded, got one of a part of it")
            tokens = len(call.batch.real)
            if len(topk_ids) != tokens:
                raise ValueError(f"{name}: expected the model's {tokens} tokens, got {len(topk_ids)}")
            key = key_of(name, call.counts[name])
            call.counts[name] += 1
            self.classes[key] = max(num_classes, self.classes.get(key, 0))
            small = torch.int16 if num_classes < 1 << 15 else torch.int32
            call.choices[key] = topk_ids.detach().to(small)

        return listen

    def finish(self, result: RoutingRecord) -> None:
        filled = torch.zeros(self.num_sequences, dtype=torch.int64)
        sequences, positions, tokens = [], [], []
        for call in self.calls:
            batch, first = call.batch, call.first
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
        choices = {}
        for key in dict.fromkeys(key for call in self.calls for key in call.choices):
            heard_in = [call for call in self.calls if key in call.choices]
            if len(heard_in) < len(self.calls):
                raise ValueError(
                    f"{key}: expected this layer in each call of the model, got it in {len(heard_in)} calls"
                )
            choices[key] = stacked([call.choices[key].cpu()[call.batch.real.cpu()] for call in self.calls])[order]
        token_ids = None if any(t is None for t in tokens) else torch.cat([t for t in tokens if t is not None])[order]
        complete = RoutingRecord.of(choices, filled, self.classes, token_ids)
        result.layers, result.lengths, result.token_ids = complete.layers, complete.lengths, complete.token_ids
