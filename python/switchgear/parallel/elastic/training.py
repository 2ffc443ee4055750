# SPDX-License-Identifier: BSD-3-Clause
"""Training: what an elastic training consists of, and what of it moves with the experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from switchgear.files import AnyPath
from switchgear.parallel import checkpoint
from switchgear.parallel.elastic.membership import Membership
from switchgear.parallel.experts import ParallelExperts, expert_parameters
from switchgear.parallel.group import ExpertParallel
from switchgear.reference import check_choice
from switchgear.weights import stored_of
from switchgear.weights.adapted import has_adapters

Lost = dict[str, tuple[int, ...]]  # experts by layer


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
    on_failure: str = "raise"
    checkpoint: AnyPath | None = None
    lost: str = "reroute"
    num_replicas: int = 0
    max_norm: float | None = None
    extra: Sequence[Stateful] = ()
    on_change: Callable[[Regrouped], None] = _ignore
    parallel: ExpertParallel = field(init=False)

    def __post_init__(self) -> None:
        check_choice("on_failure", self.on_failure, ("raise", "continue"))
        check_choice("lost", self.lost, ("reroute", "empty"))
        object.__setattr__(self, "parallel", _parallel_of(self.model))
        check_replicas(self.parallel, self.num_replicas)
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm: expected None or a number above 0, got {self.max_norm}")
        row_keys(self, parallel_experts(self.model))
        if not self.membership.empty and self.parallel.rank == 0:
            self.membership.publish(structure(self))

    @property
    def membership(self) -> Membership:
        """Who takes part, and how many changes have been applied."""
        return self.parallel.membership

    @property
    def steps(self) -> int:
        """Steps of the optimizer so far."""
        return self.membership.steps


def parallel_experts(model: nn.Module) -> dict[str, ParallelExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelExperts)}


def row_keys(training: Training, layers: dict[str, ParallelExperts]) -> list[list[str]]:
    """(layer, parameter, state) of all tensors with a row per expert; the state "" is the parameter itself. Raises
    ValueError for a state of experts that can neither move nor stay."""
    found = []
    for name, module in layers.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            state = training.optimizer.state.get(parameter, {})
            found.append([name, parameter_name, ""])
            rows = checkpoint.row_states(f"{name}.{parameter_name}".lstrip("."), parameter, state)
            found += [[name, parameter_name, key] for key in sorted(rows)]
    return found


def check_replicas(parallel: ExpertParallel, num_replicas: int) -> None:
    if num_replicas < 0:
        raise ValueError(f"num_replicas: expected 0 or more, got {num_replicas}")
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


def structure(training: Training) -> dict[str, Any]:
    """What must be equal for a process to join, of JSON's types."""
    experts = expert_parameters(training.model)
    found: dict[str, Any] = {"optimizer": type(training.optimizer).__name__}
    for name, tensor in training.model.state_dict().items():
        found[name] = [str(tensor.dtype), list(tensor.shape[1:] if name in experts else tensor.shape)]
    for name, module in parallel_experts(training.model).items():
        found[f"{name}: experts"] = module.num_experts
    return found
