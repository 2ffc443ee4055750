# SPDX-License-Identifier: BSD-3-Clause
"""Stored projections of a module: buffers instead of parameters. Shared by all forms.

The buffers are <name>_data, <name>_scales, …, and are not in state dicts. Hooks save the keys of the form, and load
them or plain weights, which they encode. Floating-point scales are kept as bits of integers, so that module.to(dtype),
.half() and similar calls do not convert them.

Packed checkpoints have the tensors of the buffers, with the data as <name>: a module with plain weights refuses it for
its shape. They load, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from switchgear.backends import warn_once
from switchgear.reference.formats import FIELDS, TABLE
from switchgear.weights.adapted import adapted, has_adapters, notice_wrapper
from switchgear.weights.form import Form, KeyedForm, Layout, on_huge_pages
from switchgear.weights.state import get_state, hook_once, set_state
from switchgear.weights.weight import Weight

_FIELDS = ("data", *FIELDS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Kind(NamedTuple):
    """A Weight without its tensors."""

    format: str
    rows: int
    cols: int
    dtype: torch.dtype
    parts: int
    group_size: int
    elements: torch.dtype | None
    is_exact: bool
    fields: tuple[str, ...]  # of its tensors

    @staticmethod
    def of(weight: Weight) -> Kind:
        fields = tuple(field for field in _FIELDS if getattr(weight, field) is not None)
        return Kind._make((*(getattr(weight, option) for option in Kind._fields[:-1]), fields))

    def weight(self, tensors: Mapping[str, Any]) -> Weight:
        options: dict[str, Any] = dict(zip(self._fields[:-1], self, strict=False))
        return Weight(**options, **tensors)


class Absent:
    """What a stored module has in place of the parameter of a projection.

    Code that does not know stored weights reads the parameter: another experts implementation, an adapter library, an
    initialisation. With None there, it would fail with a message about NoneType. Any use of an Absent raises an
    AttributeError that says what to call.
    """

    def __init__(self, name: str, form: str, undo: str) -> None:
        self.name, self.form, self.undo = name, form, undo

    def __repr__(self) -> str:
        return f"<{self.name} is stored as {self.form}>"

    def _refuse(self, *_: Any) -> NoReturn:
        raise AttributeError(
            f"{self.name} is stored as {self.form}, which only switchgear reads: call {self.undo} before "
            "using its plain weight, as other experts implementations and adapter libraries do"
        )

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)  # copy and pickle look for optional methods
        self._refuse()

    __getitem__ = __len__ = __iter__ = __call__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))._refuse()


class AbsentMatrix(Absent):
    """The weight of a stored linear layer. Libraries that wrap the layer ask for its shape, dtype and device, and need
    no numbers. buffers: of the module."""

    ndim = 2
    requires_grad = False

    def __init__(self, name: str, form: Form, weight: Weight, buffers: dict[str, Tensor | None]) -> None:
        super().__init__(name, str(form), f"{form.undo}, or leave the layer out (skip=),")
        self.shape, self.dtype, self._buffers = torch.Size(weight.shape[1:]), weight.dtype, buffers

    @property
    def device(self) -> torch.device:
        buffer = self._buffers[f"{self.name}_data"]
        assert buffer is not None
        return buffer.device


class Tie:
    """Identifies an original parameter. Modules that shared the parameter have the same Tie. kept: the parameter, if
    `restore` is to return it."""

    def __init__(self, kept: nn.Parameter | None = None) -> None:
        self.kept = kept


@dataclass(frozen=True)
class Projection:
    """A stored projection."""

    kind: Kind
    trained: bool  # requires_grad of its parameter
    tie: Tie


class StoredProjections:
    """How a module's projections are stored."""

    def __init__(self, form: Form, layout: Layout, projections: tuple[Projection, ...]) -> None:
        self.form, self.layout, self.projections = form, layout, projections
        self._cached: tuple[list[tuple[str, Tensor]], tuple[Weight, ...]] | None = None

    @property
    def is_in_memory(self) -> bool:
        """Whether all experts are."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # copies have tensors of their own

    def weights(self, module: nn.Module) -> tuple[Weight, ...]:
        """The projections of `module`; rebuilt if its buffers were replaced."""
        cached, buffers, parameters = self._cached, module._buffers, module._parameters
        for name in self.layout.names:
            if parameters.get(name) is not None:  # as of torch.func.functional_call; it would be ignored
                raise ValueError(
                    f"{name}: expected none with weights stored as {self.form.name}, got a parameter; restore the "
                    "module first"
                )
        if cached is not None:
            for name, tensor in cached[0]:
                if buffers.get(name) is not tensor:
                    break
            else:
                return cached[1]
        held: list[tuple[str, Tensor]] = []
        weights = tuple(self._weight(module, index, held) for index in range(len(self.projections)))
        self._cached = held, weights
        return weights

    def _weight(self, module: nn.Module, index: int, held: list[tuple[str, Tensor]]) -> Weight:
        kind, tensors = self.projections[index].kind, {}
        for field, name in self._buffers(index):
            buffer = getattr(module, name)
            held.append((name, buffer))
            dtype = _float_of(kind.format, field)
            tensors[field] = buffer if dtype is None else _viewed(buffer, dtype)
        return kind.weight(tensors)

    def _buffers(self, index: int) -> Iterator[tuple[str, str]]:
        """(field, name of its buffer) of a projection."""
        name = self.layout.names[index]
        for field in self.projections[index].kind.fields:
            yield field, f"{name}_{field}"

    def put_into(self, module: nn.Module, weights: tuple[Weight, ...]) -> None:
        """Registers the buffers of `weights`."""
        for index, weight in enumerate(weights):
            for field, name in self._buffers(index):
                tensor = getattr(weight, field)
                dtype = _float_of(weight.format, field)
                held = tensor if dtype is None else _viewed(tensor, _BITS[dtype])
                module.register_buffer(name, held, persistent=False)

    def take_out_of(self, module: nn.Module) -> None:
        """Removes the buffers."""
        for index in range(len(self.projections)):
            for _, name in self._buffers(index):
                module._buffers.pop(name, None)
                module._non_persistent_buffers_set.discard(name)

    def freeze(self, module: nn.Module) -> None:
        """Lets `restore` return frozen parameters."""
        set_state(module, stored=StoredProjections(self.form, self.layout, self._frozen()))

    def _frozen(self) -> tuple[Projection, ...]:
        return tuple(replace(projection, trained=False) for projection in self.projections)

    def check_restore(self) -> None:
        """Raises ValueError if `restore` cannot give plain weights."""

    @property
    def is_rounded(self) -> bool:
        """Whether `restore` gives other weights than there were."""
        return any(not one.kind.is_exact and one.tie.kept is None for one in self.projections)

    def saved(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The module's entries of a state dict."""
        for name, weight in zip(self.layout.names, self.weights(module), strict=True):
            if isinstance(self.form, KeyedForm):
                for suffix, tensor in self.form.save(weight).items():
                    yield f"{name}{suffix}", tensor
            else:
                yield name, in_layout(weight.plain(), self.layout)

    def packed(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The module's entries of a packed checkpoint."""
        for name, projection, weight in zip(self.layout.names, self.projections, self.weights(module), strict=True):
            for field, key in packed_keys(name, projection.kind):
                yield key, getattr(weight, field)

    @torch.inference_mode(False)  # a backward pass may save the weights
    def load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, missing: list[str]) -> None:
        """Takes the weights out of a state dict, whose keys of this module start with `prefix`."""
        now = self.weights(module)
        loaded = []  # all, before anything changes
        plain: list[tuple[nn.Parameter, Tensor]] = []
        for index, name in enumerate(self.layout.names):
            given = state_dict.get(f"{prefix}{name}")
            weight = _loaded(self, index, now[index], state_dict, f"{prefix}{name}", missing)
            loaded.append(now[index] if weight is None else weight)
            if weight is not None and (kept := self.projections[index].tie.kept) is not None:
                is_plain = given is not None and _is_encoded_by(self.form, given)
                plain.append((kept, given if is_plain else in_layout(weight.plain(), self.layout)))  # type: ignore[arg-type]
        weights = tuple(_in_memory_of(old, weight) for old, weight in zip(now, loaded, strict=True))
        kinds = zip(self.projections, weights, strict=True)
        changed = StoredProjections(
            self.form, self.layout, tuple(replace(one, kind=Kind.of(weight)) for one, weight in kinds)
        )
        self.take_out_of(module)
        changed.put_into(module, weights)
        set_state(module, stored=changed)
        for parameter, tensor in plain:
            parameter.detach().copy_(tensor)

    def check_load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Raises ValueError if `load` would. Plain weights are not encoded for that."""
        for index, (name, now) in enumerate(zip(self.layout.names, self.weights(module), strict=True)):
            key = f"{prefix}{name}"
            plain = state_dict.get(key)
            if plain is not None and _is_encoded_by(self.form, plain):
                self.form.check_values(key, _plain(self, index, now, plain, key), self.layout.parts(index))
            else:
                _loaded(self, index, now, dict(state_dict), key, [])


def packed_keys(name: str, kind: Kind) -> Iterator[tuple[str, str]]:
    """(field, its key in a packed checkpoint) of a weight."""
    for field in kind.fields:
        yield field, name if field == "data" else f"{name}_{field}"


_BITS = {torch.float32: torch.int32, torch.float16: torch.int16}


def _float_of(format: str, field: str) -> torch.dtype | None:
    """The dtype of floating-point scales; None for other tensors."""
    if field == "row_scales":
        return torch.float32
    scales = TABLE[format].scales if field == "scales" else None
    return scales if scales is not None and scales.is_floating_point else None


def _viewed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # there, unlike other views, it would be a tensor that autograd does not save
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return _untraced(tensor.view, dtype)
        return tensor.view(dtype)


def _untraced(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), which a graph of torch.jit.trace has as a constant: it knows no views of another dtype."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return function(*args)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def stored_of(module: nn.Module) -> StoredProjections | None:
    """How a module stores its projections; None if they are parameters."""
    stored: StoredProjections | None = get_state(module).stored
    return stored


def matrix_of(module: nn.Module) -> Tensor | Weight:
    """The weight of a linear layer for `linear`: the parameter [N,C], or the Weight [1,N,C] of a stored one."""
    stored = stored_of(module)
    return attribute(module, "weight") if stored is None else stored.weights(module)[0]


def freeze_stored(module: nn.Module) -> None:
    """Lets `restore` return frozen parameters."""
    if (stored := stored_of(module)) is not None:
        stored.freeze(module)


def attribute(module: nn.Module, name: str) -> Any:
    """getattr(module, name). Finds a parameter at once, where nn.Module searches for a third of a microsecond."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def weights_of(module: nn.Module, layout: Layout) -> tuple[Any, Any]:
    """The two projections [E,out,in] for `moe`: tensors if they are parameters, else Weights; with their adapters, if
    any. `layout` is that of the module's parameters."""
    state = get_state(module)
    stored, adapters = state.stored, state.adapters or state.borrowed
    first: Any
    second: Any
    if stored is not None:
        first, second = stored.weights(module)
        if module.training and not adapters and torch.is_grad_enabled():
            _warn_of_training(module, stored)
    else:  # each attribute is read once: under a parametrization every access recomputes the weight
        first, second = attribute(module, layout.names[0]), attribute(module, layout.names[1])
        if layout.transposed:
            first, second = _transposed(first), _transposed(second)
        if state.selection is not None:
            first, second = state.selection.around(module, layout, first, second)
    if not adapters:
        notice_wrapper(module)
        return first, second
    names, transposed = layout.names, layout.transposed
    return (
        adapted(module, names[0], first, transposed=transposed),
        adapted(module, names[1], second, transposed=transposed),
    )


def _transposed(weight: Tensor) -> Tensor:
    try:
        return weight.mT
    except NotImplementedError:  # formats of other libraries, which the caller refuses by their type
        return weight


def _warn_of_training(module: nn.Module, stored: StoredProjections) -> None:
    """Once per class and form, if parameters that were trained became buffers."""
    if torch.compiler.is_compiling() or not any(projection.trained for projection in stored.projections):
        return
    warn_once(
        f"{type(module).__name__} is in training mode, but its experts are stored as {stored.form} and do not train; "
        f"call {stored.form.undo} to train them, model.eval() for inference, or requires_grad_(False) on them "
        "before storing if only the rest trains",
        stacklevel=3,
    )


# ---- from parameters to buffers and back -----------------------------------------------------------------------------


def put(module: nn.Module, stored: StoredProjections, weights: tuple[Weight, ...]) -> None:
    """Replaces the parameters of a module by `weights`."""
    form, stored_class = stored.form, stored.layout.stored_class
    for index, name in enumerate(stored.layout.names):
        module.register_parameter(name, None)
        if stored_class is None:
            absent = Absent(name, str(form), form.undo)
        else:
            absent = AbsentMatrix(name, form, weights[index], module._buffers)
        vars(module)[name] = absent  # found before the None in module._parameters
    if stored_class is not None:
        module.__class__ = stored_class
    stored.put_into(module, weights)
    hook_once(module, "stored", _register_hooks)
    set_state(module, stored=stored)


def _register_hooks(module: Any) -> None:
    module.register_state_dict_post_hook(_save)
    module.register_load_state_dict_pre_hook(_load)


def take_back(module: nn.Module, stored: StoredProjections, parameters: list[nn.Parameter]) -> None:
    """Undoes `put`, even one that failed halfway: registers `parameters` again."""
    stored.take_out_of(module)
    if stored.layout.stored_class is not None:
        module.__class__ = stored.layout.stored_class.__base__  # type: ignore[assignment]
    for name, parameter in zip(stored.layout.names, parameters, strict=True):
        vars(module).pop(name, None)
        module.register_parameter(name, parameter)
    set_state(module, stored=None)


def in_layout(weight: Tensor, layout: Layout) -> Tensor:
    """Converts a plain weight [E,out,in] to the layout of the module's parameter, contiguous."""
    return layout.view_back(weight).contiguous() if layout.transposed else layout.view_back(weight)


# ---- for code that reads the parameters itself ----------------------------------------------------------------------


def check_plain(name: str, experts: nn.Module, *, are_replaced: bool = False) -> None:
    """Raises ValueError, which names the module, for weights in another form, adapters that are not merged, and experts
    that train alone. are_replaced: also for merged adapters, which would belong to weights that are gone."""
    for where, module in _named(name, experts):
        _check_adapters(where, module)
        if (stored := stored_of(module)) is not None:
            raise ValueError(f"{where}: expected plain weights, got {stored.form}; {stored.form.remedy}")
        if get_state(module).selection is not None:
            raise ValueError(f"{where}: expected no experts that train alone; call finetune.unfreeze(model) first")
    if are_replaced:
        _check_merged(name, experts)


def check_state_dict(name: str, model: nn.Module) -> None:
    """As check_plain of experts that are replaced, for code that reads the state dict, where lossless forms are plain,
    and experts that train alone are among the others."""
    for where, module in _named(name, model):
        _check_adapters(where, module)
        stored = stored_of(module)
        if stored is not None and stored.form.suffixes:
            raise ValueError(f"{where}: expected plain weights, got {stored.form}; {stored.form.remedy}")
    _check_merged(name, model)


def _named(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in module.named_modules():
        yield f"{name}.{path}" if path else name, part


def _check_adapters(where: str, module: nn.Module) -> None:
    if where.rpartition(".")[2] == "base_layer":
        raise ValueError(
            f"{where}: expected a module without adapters around it; merge and unload them first, "
            "model.merge_and_unload()"
        )
    if has_adapters(module):
        raise ValueError(f"{where}: expected experts without adapters; merge them first")


def _check_merged(name: str, experts: nn.Module) -> None:
    if any(get_state(module).adapters for module in experts.modules()):
        raise ValueError(
            f"{name}: expected experts without adapters, got merged ones; call merge(model, keep_adapters=False)"
        )


# ---- state dicts -----------------------------------------------------------------------------------------------------


_packs: ContextVar[bool] = ContextVar("packs", default=False)


@contextmanager
def packing() -> Iterator[None]:
    """Within the block state dicts have the entries of packed checkpoints."""
    token = _packs.set(True)
    try:
        yield
    finally:
        _packs.reset(token)


def is_packing() -> bool:
    return _packs.get()


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if (stored := stored_of(module)) is not None:
        entries = stored.packed(module) if is_packing() else stored.saved(module)
        state_dict.update((prefix + name, tensor) for name, tensor in entries)


def _load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str], *__: Any
) -> None:
    if (stored := stored_of(module)) is not None:
        stored.load(module, state_dict, prefix, missing if strict else [])


def explain_stored_keys(names: Sequence[str], prefix: str, unexpected: Sequence[str]) -> str | None:
    """What to do if the keys that a module with plain weights does not know are of stored ones, such as
    gate_up_proj_values. Biases and adapters have such keys, too."""
    starts = tuple(f"{prefix}{name}_" for name in names)
    others = ("_bias", "_lora_A", "_lora_B")
    found = [key for key in unexpected if key.startswith(starts) and not key.endswith(others)]
    if not found:
        return None
    return (
        f"{prefix}{names[0]}: expected a plain weight, got a state dict of stored ones ({', '.join(found)}); call "
        "switchgear.store(model, …) as for the model that was saved, then load_state_dict"
    )


def check_before_load(model: nn.Module) -> None:
    """From now on load_state_dict of a model, or of a module in it, changes nothing if a stored module refuses its
    weights."""
    modules = dict(model.named_modules(remove_duplicate=False))
    hook_once(model, "checks", lambda hooked: hooked.register_load_state_dict_pre_hook(_check))
    for name, module in modules.items():
        if stored_of(module) is not None:
            while name := name.rpartition(".")[0]:
                hook_once(
                    modules[name], "checks", lambda hooked: hooked.register_load_state_dict_pre_hook(_check_alone)
                )


def _check(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, inner in module.named_modules(remove_duplicate=False):
        if name and (stored := stored_of(inner)) is not None:  # the module itself loads as a whole or not
            stored.check_load(inner, state_dict, f"{prefix}{name}.")


def _check_alone(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if not prefix:  # else the model around it has been checked
        _check(module, state_dict, prefix)


def _loaded(
    stored: StoredProjections, index: int, now: Weight, state_dict: dict[str, Any], key: str, missing: list[str]
) -> Weight | None:
    """The state dict's weight under `key`, or None; removes its keys from the state dict."""
    form = stored.form
    plain = state_dict.get(key)
    if plain is not None and _is_encoded_by(form, plain):
        weight = form.encode(key, _plain(stored, index, now, plain, key), stored.layout.parts(index))
        del state_dict[key]
        if isinstance(weight, str):
            raise ValueError(f"{key}: expected a weight that can be stored as {form}; {weight}")
        return weight
    if plain is not None and not plain.is_floating_point():
        return _unpacked(now, state_dict, key, missing)
    if not isinstance(form, KeyedForm):
        missing.append(key)
        return None
    present = {suffix: state_dict.pop(key + suffix) for suffix in form.suffixes if key + suffix in state_dict}
    if len(present) < len(form.suffixes):
        missing.extend(key + suffix for suffix in form.suffixes if suffix not in present)
        return None
    try:
        return form.read(present, now)
    except ValueError as error:
        raise ValueError(f"{key}{error}") from None


def _unpacked(now: Weight, state_dict: dict[str, Any], key: str, missing: list[str]) -> Weight | None:
    """The weight of a packed checkpoint, which replaces `now`, or None; removes its keys from the state dict."""
    found = {}
    for field, name in packed_keys(key, Kind.of(now)):
        like, got = getattr(now, field), state_dict.pop(name, None)
        if got is None:
            missing.append(name)
        elif got.shape != like.shape or got.dtype is not like.dtype:
            raise ValueError(f"{name}: expected {like.dtype} {list(like.shape)}, got {got.dtype} {list(got.shape)}")
        else:
            found[field] = on_huge_pages(got.to(now.device))
    return now.with_tensors(found) if len(found) == len(now.tensors) else None


def _is_encoded_by(form: Form, tensor: Tensor) -> bool:
    """Whether a tensor of a state dict is a plain weight. The key of an fp8 weight, and of packed data, has no suffix
    either."""
    return tensor.is_floating_point() and not ("" in form.suffixes and tensor.dtype is torch.float8_e4m3fn)


def _plain(stored: StoredProjections, index: int, now: Weight, plain: Tensor, key: str) -> Tensor:
    """A plain weight of a state dict as [E,N,C], with the dtype and on the device of `now`, which it replaces."""
    if plain.dtype not in FLOATS:
        raise ValueError(f"{key}: expected a floating dtype of at least 16 bits, got {plain.dtype}")
    expected = stored.layout.view_back(torch.empty(now.shape, device="meta")).shape
    if plain.shape != expected:
        raise ValueError(f"{key}: expected shape {list(expected)}, got {list(plain.shape)}")
    return stored.layout.view(plain).detach().to(now.device, now.dtype)


def _in_memory_of(old: Weight, weight: Weight) -> Weight:
    """`weight` in the memory of `old`, as parameters are loaded: modules that share it still share it. One of another
    size, such as compact rows with longer headers, stays where it is."""
    pairs = list(zip(weight.tensors, old.tensors, strict=False))
    if Kind.of(weight)._replace(is_exact=old.is_exact) != Kind.of(old):
        return weight
    for new, held in pairs:  # which can be overwritten: in any mode, and without elements that lie on others
        if new.shape != held.shape or not held.is_contiguous() or held.is_inference():
            return weight
    for new, held in pairs:
        held.copy_(new)
    return replace(old, is_exact=weight.is_exact)
