# SPDX-License-Identifier: BSD-3-Clause
"""Plain: parameters as they are, in the order and on the pages in which the CPU's kernels read them best.

A projection [E,in,out], as gpt-oss has them, keeps its shape and gets the strides of a contiguous [E,out,in] seen
through `mT`. Parameters keep identity, shape, values and `requires_grad`, so training, copies and checkpoints go on as
before. Two things of others do not take strides: `save_file` of safetensors wants contiguous tensors (`restore` first),
and torch's optimizers with fused=True want the state in the order of the parameter, so store before their first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from switchgear.weights.form import Form
from switchgear.weights.pages import advise_huge_pages
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


class Relaid:
    """Parameters in other strides: `rows` of a transposed projection contiguous, or the projection itself again."""

    def __init__(self, parameters: list[nn.Parameter], rows: bool, copies: Copies) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._before: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        for parameter in parameters:
            with torch.inference_mode(parameter.is_inference()):  # what can train can do so wherever it was laid
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
        """Lets go of the memory that the parameters had."""
        self._before.clear()

    def undo(self) -> bool:
        """Whether the parameters have the strides that they had; their values they have in any."""
        for parameter, data, grad in self._before:
            with torch.inference_mode(parameter.is_inference()):
                parameter.data = data
                parameter.grad = grad
        return bool(self._before)
