# SPDX-License-Identifier: BSD-3-Clause
"""record: the choices of a model's routers while it runs, by sequence and position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.integrations.hook_points import Choice
from switchgear.trace.batches import Batch, cached_in, stacked
from switchgear.trace.routed_layers import calls_followed, key_of, layers_of
from switchgear.trace.routing_record import RoutingRecord
from switchgear.utils.modules import get_inner_model


@contextmanager
def record(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[RoutingRecord]:
    """Records the choices of all routers inside the block. The record is complete at its end.

        with routing.record(model) as choices:
            model.generate(prompts, attention_mask=mask, max_new_tokens=100)
        choices.save("choices.pt")

    Each call of the model adds its sequences: the rows of its tokens without padding (attention_mask), or, in a packed
    row, what position_ids or sequence_ids separate. A call with a cache continues the sequences of the call before, as
    in `generate`; beams, which exchange rows, are not followed. Tokens that are cropped from the cache, as rejected
    drafts of assisted generation, are left out, and so are those that the mask [B,L] of a later call calls padding,
    calls that raise, and calls that gradient checkpointing repeats.

    Args:
        model: has Routers, or routers of Hugging Face (moe_blocks), also inside PEFT, DistributedDataParallel, FSDP or
            torch.compile. Layers have their names in the model inside, so its records and those of wrappers are alike.
        layers: names of layers, as in a RoutingTrace; all if None.

    Raises:
        ValueError: a model without such layers, with capacity limits (dropped choices depend on other tokens), or with
            an encoder; a layer whose tokens are not those of the model; at a call, a mask that does not tell padding.
    """
    result, seen = RoutingRecord(), _Recorded()
    found = layers_of(model, layers)
    hooks = [layer.watched(seen.listener(name)) for name, layer in found.items()]
    with calls_followed(get_inner_model(model), seen.begin, seen.end, hooks):
        yield result
    seen.finish(result)


@dataclass
class _Call:
    """A call of the model."""

    batch: Batch
    length: int  # of its rows, without what was cropped from the cache since
    counts: Counter[str] = field(default_factory=Counter)  # calls of each layer
    choices: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Group:
    """The calls of some sequences: the first one, and those that continue it."""

    calls: list[_Call] = field(default_factory=list)
    kept: Tensor | None = None  # as in Batch, of the last mask that told

    def add(self, call: _Call) -> None:
        batch = call.batch
        self.crop(batch.cached)
        if batch.kept is not None:
            self.kept = batch.kept
        call.batch = replace(batch, kept=None, cache=None)  # the group's are enough
        self.calls.append(call)

    def crop(self, cached: int) -> None:
        """Leaves out tokens that the cache no longer holds."""
        for call in reversed(self.calls):
            if call.batch.cached + call.length <= cached:
                break
            call.length = max(cached - call.batch.cached, 0)
        if self.kept is not None:
            self.kept = self.kept[:, :cached]

    def real(self, call: _Call) -> Tensor:
        """[T] bool: the call's tokens that count in the end."""
        batch = call.batch
        real = batch.real.to("cpu", copy=True).view(batch.rows, batch.length)
        real[:, call.length :] = False
        if self.kept is not None:
            kept = self.kept[:, batch.cached : batch.cached + call.length].cpu()
            real[:, : kept.shape[1]] &= kept
        return real.flatten()


class _Recorded:
    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.running: _Call | None = None
        self.cache: Any = None  # of the last call
        self.classes: dict[str, int] = {}

    def begin(self, batch: Batch) -> None:
        if self._continues(batch):
            count = self.groups[-1].calls[0].batch.num_sequences
            if count != batch.num_sequences:
                raise ValueError(
                    f"past_key_values: expected {count} sequences, as in the call before, got {batch.num_sequences}"
                )
        else:
            self._close()
        self.running = _Call(batch, batch.length)  # in place of one that raised

    def _continues(self, batch: Batch) -> bool:
        return bool(self.groups) and batch.cached > self.groups[-1].calls[0].batch.cached

    def _close(self) -> None:
        """The last sequences are complete. Their cache may have been cropped after the last call."""
        left = cached_in({"cache": self.cache})
        if left and self.groups:  # 0 after a reset
            self.groups[-1].crop(left)
        self.cache = None

    def end(self) -> None:
        """The call did not raise."""
        if (call := self.running) is not None:
            self.cache = call.batch.cache
            if not self._continues(call.batch):
                self.groups.append(_Group())
            self.groups[-1].add(call)
        self.running = None

    def listener(self, name: str) -> Callable[[Choice, int, Tensor | None], None]:
        def listen(choice: Choice, num_experts: int, num_dropped: Tensor | None) -> None:
            if (call := self.running) is None:
                raise ValueError("model: expected calls of the model that is recorded, got one of a part of it")
            topk_ids, logits, tokens = choice.topk_ids, choice.router_logits, len(call.batch.real)
            if len(topk_ids) != tokens:
                raise ValueError(f"{name}: expected the model's {tokens} tokens, got {len(topk_ids)}")
            num_classes = num_experts if logits is None else max(num_experts, logits.shape[1])
            key = key_of(name, call.counts[name])
            call.counts[name] += 1
            self.classes[key] = max(num_classes, self.classes.get(key, 0))
            small = torch.int16 if num_classes < 1 << 15 else torch.int32
            call.choices[key] = topk_ids.detach().to(small)

        return listen

    def finish(self, result: RoutingRecord) -> None:
        self._close()
        sequences, positions, tokens, lengths, first = [], [], [], [], 0
        heard: list[tuple[_Call, Tensor]] = []  # the calls with their tokens
        for group in self.groups:
            filled = torch.zeros(group.calls[0].batch.num_sequences, dtype=torch.int64)
            for call in group.calls:
                real = group.real(call)
                batch = replace(call.batch, real=real, sequence=call.batch.sequence.cpu())
                sequence = batch.sequence[real]
                positions.append(filled[sequence] + batch.order()[real])
                sequences.append(sequence + first)
                filled += batch.lengths()
                tokens.append(None if batch.token_ids is None else batch.token_ids.cpu()[real])
                heard.append((call, real))
            lengths.append(filled)
            first += len(filled)
        if not heard:
            return
        longest = max(int(filled.max()) if len(filled) else 0 for filled in lengths) + 1
        order = (torch.cat(sequences) * longest + torch.cat(positions)).argsort()
        choices = {}
        for key in dict.fromkeys(key for call, _ in heard for key in call.choices):
            count = sum(key in call.choices for call, _ in heard)
            if count < len(heard):
                raise ValueError(f"{key}: expected this layer in each call of the model, got it in {count} calls")
            choices[key] = stacked([call.choices[key].cpu()[real] for call, real in heard])[order]
        token_ids = None if any(t is None for t in tokens) else torch.cat([t for t in tokens if t is not None])[order]
        complete = RoutingRecord.of(choices, torch.cat(lengths), self.classes, token_ids)
        result.layers, result.lengths, result.token_ids = complete.layers, complete.lengths, complete.token_ids
