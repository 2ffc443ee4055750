# SPDX-License-Identifier: BSD-3-Clause
"""Training that continues when ranks are lost and when others join, and that moves experts between steps.

    training = Training(model, optimizer, on_failure="continue", checkpoint=folder)
    while training.steps < 1000:
        loss = elastic_step(training, lambda: loss_and_backward(training.steps))

A step of the optimizer is applied on all ranks or on none, and so is a move of experts (membership.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from switchgear.checks import Count, PositiveOrInf, checked
from switchgear.files import AnyPath
from switchgear.parallel.errors import ExpertParallelError
from switchgear.parallel.experts import expert_parameters
from switchgear.parallel.group import ExpertParallel
from switchgear.parallel.membership import Membership
from switchgear.parallel.moves import Lost, Moved, agree, average, gather, parallel_experts, redistribute, row_keys
from switchgear.parallel.placement import Placement, place_experts
from switchgear.routing.counting import kept_counts
from switchgear.weights import stored_of
from switchgear.weights.adapted import has_adapters


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Regrouped:
    """A change of ranks or of placements: how many ranks there are now, and what it took."""

    generation: int
    step: int  # the next one
    ranks: int
    left: tuple[int, ...]  # ids of members; the first ones are their ranks
    joined: tuple[int, ...]
    bytes: int  # moved, over all ranks
    restored: Lost  # experts read from the checkpoint, by layer
    lost: Lost
    seconds: float


def _ignore(change: Regrouped) -> None:
    """Does nothing; the default of on_change."""


@checked
@dataclass(frozen=True)
class Training:
    """What a training consists of, and what to do when ranks are lost.

    Args:
        model: its experts are distributed by one ExpertParallel; everything else is equal on all ranks, without
            DistributedDataParallel: `elastic_step` averages the gradients.
        optimizer: of the model's parameters. Its state per parameter is moved with the experts.
        on_failure: "raise" the ExpertParallelError, or "continue" with the remaining ranks.
        checkpoint: a folder of switchgear.parallel.checkpoint.save, for experts that had no copy.
        lost: what happens to tokens of experts that had neither: "reroute" to other experts, or "empty" choices.
        num_replicas: copies of experts beyond one each, kept up when ranks are lost; they move when ranks change.
        max_norm: gradients are scaled so that the norm of those of all parameters, each expert once, is at most this.
        extra: objects with state_dict and load_state_dict, such as a learning rate scheduler, for ranks that join.
        on_change: called on each rank after ranks or placements have changed.

    Raises:
        ValueError: an option out of range; experts that cannot move: stored ones, those of several widths or with
            adapters, and those with tensor parallelism; state of the optimizer that is neither a scalar nor a row per
            expert, such as Adafactor's of their biases; copies with a capacity; DistributedDataParallel in the model,
            or parameters that FSDP has sharded.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    on_failure: Literal["raise", "continue"] = "raise"
    checkpoint: AnyPath | None = None
    lost: Literal["reroute", "empty"] = "reroute"
    num_replicas: Count = 0
    max_norm: PositiveOrInf | None = None
    extra: Sequence[Stateful] = ()
    on_change: Callable[[Regrouped], None] = _ignore
    parallel: ExpertParallel = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parallel", _parallel_of(self.model))
        _refuse_copies(self.parallel, self.num_replicas)
        row_keys(self, parallel_experts(self.model))
        if not self.membership.empty and self.parallel.rank == 0:
            self.membership.publish(_structure(self))

    @property
    def membership(self) -> Membership:
        """Who takes part, and how many changes have been applied."""
        return self.parallel.membership

    @property
    def steps(self) -> int:
        """Steps of the optimizer so far."""
        return self.membership.steps


def _refuse_copies(parallel: ExpertParallel, num_replicas: int) -> None:
    if num_replicas and parallel.capacity is not None:
        raise ValueError(f"num_replicas: expected 0 with a capacity, got {num_replicas}")


def _parallel_of(model: nn.Module) -> ExpertParallel:
    layers = parallel_experts(model)
    found = {id(module.parallel): module.parallel for module in layers.values()}
    if len(found) != 1:
        raise ValueError(f"model: expected experts that one ExpertParallel distributes, got {len(found)} of them")
    parallel = next(iter(found.values()))
    for name, module in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if stored_of(module) is not None or has_adapters(module) or hasattr(parent, "num_slices"):
            raise ValueError(f"model: expected plain experts of one width without adapters, got others in {name}")
    if len(parallel.twins) != parallel.size:
        raise ValueError("model: expected an ExpertParallel without tp_group, got one with it")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("model: expected one without DistributedDataParallel, got one with it")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"model: expected parameters that are not sharded, got the DTensor {name}")
    return parallel


def _structure(training: Training) -> dict[str, Any]:
    """What must be equal for a process to join, of JSON's types."""
    experts = expert_parameters(training.model)
    found: dict[str, Any] = {"optimizer": type(training.optimizer).__name__}
    for name, tensor in training.model.state_dict().items():
        found[name] = [str(tensor.dtype), list(tensor.shape[1:] if name in experts else tensor.shape)]
    for name, module in parallel_experts(training.model).items():
        found[f"{name}: experts"] = module.num_experts
    return found


# ---- steps -----------------------------------------------------------------------------------------------------------


def elastic_step(training: Training, closure: Callable[[], Tensor]) -> Tensor:
    """One step of training, on all ranks or on none. Returns the closure's loss.

    closure: runs forward and backward, and returns the loss. It is called again if a rank is lost before the step is
    applied, then with other values of parallel.rank and parallel.size; what routers and controllers counted in the
    first call is taken back. Gradients of parameters other than experts are averaged over the ranks.

    With on_failure="continue", ranks that want to join are let in after the step, and this rank joins again if the
    others have gone on without it, for instance since it was stopped.

    Raises:
        ValueError: the optimizer's state, which its first step makes, cannot move with the experts (see Training).
    """
    parallel, membership = training.parallel, training.membership
    row_keys(training, parallel_experts(training.model))  # before a rank is lost, which it would stop
    begun = membership.steps
    while True:
        uncount = kept_counts(training.model)
        try:
            training.optimizer.zero_grad()
            loss = closure().detach()
            gradients = _gradients(training)
            agree(parallel, "gradients", list(gradients))
            average(parallel, list(gradients.values()))
            _clip(training)
            looks = parallel.rank == 0 and training.on_failure == "continue"
            waiting = commit(training, "step", lambda: _apply(training), membership.num_waiting() if looks else 0)
        except ExpertParallelError as error:
            recount = kept_counts(training.model)
            uncount()  # before a join, which brings the buffers of the others
            if training.on_failure == "raise" or error.kind == "disagrees":
                raise
        else:
            if waiting:
                _change_ranks(training)
            return loss
        # The traceback, and with it the graph of the failed step, is gone here.
        change = shrink(training)
        if membership.id in change.joined:
            begun = membership.steps
        if membership.steps > begun:
            recount()
            return loss


def shrink(training: Training) -> Regrouped:
    """After an ExpertParallelError: the ranks that remain agree on who they are, connect, and share the experts anew.
    A step that another rank has applied is applied here too: see training.steps. All remaining ranks call it; processes
    that wait to join are let in.

    Raises:
        ExpertParallelError: with on_failure="raise", if the others have gone on without this rank; it may `join`.
    """
    if training.parallel.membership.empty:
        return join(training)
    return _change_ranks(training)


def join(training: Training, timeout: float | None = None) -> Regrouped:
    """Lets this process take part in a running training: waits for the end of a step, then receives its share of
    the experts and everything else. Its ExpertParallel was made with outside=True.

    Args:
        timeout: seconds to wait for the others; that of ExpertParallel if None.

    Raises:
        ExpertParallelError: they have not let it in.
        ValueError: the model or the optimizer differs from theirs; nothing has changed.
    """
    parallel, membership = training.parallel, training.membership
    if not membership.empty:
        raise ValueError("training: expected an ExpertParallel outside, got one of a group")
    timeout = parallel.timeout if timeout is None else timeout
    theirs, own = membership.published(timeout), _structure(training)
    for name in [*theirs, *own]:
        if theirs.get(name) != own.get(name):
            raise ValueError(f"{name}: expected {theirs.get(name)} as the other ranks have, got {own.get(name)}")
    begin = time.monotonic()
    membership.join(timeout)
    before = tuple(member.id for member in membership.generation.members if not member.empty)
    return _settle(training, begin, before)


@checked
def rebalance(training: Training, load: Any, *, num_replicas: Count | None = None) -> Regrouped:
    """Places the experts by their load, and moves them between two steps. Collective; results keep their bits where
    those of an exchange do not depend on the placement.

    Args:
        load: [E] tokens of each expert on this rank, by name of the layer; or a RoutingTrace of the model. The loads
            of all ranks are added.
        num_replicas: copies beyond one per expert; training.num_replicas if None.

    Raises:
        ValueError: the load of a layer is missing, or has another number of experts; copies with a capacity.
        ExpertParallelError: a rank is lost. After `shrink`, the experts have moved on all ranks or on none.
    """
    begin, parallel = time.monotonic(), training.parallel
    replicas = training.num_replicas if num_replicas is None else num_replicas
    _refuse_copies(parallel, replicas)
    own = _loads(training, load)
    wanted: dict[str, Placement] = {}
    shares: list[dict[str, list[float]]] = gather(parallel, "move", own)
    for name in own:
        total = torch.tensor([share[name] for share in shares], dtype=torch.float64).sum(0)
        wanted[name] = place_experts(total, parallel.size, num_replicas=min(replicas, len(total) * (parallel.size - 1)))
    moved = redistribute(training, partial(commit, training, "move"), wanted)
    return _report(training, begin, training.membership.generation.ids, moved)


def commit(training: Training, what: str, apply: Callable[[], None], number: int = 0) -> int:
    """Applies a prepared change once all ranks have prepared it. Returns the largest of their numbers."""
    membership = training.membership
    membership.prepare(apply)
    numbers = agree(training.parallel, "commit", (what, membership.done), number)
    membership.commit()
    return max(numbers)


# ---- parts -----------------------------------------------------------------------------------------------------------


def _apply(training: Training) -> None:
    training.optimizer.step()
    training.membership.steps += 1


def _gradients(training: Training) -> dict[str, Tensor]:
    """Those to average: experts' already cover the tokens of all ranks."""
    experts = expert_parameters(training.model)
    return {
        name: parameter.grad
        for name, parameter in training.model.named_parameters()
        if parameter.grad is not None and name not in experts
    }


def _clip(training: Training) -> None:
    """Like clip_grad_norm_, which would see the experts of one rank only. All ranks scale by the same number."""
    if training.max_norm is None:
        return
    rank, squares = training.parallel.rank, 0.0
    for gradient in _gradients(training).values() if rank == 0 else ():
        squares += float(gradient.double().square().sum())
    for module in parallel_experts(training.model).values():
        first = [place for place, expert in enumerate(module._mine) if module.placement.owners[expert][0] == rank]
        for parameter in module.parameters():
            if parameter.grad is not None:
                squares += float(parameter.grad[first].double().square().sum())
    total = math.sqrt(math.fsum(gather(training.parallel, "gradients", squares)))
    if total > training.max_norm:
        for parameter in training.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(training.max_norm / total)


def _change_ranks(training: Training) -> Regrouped:
    """The next generation, with whoever is here and whoever wants to join."""
    begin, before = time.monotonic(), training.membership.generation.ids
    return _settle(training, begin, before) if _agree(training) else _excluded(training)


def _agree(training: Training) -> bool:
    """Whether this process is in the next generation."""
    parallel, membership = training.parallel, training.membership
    # Members that have not noticed a failure yet, or wait for a step of construction to end, take up to the timeout.
    membership.agree(parallel.gone, 2 * parallel.timeout)
    return membership.rank() >= 0


def _excluded(training: Training) -> Regrouped:
    training.parallel.leave()
    if training.on_failure == "raise":
        training.membership.fail("stalled", "the others have gone on without it")
    return join(training, 4 * training.parallel.timeout)  # the others may have to agree more than once


def _settle(training: Training, begin: float, before: tuple[int, ...]) -> Regrouped:
    """Connects the generation that was agreed on, and shares the experts; with another one if a rank is lost."""
    parallel, membership = training.parallel, training.membership
    attempts = 2 + len(membership.generation.members)
    while True:
        membership.settle()
        try:
            parallel.move()
            moved = redistribute(training, partial(commit, training, "move"))
            return _report(training, begin, before, moved)
        except ExpertParallelError as error:
            attempts -= 1
            if not attempts or error.rank < 0:
                raise
        if not _agree(training):
            return _excluded(training)


def _report(training: Training, begin: float, before: tuple[int, ...], moved: Moved) -> Regrouped:
    membership = training.membership
    now = membership.generation.ids
    change = Regrouped(
        membership.generation.number, membership.steps, len(now),
        tuple(sorted(set(before) - set(now))), tuple(sorted(set(now) - set(before))),
        moved.bytes, moved.restored, moved.lost, time.monotonic() - begin,
    )  # fmt: skip
    training.on_change(change)
    return change


def _loads(training: Training, load: Any) -> dict[str, list[float]]:
    layers = parallel_experts(training.model)
    if not isinstance(load, Mapping):  # a RoutingTrace has a layer per router, beside the experts
        load = {name.removesuffix("gate") + "experts": layer.tokens_per_expert for name, layer in load.layers.items()}
    loads = {}
    for name, module in layers.items():
        counts = [float(value) for value in load.get(name, ())]
        if len(counts) != module.num_experts:
            raise ValueError(f"load: expected {module.num_experts} numbers for {name}, got {len(counts)}")
        loads[name] = counts
    return loads
