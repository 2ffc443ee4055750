# SPDX-License-Identifier: BSD-3-Clause
"""replay: the choices of one run of a model, forced in another.

In reinforcement learning the rollout and the trainer choose differently for some tokens, since weights moved or kernels
round differently; the ratio of their probabilities then compares two different networks. Replaying the choices of the
rollout in the trainer removes that. Weights come from the trainer's logits, so the router learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from switchgear.checks import checked
from switchgear.functional import Routing
from switchgear.routing.context import NOTHING_KNOWN, Context, Select, is_recomputing
from switchgear.routing.counting import unseen
from switchgear.trace.batches import Batch
from switchgear.trace.routed_layers import calls_followed, key_of, layers_of
from switchgear.trace.routing_record import RoutingRecord
from switchgear.utils.modules import get_inner_model

_FORWARDS = 64  # that gradient checkpointing may still repeat


@checked
@contextmanager
def replay(model: nn.Module, choices: RoutingRecord, sequences: Sequence[int] | Tensor | None = None) -> Iterator[None]:
    """Inside the block, recorded tokens get their recorded experts, weighted from the current logits.

        with routing.replay(model, choices, sequences=[4, 7]):
            loss = ...(model(input_ids=batch, attention_mask=mask))
            loss.backward()

    Call by call, the model's sequences are the next ones of the record, however they are padded or packed; after the
    last one it begins again. A call that raises does not count: the next one gets its sequences. A token beyond the end
    of its recorded sequence is routed freely, as is padding: the last token that `generate` returns was never an input.
    Gradient checkpointing repeats the choices of its forward, so call backward inside the block. Ids and order of the
    choices are bit-equal to the record. Where the router would have chosen the same, weights are too.

    Args:
        model: as in `record`; other weights, wrappers, kernels or another attention implementation do not matter.
        choices: the record. Layers that it does not have are routed freely.
        sequences: which sequences of the record come, in this order; all if None.

    Raises:
        ValueError: layers that the model does not have, or with other numbers of classes; routers whose weights do not
            follow from a choice (the name is given); at a call, more sequences than are left or other token ids.
    """
    names = {key.partition("#")[0] for key in choices.layers}
    found = layers_of(model, None)
    if missing := sorted(names - set(found)):
        raise ValueError(f"choices: expected layers of the model, {', '.join(found)}; got {missing[0]}")
    chosen = {name: layer for name, layer in found.items() if name in names}
    state = _Replay(choices, sequences, {n: layer.num_classes for n, layer in chosen.items()})
    methods = {name: layer.routing_method(name) for name, layer in chosen.items()}
    hooks = [
        layer.overridden(partial(_Replayed, name=name, state=state, method=methods[name]), methods[name])
        for name, layer in chosen.items()
    ]
    with calls_followed(get_inner_model(model), state.begin, state.end, hooks):
        yield


@dataclass(frozen=True)
class _Place:
    """How far the calls have come in the record."""

    next: int  # index of the next sequence to replay
    current: Tensor  # int64: sequences of the last call
    cached: int  # tokens in the cache before their first call
    past: Tensor  # [B,C] bool: what was fed since, False for padding


@dataclass
class _Forward:
    """A call of the model: the record's row of each token, -1 for none, and what was seen of each layer's logits."""

    rows: Tensor
    end: _Place
    is_complete: bool = False
    calls: Counter[str] = field(default_factory=Counter)
    prints: dict[str, Tensor] = field(default_factory=dict)


class _Replay:
    def __init__(
        self, choices: RoutingRecord, sequences: Sequence[int] | Tensor | None, num_classes: Mapping[str, int | None]
    ) -> None:
        count = choices.num_sequences
        self.sequences = torch.as_tensor(range(count) if sequences is None else list(sequences), dtype=torch.int64)
        if len(self.sequences) and not 0 <= int(self.sequences.min()) <= int(self.sequences.max()) < count:
            raise ValueError(f"sequences: expected numbers from 0 to {count - 1}, got {self.sequences.tolist()}")
        self.choices = choices
        self.starts = choices.lengths.cumsum(0) - choices.lengths
        self.ids: dict[str, Tensor] = {}
        for key, layer in choices.layers.items():
            classes = num_classes[key.partition("#")[0]]
            if classes is not None and classes < layer.num_classes:
                raise ValueError(f"choices: expected {classes} classes in {key}, got {layer.num_classes}")
            self.ids[key] = layer.topk_ids().long()
        self.forwards: list[_Forward] = []

    def begin(self, batch: Batch) -> None:
        """Finds the record's row of each token. Raises ValueError if there is none."""
        self.forwards = [forward for forward in self.forwards if forward.is_complete]  # the last call may have raised
        place = self._place(batch)
        filled = place.past.sum(1) if place.past.shape[1] else torch.zeros(batch.num_sequences, dtype=torch.int64)
        real, within = batch.real.cpu(), batch.sequence.cpu()
        within = torch.where(real, within, 0)
        position = filled[within] + batch.order().cpu()
        sequence = place.current[within]
        known = real & (position < self.choices.lengths[sequence])
        rows = torch.where(known, self.starts[sequence] + position, -1)
        if batch.token_ids is not None and self.choices.token_ids is not None:
            wrong = known & (self.choices.token_ids[rows.clamp(min=0)] != batch.token_ids.cpu())
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                raise ValueError(
                    f"input_ids: expected those of the record, got another at position {int(position[at])} of its "
                    f"sequence {int(sequence[at])}"
                )
        end = replace(place, past=torch.cat([place.past, real.view(batch.rows, batch.length)], 1))
        self.forwards = [*self.forwards[1 - _FORWARDS :], _Forward(rows.to(batch.real.device), end)]

    def end(self) -> None:
        """The call did not raise."""
        self.forwards[-1].is_complete = True

    def _place(self, batch: Batch) -> _Place:
        before = self.forwards[-1].end if self.forwards else None
        if before is None or batch.cached <= before.cached:
            return self._next(0 if before is None else before.next, batch)
        if len(before.current) != batch.num_sequences:
            raise ValueError(f"past_key_values: expected {len(before.current)} sequences, got {batch.num_sequences}")
        past = before.past[:, : batch.cached - before.cached]  # the cache may have been cropped
        if batch.kept is not None:
            past = past & batch.kept.cpu()[:, before.cached : before.cached + past.shape[1]]
        return replace(before, past=past)

    def _next(self, start: int, batch: Batch) -> _Place:
        count, start = batch.num_sequences, 0 if start == len(self.sequences) else start
        if start + count > len(self.sequences):
            left = len(self.sequences) - start
            raise ValueError(f"model: expected at most {left} more sequences of the record, got {count}")
        past = torch.zeros(batch.rows, 0, dtype=torch.bool)
        return _Place(start + count, self.sequences[start : start + count], batch.cached, past)

    def choice(self, name: str, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """(ids [T,K] int64, whether a token is recorded [T]) for this call of a layer."""
        with unseen(router_logits):
            forward, key = self._call(name, router_logits)
            ids = self.ids[key] = self.ids[key].to(router_logits.device)
            rows = forward.rows.to(ids.device)
        if len(rows) != len(router_logits):
            raise ValueError(f"{name}: expected the model's {len(rows)} tokens, got {len(router_logits)}")
        if not len(ids):
            return rows.new_full((len(rows), ids.shape[1]), -1), rows >= 0
        return ids[rows.clamp(min=0)], rows >= 0

    def _call(self, name: str, router_logits: Tensor) -> tuple[_Forward, str]:
        if not self.forwards:
            raise ValueError("model: expected calls of the model that is replayed, got one of a part of it")
        seen = router_logits.detach().sum(dtype=torch.float64)
        if is_recomputing():
            return self._repeated(name, seen, len(router_logits))
        forward = self.forwards[-1]
        key = key_of(name, forward.calls[name])
        if key not in self.ids:
            raise ValueError(f"{name}: expected as many calls in a forward as were recorded, got more")
        forward.calls[name] += 1
        forward.prints[key] = seen
        return forward, key

    def _repeated(self, name: str, seen: Tensor, tokens: int) -> tuple[_Forward, str]:
        """The call that gradient checkpointing repeats: the one with these logits."""
        found = [
            (forward, key)
            for forward in self.forwards
            for key in forward.prints
            if key.partition("#")[0] == name and len(forward.rows) == tokens
        ]
        if len(found) > 1:
            found = [(f, k) for f, k in reversed(found) if torch.equal(f.prints[k], seen) or bool(seen.isnan())]
        if not found:
            raise ValueError(f"{name}: expected backward to repeat a forward inside this block, got another")
        return found[0]


@dataclass(frozen=True)
class _Replayed:
    """A selection with recorded choices."""

    select: Select
    name: str
    state: _Replay
    method: Any  # weigh(router_logits, ids)
    uses_bias: ClassVar[bool] = False

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        own = self.select(router_logits, context, bias)
        ids, known = self.state.choice(self.name, own.router_logits)
        width = max(ids.shape[1], own.topk_ids.shape[1])
        ids = pad(ids, (0, width - ids.shape[1]), value=-1)
        own_ids = pad(own.topk_ids.long(), (0, width - own.topk_ids.shape[1]), value=-1)
        own_weights = pad(own.topk_weights, (0, width - own.topk_weights.shape[1]))
        ids = torch.where(known[:, None], ids, own_ids)
        same = (ids == own_ids).all(1, keepdim=True)
        weights = self.method.weigh(own.router_logits, ids).to(own_weights.dtype)
        weights = torch.where(same, own_weights, weights)
        return own._replace(topk_ids=ids.to(own.topk_ids.dtype), topk_weights=weights)
