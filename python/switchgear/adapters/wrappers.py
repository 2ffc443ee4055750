# SPDX-License-Identifier: BSD-3-Clause
"""Wrappers of PEFT around experts (LoraConfig(target_parameters=[…])): their factors go to the kernels.

PEFT's ParamWrapper computes W + scale · B·A for each call and puts it in place of the parameter. A module that runs on
switchgear borrows A and B instead, as views. So nothing of the size of W is
allocated, and W may be stored in any form. All else stays with PEFT: which adapters are active, disabled or merged, its
state dict, its errors. While PEFT looks for parameters to adapt, it sees those of stored experts, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.experts import Experts
from switchgear.utils.modules import extend_once
from switchgear.weights import stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.state import Factors, extend, find, get_state, set_state

_PLAIN = (Tensor, nn.Parameter)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is a ParamWrapper of PEFT. PEFT is not imported for it."""
    return type(module).__name__ == "ParamWrapper" and type(module).__module__.startswith("peft.")


def register() -> None:
    """If PEFT is imported, from now on it finds stored experts and refuses adapters of add_lora, and its wrappers lend
    their factors. Idempotent."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    layer = sys.modules.get("peft.tuners.lora.layer")
    extend_once(getattr(tuners, "BaseTuner", None), "inject_adapter", _extend_inject_adapter)
    extend_once(getattr(tuners, "BaseTuner", None), "_inject_parameters", _extend_inject_parameters)
    extend_once(getattr(layer, "ParamWrapper", None), "_activate_lora", _extend_activate_lora)


def _extend_inject_adapter(original: Any) -> Any:
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _refuse_own(model)
        return original(self, model, *args, **kwargs)

    return inject_adapter


def _refuse_own(model: nn.Module) -> None:
    """Raises ValueError if PEFT would adapt a model for the first time, and freeze adapters that it has."""
    layers = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
    if any(isinstance(module, layers) for module in model.modules()):
        return
    for path, module in model.named_modules():
        for name in adapters_of(module):
            raise ValueError(
                "model: expected no adapters of add_lora or load_peft, got those of "
                f"{f'{path}.{name}' if path else name}, which PEFT would freeze, not save and not disable; call "
                "remove_lora(model) first, and adapt experts with target_parameters=[…] of PEFT's config, or with "
                "add_lora after PEFT"
            )


def _extend_inject_parameters(original: Any) -> Any:
    def inject_parameters(self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _shown_as_parameters(model):
            return original(self, peft_config, model, *args, **kwargs)

    return inject_parameters


@contextmanager
def _shown_as_parameters(model: nn.Module) -> Iterator[None]:
    """Within the block stored projections appear as parameters, so that other code finds their names, shapes, dtypes
    and devices. Each takes the memory of one element."""
    shown = []
    for module in model.modules():
        if (stored := stored_of(module)) is not None and stored.layout.stored_class is None:  # experts
            for name, weight in zip(stored.layout.names, stored.weights(module), strict=True):
                one = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
                parameter = nn.Parameter(one.mT if stored.layout.transposed else one, requires_grad=False)
                shown.append((module, name, parameter, vars(module)[name]))
    for module, name, parameter, _ in shown:
        del vars(module)[name]
        module._parameters[name] = parameter
    try:
        yield
    finally:
        for module, name, _, absent in shown:
            module._parameters[name] = None
            vars(module)[name] = absent


def _extend_activate_lora(original: Any) -> Any:
    @contextmanager
    def activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        base = self.get_base_layer()
        factors = _read_factors(self, active_adapters)
        if not factors or find("reader", base, self.parameter_name) is None:
            with original(self, active_adapters):
                yield
            return
        set_state(base, borrowed={**get_state(base).borrowed, self.parameter_name: factors})
        try:
            yield
        finally:
            borrowed = get_state(base).borrowed
            set_state(base, borrowed={name: borrowed[name] for name in borrowed if name != self.parameter_name})

    return activate_lora


def lend_factors(wrapper: Any) -> list[Factors] | None:
    """What a wrapper would apply in a call now; None if the kernels cannot read it. A merge of disabled adapters is
    undone, as in ParamWrapper.forward."""
    if wrapper.disable_adapters and wrapper.merged:
        wrapper.unmerge()
    if wrapper.disable_adapters or wrapper.merged:
        return []
    return _read_factors(wrapper, wrapper.active_adapters)


def _read_factors(wrapper: Any, active_adapters: Sequence[str]) -> list[Factors] | None:
    """The factors of the active adapters, or None if the kernels cannot read some."""
    base, dims = wrapper.get_base_layer(), 3
    if stored_of(base) is None:
        parameter = getattr(base, wrapper.parameter_name)
        if type(parameter) not in _PLAIN:  # a DTensor has fewer experts here than the factors
            return None
        dims = parameter.dim()
    found = []
    for adapter in active_adapters:
        if adapter not in wrapper.lora_A:
            continue
        a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        if type(a) not in _PLAIN or type(b) not in _PLAIN:
            return None
        # Whether PEFT takes the parameter for [E,out,in]; before 0.19 it always took it for [E,in,out].
        is_swapped = bool(getattr(wrapper, "_did_swap_in_out_features", False))
        left_right = arrange_factors(a, b, wrapper.num_experts, dims, is_swapped)
        if left_right is None:
            return None
        found.append(Factors(*left_right, wrapper.scaling[adapter]))
    return found


def arrange_factors(a: Tensor, b: Tensor, num_experts: int, dims: int, swapped: bool) -> tuple[Tensor, Tensor] | None:
    """Factors (left, right) of the parameter, as views, from PEFT's A [E·r,in] (experts one below the other) and
    B [out,r·E] (the expert fastest). None for a combination that PEFT cannot compute itself.

    swapped: the parameter has [E,out,in]; otherwise [E,in,out]. dims: 2 for a parameter without experts, [out,in].
    """
    if dims == 2:
        return b, a
    if num_experts == 1 and not swapped:
        return None
    a = a.view(num_experts, -1, a.shape[1])
    b = b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)
    return (b, a) if swapped else (a.mT, b.mT)


extend("reader", lambda module, name: (isinstance(module, Experts) and name in module._layout.names) or None)
extend("wrapper", register)  # PEFT may be imported later than switchgear
