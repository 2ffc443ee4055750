# SPDX-License-Identifier: BSD-3-Clause
"""Transposed weights with rows along the inner dimension: the order in which the CPU's kernels read them best.

A projection [E,in,out], as gpt-oss has them, keeps its shape and gets the strides of a contiguous [E,out,in] seen
through `mT`. The kernels take any strides, so nothing else has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchgear.pages import advise_huge_pages


class Layout(NamedTuple):
    """How a module of experts holds its projections."""

    names: tuple[str, str]  # of the parameters: the first projection, the second
    transposed: bool  # they are [E,in,out] instead of [E,out,in]
    split_gates: bool  # the first holds all gates, then all ups


FINDERS: list[Callable[[nn.Module], Layout | None]] = []  # each knows a kind of module


def layout_of(module: nn.Module) -> Layout | None:
    """How a module holds plain projections that the fused kernel reads; None where it has none."""
    return next((layout for find in FINDERS if (layout := find(module)) is not None), None)


def pack_weights(model: nn.Module) -> int:
    """Lays experts' transposed projections [E,in,out] so that the inner dimension is contiguous in memory.

    The CPU's kernels then read them as fast as projections [E,out,in], which stay as they are. Parameters keep
    identity, shape, values and `requires_grad`, so training, copies and checkpoints go on as before; their memory is
    new, and one projection at a time is in memory twice. Two things of others do not take strides: `save_file` of
    safetensors wants contiguous tensors (`unpack_weights` first), and torch's optimizers with fused=True want the state
    in the order of the parameter, so pack before their first step.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).

    Returns the number of experts modules that it changed, 0 where all weights are in this order already.

    Raises:
        ValueError: the model has no such experts, or all of them hold transposed weights that are not plain parameters
            in the memory of the CPU.
    """
    reason = f"{type(model).__name__} has no experts that run on the fused kernel"
    found, changed, copies = False, 0, _Copies()
    for module in model.modules():
        layout = layout_of(module)
        if layout is None:
            continue
        if (obstacle := _obstacle(module, layout)) is not None:
            reason = obstacle
            continue
        found = True
        if layout.transposed and _lay(module, layout.names, True, copies):
            module._switchgear_packed = layout.names  # type: ignore[assignment]
            changed += 1
    if not found:
        raise ValueError(f"model: expected experts that can be packed; {reason}")
    return changed


def unpack_weights(model: nn.Module) -> int:
    """Takes `pack_weights` back: the projections are contiguous again. Returns the number of modules it changed."""
    changed, copies = 0, _Copies()
    for module in model.modules():
        if (names := vars(module).pop("_switchgear_packed", None)) is not None:
            changed += _lay(module, names, False, copies)
    return changed


def _obstacle(module: nn.Module, layout: Layout) -> str | None:
    """Why the projections of a module cannot be laid anew."""
    for name in layout.names if layout.transposed else ():
        weight = module._parameters.get(name)  # under a parametrization the attribute is none, but is made of one
        if type(weight) is not nn.Parameter:
            return f"{name} is {'computed' if weight is None else f'a {type(weight).__name__}'}, no plain parameter"
        if weight.device.type != "cpu":
            return f"{name} is on {weight.device}, and this order is for the CPU"
    return None


class _Copies:
    """Contiguous copies of weights; those that share memory share the copy, too."""

    def __init__(self) -> None:
        # By where a weight was. Memory that is freed meanwhile can only become that of a copy, which nobody copies.
        self._copies: dict[tuple[object, ...], Tensor] = {}

    def of(self, weight: Tensor) -> Tensor:
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        if key not in self._copies:
            copy = torch.empty_like(weight, memory_format=torch.contiguous_format)
            advise_huge_pages(copy)
            self._copies[key] = copy.copy_(weight)
        return self._copies[key]


def _lay(module: nn.Module, names: tuple[str, str], packed: bool, copies: _Copies) -> bool:
    """Whether a projection was not in this order yet."""
    changed = False
    for name in names:
        parameter = module._parameters.get(name)
        if type(parameter) is not nn.Parameter:
            continue
        with torch.inference_mode(parameter.is_inference()):  # what can train can do so wherever it was laid
            weight = parameter.data.mT if packed else parameter.data
            if not weight.is_contiguous():
                copy = copies.of(weight)
                parameter.data = copy.mT if packed else copy
                if parameter.grad is not None:
                    parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
                changed = True
    return changed
