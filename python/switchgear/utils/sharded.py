# SPDX-License-Identifier: BSD-3-Clause
"""Parameters that may be sharded (torch's DTensor), without an import of torch.distributed for others."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def is_sharded(module: nn.Module, parameter: Tensor | None) -> bool:
    """Whether FSDP2 shards a parameter of a module. During a forward it is plain, so hooks of the module tell."""
    hooks = module._state_dict_pre_hooks.values()
    return hasattr(parameter, "device_mesh") or any("fsdp" in (getattr(h, "__module__", None) or "") for h in hooks)


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, for operations with `like`."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    whole: Tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole


def of_matrices(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """function(tensor [..., N, C]), which acts on each matrix by itself. A rank takes its own matrices, and those
    that are split among ranks."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return function(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    kept = [p if p.is_shard() and p.dim < tensor.dim() - 2 else Replicate() for p in tensor.placements]  # type: ignore[attr-defined]
    part = function(tensor.redistribute(placements=kept).to_local()).contiguous()  # type: ignore[attr-defined]
    shape, stride = tensor.shape, tensor.stride()
    result = DTensor.from_local(part, mesh, kept, run_check=False, shape=shape, stride=stride)
    placed: Tensor = result.redistribute(placements=tensor.placements)  # type: ignore[attr-defined]
    return placed
