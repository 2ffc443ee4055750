# SPDX-License-Identifier: BSD-3-Clause
"""The change that `store` makes to one module: prepared, committed, and undone if another module fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from switchgear.weights.exact import Copies, Plain, Relaid
from switchgear.weights.form import Form, Layout
from switchgear.weights.module import Kind, Projection, StoredProjections, Tie, in_layout, put, stored_of, take_back
from switchgear.weights.state import set_state
from switchgear.weights.weight import Weight


@dataclass
class Target:
    """A module whose projections can be stored."""

    name: str
    module: nn.Module
    layout: Layout


def preparation_of(form: Form) -> Callable[[Target], StoredChange | PlainChange]:
    """Returns a function that prepares the change of a module. Shared parameters are encoded once."""
    if isinstance(form, Plain):
        copies = Copies()
        return lambda target: PlainChange(target, copies)
    encoded: dict[tuple[object, ...], Weight] = {}
    ties: dict[int, Tie] = {}

    def prepare(target: Target) -> StoredChange:
        weights, projections, layout = [], [], target.layout
        for index, parameter in enumerate(parameters_of(target.module, layout.names)):
            plain, parts = parameter.detach(), layout.parts(index)
            view = plain.mT if layout.transposed else plain
            key = (plain.data_ptr(), view.shape, view.stride(), view.dtype, view.device, parts, layout.transposed)
            if key not in encoded:
                encoded[key] = _encoded(form, f"{target.name}.{layout.names[index]}", view, parts)
            weights.append(encoded[key])
            tie = ties.setdefault(id(parameter), Tie())
            projections.append(Projection(Kind.of(weights[-1]), parameter.requires_grad, tie))
        stored = StoredProjections(form, layout, (projections[0], projections[1]))
        return StoredChange(target, stored, (weights[0], weights[1]))

    return prepare


@torch.inference_mode(False)  # a backward pass may save the result
def _encoded(form: Form, name: str, weight: Tensor, parts: int) -> Weight:
    encoded = form.encode(name, weight, parts)
    if isinstance(encoded, str):
        raise ValueError(f"model: expected experts that can be stored as {form}; {encoded}")
    return encoded


class StoredChange:
    """Replaces a module's parameters by stored weights."""

    def __init__(self, target: Target, stored: StoredProjections, weights: tuple[Weight, Weight]) -> None:
        self.target, self.weights = target, weights
        self._stored, self._is_begun = stored, False
        self._parameters: list[nn.Parameter] | None = parameters_of(target.module, stored.layout.names)
        self.bytes_before = {memory_of(parameter): parameter.nbytes for parameter in self._parameters}
        self.bytes_after = {memory_of(t): t.nbytes for weight in weights for t in weight.tensors}
        self.is_exact = all(weight.is_exact for weight in weights)

    def commit(self) -> None:
        self._is_begun = True
        put(self.target.module, self._stored, self.weights)

    def forget(self) -> None:
        """Frees the parameters."""
        self._parameters = None

    def undo(self) -> bool:
        """Undoes `commit`, even one that failed halfway. Returns whether the parameters are restored."""
        if not self._is_begun:
            return True
        if self._parameters is None:
            if not self.is_exact:
                return False
            self._parameters = plain_parameters(self.target.module, {}, {})
        take_back(self.target.module, self._stored, self._parameters)
        return True


class PlainChange:
    """Gives a module's parameters other strides, on huge pages."""

    is_exact = True

    def __init__(self, target: Target, copies: Copies) -> None:
        self.target = target
        parameters = parameters_of(target.module, target.layout.names)
        self._relaid = Relaid(parameters if target.layout.transposed else [], True, copies)
        self.bytes_before = self.bytes_after = {memory_of(parameter): parameter.nbytes for parameter in parameters}

    def commit(self) -> None:
        if self._relaid.changes:
            self._relaid.commit()
            set_state(self.target.module, packed=self.target.layout.names)

    def forget(self) -> None:
        self._relaid.forget()

    def undo(self) -> bool:
        if self._relaid.undo():
            set_state(self.target.module, packed=None)
        return True


def parameters_of(module: nn.Module, names: tuple[str, str]) -> list[nn.Parameter]:
    return [p for name in names if type(p := module._parameters.get(name)) is nn.Parameter]


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape)


@torch.inference_mode(False)
def plain_parameters(
    module: nn.Module, parameters: dict[Tie, nn.Parameter], plain: dict[tuple[object, ...], Tensor]
) -> list[nn.Parameter]:
    """The original parameters of a module. Parameters that were shared, or shared memory, share it again."""
    stored = stored_of(module)
    assert stored is not None
    found = []
    for weight, projection in zip(stored.weights(module), stored.projections, strict=True):
        if projection.tie not in parameters:
            key = (weight.data.data_ptr(), weight.device, weight.format, weight.shape, stored.layout.transposed)
            if key not in plain:
                plain[key] = in_layout(weight.plain(), stored.layout)
            parameters[projection.tie] = nn.Parameter(plain[key], requires_grad=projection.trained)
        found.append(parameters[projection.tie])
    return found
