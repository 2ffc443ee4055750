# SPDX-License-Identifier: BSD-3-Clause
"""Operands of parameters that may be sharded (torch's DTensor), without an import of torch.distributed for others."""

from __future__ import annotations

from torch import Tensor


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, for operations with `like`."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    whole: Tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the placements of `like`."""
    placements = getattr(like, "placements", None)
    if placements is None:
        return tensor
    moved: Tensor = tensor.redistribute(placements=placements)  # type: ignore[attr-defined]
    return moved
