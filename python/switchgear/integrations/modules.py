# SPDX-License-Identifier: BSD-3-Clause
"""Modules of experts of transformers: what each is, how it runs now, and how it comes to run on switchgear.

`recognize(module)` gives one of two classes with the same questions: DecoratedExperts, which transformers dispatches by
a name in their config, and PatchedExperts, whose forward is replaced on the instance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from switchgear.adapters.sites import TARGETS, Site, refuse_wrapped
from switchgear.backends import warn_once
from switchgear.integrations.experts import ExpertWeights, find_unreadable, has_post_norm, is_of
from switchgear.integrations.forwards import Bypassed, is_swapped, replace_forward, runs_own_forward
from switchgear.integrations.gates import find_gate
from switchgear.integrations.undecorated import Patch, find_difference, find_patch
from switchgear.weights import Layout, stored_of, weights_of
from switchgear.weights.adapted import has_adapters
from switchgear.weights.selected import selection_of

NAME = "switchgear"
# What use_experts_implementation sets on a module and on its class.
MARKS = ("config", "is_transposed", "has_bias")
CLASS_MARK = "_apply_gate"
FP8_ADVICE = (
    "load FP8 checkpoints with switchgear.integrations.published.load_published(path), which keeps them in FP8, "
    'or with FineGrainedFP8Config(dequantize=True) and experts_implementation="switchgear"'
)


def recognize(module: nn.Module) -> DecoratedExperts | PatchedExperts | None:
    """What a module of experts is; None if switchgear does not know it."""
    if is_decorated(module):
        return DecoratedExperts(module)
    patch = find_patch(module)
    return None if patch is None else PatchedExperts(module, patch)


def is_decorated(module: nn.Module) -> bool:
    """Whether the module's class has transformers' decorator `use_experts_implementation`."""
    own = vars(module)  # getattr of a wrapper, as of torch.compile, answers for the module inside
    return all(mark in own for mark in MARKS) and hasattr(type(module), CLASS_MARK)


def weights_in(module: Any) -> ExpertWeights:
    """The weights of a decorated experts module, as the kernels take them."""
    first, second = names = _get_names(module)
    gate_up_proj, down_proj = weights_of(module, Layout(names, module.is_transposed, False))
    if not module.has_bias:
        return ExpertWeights(gate_up_proj, down_proj)
    return ExpertWeights(gate_up_proj, down_proj, getattr(module, f"{first}_bias"), getattr(module, f"{second}_bias"))


def _get_names(module: Any) -> tuple[str, str]:
    """The names of a decorated module's projections."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"


class DecoratedExperts:
    """Experts whose class has transformers' decorator: the name of their implementation is in their config."""

    def __init__(self, module: Any) -> None:
        self.module = module

    has_choice = True  # it belongs to an MoE block with a choice per token

    @property
    def is_fp8(self) -> bool:
        return is_of(self.module, "FP8Experts")

    @property
    def is_on_switchgear(self) -> bool:
        return bool(self.module.config._experts_implementation == NAME)

    def path(self) -> str:
        """How the module runs now, as `path_of` of transformers.py."""
        if self.is_fp8:
            return f"FP8 experts: {FP8_ADVICE}"
        if not self.is_on_switchgear:
            name = self.module.config._experts_implementation
            return f"not replaced: experts_implementation is {name!r}, call switchgear.accelerate(model)"
        if stored_of(self.module) is None:
            # FSDP, tensor and expert parallelism hold DTensors between forwards, and plain local tensors during one.
            local = (weight for weight in weights_in(self.module) if not hasattr(weight, "device_mesh"))
            if (reason := find_unreadable(local)) is not None:
                return f"eager: {reason}"
        return "grouped_gemm" if find_gate(self.module) is None or has_post_norm(self.module) else "moe"

    def dispatch(self, before: str | None) -> Callable[[], None]:
        """Lets transformers call switchgear. Returns an undo function, to the implementation `before`."""
        config = self.module.config
        config._experts_implementation_internal = NAME  # the public setter would also change sub-configs

        def undo() -> None:
            if before != NAME:
                config._experts_implementation_internal = before

        return undo

    def layout(self) -> Layout | None:
        """How `store` stores the projections; None if the fused kernel does not run them."""
        if self.path() != "moe":
            return None
        gate = find_gate(self.module)
        assert gate is not None
        return Layout(_get_names(self.module), self.module.is_transposed, gate.gated and not gate.interleaved)

    def hint(self) -> str:
        """Why there is no layout."""
        path = self.path()
        return f"{type(self.module).__name__} runs as {path}" if path == "grouped_gemm" else path

    def sites(self, path: str) -> list[Site]:
        """The projections that can have adapters. Raises ValueError if they cannot have any as they run now."""
        _check_path(path, self)
        module, stored = self.module, stored_of(self.module)
        layout = Layout(_get_names(module), module.is_transposed, False)
        weights: Any = stored.weights(module) if stored is not None else _view_plain(module, layout)
        return [
            Site(path, module, name, target, weight, module.is_transposed, (), module, refuse_other_implementation)
            for name, target, weight in zip(layout.names, TARGETS, weights, strict=True)
        ]

    def reads_borrowed(self, name: str) -> bool:
        """Whether a call of the module reads the factors that it borrows for its parameter `name`."""
        return name in _get_names(self.module) and self.path() in ("moe", "grouped_gemm")


def _view_plain(module: Any, layout: Layout) -> list[Tensor]:
    weights = [getattr(module, name) for name in layout.names]
    if (reason := find_unreadable(weights)) is not None:  # a DTensor, between forwards
        raise ValueError(f"model: expected experts with plain weights, got others: {reason}")
    return [weight.mT if layout.transposed else weight for weight in weights]


class PatchedExperts:
    """Experts, or a block of them, of a class in `undecorated.PATCHES`."""

    def __init__(self, module: nn.Module, patch: Patch) -> None:
        self.module, self.patch, self.has_choice = module, patch, patch.has_choice

    @property
    def is_on_switchgear(self) -> bool:
        return is_swapped(self.module)

    def path(self) -> str:
        if self.is_on_switchgear:
            reason = self.read()[1]
            return self.patch.path(self.module) if reason is None else f"eager: {reason}"
        if runs_own_forward(self.module):
            return "not replaced: call switchgear.accelerate(model)"
        return "not replaced: other code has replaced its forward"

    def read(self) -> tuple[Any, str | None]:
        """The weights, and why they cannot be used for now, or None."""
        try:
            weights = self.patch.weights(self.module)
        except Bypassed as error:
            return None, str(error)
        except NotImplementedError as error:  # a format of another library, without the views that are needed
            return None, f"its weights cannot be read ({error})"
        return weights, find_unreadable(weights)

    def swap(self, trial: bool = True) -> Callable[[], None] | None:
        """Replaces the module's forward and returns an undo function. Returns None, with a warning, if other code has
        replaced the forward, or if a trial disagrees with the class."""
        if self.is_on_switchgear:
            return lambda: None  # an earlier swap belongs to the caller that made it
        name = type(self.module).__name__
        if not runs_own_forward(self.module):
            warn_once(f"{name} is left alone, other code has replaced its forward")
            return None
        weights, reason = self.read() if trial else (None, "no trial")
        if reason is None and (difference := find_difference(self.module, self.patch, weights)) is not None:
            warn_once(f"{name} is left alone, it does not compute what switchgear expects: {difference}")
            return None
        return replace_forward(self.module, _build_forward(self.patch))

    def layout(self) -> Layout | None:
        return None  # no form is made for these classes

    def hint(self) -> str:
        path = self.path()
        if self.is_on_switchgear:
            return f"{type(self.module).__name__} runs as {path}, but its class has no stored layout"
        return path

    def sites(self, path: str) -> list[Site] | None:
        """The projections that can have adapters; None while the module runs its own forward. Raises ValueError if they
        cannot have any as they run now."""
        if not self.is_on_switchgear:
            return None
        _check_path(path, self)
        names = {id(part): name for name, part in self.module.named_modules(prefix=path)}
        sites = []
        for part in self.patch.sites(self.module):
            where = names[id(part.module)]
            refuse_wrapped(where, part.module)
            sites.append(replace(part, path=where, guarded=self.module, guard=refuse_other_implementation))
        return sites

    def reads_borrowed(self, name: str) -> bool:
        return name in self.patch.borrows and self.is_on_switchgear and not self.path().startswith("eager")


def _build_forward(patch: Patch) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weights, reason = PatchedExperts(self, patch).read()
        if reason is not None:
            refuse_bypass(self, reason)
            warn_once(f"{type(self).__name__} keeps its own implementation: {reason}")
            return type(self).forward(self, *args, **kwargs)
        return patch.forward(self, weights, *args, **kwargs)

    forward.switchgear_patch = patch  # type: ignore[attr-defined]
    return forward


def _check_path(path: str, experts: DecoratedExperts | PatchedExperts) -> None:
    refuse_wrapped(path, experts.module)
    if (how := experts.path()) not in ("moe", "grouped_gemm"):
        raise ValueError(f"{f'model.{path}' if path else 'model'}: expected experts that run on switchgear, got {how}")


# ---- calls that switchgear would not see -----------------------------------------------------------------------------


def refuse_other_implementation(module: Any, *_: Any) -> None:
    """Forward pre-hook of modules with adapters or experts that train alone, which only switchgear's forwards know."""
    experts = recognize(module)
    if experts is not None and not experts.is_on_switchgear:
        refuse_bypass(module, experts.path())


def refuse_bypass(module: nn.Module, reason: str) -> None:
    """Raises RuntimeError if the module, or a part of it, has adapters or experts that train alone, which its class's
    own forward would miss."""
    what = advice = None
    for part in module.modules():
        if has_adapters(part):
            what, advice = "adapters", "merge(model) or remove_lora(model) of switchgear.adapters"
        elif selection_of(part) is not None:
            what, advice = "experts that train alone", "switchgear.finetune.unfreeze(model)"
    if what is not None:
        raise RuntimeError(
            f"{type(module).__name__} has {what}, but does not run on switchgear ({reason}); "
            f"call switchgear.accelerate(model), or {advice}"
        )
