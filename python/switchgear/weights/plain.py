# SPDX-License-Identifier: BSD-3-Clause
"""Plain: unchanged parameters in the memory order that is fastest for the CPU's kernels, on huge pages.

A projection [E,in,out], as in gpt-oss, keeps its shape and gets the strides of a contiguous [E,out,in] seen through
`mT`. Parameters keep identity, shape, values and `requires_grad`, so training, copies and checkpoints work as before.
Two functions need care with such strides. safetensors' `save_file` requires contiguous tensors, so `restore` first.
torch's optimizers with fused=True require state with the parameter's strides, so store before their first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from switchgear.weights.form import Form, on_huge_pages
from switchgear.weights.weight import Weight


@dataclass(frozen=True)
class Plain(Form):
    """Rows along the inner dimension, on huge pages."""

    name: ClassVar[str] = "plain"
    devices: ClassVar[tuple[str, ...] | None] = ("cpu",)

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        _, rows, cols = weight.shape
        return Weight("plain", weight.detach(), rows, cols, weight.dtype, is_exact=True)


class Copies:
    """Contiguous copies of weights. Weights that share memory share the copy, too."""

    def __init__(self) -> None:
        # Keyed by the weight's address. Memory freed meanwhile can only be reused by a copy, and copies are not copied.
        self._copies: dict[tuple[object, ...], Tensor] = {}

    def of(self, weight: Tensor) -> Tensor:
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        if key not in self._copies:
            self._copies[key] = on_huge_pages(weight)
        return self._copies[key]


class Relaid:
    """Gives parameters other strides. rows: `mT` of a transposed projection becomes contiguous; else the projection."""

    def __init__(self, parameters: list[nn.Parameter], rows: bool, copies: Copies) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._before: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        for parameter in parameters:
            with torch.inference_mode(parameter.is_inference()):  # a copy can be trained if the parameter can
                weight = parameter.data.mT if rows else parameter.data
                if not weight.is_contiguous():
                    copy = copies.of(weight)
                    self._pairs.append((parameter, copy.mT if rows else copy))

    @property
    def changes(self) -> bool:
        return bool(self._pairs)

    def commit(self) -> None:
        for parameter, laid in self._pairs:
            with torch.inference_mode(parameter.is_inference()):
                self._before.append((parameter, parameter.data, parameter.grad))
                parameter.data = laid
                if parameter.grad is not None:
                    parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)

    def forget(self) -> None:
        """Frees the previous memory of the parameters."""
        self._before.clear()

    def undo(self) -> bool:
        """Restores the previous strides. Returns whether there was anything to restore."""
        for parameter, data, grad in self._before:
            with torch.inference_mode(parameter.is_inference()):
                parameter.data = data
                parameter.grad = grad
        return bool(self._before)
