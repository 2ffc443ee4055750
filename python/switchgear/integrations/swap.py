# SPDX-License-Identifier: BSD-3-Clause
"""Replaces the forward of one module instance by an entry of `undecorated.PATCHES`, after a trial."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.backends import warn_once
from switchgear.integrations.bypass import refuse_bypass
from switchgear.integrations.experts import not_plain, tensors_of
from switchgear.integrations.forwards import replace_forward, runs_own_forward
from switchgear.integrations.parts import Bypassed, is_swap
from switchgear.integrations.undecorated import Patch, patch_of
from switchgear.utils.modes import evaluating

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def swap_forward(module: nn.Module, trial: bool = True) -> Callable[[], None] | None:
    """Swaps the forward and returns an undo function. Returns None, with a warning, if other code has replaced the
    forward, or if a trial disagrees with the class."""
    if is_swapped(module):
        return lambda: None  # an earlier swap belongs to the caller that made it
    patch = patch_of(module)
    assert patch is not None, f"{type(module).__name__} is not in the table"
    if not runs_own_forward(module):
        warn_once(f"{type(module).__name__} is left alone, other code has replaced its forward")
        return None
    if trial and (difference := _trial(module, patch)) is not None:
        warn_once(f"{type(module).__name__} is left alone, it does not compute what switchgear expects: {difference}")
        return None
    return replace_forward(module, _forward_of(patch))


def is_swapped(module: nn.Module) -> bool:
    """Whether the instance runs a forward from the table, itself or below a hook of Hugging Face's accelerate."""
    own = module.__dict__
    return is_swap(own.get("forward")) or is_swap(own.get("_old_forward"))


def obstacle(module: nn.Module, patch: Patch) -> str | None:
    """Why a swapped module runs its own implementation for now, or None."""
    return _read(module, patch)[1]


def _read(module: nn.Module, patch: Patch) -> tuple[Any, str | None]:
    """The weights, and why they cannot be used."""
    try:
        weights = patch.weights(module)
    except Bypassed as error:
        return None, str(error)
    except NotImplementedError as error:  # a format of another library, without the views that are needed
        return None, f"its weights cannot be read ({error})"
    return weights, not_plain(weights)


def _forward_of(patch: Patch) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weights, reason = _read(self, patch)
        if reason is not None:
            refuse_bypass(self, reason)
            warn_once(f"{type(self).__name__} keeps its own implementation: {reason}")
            return type(self).forward(self, *args, **kwargs)
        return patch.forward(self, weights, *args, **kwargs)

    forward.switchgear_patch = patch  # type: ignore[attr-defined]
    return forward


@torch.no_grad()
def _trial(module: nn.Module, patch: Patch) -> str | None:
    """Runs the class's forward and the patch on the same random rows. Returns how they differ."""
    weights, reason = _read(module, patch)
    if reason is not None:
        return None  # the class's own forward runs
    leaves = tensors_of(weights)
    if any(leaf.is_meta for leaf in leaves):
        return None  # nothing to compare yet
    arguments = patch.sample(module, torch.Generator().manual_seed(0))
    try:
        with _undisturbed(module):
            want = _result(type(module).forward(module, *arguments))
            got = _result(patch.forward(module, weights, *arguments))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if not bool(want.isfinite().all()):
        return None  # of such weights; nothing to compare
    # Tolerance: a few roundings to the storage dtype, and sums of `length` float32 products in another order (a random
    # walk of half ulps). A patch with another meaning differs by the size of the value itself.
    length = max(leaf.shape[-1] for leaf in leaves)
    relative = 16 * torch.finfo(want.dtype).eps + 4 * length**0.5 * torch.finfo(torch.float32).eps
    bound = relative * want.abs().max()
    difference = (got - want).abs().max()
    return None if difference <= bound else f"difference {difference:.1e} of {want.abs().max():.1e}"  # NaN differs


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Without dropout, and without hooks of parts, which belong to the model's own calls."""
    before = [(part, name, getattr(part, name)) for part in module.modules() for name in _HOOKS]
    try:
        for part, name, _ in before:
            setattr(part, name, OrderedDict())
        with evaluating(module):
            yield
    finally:
        for part, name, hooks in before:
            setattr(part, name, hooks)


def _result(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
