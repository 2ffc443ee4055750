# SPDX-License-Identifier: BSD-3-Clause
"""store and restore: convert a model's experts and linear layers to another form, and back; encode one weight."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear import backends, ops
from switchgear.checks import Size, checked
from switchgear.reference import formats
from switchgear.reference.checks import AnyFloats
from switchgear.utils.progress import show_progress
from switchgear.weights.adapted import can_borrow_from, notice_wrappers
from switchgear.weights.exact import Plain
from switchgear.weights.form import FORMS, Form, Layout, hint_for, layout_of, linear_layout_of, on_huge_pages
from switchgear.weights.module import (
    Kind,
    Projection,
    StoredProjections,
    Tie,
    check_before_load,
    in_layout,
    put,
    stored_of,
    take_back,
)
from switchgear.weights.selected import selection_of
from switchgear.weights.state import get_state, set_state
from switchgear.weights.weight import Weight, use_huge_pages

_logger = logging.getLogger(__name__)

FEW_ROWS = 4  # per expert; up to this number compact weights were faster than plain ones in every measured case
TOP_K_FIELDS = (  # names of top_k in configs of Hugging Face models
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k",
)  # fmt: skip
PLAIN_LINEARS = ("lm_head", "gate", "router", "*_gate", "*_router", "dt_proj", "lora_*")
"""Linear layers that `store` leaves plain by default: the output embeddings, routers and gates, whose rounding costs
quality and saves little, those of state space models that read the weight themselves, and factors of adapters."""
WIDE_VECTORS = ("avx512", "amx")  # ISAs that unpack compact weights as fast as memory delivers them


@dataclass(frozen=True)
class Stored:
    """The result of `store`."""

    form: Form
    modules: int  # modules in this form now
    bytes_before: int  # of their projections; shared memory counts once
    bytes_after: int
    lossless: bool  # decoding returns the same bits
    reason: str = ""  # why "auto" chose the form
    linears: Stored | None = None  # the result for linear layers; the other fields are of the experts, if there are any
    is_of_linears: bool = False

    def __str__(self) -> str:
        what = "linear layer{}" if self.is_of_linears else "module{} of experts"
        modules = f"{self.modules} {what.format('' if self.modules == 1 else 's')} as {self.form}"
        change = f"{self.bytes_before / 1e6:,.1f} -> {self.bytes_after / 1e6:,.1f} MB"
        loss = "lossless" if self.lossless else "rounded"
        text = f"{modules}: {change}, {loss}" + (f" ({self.reason})" if self.reason else "")
        return text if self.linears is None else f"{text}; {self.linears}"


def form_named(form: str | Form, options: dict[str, Any]) -> Form:
    """The requested form. Raises ValueError for an unknown form or option."""
    if isinstance(form, Form):
        if options:
            raise ValueError(f"{next(iter(options))}: expected no options with {form}, got {', '.join(options)}")
        return form
    if not isinstance(form, str):
        raise TypeError(f"form: expected a name or an object of a form, got {type(form).__name__}")
    if form not in FORMS:
        names = ", ".join(formats.FORMATS)
        raise ValueError(f"form: expected one of {names}, an object of theirs, or in `store` alone auto, got {form!r}")
    _check_options(form, options, [field.name for field in dataclasses.fields(FORMS[form])])
    return FORMS[form](**options)


def _check_options(form: str, options: Iterable[str], known: Sequence[str]) -> None:
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{unknown[0]}: expected an option of {form} ({', '.join(known) or 'it has none'})")


@checked
@torch.inference_mode(False)  # a backward pass may save the result
def encode(
    weight: Annotated[Tensor, AnyFloats("E", "N", "C")], form: str | Form, *, parts: Size = 1, **options: Any
) -> Weight:
    """Encodes a weight [E,N,C] for `moe` and `grouped_gemm`. parts: 2 if all gates precede all ups. Raises ValueError
    with the reason if the form does not support the weight, and TypeError or ValueError for anything but a weight."""
    if 0 in weight.shape or weight.is_meta:
        raise ValueError(f"weight: expected numbers, got shape {list(weight.shape)} on {weight.device}")
    if parts > 2 or weight.shape[1] % parts:
        raise ValueError(f"parts: expected 1, or 2 for an even number of rows, got {parts} for {weight.shape[1]} rows")
    encoded = form_named(form, options).encode("weight", weight, parts)
    if isinstance(encoded, str):
        raise ValueError(f"weight: expected one that can be stored as {form}; {encoded}")
    return encoded


@checked
def store(
    model: nn.Module,
    form: str | Form | None,
    *,
    linears: str | Form | None = None,
    skip: Sequence[str] = PLAIN_LINEARS,
    low_memory: bool = False,
    keep_plain: bool = False,
    **options: Any,
) -> Stored:
    """Stores the projections of all experts of a model, and its linear layers if asked to, in another form, in place;
    on failure none.

        switchgear.store(model, "compact")
        switchgear.store(model, "int4", group_size=64)
        switchgear.store(model, "int4", linears="int8")
        print(switchgear.store(model, "auto", tokens_per_step=1))

    Except for "plain", buffers replace the parameters of the projections. Gradients reach x, topk_weights, biases and
    adapters. State dicts have the keys of the form (docs/weights.md); plain weights load, too. Experts that share
    memory still share it when stored. Biases do not change. A stored torch.nn.Linear becomes a `layers.StoredLinear`.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).
        form: a name, such as "compact" or "int8" (docs/weights.md lists all), or an object with options,
            Int4(group_size=64); "auto" chooses one for the machine and the use. "plain" (rows along the inner
            dimension) keeps the parameters, and moves all weights of the model onto huge pages. None: experts stay as
            they are.
        linears: the form of the linear layers, exactly of the class torch.nn.Linear; None: they stay as they are.
            With another form than `form`, pass options in an object. A weight that another module has too, such as tied
            embeddings, stays plain.
        skip: linear layers that stay plain: patterns of `fnmatch` for their path, or for one name in it.
        options: those of the form, or of `linears` if form is None. For "auto" (both, if both are "auto"):
            tokens_per_step, the number of tokens per forward (1: decoding one text), lossless, whether weights must
            keep every bit, and if not, bits: 1 to 4, or a list of each expert's.
        low_memory: store one layer after the other and free its parameters at once. By default all layers are stored
            before any parameter is freed, so both are in memory for a while. If this mode fails halfway, a lossless
            form is undone from the stored weights; with another form the error names the modules that stay stored.
        keep_plain: keep the parameters, too, where they are, so that `restore` returns them: to compare rounded forms.
            They take their memory. A state dict is loaded into both.

    Raises:
        ValueError: keep_plain with low_memory; there are no experts, or no linear layers, to store; or some are on a
            device that the form does not support (or on meta), computed by a parametrization, of an unsupported dtype
            or shape, not finite, or in another form (`restore` first). The message names the module, and no module is
            changed.
    """
    if keep_plain and low_memory:
        raise ValueError("keep_plain: expected False with low_memory, which frees the parameters, got True")
    if form is None and linears is None:
        raise ValueError("form: expected one for experts or linears, got None for both")
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a list of patterns, got {skip!r}")
    notice_wrappers()
    storing = _Storing(model, low_memory, keep_plain)
    try:
        done = None if form is None else storing.add(ExpertModules(), form, options)
        if linears is not None:
            is_for_both = form is None or (form == "auto" and linears == "auto")
            layers = storing.add(LinearLayers(tuple(skip)), linears, options if is_for_both else {})
            done = layers if done is None else dataclasses.replace(done, linears=layers)
    except BaseException as error:
        storing.undo(error)
        raise
    assert done is not None
    if any(type(change) is StoredChange for _, change in storing.done):
        check_before_load(model)
    _logger.info("stored %s", done)
    return done


@checked
def restore(model: nn.Module) -> int:
    """Makes the projections of experts and linear layers parameters again, in their original dtype. Returns the number
    of changed modules. All weights are decoded before any module changes, so on failure none does.

    The bits are the original ones if the form is lossless, or `store` has kept them (keep_plain). Otherwise the weights
    are those that the form rounded to, and a RuntimeWarning names it: storing them again may round once more.
    """
    copies: dict[tuple[object, ...], Tensor] = {}
    parameters: dict[Tie, nn.Parameter] = {}
    plain: dict[tuple[object, ...], Tensor] = {}
    decoded: list[tuple[nn.Module, StoredProjections, list[nn.Parameter]]] = []
    changes: list[PlainChange] = []
    for module in model.modules():
        if (stored := stored_of(module)) is not None:
            stored.check_restore()
            decoded.append((module, stored, plain_parameters(module, parameters, plain)))
        elif (names := get_state(module).packed) is not None:
            changes.append(PlainChange(module, names, copies, is_back=True))
    if rounded := sorted({str(stored.form) for _, stored, _ in decoded if stored.is_rounded}):
        forms = ", ".join(rounded)
        warnings.warn(
            f"restore: the weights are those that {forms} rounded to, not the original ones, and storing them may "
            "round once more; to compare forms, call store(model, form, keep_plain=True) or load the model again",
            RuntimeWarning,
            stacklevel=3,
        )
    try:
        for change in changes:
            change.commit()  # copies gradients, too
    except BaseException:
        for change in changes:
            change.undo()
        raise
    for module, stored, found in decoded:
        take_back(module, stored, found)
    changed = len(decoded) + sum(bool(change.laid) for change in changes)
    _logger.info("restored modules: %d", changed)
    return changed


# ---- the change of one module: prepared, committed, and undone if another module fails -------------------------------


@dataclass
class Target:
    """A module whose projections can be stored."""

    name: str
    module: nn.Module
    layout: Layout


def preparation_of(form: Form, keep_plain: bool = False) -> Callable[[Target], StoredChange | PlainChange]:
    """Returns a function that prepares the change of a module. Shared parameters are encoded once."""
    if isinstance(form, Plain):
        copies: dict[tuple[object, ...], Tensor] = {}
        return lambda t: PlainChange(t.module, t.layout.names, copies, is_laid=not t.layout.transposed)
    encoded: dict[tuple[object, ...], Weight] = {}
    ties: dict[int, Tie] = {}

    def prepare(target: Target) -> StoredChange:
        weights, layout = [], target.layout
        for index, parameter in enumerate(parameters_of(target.module, layout.names)):
            plain, parts = parameter.detach(), layout.parts(index)
            view = layout.view(plain)
            key = (plain.data_ptr(), view.shape, view.stride(), view.dtype, view.device, parts, layout.transposed)
            if key not in encoded:
                encoded[key] = _encoded(form, f"{target.name}.{layout.names[index]}", view, parts)
            weights.append(encoded[key])
        return StoredChange(target, form, tuple(weights), ties, keep_plain)

    return prepare


@torch.inference_mode(False)  # a backward pass may save the result
def _encoded(form: Form, name: str, weight: Tensor, parts: int) -> Weight:
    encoded = form.encode(name, weight, parts)
    if isinstance(encoded, str):
        raise ValueError(f"model: expected weights that can be stored as {form}; {encoded}")
    return encoded


class StoredChange:
    """Replaces a module's parameters by stored weights. ties: those of the parameters by their id()."""

    def __init__(
        self, target: Target, form: Form, weights: tuple[Weight, ...], ties: dict[int, Tie], keep_plain: bool = False
    ) -> None:
        self._module, self._weights, self._is_begun = target.module, weights, False
        parameters = parameters_of(target.module, target.layout.names)
        for parameter in parameters:
            ties.setdefault(id(parameter), Tie(parameter if keep_plain else None))
        projections = tuple(
            Projection(Kind.of(weight), parameter.requires_grad, ties[id(parameter)])
            for weight, parameter in zip(weights, parameters, strict=True)
        )
        self._stored = StoredProjections(form, target.layout, projections)
        self._parameters: list[nn.Parameter] | None = parameters
        self.bytes_before = {memory_of(parameter): parameter.nbytes for parameter in parameters}
        self.bytes_after = {memory_of(t): t.nbytes for weight in weights for t in weight.tensors}
        if keep_plain:
            self.bytes_after |= self.bytes_before
        self.is_exact = all(weight.is_exact for weight in weights)

    def commit(self) -> None:
        self._is_begun = True
        put(self._module, self._stored, self._weights)

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
            self._parameters = plain_parameters(self._module, {}, {})
        take_back(self._module, self._stored, self._parameters)
        return True


class PlainChange:
    """Gives a module's parameters other strides, on huge pages: `mT` becomes contiguous, or, with is_back, the
    parameters themselves. is_laid: they have these strides."""

    is_exact = True

    def __init__(
        self,
        module: nn.Module,
        names: tuple[str, ...],
        copies: dict[tuple[object, ...], Tensor],
        *,
        is_laid: bool = False,
        is_back: bool = False,
    ) -> None:
        self._module, self._names, self._is_back = module, names, is_back
        self.laid: list[tuple[nn.Parameter, Tensor]] = []
        self._before: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        parameters = parameters_of(module, names)
        self.bytes_before = self.bytes_after = {memory_of(parameter): parameter.nbytes for parameter in parameters}
        for parameter in () if is_laid else parameters:
            with torch.inference_mode(parameter.is_inference()):  # a copy can be trained if the parameter can
                weight = parameter.data if is_back else parameter.data.mT
                if not weight.is_contiguous():
                    # Memory freed meanwhile can only be reused by a copy, and copies are not copied.
                    key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
                    if key not in copies:
                        copies[key] = on_huge_pages(weight)
                    self.laid.append((parameter, copies[key] if is_back else copies[key].mT))

    def commit(self) -> None:
        for parameter, laid in self.laid:
            with torch.inference_mode(parameter.is_inference()):
                self._before.append((parameter, parameter.data, parameter.grad))
                parameter.data = laid
                if parameter.grad is not None:
                    parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        if self.laid or self._is_back:
            set_state(self._module, packed=None if self._is_back else self._names)

    def forget(self) -> None:
        """Frees the previous memory of the parameters."""
        self._before.clear()

    def undo(self) -> bool:
        for parameter, data, grad in self._before:
            with torch.inference_mode(parameter.is_inference()):
                parameter.data = data
                parameter.grad = grad
        if self._before:
            set_state(self._module, packed=self._names if self._is_back else None)
        return True


def parameters_of(module: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
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
        tie = projection.tie
        if tie not in parameters and tie.kept is not None and tie.kept.device == weight.device:
            parameters[tie] = tie.kept
            tie.kept.requires_grad_(projection.trained)
        if tie not in parameters:
            key = (weight.data.data_ptr(), weight.device, weight.format, weight.shape, *stored.layout[1:])
            if key not in plain:
                kept = None if tie.kept is None else tie.kept.detach().to(weight.device)
                plain[key] = in_layout(weight.plain(), stored.layout) if kept is None else kept
            parameters[tie] = nn.Parameter(plain[key], requires_grad=projection.trained)
        found.append(parameters[tie])
    return found


# ---- one form --------------------------------------------------------------------------------------------------------


def commit_all(changes: Iterable[Any]) -> None:
    """Commits all changes or none."""
    done = []
    try:
        for change in changes:
            done.append(change)
            change.commit()
    except BaseException:
        for change in done:
            change.undo()
        raise


@dataclass(frozen=True)
class ExpertModules:
    """What `store` stores: the modules of experts."""

    layout_of = staticmethod(layout_of)

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, module in model.named_modules():
            stored = stored_of(module)
            if layout_of(module) is not None if stored is None else stored.layout.stored_class is None:
                yield name, module

    def obstacle(self, model: nn.Module, name: str, form: Form) -> str | None:
        if (wrapper := wrapper_of(model, name)) is None:
            return None
        return f"there is a {wrapper} around them; merge and unload the adapters first, model.merge_and_unload()"

    def hint(self, model: nn.Module) -> str:
        return f"{type(model).__name__} has no experts with a stored layout ({hint_for(model)})"

    def rows(self, model: nn.Module, tokens_per_step: int) -> tuple[float, str]:
        rows = rows_per_expert(model, tokens_per_step)
        return rows, f"about {rows:.3g} tokens for an expert"


@dataclass(frozen=True)
class LinearLayers:
    """What `store` stores: linear layers, without those that `skip` names and those that share their weight with other
    modules."""

    skip: tuple[str, ...]
    layout_of = staticmethod(linear_layout_of)

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        found, others = [], set()
        for name, module in model.named_modules():
            if linear_layout_of(module) is not None and not self._skips(name):
                found.append((name, module))
            else:
                others |= {id(parameter) for parameter in module._parameters.values() if parameter is not None}
        return ((name, module) for name, module in found if id(module._parameters["weight"]) not in others)

    def _skips(self, name: str) -> bool:
        return any(fnmatchcase(part, pattern) for pattern in self.skip for part in (name, *name.split(".")))

    def obstacle(self, model: nn.Module, name: str, form: Form) -> str | None:
        own = vars(model.get_submodule(name))
        forward = own.get("_old_forward", own.get("forward"))
        if forward is not None and not hasattr(getattr(forward, "__func__", None), "switchgear_patch"):
            return "other code has replaced the forward of this layer"
        return None

    def hint(self, model: nn.Module) -> str:
        return f"{type(model).__name__} has none but those that are left out: {', '.join(self.skip)}"

    def rows(self, model: nn.Module, tokens_per_step: int) -> tuple[float, str]:
        return tokens_per_step, f"{tokens_per_step} tokens in a step"


class _Storing:
    """One call of `store`. done: what was changed so far."""

    def __init__(self, model: nn.Module, low_memory: bool, keep_plain: bool) -> None:
        self._model, self._low_memory, self._keep_plain = model, low_memory, keep_plain
        self.done: list[tuple[str, StoredChange | PlainChange]] = []

    def add(self, what: ExpertModules | LinearLayers, form: str | Form, options: dict[str, Any]) -> Stored:
        """Stores the modules of a kind. On failure none of them is stored."""
        if form != "auto":
            return self._add(what, form_named(form, options))
        _check_options("auto", options, list(inspect.signature(candidates).parameters)[1:-1])
        refused: list[str] = []
        choices = candidates(self._model, **options, what=what)
        for choice in choices:
            try:
                done = self._add(what, FORMS[choice.form](**choice.options))
                return dataclasses.replace(done, reason="; ".join([choice.reason, *refused]))
            except ValueError as error:
                if choice is choices[-1]:
                    raise
                refused.append(f"not {choice.form}: {str(error).rpartition('; ')[2]}")
        raise AssertionError("there is always a form to try")

    def _add(self, what: ExpertModules | LinearLayers, form: Form) -> Stored:
        targets, present = _targets(self._model, form, what)
        prepare = preparation_of(form, self._keep_plain)
        own = _Storing(self._model, self._low_memory, self._keep_plain)
        try:
            for target in show_progress(targets, f"storing as {form}"):
                change = prepare(target)
                own.done.append((target.name, change))
                if self._low_memory:
                    change.commit()
                    change.forget()
            if not self._low_memory:
                for _, change in own.done:
                    change.commit()
        except BaseException as error:
            own.undo(error)
            raise
        self.done += own.done
        if isinstance(form, Plain):
            use_huge_pages(self._model)
        report = _report(form, present + [target.module for target in targets], [change for _, change in own.done])
        return dataclasses.replace(report, is_of_linears=isinstance(what, LinearLayers))

    def undo(self, error: BaseException) -> None:
        """Undoes the changes because of an error. Raises RuntimeError if some are for good."""
        if stay := [name for name, change in reversed(self.done) if not change.undo()]:
            names = ", ".join(reversed(stay))
            raise RuntimeError(f"model: {names} stay stored, since low_memory kept no parameters ({error})") from error


def _targets(model: nn.Module, form: Form, what: ExpertModules | LinearLayers) -> tuple[list[Target], list[nn.Module]]:
    """The modules to store, and those in this form already. Raises ValueError for a module that cannot be stored."""
    targets, present = [], []
    for name, module in what.find(model):
        where = f"model.{name}" if name else "model"
        if (stored := stored_of(module)) is not None:
            if stored.form != form:
                stored.check_restore()
                raise ValueError(f"{where}: expected plain weights, got {stored.form}; {stored.form.remedy}")
            present.append(module)
        elif (layout := what.layout_of(module)) is not None:
            obstacle = what.obstacle(model, name, form) or _obstacle(module, layout, form)
            if obstacle is not None:
                raise ValueError(f"{where}: expected weights that can be stored as {form}; {obstacle}")
            targets.append(Target(where, module, layout))
    if not targets and not present:
        raise ValueError(f"model: expected weights that can be stored as {form}; {what.hint(model)}")
    return targets, present


def wrapper_of(model: nn.Module, name: str) -> str | None:
    """The class of a wrapper of peft around the module that reads its parameters at each call, or None. One that lends
    its factors to switchgear does not."""
    outer, _, last = name.rpartition(".")
    if last != "base_layer":
        return None
    wrapper = model.get_submodule(outer)
    return None if can_borrow_from(wrapper) else type(wrapper).__name__


def _obstacle(module: nn.Module, layout: Layout, form: Form) -> str | None:
    """Why the projections of a module cannot be stored; None if they can."""
    if selection_of(module) is not None:
        return "some of them are trained alone: call switchgear.finetune.unfreeze(model) first"
    if isinstance(form, Plain) and not layout.transposed:
        return None  # nothing to do
    dtypes = []
    for name in layout.names:
        weight = module._parameters.get(name)  # a parametrization replaces the parameter by a computed attribute
        if type(weight) is not nn.Parameter:
            return f"{name} is {'computed' if weight is None else f'a {type(weight).__name__}'}, no plain parameter"
        if weight.is_meta:
            return f"{name} is on meta, without numbers: store a model that is loaded without offloading (device_map)"
        if form.devices is not None and weight.device.type not in form.devices:
            return f"{name} is on {weight.device}"
        dtypes.append(weight.dtype)
    if form.one_dtype and len(set(dtypes)) > 1:
        return f"{layout.names[0]} is {dtypes[0]}, and {layout.names[1]} {dtypes[1]}"
    return None


def _report(form: Form, modules: list[nn.Module], done: list[StoredChange | PlainChange]) -> Stored:
    before: dict[tuple[object, ...], int] = {}
    after: dict[tuple[object, ...], int] = {}
    is_exact = True
    for change in done:
        before |= change.bytes_before
        after |= change.bytes_after
        is_exact = is_exact and change.is_exact
    for module in modules[: len(modules) - len(done)]:  # in this form already
        stored = stored_of(module)
        assert stored is not None
        kept = [one.tie.kept for one in stored.projections if one.tie.kept is not None]
        after |= {memory_of(parameter): parameter.nbytes for parameter in kept}
        for weight in stored.weights(module):
            experts, rows, cols = weight.shape
            before[memory_of(weight.data)] = experts * rows * cols * weight.dtype.itemsize
            after |= {memory_of(tensor): tensor.nbytes for tensor in weight.tensors}
            is_exact = is_exact and weight.is_exact
    return Stored(form, len(modules), sum(before.values()), sum(after.values()), is_exact)


# ---- auto ------------------------------------------------------------------------------------------------------------
# The forms that store(model, "auto") tries. The thresholds are measured (docs/weights.md, docs/performance.md). With
# few rows per expert a layer is bound by memory, so the form with the fewest bytes is fastest. With more rows it is
# bound by compute, and only the order matters.


class Candidate(NamedTuple):
    """A form to try."""

    form: str
    reason: str
    options: dict[str, Any]


@checked
def candidates(
    model: nn.Module,
    tokens_per_step: Size = 1,
    lossless: bool = True,
    bits: int | Sequence[int] | None = None,
    what: Any = None,
) -> list[Candidate]:
    """The forms to try, in order, for the experts of a model, or for `what`. Raises ValueError if tokens_per_step is
    below 1, or for bits of lossless forms."""
    if bits is not None and lossless:
        raise ValueError(f"bits: expected none of a lossless form, got {bits}; pass lossless=False")
    what = ExpertModules() if what is None else what
    devices = {p.device.type for _, module in what.find(model) for p in module.parameters()}
    if devices - {"cpu"}:
        where = ", ".join(sorted(devices - {"cpu"}))
        return [Candidate("plain", f"kernels on {where} multiply plain weights alone", {})]
    if backends.backend() == "reference":
        return [Candidate("plain", "the reference gains nothing from another form", {})]
    rows, text = what.rows(model, tokens_per_step)
    text = f"{text} on {ops.cpu_isa()}"
    plain = Candidate("plain", f"{text}: plain weights on huge pages", {})
    panels = Candidate("panels", f"{text}: the order of the kernels", {})
    if bits is not None:
        reason = f"{text}: the requested number of bits"
        return [Candidate("groups", reason, {"bits": bits, "symmetric": False})]
    if not lossless:
        if rows <= FEW_ROWS:
            return [Candidate("int4", f"{text}: memory is the limit, so the fewest bits", {"symmetric": False}), plain]
        return [Candidate("int8", f"{text}: multiplications are the limit, and those of int8 are fast", {}), plain]
    if rows <= FEW_ROWS and ops.cpu_isa().startswith(WIDE_VECTORS):
        return [Candidate("compact", f"{text}: memory is the limit, so fewer bytes", {}), panels, plain]
    return [panels, plain] if rows > 1 else [plain]


def rows_per_expert(model: nn.Module, tokens_per_step: int) -> float:
    """The average number of rows per step of an expert that has any."""
    most = 0.0
    for module in model.modules():
        if (layout := layout_of(module)) is None:
            continue
        experts = _num_experts(module, layout)
        share = min(1.0, _top_k(model, module, experts) / experts)
        touched = experts * (1 - (1 - share) ** tokens_per_step)
        most = max(most, tokens_per_step * share * experts / touched)
    return most


def _num_experts(module: nn.Module, layout: Layout) -> int:
    if (stored := stored_of(module)) is not None:
        return stored.weights(module)[1].shape[0]
    weight: torch.Tensor = getattr(module, layout.names[1])
    return len(weight)


def _top_k(model: nn.Module, module: nn.Module, experts: int) -> int:
    """Choices per token: from the model's config, or from a router with as many experts; 2 if neither has it."""
    config = getattr(module, "config", None)
    for name in (*TOP_K_FIELDS, "top_k"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    for router in model.modules():
        if getattr(router, "num_experts", None) == experts and isinstance(value := getattr(router, "top_k", None), int):
            return value
    return min(2, experts)
