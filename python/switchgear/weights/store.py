# SPDX-License-Identifier: BSD-3-Clause
"""store and restore: a model's experts in another form, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from switchgear.weights.auto import Candidate, candidates
from switchgear.weights.compact import Compact
from switchgear.weights.form import Form
from switchgear.weights.integers import Int4, Int8
from switchgear.weights.layout import Layout, layout_of
from switchgear.weights.minifloat import Fp8, Mxfp4
from switchgear.weights.module import (
    Kind,
    Projection,
    StoredProjections,
    Tie,
    in_layout,
    put,
    stored_of,
    take_back,
)
from switchgear.weights.pages import use_huge_pages
from switchgear.weights.panels import Panels
from switchgear.weights.plain import Copies, Plain, Relaid
from switchgear.weights.weight import Weight

FORMS: dict[str, type[Form]] = {
    form.name: form for form in (Plain, Panels, Compact, Int8, Int4, Fp8, Mxfp4)
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What `store` did."""

    form: Form
    modules: int  # that are in this form now
    bytes_before: int  # of their projections; what is shared counts once
    bytes_after: int
    lossless: bool  # restore gives the weights back, bit for bit
    reason: str = ""  # of the choice of "auto"

    def __str__(self) -> str:
        modules = f"{self.modules} module{'' if self.modules == 1 else 's'} of experts as {self.form}"
        change = f"{self.bytes_before / 1e6:,.1f} -> {self.bytes_after / 1e6:,.1f} MB"
        loss = "lossless" if self.lossless else "rounded"
        return f"{modules}: {change}, {loss}" + (f" ({self.reason})" if self.reason else "")


def form_named(form: str | Form, options: dict[str, Any]) -> Form:
    """The form that `store` was asked for. ValueError for an unknown one, or an option that it has not."""
    if isinstance(form, Form):
        if options:
            raise ValueError(f"{next(iter(options))}: expected no options beside {form}")
        return form
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, auto, or an object of theirs, got {form!r}")
    known = [field.name for field in dataclasses.fields(FORMS[form])]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{unknown[0]}: expected an option of {form} ({', '.join(known) or 'it has none'})")
    return FORMS[form](**options)


def encode(weight: Tensor, form: str | Form, *, parts: int = 1, **options: Any) -> Weight:
    """A weight [E,N,C] in a form, for `moe` and `grouped_gemm`; parts: 2 where gates precede ups. ValueError, saying
    why, where it cannot be."""
    encoded = form_named(form, options).encode("weight", weight, parts)
    if isinstance(encoded, str):
        raise ValueError(f"weight: expected one that can be stored as {form}; {encoded}")
    return encoded


def store(model: nn.Module, form: str | Form, *, low_memory: bool = False, **options: Any) -> Stored:
    """Stores the projections of all experts of a model in another form, in place: all of them, or none.

        switchgear.store(model, "compact")
        switchgear.store(model, "int4", group_size=64)
        print(switchgear.store(model, "auto", tokens_per_step=1))

    The parameters of the projections go, and buffers come, except for "plain". Gradients reach x, topk_weights, biases
    and adapters. State dicts have the keys of the form (docs/weights.md), and plain weights load, too. Experts that
    share memory share what is stored. Biases stay as they are.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).
        form: "plain" (rows along the inner dimension; parameters stay, and all weights of the model move onto huge
            pages), "panels", "compact", "int8", "int4", "fp8", "mxfp4", or an object with options, Int4(group_size=64);
            "auto" picks one by machine and use.
        options: those of the form. Of "auto": tokens_per_step, how many tokens a forward has (1: decoding one text),
            and lossless, whether weights must keep every bit.
        low_memory: store one layer after the other, and let go of its parameters at once. By default all are stored
            before any goes, so that both are in memory for a while. If it fails halfway, a form without loss is undone
            from what is stored; an error says which modules of another stay stored.

    Raises:
        ValueError: there are no experts; some are on a device that the form is not for (or on none), computed by a
            parametrization, of a dtype or shape that the form does not take, not finite, or in another form (`restore`
            first). The message names the module, and no module is changed.
    """
    if form == "auto":
        return _store_best(model, low_memory, **options)
    return _store(model, form_named(form, options), low_memory)


def restore(model: nn.Module) -> int:
    """Undoes `store`: the parameters are there again, in the dtype that they had. They have their bits where the form
    is lossless, else the values that it stands for. Returns the number of modules that it changed."""
    changed, copies = 0, Copies()
    parameters: dict[Tie, nn.Parameter] = {}
    plain: dict[tuple[object, ...], Tensor] = {}
    for module in model.modules():
        if stored_of(module) is not None:
            take_back(module, _plain_parameters(module, parameters, plain))
            changed += 1
        elif (names := vars(module).pop("_switchgear_packed", None)) is not None:
            relaid = Relaid(_parameters(module, names), False, copies)
            relaid.commit()
            changed += relaid.changes
    return changed


# ---- one form --------------------------------------------------------------------------------------------------------


@dataclass
class _Target:
    """A module whose projections can be stored."""

    name: str
    module: nn.Module
    layout: Layout


def _store(model: nn.Module, form: Form, low_memory: bool) -> Stored:
    targets, present = _targets(model, form)
    prepare = _preparation(form)
    done: list[_Change | _Packed] = []
    try:
        for target in targets:
            change = prepare(target)
            done.append(change)
            if low_memory:
                change.commit()
                change.forget()
        if not low_memory:
            for change in done:
                change.commit()
    except BaseException as error:
        stay = [change.target.name for change in reversed(done) if not change.undo()]
        if stay:
            names = ", ".join(reversed(stay))
            raise RuntimeError(
                f"model: {names} stay stored as {form}, since low_memory kept no parameters ({error})"
            ) from error
        raise
    if isinstance(form, Plain):
        use_huge_pages(model)
    return _report(form, present + [target.module for target in targets], done)


def _targets(model: nn.Module, form: Form) -> tuple[list[_Target], list[nn.Module]]:
    """What there is to store, and what is in this form already. ValueError for what cannot be."""
    targets, present = [], []
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if (stored := stored_of(module)) is not None:
            if stored.form != form:
                raise ValueError(f"{where}: expected plain weights, got {stored.form}; restore(model) first")
            present.append(module)
        elif (layout := layout_of(module)) is not None:
            if (obstacle := _obstacle(module, layout, form)) is not None:
                raise ValueError(f"{where}: expected experts that can be stored as {form}; {obstacle}")
            targets.append(_Target(where, module, layout))
    if not targets and not present:
        raise ValueError(
            f"model: expected experts that can be stored as {form}; {type(model).__name__} has none that run on the "
            "fused kernel"
        )
    return targets, present


def _obstacle(module: nn.Module, layout: Layout, form: Form) -> str | None:
    """Why the projections of a module cannot be stored."""
    if isinstance(form, Plain) and not layout.transposed:
        return None  # nothing to do
    dtypes = []
    for name in layout.names:
        weight = module._parameters.get(name)  # under a parametrization the attribute is none, but is made of one
        if type(weight) is not nn.Parameter:
            return f"{name} is {'computed' if weight is None else f'a {type(weight).__name__}'}, no plain parameter"
        if weight.is_meta or (form.devices is not None and weight.device.type not in form.devices):
            return f"{name} is on {weight.device}"
        dtypes.append(weight.dtype)
    if form.one_dtype and dtypes[0] is not dtypes[1]:
        return f"{layout.names[0]} is {dtypes[0]}, and {layout.names[1]} {dtypes[1]}"
    return None


def _preparation(form: Form) -> Callable[[_Target], _Change | _Packed]:
    """Makes the change of a module; what is shared is made once."""
    if isinstance(form, Plain):
        copies = Copies()
        return lambda target: _Packed(target, copies)
    encoded: dict[tuple[object, ...], Weight] = {}
    ties: dict[int, Tie] = {}

    def prepare(target: _Target) -> _Change:
        weights, projections, layout = [], [], target.layout
        for index, parameter in enumerate(_parameters(target.module, layout.names)):
            plain, parts = parameter.detach(), layout.parts(index)
            view = plain.mT if layout.transposed else plain
            key = (plain.data_ptr(), view.shape, view.stride(), view.dtype, view.device, parts)
            if key not in encoded:
                encoded[key] = _encoded(form, f"{target.name}.{layout.names[index]}", view, parts)
            weights.append(encoded[key])
            tie = ties.setdefault(id(parameter), Tie())
            projections.append(Projection(Kind.of(weights[-1]), parameter.requires_grad, tie))
        stored = StoredProjections(form, layout, (projections[0], projections[1]))
        return _Change(target, stored, (weights[0], weights[1]))

    return prepare


def _encoded(form: Form, name: str, weight: Tensor, parts: int) -> Weight:
    encoded = form.encode(name, weight, parts)
    if isinstance(encoded, str):
        raise ValueError(f"model: expected experts that can be stored as {form}; {encoded}")
    return encoded


class _Change:
    """A module's parameters to stored weights."""

    def __init__(self, target: _Target, stored: StoredProjections, weights: tuple[Weight, Weight]) -> None:
        self.target, self.weights = target, weights
        self._stored, self._is_done = stored, False
        self._parameters: list[nn.Parameter] | None = _parameters(target.module, stored.layout.names)
        self.bytes_before = {_memory(parameter): parameter.nbytes for parameter in self._parameters}
        self.bytes_after = {_memory(t): t.nbytes for weight in weights for t in weight.tensors}
        self.is_exact = all(weight.is_exact for weight in weights)

    def commit(self) -> None:
        put(self.target.module, self._stored, self.weights)
        self._is_done = True

    def forget(self) -> None:
        """Lets go of the parameters."""
        self._parameters = None

    def undo(self) -> bool:
        """Whether the parameters are there again."""
        if not self._is_done:
            return True
        if self._parameters is None:
            if not self.is_exact:
                return False
            self._parameters = _plain_parameters(self.target.module, {}, {})
        take_back(self.target.module, self._parameters)
        return True


class _Packed:
    """A module's parameters in other strides, on huge pages."""

    is_exact = True

    def __init__(self, target: _Target, copies: Copies) -> None:
        self.target = target
        parameters = _parameters(target.module, target.layout.names)
        self._relaid = Relaid(parameters if target.layout.transposed else [], True, copies)
        self.bytes_before = self.bytes_after = {_memory(parameter): parameter.nbytes for parameter in parameters}

    def commit(self) -> None:
        if self._relaid.changes:
            self._relaid.commit()
            self.target.module._switchgear_packed = self.target.layout.names  # type: ignore[assignment]

    def forget(self) -> None:
        self._relaid.forget()

    def undo(self) -> bool:
        self._relaid.undo()
        vars(self.target.module).pop("_switchgear_packed", None)
        return True


def _parameters(module: nn.Module, names: tuple[str, str]) -> list[nn.Parameter]:
    return [p for name in names if type(p := module._parameters.get(name)) is nn.Parameter]


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape)


def _plain_parameters(
    module: nn.Module, parameters: dict[Tie, nn.Parameter], plain: dict[tuple[object, ...], Tensor]
) -> list[nn.Parameter]:
    """The parameters that a module had; those that were shared, or shared memory, do again."""
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


def _report(form: Form, modules: list[nn.Module], done: list[_Change | _Packed], reason: str = "") -> Stored:
    before: dict[tuple[object, ...], int] = {}
    after: dict[tuple[object, ...], int] = {}
    is_exact = True
    for change in done:
        before |= change.bytes_before
        after |= change.bytes_after
        is_exact = is_exact and change.is_exact
    for module in modules[: len(modules) - len(done)]:  # that were in this form already
        stored = stored_of(module)
        assert stored is not None
        for weight in stored.weights(module):
            experts, rows, cols = weight.shape
            before[_memory(weight.data)] = experts * rows * cols * weight.dtype.itemsize
            after |= {_memory(tensor): tensor.nbytes for tensor in weight.tensors}
            is_exact = is_exact and weight.is_exact
    return Stored(form, len(modules), sum(before.values()), sum(after.values()), is_exact, reason)


# ---- auto ------------------------------------------------------------------------------------------------------------


def _store_best(model: nn.Module, low_memory: bool, tokens_per_step: int = 1, lossless: bool = True) -> Stored:
    refused = []
    candidate: Candidate
    for candidate in candidates(model, tokens_per_step, lossless):
        try:
            done = _store(model, FORMS[candidate.form](**candidate.options), low_memory)
        except ValueError as error:
            if candidate.is_last:
                raise
            refused.append(f"not {candidate.form}: {str(error).rpartition('; ')[2]}")
            continue
        return Stored(**{**vars(done), "reason": "; ".join([candidate.reason, *refused])})
    raise AssertionError("there is always a plain form")
