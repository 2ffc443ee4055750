# SPDX-License-Identifier: BSD-3-Clause
"""Replaces the forward of one module instance, and restores it.

A hook of Hugging Face's accelerate replaces `forward` too, and calls what it found, which it keeps in `_old_forward`.
Such hooks come and go before and after ours. So ours is put where a hook calls it, and taken from where it is by then.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn


def runs_own_forward(module: nn.Module) -> bool:
    """Whether the module runs the forward of its class, itself or below a hook."""
    forward = vars(module).get(_place(module))
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replaces the forward of a module that runs its own. Returns an undo function, which leaves those of others."""
    ours = types.MethodType(forward, module)
    setattr(module, _place(module), ours)

    def undo() -> None:
        if vars(module).get("forward") is ours:
            del module.forward
        elif vars(module).get(_place(module)) is ours:
            setattr(module, _place(module), types.MethodType(type(module).forward, module))

    return undo


def _place(module: nn.Module) -> str:
    return "_old_forward" if "_old_forward" in vars(module) else "forward"
