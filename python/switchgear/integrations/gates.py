# SPDX-License-Identifier: BSD-3-Clause
"""Recognises a model's gate: the function between an expert's two projections.

A model class defines its gate in Python code. To map it to a kernel, we call it once on fixed numbers and compare the
result with every family that the kernels support:

    {concatenated, interleaved} x {silu, gelu, gelu_tanh, relu, relu2} x {plain, clamped at a limit}, and swiglu_oai

A gate that matches none (a softcap, a learnt activation, a random one) runs as the model defines it. So does one whose
activation has hooks or a replaced forward.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.experts import Experts
from switchgear.functional import glu
from switchgear.integrations.forwards import has_hooks
from switchgear.ops import GluOptions
from switchgear.reference.activations import ACTIVATIONS, glu_of, halves
from switchgear.utils.modules import constant_when_compiled, not_compiled

ACTIVATION_NAMES = ("act_fn", "activation", "activation_fn", "act")  # attributes that hold the activation
PLAIN_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "swiglu_oai")  # which need no alpha


def get_own_gate(module: Any) -> Callable[[Tensor], Tensor]:
    """The model's own gate: [rows, 2I] -> [rows, I], or [rows, I] -> [rows, I] for ungated experts."""
    if isinstance(module, Experts):
        options: dict[str, Any] = {name: getattr(module, name) for name in GluOptions._fields}
        return lambda h: glu(h, **options)
    is_gated = getattr(module, "has_gate", True)
    if is_gated and hasattr(module, "_apply_gate"):
        apply_gate: Callable[[Tensor], Tensor] = module._apply_gate
        return apply_gate
    activation: Any = None
    for name in ACTIVATION_NAMES:  # a loop, which compilers go through
        activation = getattr(module, name, None) if activation is None else activation
    if not is_gated:
        return activation  # type: ignore[no-any-return]

    def gated(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        product: Tensor = activation(gate) * up
        return product

    return gated


def find_gate(module: nn.Module) -> GluOptions | None:
    """The family that the module's gate belongs to, or None. Found at each call, since its parts may have changed.

    It depends on classes and values, never on which module it is: layers that are alike share one answer, and one graph
    of torch.compile. A gate that reads anything else, such as a parameter, is in no family.
    """
    if "_apply_gate" in module.__dict__:  # replaced
        return None
    own = type(module), getattr(type(module), "_apply_gate", None), _list_values(module)
    for name in ACTIVATION_NAMES:
        activation = module._modules.get(name)
        if activation is not None:
            if has_hooks(activation) or "forward" in activation.__dict__:
                return None
            return _find_family(own, name, (type(activation), type(activation).forward, _list_values(activation)))
    return _find_family(own)


if torch.__version__ < "2.13":  # whose compiler cannot go through the attributes of a module
    find_gate = not_compiled(find_gate)

_PLAIN = {int, float, bool, str, type(None)}
_FUNCTIONS = {types.FunctionType, types.BuiltinFunctionType}
_Values = tuple[tuple[Any, ...], ...]
_Known = tuple[type[nn.Module], Any, _Values]  # the class of a module, its function, and its values


def _list_values(module: nn.Module) -> _Values:
    """The attributes that are plain, and activations that are functions."""
    attributes = module.__dict__
    values: list[tuple[Any, ...]] = [(name, value) for name, value in attributes.items() if type(value) in _PLAIN]
    if torch.compiler.is_compiling():  # guards a float by its value only as an element of a set
        values = [(name, frozenset([value])) for name, value in values]
    for name in ACTIVATION_NAMES:
        if (function := attributes.get(name)) is None:
            continue
        if type(function) in _FUNCTIONS:
            values.append((name, function))
        elif type(function) is functools.partial and _is_plain(function):  # equal ones are not the same object
            values.append((name, function.func, function.args, frozenset(function.keywords.items())))
    return tuple(values)


def _is_plain(function: functools.partial[Any]) -> bool:
    bound = (*function.args, *function.keywords.values())
    return type(function.func) in _FUNCTIONS and all(type(value) in _PLAIN for value in bound)


@constant_when_compiled
def _find_family(own: _Known, name: str = "", activation: _Known | None = None) -> GluOptions | None:
    return _recognise_in_thread(own, name, activation)


@functools.lru_cache(maxsize=1024)  # classes that parametrisations make are kept no longer
def _recognise_in_thread(own: _Known, name: str, activation: _Known | None) -> GluOptions | None:
    # Fake tensors, tracing, autocast, grad mode and default devices are per thread; a new thread has none.
    with ThreadPoolExecutor(max_workers=1) as fresh:
        return fresh.submit(_recognise_alike, own, name, activation).result()


def _recognise_alike(own: _Known, name: str, activation: _Known | None) -> GluOptions | None:
    module = _build_alike(own)
    if activation is not None:
        setattr(module, name, _build_alike(activation))
    # Candidates for a limit or an alpha.
    numbers = [value for value in vars(module).values() if type(value) in (int, float) and 0 < value < float("inf")]
    try:
        return recognise(get_own_gate(module), gated=getattr(module, "has_gate", True), numbers=numbers)
    # A gate that reads more than values, or needs another dtype, device or width, is not one of ours.
    except (AttributeError, RuntimeError, TypeError):
        return None


def _build_alike(known: _Known) -> nn.Module:
    """A module of the same class with these values alone, and functions that depend on their arguments alone."""
    cls, _, values = known
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value, *bound in values:
        if isinstance(value, frozenset):
            (vars(module)[name],) = value
        elif not getattr(value, "__closure__", None):  # which may hold a parameter
            vars(module)[name] = functools.partial(value, *bound[0], **dict(bound[1])) if bound else value
    return module


@torch.no_grad()
def recognise(
    gate: Callable[[Tensor], Tensor], *, gated: bool = True, numbers: Iterable[float] = ()
) -> GluOptions | None:
    """Finds the family of `gate` by calling it once.

    Args:
        gate: [rows, 2I] -> [rows, I] where `gated`, else [rows, I] -> [rows, I].
        numbers: candidates for `limit` and `alpha`. A clamp at any other number is not recognised.
    """
    h = _build_probe()
    got = gate(h)
    for family in _list_families(gated, sorted({float(number) for number in numbers})):
        want, scale = _evaluate(family, h)
        # Gates may compute in float32, whose half ulp is 2^-24; a dozen roundings stay below 2^-20 of the scale.
        # The closest two families, gelu and gelu_tanh, are 2e-4 apart.
        if got.shape == want.shape and bool(((got - want).abs() <= 2.0**-20 * scale).all()):
            return family
    return None


def name_activation(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name of an activation, found by its values."""
    try:
        family = recognise(activation, gated=False)
    except Exception:  # a function of something else
        return None
    return None if family is None else family.activation


def _build_probe() -> Tensor:
    """[64, 128] float64, magnitudes 2^-8 to 2^17 of either sign: past float16's maximum, so any useful clamp acts."""
    generator = torch.Generator().manual_seed(0)
    exponent = torch.rand(64, 128, generator=generator, dtype=torch.float64) * 25 - 8
    sign = torch.randint(0, 2, (64, 128), generator=generator, dtype=torch.float64) * 2 - 1
    return sign * 2.0**exponent


def _list_families(gated: bool, numbers: list[float]) -> Iterator[GluOptions]:
    if not gated:
        yield from (GluOptions(activation, gated=False) for activation in PLAIN_ACTIVATIONS)
        return
    limits = [0.0, *numbers]
    for interleaved, limit in itertools.product((False, True), limits):
        yield from (GluOptions(activation, True, interleaved, limit=limit) for activation in PLAIN_ACTIVATIONS)
        yield from (GluOptions("swiglu_oai", True, interleaved, alpha, limit) for alpha in numbers)


def _evaluate(family: GluOptions, h: Tensor) -> tuple[Tensor, Tensor]:
    """The family's value on h, and the magnitude to which its rounding errors are relative."""
    a = glu_of(h, *family)
    gate, up = halves(h, family.interleaved) if family.gated else (h, h.new_zeros(()))
    if family.limit:
        gate, up = gate.clamp(max=family.limit), up.clamp(-family.limit, family.limit)
    return a, a.abs() + gate.abs() * (1 + up.abs())
