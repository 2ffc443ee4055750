# SPDX-License-Identifier: BSD-3-Clause
"""record and replay: the choices of one run of a model, forced in another.

In reinforcement learning the rollout and the trainer choose differently for some tokens, since weights moved or kernels
round differently; the ratio of their probabilities then compares two different networks. Replaying the choices of the
rollout in the trainer removes that. Weights come from the trainer's logits, so the router learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from switchgear.complaints import check_module
from switchgear.functional import Routing
from switchgear.routing.batches import Batch, batch_of
from switchgear.routing.context import NOTHING_KNOWN, Context, Select
from switchgear.routing.ranking import normalized, scores_of
from switchgear.routing.records import RoutingRecord, _stacked
from switchgear.routing.router import Router

_FORWARDS = 64  # that gradient checkpointing may still repeat


# ---- record ----------------------------------------------------------------------------------------------------------


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
    sources = _sources(model, layers)
    result, seen = RoutingRecord(), _Recorded()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.begin(batch_of(module, args, kwargs))

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for name, source in sources.items():
            stack.enter_context(_heard(source, seen.listener(name)))
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
            key = _key(name, self.calls[name])
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
            key: _stacked([ids.cpu()[self.batches[call].real.cpu()] for call, ids in calls])[order]
            for key, calls in self.choices.items()
        }
        token_ids = None if any(t is None for t in tokens) else torch.cat([t for t in tokens if t is not None])[order]
        complete = RoutingRecord.of(choices, filled, self.classes, token_ids)
        result.layers, result.lengths, result.token_ids = complete.layers, complete.lengths, complete.token_ids


# ---- replay ----------------------------------------------------------------------------------------------------------


@contextmanager
def replay(model: nn.Module, choices: RoutingRecord, sequences: Sequence[int] | None = None) -> Iterator[None]:
    """Inside the block, recorded tokens get their recorded experts, weighted from the current logits.

        with routing.replay(model, choices, sequences=[4, 7]):
            loss = ...(model(input_ids=batch, attention_mask=mask))
            loss.backward()

    Call by call, the model's sequences are the next ones of the record, however they are padded or packed; after the
    last one it begins again. A token beyond the end of its recorded sequence is routed freely, as is padding: the last
    token that `generate` returns was never an input. Gradient checkpointing repeats the choices of its forward, so call
    backward inside the block. Ids and order of the choices are bit-equal to the record. Where the router would have
    chosen the same, weights are too.

    Args:
        model: as in `record`; other weights, another attention implementation or other kernels do not matter.
        choices: the record. Layers that it does not have are routed freely.
        sequences: which sequences of the record come, in this order; all if None.

    Raises:
        ValueError: layers that the model does not have, or with other numbers of classes; routers whose weights do not
            follow from a choice (the name is given); at a call, more sequences than are left or other token ids.
    """
    if not isinstance(choices, RoutingRecord):
        raise TypeError(f"choices: expected RoutingRecord, got {type(choices).__name__}")
    names = {key.partition("#")[0] for key in choices.layers}
    found = _sources(model, None)
    if missing := sorted(names - set(found)):
        raise ValueError(f"choices: expected layers of the model, {', '.join(found)}; got {missing[0]}")
    sources = {name: source for name, source in found.items() if name in names}
    state = _Replay(choices, sequences, {n: s.num_classes for n, s in sources.items()})
    manners = {name: source.manner() for name, source in sources.items()}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.begin(batch_of(module, args, kwargs))

    def wrapper(name: str) -> Callable[[Select], Select]:
        return lambda own: _Replayed(own, name, state, manners[name])

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for name, source in sources.items():
            stack.enter_context(source.overridden(wrapper(name), manners[name]))
        yield


@dataclass
class _Forward:
    """A call of the model: the record's row of each token, -1 for none, and what was seen of each layer's logits."""

    rows: Tensor
    calls: Counter[str] = field(default_factory=Counter)
    prints: dict[str, Tensor] = field(default_factory=dict)


class _Replay:
    def __init__(
        self, choices: RoutingRecord, sequences: Sequence[int] | None, num_classes: Mapping[str, int | None]
    ) -> None:
        count = choices.num_sequences
        self.sequences = torch.as_tensor(range(count) if sequences is None else list(sequences), dtype=torch.int64)
        if len(self.sequences) and not 0 <= int(self.sequences.min()) <= int(self.sequences.max()) < count:
            raise ValueError(f"sequences: expected numbers from 0 to {count - 1}, got {self.sequences.tolist()}")
        self.choices, self.next = choices, 0
        self.starts = choices.lengths.cumsum(0) - choices.lengths
        self.ids: dict[str, Tensor] = {}
        for key, layer in choices.layers.items():
            classes = num_classes[key.partition("#")[0]]
            if classes is not None and classes < layer.num_classes:
                raise ValueError(f"choices: expected {classes} classes in {key}, got {layer.num_classes}")
            self.ids[key] = layer.topk_ids().long()
        self.forwards: list[_Forward] = []
        self.current = torch.zeros(0, dtype=torch.int64)  # sequences of the last call
        self.filled = torch.zeros(0, dtype=torch.int64)

    def begin(self, batch: Batch) -> None:
        """Finds the record's row of each token. Raises ValueError if there is none."""
        if not batch.continues:
            self._take(batch.num_sequences)
        elif len(self.current) != batch.num_sequences:
            raise ValueError(f"past_key_values: expected {len(self.current)} sequences, got {batch.num_sequences}")
        real, within = batch.real.cpu(), batch.sequence.cpu()
        within = torch.where(real, within, 0)
        position = self.filled[within] + batch.order().cpu()
        self.filled = self.filled + batch.lengths().cpu()
        sequence = self.current[within]
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
        self.forwards = [*self.forwards[1 - _FORWARDS :], _Forward(rows.to(batch.real.device))]

    def _take(self, count: int) -> None:
        if self.next == len(self.sequences):
            self.next = 0
        if self.next + count > len(self.sequences):
            left = len(self.sequences) - self.next
            raise ValueError(f"model: expected at most {left} more sequences of the record, got {count}")
        self.current = self.sequences[self.next : self.next + count]
        self.filled = torch.zeros(count, dtype=torch.int64)
        self.next += count

    def choice(self, name: str, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """(ids [T,K] int64, whether a token is recorded [T]) for this call of a layer."""
        forward, key = self._call(name, router_logits)
        ids = self.ids[key]
        if ids.device != router_logits.device:
            ids = self.ids[key] = ids.to(router_logits.device)
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
        if _is_recomputing():
            return self._repeated(name, seen, len(router_logits))
        forward = self.forwards[-1]
        key = _key(name, forward.calls[name])
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
    manner: Any  # weigh(router_logits, ids)

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        own = self.select(router_logits, context, bias)
        ids, known = self.state.choice(self.name, own.router_logits)
        width = max(ids.shape[1], own.topk_ids.shape[1])
        ids = pad(ids, (0, width - ids.shape[1]), value=-1)
        own_ids = pad(own.topk_ids.long(), (0, width - own.topk_ids.shape[1]), value=-1)
        own_weights = pad(own.topk_weights, (0, width - own.topk_weights.shape[1]))
        ids = torch.where(known[:, None], ids, own_ids)
        same = (ids == own_ids).all(1, keepdim=True)
        weights = self.manner.weigh(own.router_logits, ids).to(own_weights.dtype)
        weights = torch.where(same, own_weights, weights)
        return own._replace(topk_ids=ids.to(own.topk_ids.dtype), topk_weights=weights)


# ---- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A router of ours, or a block of Hugging Face."""

    name: str
    router: Router | None
    block: Any

    @property
    def num_classes(self) -> int | None:
        """None if only the logits tell."""
        return None if self.router is None else self.router.num_experts

    def manner(self) -> Any:
        """What weighs any choice as the router does. Raises ValueError if there is none."""
        if self.router is not None:
            return _RouterManner.of(self.name, self.router)
        from switchgear.integrations.routers import manner_of

        return manner_of(self.block)

    @contextmanager
    def overridden(self, wrapper: Callable[[Select], Select], manner: Any) -> Iterator[None]:
        if self.router is None:
            from switchgear.integrations.choices import overridden

            with overridden(self.block, manner, wrapper):
                yield
            return
        from switchgear.routing.interventions import overridden_router

        with overridden_router(self.router, wrapper):
            yield


@dataclass(frozen=True)
class _RouterManner:
    """The weights of our selections that follow from scores: score_function, normalize, scale."""

    score_function: str
    normalize: bool
    scale: float

    def weigh(self, router_logits: Tensor, ids: Tensor) -> Tensor:
        weights = scores_of(router_logits, self.score_function).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
        return (normalized(weights) if self.normalize else weights) * self.scale

    @classmethod
    @torch.no_grad()
    def of(cls, name: str, router: Router) -> _RouterManner:
        """Verified on random logits, with the router's own selection."""
        select: Any = router.selection()
        while not hasattr(select, "score_function") and hasattr(select, "select"):
            select = select.select
        manner = cls(
            str(getattr(select, "score_function", "softmax")), bool(getattr(select, "normalize", False)),
            float(getattr(select, "scale", 1.0)),
        )  # fmt: skip
        device = next((p.device for p in router.parameters()), torch.device("cpu"))
        logits = torch.randn(64, router.num_experts, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                routing = router.selection()(logits, Context(training=router.training), router.e_score_correction_bias)
            weights = manner.weigh(routing.router_logits, routing.topk_ids.long())
            # Both are sums and quotients of a few float32 numbers.
            right = torch.allclose(weights, routing.topk_weights.float(), rtol=1e-5, atol=1e-7)
            right = right and torch.equal(routing.router_logits, logits)
        except (ValueError, RuntimeError):  # it needs a context
            right = False
        if not right:
            raise ValueError(
                f"{name}: expected a selection whose weights are scores of the choice, got {type(select).__name__}"
            )
        return manner


def _sources(model: nn.Module, layers: Collection[str] | None) -> dict[str, _Source]:
    from switchgear.trace.observe import pick, traceable

    check_module("model", model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder alone, got {type(model).__name__}")
    found = {name: _Source(name, s.router, s.block) for name, s in pick(traceable(model), layers).items()}
    for name, source in found.items():
        if source.router is not None and source.router.capacity is not None:
            raise ValueError(f"{name}: expected a router without a capacity limit, got {source.router.capacity}")
    return found


@contextmanager
def _heard(source: _Source, function: Callable[[Tensor, int], None]) -> Iterator[None]:
    """Inside the block, function(topk_ids [T,K], num_classes) is called at each choice that is not repeated."""
    if source.router is not None:

        def hook(router: nn.Module, args: Any, routing: Routing) -> None:
            if not _is_recomputing():
                function(routing.topk_ids, routing.num_experts)

        handle = source.router.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        return
    from switchgear.integrations.choices import Choice, watched

    def see(choice: Choice) -> None:
        if not _is_recomputing():
            classes = source.block.num_experts
            if choice.router_logits is not None:
                classes = max(classes, choice.router_logits.shape[1])
            function(choice.topk_ids, classes)

    with watched(source.block, see):
        yield


def _is_recomputing() -> bool:
    from switchgear.trace.observe import is_recomputing

    return is_recomputing()


def _key(name: str, repeat: int) -> str:
    return name if not repeat else f"{name}#{repeat}"
