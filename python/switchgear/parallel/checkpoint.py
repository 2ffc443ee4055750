# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of distributed experts, in torch.distributed.checkpoint; the number of ranks may differ between runs.

Each expert is a separate entry: row e of "layer.experts.gate_up_proj" is called "layer.experts.gate_up_proj[e]". So a
checkpoint is independent of ranks, and each rank reads and writes only its own experts, in place. Layers without
`parallel` use the same format. `load_whole` returns the layout of Hugging Face, [E, ...] under plain names.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor

from switchgear.complaints import first_line
from switchgear.experts import Experts
from switchgear.files import AnyPath
from switchgear.parallel.checkpoint_metadata import Reader, read_metadata
from switchgear.parallel.experts import ParallelExperts

_ENTRY = re.compile(r"(.*)\[(0|[1-9][0-9]{0,8})\]")
_WRAPPED = "_checkpoint_wrapped_module."  # torch's wrapper of activation checkpointing leaves it out of state dicts


def state_dict(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """What `save` writes and `load` fills: tensors that share memory with the model's and the optimizer's. Each expert
    is one entry. The optimizer's state is called "optimizer/<parameter>/<name>"; all of it must be tensors.

    Raises:
        ValueError: experts that are DTensors, distributed experts that are stored or parametrized, an optimizer with
            state of some parameters only, or with state of experts that is neither a scalar nor a row per expert.
    """
    layers = _layers(model)
    distributed = tuple(prefix for prefix, module in layers.items() if isinstance(module, ParallelExperts))
    experts = {f"{prefix}{name}": _ids(module) for prefix, module in layers.items()
               for name, _ in module.named_parameters(recurse=False)}  # fmt: skip
    entries: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor, ids: tuple[int, ...] | None) -> None:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        tensor = tensor.detach()
        if ids is None:
            entries[name] = tensor
            return
        if isinstance(tensor, DTensor) or len(tensor) != len(ids):
            what = "a DTensor" if isinstance(tensor, DTensor) else f"shape {list(tensor.shape)}"
            raise ValueError(f"{name}: expected the plain weights of {len(ids)} experts, got {what}")
        entries.update({f"{name}[{expert}]": tensor[number] for number, expert in enumerate(ids)})

    for name, tensor in model.state_dict().items():
        if name not in experts and name.startswith(distributed):  # one name for what each rank has of its own
            raise ValueError(
                f"{name}: expected plain weights of distributed experts, got stored or parametrized ones; call "
                "switchgear.restore(model) first, or remove the parametrization"
            )
        add(name, tensor, experts.get(name))
    if optimizer is not None:
        has_state = any(optimizer.state.values())
        for name, parameter in model.named_parameters():
            name = name.replace(_WRAPPED, "")
            state = optimizer.state.get(parameter)
            if parameter.requires_grad and has_state and not state:
                raise ValueError(f"optimizer: expected a state of {name}, got none; see init_optimizer")
            ids = experts.get(name)
            rows = () if ids is None else row_states(name, parameter, state or {})
            for key, value in (state or {}).items():
                add(f"optimizer/{name}/{key}", value, ids if key in rows else None)
    return entries


def row_states(name: str, parameter: Tensor, state: Mapping[str, Any]) -> list[str]:
    """The parts of an optimizer's state that have a row per expert, as the parameter `name` of experts has.

    Raises:
        ValueError: another part has several numbers, or is a mean over experts, such as Adafactor's of biases.
    """
    found = []
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        fits = value.dim() == parameter.dim() and len(value) == len(parameter)
        # With one expert here, a mean over the experts of their biases has a bias's shape; means of biases go with it.
        is_mean = fits and parameter.dim() == 2 and len(parameter) == 1 and value.shape != parameter.shape
        if is_mean or (value.numel() > 1 and not fits):
            got = f"shape {list(value.shape)} for a parameter of {list(parameter.shape)}"
            raise ValueError(f"optimizer/{name}/{key}: expected a scalar or a row per expert, got {got}")
        if fits:
            found.append(key)
    return found


def init_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state of a new optimizer, for `load` to fill, by a step with zero gradients and learning rate."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(optimizer.state.get(parameter) for parameter in parameters):
        return
    grads = [parameter.grad for parameter in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def save(
    model: nn.Module, path: AnyPath, optimizer: torch.optim.Optimizer | None = None, *,
    process_group: dist.ProcessGroup | None = None,
) -> None:  # fmt: skip
    """Writes a checkpoint into the folder `path`, collectively over process_group. Replicas are written once."""
    with _quietly_alone() as alone:
        save_tensors(state_dict(model, optimizer), checkpoint_id=path, process_group=process_group, no_dist=alone)


def load(
    model: nn.Module, path: AnyPath, optimizer: torch.optim.Optimizer | None = None, *,
    process_group: dist.ProcessGroup | None = None,
) -> None:  # fmt: skip
    """Reads a checkpoint of the same model in place, whatever the number of ranks that wrote it. Runs no code from it.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape or dtype, or the metadata is not to be trusted;
            in that case nothing is read. Or a file with tensors is damaged; those read before stay in the model.
    """
    metadata = read_metadata(path)
    had_state = optimizer is None or bool(optimizer.state)
    if optimizer is not None:
        init_optimizer(optimizer)
    try:
        wanted = state_dict(model, optimizer)
        _check(wanted, metadata.state_dict_metadata, _names(model))
        if optimizer is not None:
            _check_optimizer(wanted, metadata.state_dict_metadata)
    except ValueError:
        if optimizer is not None and not had_state:
            optimizer.state.clear()
        raise
    with _quietly_alone() as alone, _naming(path):
        load_tensors(wanted, storage_reader=Reader(path, metadata), process_group=process_group, no_dist=alone)


def load_entries(entries: dict[str, Tensor], path: AnyPath) -> None:
    """Reads these entries of a checkpoint in place, on this process alone. Names and shapes are those of `state_dict`.

    Raises:
        ValueError: as `load`; in that case nothing is read, unless a file is damaged.
    """
    metadata = read_metadata(path)
    _check_found(entries, metadata.state_dict_metadata)
    with _quietly_alone(), _naming(path):
        load_tensors(entries, storage_reader=Reader(path, metadata), no_dist=True)


def load_whole(path: AnyPath) -> dict[str, Tensor]:
    """All tensors of a checkpoint except the optimizer's, on this process, in Hugging Face's layout: experts stacked to
    [E, ...] under their names. For load_state_dict of a model without `parallel`. Runs no code from the checkpoint.

    Raises:
        ValueError: an expert is missing, or differs in shape or dtype, a file is damaged, or the metadata is not to be
            trusted.
    """
    metadata = read_metadata(path)
    tensors = {}
    for name, stored in metadata.state_dict_metadata.items():
        if not name.startswith("optimizer/"):
            entry = _tensor_of(name, stored)
            tensors[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
    with _quietly_alone(), _naming(path):
        load_tensors(tensors, storage_reader=Reader(path, metadata), no_dist=True)
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = _ENTRY.fullmatch(name)
        if found is None:
            whole[name] = tensor
        else:
            parts[found[1]][int(found[2])] = tensor
    for name, experts in parts.items():
        missing = next((expert for expert in range(len(experts)) if expert not in experts), None)
        if missing is not None:
            raise ValueError(f"{name}[{missing}]: expected in the checkpoint, got experts {sorted(experts)}")
        kinds = {f"{tensor.dtype} {list(tensor.shape)}" for tensor in experts.values()}
        if len(kinds) > 1:
            raise ValueError(f"{name}: expected experts of one shape and dtype, got {', '.join(sorted(kinds))}")
        if name in whole:
            raise ValueError(f"{name}: expected either a tensor or one per expert, got both")
        whole[name] = torch.stack([experts[expert] for expert in range(len(experts))])
    return whole


@contextlib.contextmanager
def _quietly_alone() -> Iterator[bool]:
    """Yields whether this process is the only one, and silences torch's warning about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not dist.is_initialized()


@contextlib.contextmanager
def _naming(path: AnyPath) -> Iterator[None]:
    """What goes wrong on a rank while it reads arrives on all as a BaseException, which `except Exception` misses."""
    try:
        yield
    except CheckpointException as failure:
        rank, (error, _) = next(iter(failure.failures.items()))
        reason = f"rank {rank}: {first_line(error)}"
        raise ValueError(f"path: expected tensors that can be read in {path}, got {reason}") from failure


def _ids(module: Experts) -> tuple[int, ...]:
    """The experts of a module, by their global ids."""
    if isinstance(module, ParallelExperts):
        return module.placement.experts_of_rank[module.parallel.rank]
    return tuple(range(module.num_experts))


def _layers(model: nn.Module) -> dict[str, Experts]:
    """The modules with experts, by the prefix of their tensors in state dicts."""
    return {
        f"{name}.".lstrip(".").replace(_WRAPPED, ""): module
        for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Experts)
    }  # fmt: skip


def _names(model: nn.Module) -> dict[str, int]:
    """The number of experts that a checkpoint must have for each distributed parameter."""
    return {
        f"{prefix}{name}": module.num_experts
        for prefix, module in _layers(model).items()
        for name, _ in module.named_parameters(recurse=False)
    }


def _tensor_of(name: str, entry: object) -> TensorStorageMetadata:
    if not isinstance(entry, TensorStorageMetadata):
        raise ValueError(f"{name}: expected a tensor in the checkpoint, got bytes")  # a pickle
    return entry


def _check(wanted: dict[str, Tensor], stored: dict[str, Any], experts: dict[str, int]) -> None:
    _check_found(wanted, stored)
    for name in stored:
        found = _ENTRY.fullmatch(name)
        if found is not None:
            parameter = found[1].split("/")[1] if found[1].startswith("optimizer/") else found[1]
            if int(found[2]) >= experts.get(parameter, 0):
                raise ValueError(f"{name}: expected {experts.get(parameter, 0)} experts, got one more")
        elif not name.startswith("optimizer/") and name not in wanted:
            raise ValueError(f"{name}: expected none in the checkpoint, got one")


def _check_optimizer(wanted: dict[str, Tensor], stored: dict[str, Any]) -> None:
    found = [next((name for name in names if name.startswith("optimizer/")), None) for names in (wanted, stored)]
    if found[0] is None and found[1] is not None:
        raise ValueError(f"{found[1]}: expected none in the checkpoint for an optimizer without state, got one")


def _check_found(wanted: dict[str, Tensor], stored: dict[str, Any]) -> None:
    for name, tensor in wanted.items():
        if name not in stored:
            raise ValueError(f"{name}: expected in the checkpoint, got none")
        entry = _tensor_of(name, stored[name])
        if tuple(entry.size) != tuple(tensor.shape) or entry.properties.dtype is not tensor.dtype:
            raise ValueError(
                f"{name}: expected {tensor.dtype} {list(tensor.shape)}, got {entry.properties.dtype} {list(entry.size)}"
            )
