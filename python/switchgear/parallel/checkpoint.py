# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of distributed experts, in torch.distributed.checkpoint; the number of ranks may differ between runs.

Each expert is a separate entry: row e of "layer.experts.gate_up_proj" is called "layer.experts.gate_up_proj[e]". So a
checkpoint is independent of ranks, and each rank reads and writes only its own experts, in place. Layers without
`parallel` use the same format. `load_whole` returns the layout of Hugging Face, [E, ...] under plain names.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import pickle
import pickletools
import re
import secrets
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from switchgear.experts import Experts
from switchgear.files import NO_ROOM, AnyPath, DiskFull, reading
from switchgear.parallel.experts import ParallelExperts
from switchgear.utils.packages import first_line

# ---- Metadata, read without running code from it ---------------------------------------------------------------------


_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "builtins": {"getattr"},  # members of enums in Python 3.11.0 and later patches
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}  # fmt: skip


class _Record:
    """Stands for an object in the pickle: keeps what it was to be made of, and does nothing with it."""

    state: object = None

    def __new__(cls, *args: object) -> _Record:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._records: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)  # neither can be changed by a pickle
        if name not in _CLASSES.get(module, ()):
            raise ValueError(f"expected classes of torch.distributed.checkpoint, got {module}.{name}")
        key = (module, name)
        return self._records.setdefault(key, type(name, (_Record,), {}))  # its own: a pickle may set attributes of it


class Writer(FileSystemWriter):
    """Gives files names of their own, so an earlier checkpoint in the folder is whole until the new one is."""

    prefix = ""  # of this rank's files

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        name = secrets.token_hex(6)
        prefixes = (_StoragePrefix(f"__{rank}_{name}_") for rank in range(len(plans)))
        return [replace(plan, storage_data=prefix) for plan, prefix in zip(plans, prefixes, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.prefix = plan.storage_data.prefix
        return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        folder = Path(self.path)
        (folder / ".metadata.tmp").unlink(missing_ok=True)  # torch writes through a link
        super().finish(metadata, results)
        files = {result.storage_data.relative_path for part in results for result in part}
        for file in folder.glob("__*.distcp"):
            if file.name not in files:
                file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes what this rank has written."""
        (Path(self.path) / ".metadata.tmp").unlink(missing_ok=True)
        for file in Path(self.path).glob(f"{self.prefix}*.distcp") if self.prefix else ():
            file.unlink(missing_ok=True)


class Reader(FileSystemReader):
    """Reads the tensors of a checkpoint whose metadata was read by `read_metadata`."""

    def __init__(self, path: AnyPath, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(path: AnyPath) -> Metadata:
    """Raises:
    ValueError: it is not the metadata of a checkpoint, names anything else, or does not fit the files beside it.
    """
    file = Path(path) / ".metadata"
    with reading(file) as opened:
        data = opened.read()
    try:
        _check_sizes(data)
        return _metadata(_Unpickler(data).load(), Path(path))
    except Exception as error:  # a damaged pickle may raise any
        is_ours = isinstance(error, ValueError) and "expected" in str(error)
        text = str(error) if is_ours else f"expected a checkpoint, got {type(error).__name__}: {error}"
        raise ValueError(f"{file}: {text}") from error


def _check_sizes(data: bytes) -> None:
    """A few bytes of a pickle can make Python's unpickler allocate all memory: as a length, which pickletools checks
    against the file, or as an index of the memo, an array of up to 2^32 pointers. Picklers count from 0."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > len(data):
            raise ValueError(f"expected a memo of at most {len(data)} entries, got the index {argument}")


def _metadata(root: object, folder: Path) -> Metadata:
    fields = _fields(root, "Metadata")
    storage = _storage(fields["storage_data"], folder)
    stored = _typed("state_dict_metadata", fields["state_dict_metadata"], dict)
    entries = {_typed("names", name, str): _entry(name, entry, storage) for name, entry in stored.items()}
    return Metadata(entries, storage_data=storage, storage_meta=StorageMeta())


def _storage(stored: object, folder: Path) -> dict[MetadataIndex, _StorageInfo]:
    """Where the bytes of each chunk are."""
    storage = {}
    sizes: dict[str, int] = {}
    for key, value in _typed("storage_data", stored, dict).items():
        index, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        name, offset = _typed("names", index["fqn"], str), index.get("offset")
        path = _typed("relative_path", info["relative_path"], str)
        if path in ("", ".", "..") or Path(path).name != path:
            raise ValueError(f"{name}: expected a file of the checkpoint's folder, got {path!r}")
        if info.get("transform_descriptors"):
            raise ValueError(f"{name}: expected no transformed data, got {info['transform_descriptors']!r}")
        if path not in sizes:
            if not (folder / path).is_file():
                raise ValueError(f"{name}: expected the file {path}, got none")
            sizes[path] = (folder / path).stat().st_size
        (begin, length) = _numbers(name, (info["offset"], info["length"]))
        if begin + length > sizes[path]:
            raise ValueError(f"{name}: expected {begin + length} bytes in {path}, got {sizes[path]}")
        storage[MetadataIndex(name, None if offset is None else _numbers(name, offset))] = _StorageInfo(
            path, begin, length
        )
    return storage


def _entry(
    name: str, entry: object, storage: Mapping[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    properties = getattr(fields["properties"], "state", None)
    dtype = _typed(name, _typed(name, properties, tuple)[0], torch.dtype)
    size = _numbers(name, fields["size"])
    chunks = []
    for chunk in _typed(name, fields["chunks"], list):
        part = _fields(chunk, "ChunkStorageMetadata")
        offsets, lengths = _numbers(name, part["offsets"]), _numbers(name, part["sizes"])
        if len(offsets) != len(size) or any(o + n > s for o, n, s in zip(offsets, lengths, size, strict=True)):
            raise ValueError(f"{name}: expected chunks of {list(size)}, got {list(lengths)} at {list(offsets)}")
        info = storage.get(MetadataIndex(name, offsets))
        needed = math.prod(lengths) * dtype.itemsize
        if info is None or info.length < needed:
            raise ValueError(f"{name}: expected {needed} bytes, got {info.length if info else 'none'}")
        chunks.append(ChunkStorageMetadata(offsets, lengths))
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(size) or len({chunk.offsets for chunk in chunks}) != len(chunks):
        raise ValueError(f"{name}: expected chunks of {math.prod(size)} elements, got {covered}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _fields(record: object, name: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != name or not isinstance(record.state, dict):
        raise ValueError(f"expected a {name}, got {type(record).__name__}")
    return record.state


def _typed(name: str, value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _numbers(name: str, values: object) -> torch.Size:
    numbers = _typed(name, values, tuple)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{name}: expected sizes of at least 0, got {numbers}")
    return torch.Size(numbers)


# ---- Saving and loading ----------------------------------------------------------------------------------------------


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
    """Writes a checkpoint into the folder `path`, collectively over process_group. Replicas are written once. An
    earlier checkpoint there is replaced when the new one is complete.

    Raises:
        ValueError: as `state_dict`. DiskFull: a rank has no room. OSError: a rank cannot write for another reason. An
            earlier checkpoint is whole then.
    """
    entries, writer = state_dict(model, optimizer), Writer(path)
    try:
        with _quietly_alone() as alone:
            save_tensors(entries, storage_writer=writer, process_group=process_group, no_dist=alone)
    except BaseException as error:
        writer.discard()
        if not isinstance(error, CheckpointException):
            raise
        rank, (first, _) = next(iter(error.failures.items()))
        number = getattr(first, "errno", None) or errno.EIO
        kind = DiskFull if number in NO_ROOM else OSError
        raise kind(number, f"rank {rank}: {first_line(first)}", str(path)) from error


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
        _compare(wanted, metadata.state_dict_metadata)
        _refuse_others(model, wanted, metadata.state_dict_metadata, has_optimizer=optimizer is not None)
    except ValueError:
        if optimizer is not None and not had_state:
            optimizer.state.clear()
        raise
    _read(wanted, path, metadata, dist.is_initialized(), process_group)


def load_entries(entries: dict[str, Tensor], path: AnyPath) -> None:
    """Reads these entries of a checkpoint in place, on this process alone. Names and shapes are those of `state_dict`.

    Raises:
        ValueError: as `load`; in that case nothing is read, unless a file is damaged.
    """
    metadata = read_metadata(path)
    _compare(entries, metadata.state_dict_metadata)
    _read(entries, path, metadata)


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
    _read(tensors, path, metadata)
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
    """Yields whether this process is the only one, and silences torch's warnings about it, and about a
    checkpoint that is replaced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        yield not dist.is_initialized()


def _read(
    tensors: dict[str, Tensor], path: AnyPath, metadata: Metadata, is_collective: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> None:  # fmt: skip
    reader = Reader(path, metadata)
    try:
        with _quietly_alone():
            load_tensors(tensors, storage_reader=reader, process_group=process_group, no_dist=not is_collective)
    except CheckpointException as failure:  # on any rank; a BaseException, which `except Exception` misses
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


def _tensor_of(name: str, entry: object) -> TensorStorageMetadata:
    if not isinstance(entry, TensorStorageMetadata):
        raise ValueError(f"{name}: expected a tensor in the checkpoint, got bytes")  # a pickle
    return entry


def _refuse_others(model: nn.Module, wanted: dict[str, Tensor], stored: dict[str, Any], has_optimizer: bool) -> None:
    """Raises ValueError if the checkpoint has tensors that nothing reads."""
    experts = {
        f"{prefix}{name}": module.num_experts
        for prefix, module in _layers(model).items()
        for name, _ in module.named_parameters(recurse=False)
    }
    for name in stored:
        found = _ENTRY.fullmatch(name)
        if found is not None:
            count = experts.get(found[1].removeprefix("optimizer/").split("/")[0], 0)
            if int(found[2]) >= count:
                raise ValueError(f"{name}: expected {count} experts, got one more")
        elif not name.startswith("optimizer/") and name not in wanted:
            raise ValueError(f"{name}: expected none in the checkpoint, got one")
    states = next((name for name in stored if name.startswith("optimizer/")), None)
    if has_optimizer and states is not None and not any(name.startswith("optimizer/") for name in wanted):
        raise ValueError(f"{states}: expected none in the checkpoint for an optimizer without state, got one")


def _compare(wanted: dict[str, Tensor], stored: dict[str, Any]) -> None:
    for name, tensor in wanted.items():
        if name not in stored:
            raise ValueError(f"{name}: expected in the checkpoint, got none")
        entry = _tensor_of(name, stored[name])
        if tuple(entry.size) != tuple(tensor.shape) or entry.properties.dtype is not tensor.dtype:
            raise ValueError(
                f"{name}: expected {tensor.dtype} {list(tensor.shape)}, got {entry.properties.dtype} {list(entry.size)}"
            )
