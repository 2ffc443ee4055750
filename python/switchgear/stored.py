# SPDX-License-Identifier: BSD-3-Clause
"""Experts whose weights are stored in another form than torch's, as bytes for the CPU's kernels: compact, in panels.

The parameters of the projections go, and buffers `<name>_<form>` come. State dicts hold, and take, the plain weights
under their own names. Where the kernels do not read the bytes (gradients, other devices), a call expands them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from switchgear.backends import in_autocast
from switchgear.compress.formats import QuantizedExperts, quantized_of
from switchgear.functional import _needs_autograd, moe
from switchgear.packing import Layout, layout_of


class StoredMatrix(Protocol):
    """A weight [E,N,C] as bytes, and what they do not show."""

    @property
    def data(self) -> Tensor: ...  # uint8, what the kernels read
    @property
    def rows(self) -> int: ...  # N
    @property
    def columns(self) -> int: ...  # C
    @property
    def dtype(self) -> torch.dtype: ...  # of the weight

    def weight(self) -> Tensor:
        """The weight itself."""

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the kernels read these bytes for an x of `dtype`."""

    def with_data(self, data: Tensor) -> StoredMatrix:
        """The same of other bytes."""


class Form(NamedTuple):
    """A way to store weights."""

    name: str  # of the buffers' ending
    noun: str  # for messages
    # (name, weight [E,N,C], whether its rows are halves) -> the weight in this form, or why it cannot be
    store: Callable[[str, Tensor, bool], StoredMatrix | str]


@dataclass(frozen=True)
class StoredExperts:
    """What became of a module's projections: parameters went, buffers `<name>_<form>` came."""

    form: Form
    layout: Layout
    kinds: tuple[StoredMatrix, StoredMatrix]  # without data
    trained: tuple[bool, bool]  # whether the parameters asked for gradients

    @property
    def names(self) -> tuple[str, str]:
        """The parameters that went."""
        return self.layout.names

    @property
    def transposed(self) -> bool:
        """Whether the parameters were [E,in,out]."""
        return self.layout.transposed

    def matrices(self, module: nn.Module) -> tuple[StoredMatrix, StoredMatrix]:
        """The two projections of `module`, [E,out,in]."""
        return self._matrix(module, 0), self._matrix(module, 1)

    def weights(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Both projections as they were, [E,out,in]."""
        first, second = self.matrices(module)
        return first.weight(), second.weight()

    def moe(self, module: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, **options: Any) -> Tensor:
        """switchgear.moe with the projections of `module`."""
        return stored_moe(x, *self.matrices(module), topk_ids, topk_weights, **options)

    def buffer(self, index: int) -> str:
        """The name of what holds projection 0 or 1."""
        return f"{self.names[index]}_{self.form.name}"

    def _matrix(self, module: nn.Module, index: int) -> StoredMatrix:
        return self.kinds[index].with_data(getattr(module, self.buffer(index)))


def stored_of(module: nn.Module) -> StoredExperts | None:
    """How a module stores its projections, None where they are no bytes."""
    return vars(module).get("_switchgear_stored")


def compressed_of(module: nn.Module) -> QuantizedExperts | StoredExperts | None:
    """What holds a module's projections in place of its parameters: QuantizedExperts, StoredExperts, or None."""
    return quantized_of(module) or stored_of(module)


def stored_moe(
    x: Tensor,
    gate_up_proj: StoredMatrix,
    down_proj: StoredMatrix,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """switchgear.moe, and its options, with stored weights of x's dtype.

    Inside torch.autocast x is cast to its dtype, as in moe. ValueError for an x of another H, which bytes do not show.
    """
    if x.shape[-1] != gate_up_proj.columns:
        raise ValueError(f"x: expected shape [..., {gate_up_proj.columns}], got {list(x.shape)}")
    dtype = x.dtype
    is_served = dtype is gate_up_proj.dtype
    if in_autocast(x.device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        is_served = True  # bytes may hold what weights would be cast to
    is_served = is_served and x.is_cpu and gate_up_proj.serves(dtype) and down_proj.serves(dtype)
    if is_served and not _needs_autograd(x, gate_up_bias, down_bias, topk_weights):
        first, second = gate_up_proj.data, down_proj.data
    else:
        first, second = gate_up_proj.weight(), down_proj.weight()
    return moe(x, first, second, topk_ids, topk_weights, gate_up_bias=gate_up_bias, down_bias=down_bias, **options)


def store(model: nn.Module, form: Form) -> int:
    """Puts the experts' projections of a model into a form. Returns how many experts modules are in it now.

    ValueError where none can be; the message says why those there are stay as they are.
    """
    reason = f"{type(model).__name__} has no experts that run on the fused kernel"
    found = 0
    for module in model.modules():
        if (state := stored_of(module)) is not None:
            found += state.form.name == form.name  # a copy of a module may have a copy of its form
            reason = f"{state.names[0]} is stored as {state.form.noun}"
        elif (layout := layout_of(module)) is not None:
            obstacle = _store_module(module, layout, form)
            found += obstacle is None
            reason = obstacle or reason
    if not found:
        raise ValueError(f"model: expected experts that can be stored as {form.noun}; {reason}")
    return found


def restore(model: nn.Module, form: Form) -> int:
    """Takes `store` back: the parameters are there again, bit for bit. Returns the number of modules it changed."""
    changed = 0
    for module in model.modules():
        state = stored_of(module)
        if state is None or state.form.name != form.name:
            continue
        for index, (weight, trained) in enumerate(zip(state.weights(module), state.trained, strict=True)):
            del module._buffers[state.buffer(index)]
            module._non_persistent_buffers_set.discard(state.buffer(index))
            weight = weight.mT.contiguous() if state.transposed else weight
            module.register_parameter(state.names[index], nn.Parameter(weight, requires_grad=trained))
        module._switchgear_stored = None  # type: ignore[assignment]
        changed += 1
    return changed


def _stored(form: Form, layout: Layout, index: int, name: str, weight: Tensor) -> StoredMatrix | str:
    return form.store(name, weight.mT if layout.transposed else weight, index == 0 and layout.split_gates)


def _store_module(module: nn.Module, layout: Layout, form: Form) -> str | None:
    """Puts a module's projections into a form, or says why not."""
    matrices, trained = [], []
    for index, name in enumerate(layout.names):
        weight = module._parameters.get(name)  # under a parametrization the attribute is none, but is made of one
        if type(weight) is not nn.Parameter:
            return f"{name} is {'computed' if weight is None else f'a {type(weight).__name__}'}, no plain parameter"
        if not weight.is_cpu:
            return f"{name} is on {weight.device}, and {form.noun} are for the CPU"
        matrix = _stored(form, layout, index, name, weight.detach())
        if isinstance(matrix, str):
            return matrix
        matrices.append(matrix)
        trained.append(weight.requires_grad)
    first, second = matrices
    if first.dtype is not second.dtype:
        return f"{layout.names[0]} is {first.dtype}, and {layout.names[1]} {second.dtype}"
    nothing = torch.empty(0, dtype=torch.uint8)
    state = StoredExperts(
        form=form,
        layout=layout,
        kinds=(first.with_data(nothing), second.with_data(nothing)),
        trained=(trained[0], trained[1]),
    )
    for index, matrix in enumerate(matrices):
        module.register_parameter(layout.names[index], None)
        module.register_buffer(state.buffer(index), matrix.data, persistent=False)
    if "_switchgear_stored" not in vars(module):  # the hooks do nothing while a module is plain
        hooked: Any = module
        hooked.register_state_dict_post_hook(_save_plain)
        hooked.register_load_state_dict_pre_hook(_load_plain)
    module._switchgear_stored = state  # type: ignore[assignment]
    return None


def _save_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if (state := stored_of(module)) is not None:
        for name, weight in zip(state.names, state.weights(module), strict=True):
            state_dict[prefix + name] = weight.mT.contiguous() if state.transposed else weight


def _load_plain(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str], *__: Any
) -> None:
    if (state := stored_of(module)) is None:
        return
    loaded: dict[int, StoredMatrix] = {}  # all of it, before anything changes
    for index, (name, now) in enumerate(zip(state.names, state.matrices(module), strict=True)):
        weight = state_dict.pop(prefix + name, None)
        if weight is None:
            if strict:
                missing.append(prefix + name)
            continue
        view = weight.mT if state.transposed else weight
        expected = [now.data.shape[0], now.rows, now.columns]
        if list(view.shape) != expected:
            shape = [expected[0], *reversed(expected[1:])] if state.transposed else expected
            raise ValueError(f"{prefix}{name}: expected shape {shape}, got {list(weight.shape)}")
        matrix = _stored(state.form, state.layout, index, name, weight.to(state.kinds[index].dtype))
        if isinstance(matrix, str):
            raise ValueError(f"{prefix}{name}: expected a weight that can be stored as {state.form.noun}; {matrix}")
        loaded[index] = matrix
    kinds = list(state.kinds)
    for index, matrix in loaded.items():
        setattr(module, state.buffer(index), matrix.data)
        kinds[index] = matrix.with_data(kinds[index].data)
    module._switchgear_stored = dataclasses.replace(state, kinds=(kinds[0], kinds[1]))  # type: ignore[assignment]
