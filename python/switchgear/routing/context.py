# SPDX-License-Identifier: BSD-3-Clause
"""The context of a routing policy, besides the tokens themselves, and the signatures of the parts of a router.

    x [T,H] ──score──► router_logits [T,E] ──select──► Routing ──capacity──► Routing       balance: Routing ──► losses

A policy combines the four. Each part is a callable with the signature below: a function, a frozen dataclass, or an
nn.Module if it has parameters or buffers (the router registers it as a submodule). A part may also be a class or a
functools.partial of one. The router then calls it, so that layers share no state; see `made`. A functools.partial of a
function with the signature below is a part itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from switchgear.checks import convert
from switchgear.functional import Routing
from switchgear.reference import check_range, check_size

if TYPE_CHECKING:
    from switchgear.routing.change import Change

Scope = Literal["batch", "sequence"]
"""Whether all tokens of a call compete, or only those of one sequence."""


class Noise(NamedTuple):
    """What a score drew, [T,E] each."""

    clean_logits: Tensor
    noisy_logits: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Context:
    """What is known about the T tokens of a call. All optional; a policy raises ValueError naming a missing one.

    Attributes:
        token_ids: [T] integers, the vocabulary ids (lookup and masked routing).
        sequence_ids: [T] integers, equal for tokens of one sequence; any values in any order.
        num_sequences: promises that sequence_ids are in [0, num_sequences), which avoids a read from the device. Of
            sequences of length 0, how many there are.
        sequence_length: for consecutive sequences of equal length; sequence_ids take precedence.
        embedding: [T,D], or [B,D] with a row per sequence: a task, domain or instance.
        importance: [T], of tokens to be protected (SkipBelow).
        generator: for all random numbers; torch's default generator if None. Activation checkpointing repeats draws of
            the default generator alone, so a layer that draws from another one raises ValueError there.
        group: a torch.distributed process group over which counts are summed; the default group, if there is one, if
            None.
        fields: by name, whatever a policy of your own needs: moe(x, fields={"previous_logits": z}).
        isolated: tokens compete only with tokens of their own sequence, whatever the scope of the policy.
        training: set by the router.
        changes: set by a router with a capacity: the interventions whose disabled experts and gains it applies after
            the capacity.
        noise: set by a router with losses in training: where a score leaves its noise for them.
    """

    token_ids: Tensor | None = None
    sequence_ids: Tensor | None = None
    num_sequences: int | None = None
    sequence_length: int | None = None
    embedding: Tensor | None = None
    importance: Tensor | None = None
    generator: torch.Generator | None = None
    group: Any = None
    fields: Mapping[str, Any] | None = None
    isolated: bool = False
    training: bool = False
    changes: list[Change] | None = None
    noise: list[Noise] | None = None

    def __post_init__(self) -> None:
        for name in ("token_ids", "sequence_ids", "embedding", "importance"):
            value = getattr(self, name)
            if value is not None:
                convert(name, value, Tensor)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator: expected torch.Generator, got {type(self.generator).__name__}")

    def source(self) -> torch.Generator | None:
        """The generator, to draw from. Raises ValueError where other numbers would come than in the forward."""
        if self.generator is not None and is_recomputing():
            raise ValueError(
                "generator: expected None under activation checkpointing, which restores the state of torch's default "
                "generator alone, got another one"
            )
        return self.generator

    def require(self, name: str, user: str) -> Any:
        """The attribute or field `name`. Raises ValueError, naming it and its user, if it is None."""
        value = (self.fields or {}).get(name, getattr(self, name, None))
        if value is None:
            raise ValueError(f"{name}: {user} needs it, got None; pass it to the layer's forward")
        return value


NOTHING_KNOWN = Context()


def context_of(**values: Any) -> Context:
    """A Context; its tensors may have the leading dimensions of hidden_states."""
    for name in ("token_ids", "sequence_ids", "importance"):
        if isinstance(values.get(name), Tensor):
            values[name] = values[name].reshape(-1)
    embedding = values.get("embedding")
    if isinstance(embedding, Tensor) and embedding.dim() > 2:
        values["embedding"] = embedding.reshape(-1, embedding.shape[-1])
    if not isinstance(values.get("fields") or {}, Mapping):
        raise TypeError(f"fields: expected a mapping from names, got {type(values['fields']).__name__}")
    try:
        return Context(**values)
    except TypeError:
        names = [field.name for field in fields(Context)]
        for name in values:
            if name not in names:
                raise TypeError(f"{name}: expected an attribute of Context ({', '.join(names)}), got another") from None
        raise


@runtime_checkable
class Score(Protocol):
    """x [T,H] -> router_logits [T,E]. A class is called as (hidden_size, num_experts, device=, dtype=)."""

    def __call__(self, x: Tensor, context: Context, /) -> Tensor: ...


@runtime_checkable
class Select(Protocol):
    """router_logits [T,E] -> Routing: topk_ids [T,K] int32 with -1 for none, topk_weights [T,K] float32.

    The only part with randomness. Selections guarantee three things: they are total (any bits in the logits give ids
    in range, distinct within a token), ties go to the lowest index, and the weights of empty choices are 0.

    `bias` [E] float32, if given, is added to the scores for the choice only and gets no gradient; -Inf excludes an
    expert and +Inf puts it first. A selection that draws adds it to the logarithm of the odds. One whose choice it
    cannot move has an attribute uses_bias = False. One that ignores the logits has uses_logits = False; under a mask
    its bias is [T,E].
    """

    def __call__(self, router_logits: Tensor, context: Context, bias: Tensor | None = None, /) -> Routing: ...


@runtime_checkable
class Limit(Protocol):
    """Routing -> Routing in which no expert exceeds its capacity (`capacity=`): some ids become -1 or another expert.
    It adds to num_dropped. Optional attribute needs_scores: it requires Routing.scores."""

    def __call__(self, routing: Routing, context: Context, /) -> Routing: ...


@runtime_checkable
class Balance(Protocol):
    """Routing -> a float32 scalar that the trainer adds to the loss, stored in Routing.losses under `name` (an
    attribute, else the name of the class or function). Called in training only.

    It sees the choice before the capacity limit (what the router wanted), and num_dropped after it. None: no loss, as
    from a controller that only counts.
    """

    def __call__(self, routing: Routing, context: Context, /) -> Tensor | None: ...


@runtime_checkable
class Controller(Protocol):
    """In place of a loss, or the same object: Router.after_step calls it once per optimizer step with the counts [E]
    int64 since the last one, summed over the processes. One that updates the selection bias
    (router.e_score_correction_bias) has an attribute needs_selection_bias = True."""

    def after_step(self, tokens_per_expert: Tensor, router: Any, /) -> None: ...


def made(part: Any, *args: Any, num_experts: int | None = None, **kwargs: Any) -> Any:
    """Calls a class, or a functools.partial of a class or of a function that takes args and kwargs, with these, and
    with num_experts if it takes that and has none yet. A dataclass gets such fields replaced by their results, at any
    depth. Anything else is returned unchanged, such as a partial of a function that is a part itself."""
    if isinstance(part, (type, functools.partial)):
        if num_experts is not None and "num_experts" in _parameters(part):
            given = part.keywords if isinstance(part, functools.partial) else {}
            kwargs = {"num_experts": given.get("num_experts") or num_experts, **kwargs}
        if isinstance(part, type) or isinstance(part.func, type) or takes(part, *args, **kwargs) is None:
            part = part(*args, **kwargs)
    inner = {name: (value, made(value, num_experts=num_experts)) for name, value in _fields(part)}
    changed = {name: result for name, (value, result) in inner.items() if result is not value}
    return replace(part, **changed) if changed else part


def _parameters(part: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(part).parameters
    except ValueError:  # a partial with an argument that its function lacks; the call says so
        return {}


def takes(part: Any, *args: Any, **kwargs: Any) -> str | None:
    """Why a callable does not take these arguments; None if it does, or does not say what it takes."""
    try:
        inspect.signature(part).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    except ValueError as error:
        return str(error) if isinstance(part, functools.partial) else None
    return None


def _fields(part: Any) -> list[tuple[str, Any]]:
    is_part = is_dataclass(part) and not isinstance(part, type)
    return [(field.name, getattr(part, field.name)) for field in fields(part)] if is_part else []


def modules_in(part: Any) -> list[nn.Module]:
    """The modules in a part: itself, or those in the fields of a dataclass (Broadcast(Masked(…)))."""
    if isinstance(part, nn.Module):
        return [part]
    return [module for _, value in _fields(part) for module in modules_in(value)]


def wrapped(select: Any) -> Iterator[Any]:
    """A selection, and those that it wraps (Masked, SkipBelow, …), from the outside in."""
    while select is not None:
        yield select
        select = getattr(select, "select", None)


def scored(select: Any) -> Any:
    """The part of a selection that has the score function: itself, or what it wraps."""
    part = select
    for part in wrapped(select):
        if hasattr(part, "score_function"):
            break
    return part


def most_experts(select: Any) -> int | None:
    """The most experts of a token that a selection itself allows, None if it has no limit."""
    limits = (getattr(part, name, None) for part in wrapped(select) for name in ("top_k", "max_experts"))
    return next((limit for limit in limits if isinstance(limit, int)), None)


def ignoring_bias(select: Any) -> str | None:
    """The name of the selection, or of one that it wraps, which ignores a selection bias; None if there is none."""
    ignoring = (part for part in wrapped(select) if not getattr(part, "uses_bias", True))
    return next((type(part).__name__.lstrip("_") for part in ignoring), None)


def groups_of(groups: int | Sequence[int] | Tensor, num_experts: int | None, name: str = "groups") -> Tensor:
    """The group of each expert, [E] int64 on the CPU. groups: that, or a number of groups of consecutive experts, whose
    sizes are as equal as possible. Errors call it `name`."""
    if not isinstance(groups, int):
        found = torch.as_tensor(groups, device="cpu").detach()
        if found.dim() != 1 or len(found) != (num_experts or len(found)):
            raise ValueError(
                f"{name}: expected the group of each of {num_experts or 'E'} experts, got {list(found.shape)}"
            )
        if found.is_floating_point() or found.dtype is torch.bool:
            raise TypeError(f"{name}: expected integers, got {found.dtype}")
        check_range(name, found, 0, 2**31)
        return found.long()
    if num_experts is None:
        raise ValueError(
            f"{name}: expected the group of each expert, or num_experts with a number of groups; got {groups} alone"
        )
    if not 1 <= groups <= num_experts:
        raise ValueError(f"{name}: expected 1 to {num_experts} (num_experts), got {groups}")
    return torch.arange(num_experts, device="cpu") * groups // num_experts


def sequences(context: Context, num_tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """The sequence of each token, [T] int64 in [0, B), and B.

    Raises ValueError if the context has none, or has another number of tokens.
    """
    if context.sequence_ids is not None:
        ids = context.sequence_ids.reshape(-1).to(device)
        if ids.shape[0] != num_tokens:
            raise ValueError(f"sequence_ids: expected {num_tokens} tokens, got {ids.shape[0]}")
        if ids.is_floating_point():
            raise TypeError(f"sequence_ids: expected integers, got {ids.dtype}")
        if context.num_sequences is not None:
            check_size("num_sequences", context.num_sequences, 0)
            if can_be_read(ids):
                check_range("sequence_ids", ids, 0, context.num_sequences)
            return ids.long(), context.num_sequences
        values, index = torch.unique(ids, return_inverse=True)
        return index, values.shape[0]
    length = context.require("sequence_length", "a policy per sequence")
    if length == num_tokens == 0:  # hidden_states [B,0,H]
        return torch.zeros(0, dtype=torch.int64, device=device), context.num_sequences or 0
    if length < 1 or num_tokens % length:
        raise ValueError(f"sequence_length: expected a divisor of {num_tokens} tokens, got {length}")
    return torch.arange(num_tokens, device=device) // length, num_tokens // length


def can_be_read(tensor: Tensor) -> bool:
    """Whether reading its values costs no synchronisation, and no graph, dispatch mode or torch.vmap would see it."""
    if not tensor.is_cpu or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._functorch.maybe_current_level() is None


def is_recomputing() -> bool:
    """Whether this call runs inside backward, where checkpointing repeats a forward that was counted already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_per_sequence(scope: str, context: Context) -> bool:
    return context.isolated or scope == "sequence"
